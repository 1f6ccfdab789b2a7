"""How this process keeps the memory that it frees."""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h, for mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_PAD = 64 << 20


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
