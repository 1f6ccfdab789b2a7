"""How this process keeps the memory that it frees, and what it says where there is too little."""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h, for mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_PAD = 64 << 20
# What torch's allocator of CPUs, and DALI's of either, say where there is none; torch's of GPUs has a class of its own.
_EXHAUSTED = ("can't allocate memory", "Can't allocate", "CUDA allocation failed", "std::bad_alloc")


def keep_freed() -> bool:
    """Let malloc keep what is freed, for the whole process; returns whether it can be told to (glibc can).

    A training step on a CPU frees and takes the same gigabytes again. glibc returns blocks of 32 MiB and more to the
    kernel at once, and whatever is free at the heap's top, so that each step faults all its pages in anew: a million
    faults a step for ResNet-50 in fp32 at batch 32, without which it takes 0.77 of the time
    (benchmarks/README.md). The price is a heap that does not shrink, of 1.19 times the memory there.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    options = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, _PAD))
    return mallopt is not None and all([mallopt(key, value) for key, value in options])


def ran_out(error: BaseException) -> bool:
    """Whether `error` is that there was not enough memory, of this machine or of a GPU."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or any(text in str(error) for text in _EXHAUSTED)


def advice(error: BaseException, rank: int) -> str:
    """One line for what `ran_out`: who, what, and what to do."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    said = next((line for line in lines if any(text in line for text in _EXHAUSTED)), lines[0])
    said = ". ".join(said.split(". ")[:3]).rstrip(".")
    return (
        f"rank {rank} has run out of memory ({said}): lower max_batch_per_gpu, whose forward batches are then "
        "accumulated to the same global_batch_size, or data.image_size"
    )
