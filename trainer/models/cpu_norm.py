"""BatchNorm on a CPU that does the addition and the ReLU after it in the same pass, forward and backward.

torch's own backward pass of BatchNorm takes three times as long as its forward pass, and the ReLU and the sum are
passes of their own: for ResNet-50 in fp32 a third of a step (benchmarks/README.md). The kernels are C (cpu_norm.c),
compiled once a machine by the C compiler that is there; without one, torch's are used.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer import environment
from trainer.models.fused_norm import FusedBatchNorm2d, replace

SOURCE = Path(__file__).with_name("cpu_norm.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno")
GRAIN = 32768  # values that are worth a thread, as torch finds
TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16"}


class CpuBatchNorm2d(FusedBatchNorm2d):
    """The fused norm of the kernels in C."""

    types = frozenset(TYPES)

    def _normed(self, x: Tensor, shortcut: Tensor | None, *, relu: bool) -> Tensor:
        return _Norm.apply(x, shortcut, self.weight, self.bias, self, relu)


class _Norm(torch.autograd.Function):
    """In training; the running statistics of `norm` move in the forward pass."""

    @staticmethod
    def forward(
        ctx, x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, norm: CpuBatchNorm2d, relu: bool
    ) -> Tensor:
        rows, channels = x.numel() // x.shape[1], x.shape[1]
        mean, variance = torch.empty(2, channels)
        _call("moments", x, mean, variance, _scratch(rows, channels), rows, channels)
        _remember(norm, mean, variance * (rows / (rows - 1)))
        invstd = torch.rsqrt(variance + norm.eps)
        scale = weight * invstd
        shift = bias - mean * scale
        y = torch.empty_like(x)
        _call("normalise", x, shortcut, y, scale, shift, rows, channels, int(relu))
        if shortcut is not None:  # whether the ReLU let a value through only y tells
            ctx.save_for_backward(x, y, mean, invstd, weight, None, None)
        else:  # x is read anyway
            ctx.save_for_backward(x, None, mean, invstd, weight, *((scale, shift) if relu else (None, None)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, mean, invstd, weight, scale, shift = ctx.saved_tensors
        rows, channels = x.numel() // x.shape[1], x.shape[1]
        dy = dy.contiguous(memory_format=torch.channels_last)
        passed = torch.empty_like(x) if y is not None else None
        sums = torch.empty(2, channels)
        given = dy, x, y, scale, shift, mean, passed, sums
        _call("gradient_sums", *given, _scratch(rows, channels), rows, channels)
        dbias, dweight = sums[0], sums[1] * invstd
        a = weight * invstd
        b = -a * invstd * dweight / rows
        d = -a * dbias / rows - b * mean
        dx = torch.empty_like(x)
        _call("gradient", dy if passed is None else passed, x, scale, shift, dx, a, b, d, rows, channels)
        return dx, passed, dweight, dbias, None, None


def fuse(model: nn.Module) -> bool:
    """Make, in place, every plain BatchNorm2d of `model` a CpuBatchNorm2d; False where no kernels can be had."""
    if _library() is None:
        return False
    replace(model, CpuBatchNorm2d)
    return True


@torch.no_grad()
def _remember(norm: CpuBatchNorm2d, mean: Tensor, unbiased: Tensor) -> None:
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)


def _scratch(rows: int, channels: int) -> Tensor:
    return torch.empty(2, _library().slabs(rows, channels), channels)


def _call(name: str, *arguments: Tensor | int | None) -> None:
    """Call a kernel of the first tensor's type: pointers and sizes, and as many of torch's threads as are worth it."""
    kernel = getattr(_library(), f"{name}_{TYPES[arguments[0].dtype]}")
    words = []
    for word in arguments:
        if isinstance(word, int):
            words.append(ctypes.c_int64(word))
        else:
            words.append(ctypes.c_void_p(None if word is None else word.data_ptr()))
    threads = min(torch.get_num_threads(), arguments[0].numel() // GRAIN)
    kernel(*words, ctypes.c_int(max(1, threads)))


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The kernels, compiled if this machine has not done so before; None where there is no compiler that can."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    try:
        path = environment.cache("kernels") / f"cpu_norm-{_fingerprint(compiler)}.so"
        if not path.exists():
            _compile(compiler, path)
        # OpenMP's functions are torch's own: a second pool of threads would fight with it for the cores.
        library = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: the user has no home
        return None
    library.slabs.restype = ctypes.c_int64
    library.slabs.argtypes = (ctypes.c_int64, ctypes.c_int64)
    return library


def _compile(compiler: str, path: Path) -> None:
    """Compile to `path`, which other processes may do at the same time; OSError or SubprocessError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, linked = Path(folder) / "cpu_norm.o", Path(folder) / "cpu_norm.so"
        # Linked without -fopenmp, which would name an OpenMP of the compiler's own.
        for command in (
            [compiler, *FLAGS, "-c", SOURCE, "-o", compiled],
            [compiler, "-shared", compiled, "-o", linked],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        os.replace(linked, path)


def _fingerprint(compiler: str) -> str:
    """Of all that the compiled file depends on: a home folder may serve machines of several kinds."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=30).stdout
    kind = environment.processor()
    words = [*FLAGS, platform.machine(), *(kind.get(key, "") for key in ("model name", "flags", "Features"))]
    return hashlib.sha256(b"\0".join([SOURCE.read_bytes(), version, *(w.encode() for w in words)])).hexdigest()[:16]
