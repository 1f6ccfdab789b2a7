"""BatchNorm on a GPU that does the addition and the ReLU after it in the same pass, forward and backward.

The limit of a GPU is its memory. A ReLU and a sum of their own are reads and writes of whole activations, and torch
keeps the output of each ReLU for the backward pass; here one bit a value is kept, and the input, which the convolution
before has written anyway. The kernels are Triton's (gpu_kernels.py), which comes with torch for CUDA.

Written for H100-class GPUs; not measured on a GPU. precision.fused=true asks for it.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.models.fused_norm import FusedBatchNorm2d, replace

TILE_ROWS, TILE_CHANNELS = 64, 64  # of a reduction: 128 bytes of bf16 a row
BLOCK = 2048  # elements that a program of the other kernels takes
SLABS = 1024  # at most: one program adds up those of a channel
PROGRAMS_AN_SM = 4  # of a reduction, so that enough loads are under way


class GpuBatchNorm2d(FusedBatchNorm2d):
    """The fused norm of Triton's kernels."""

    types = frozenset({torch.float32, torch.bfloat16, torch.float16})

    def _normed(self, x: Tensor, shortcut: Tensor | None, *, relu: bool) -> Tensor:
        return _Norm.apply(x, shortcut, self.weight, self.bias, self, relu)


class _Norm(torch.autograd.Function):
    """In training; the running statistics of `norm` move in the forward pass. No call waits for the device."""

    @staticmethod
    def forward(
        ctx, x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, norm: GpuBatchNorm2d, relu: bool
    ) -> Tensor:
        cut = _Cut(x)
        partial, mean, invstd = cut.partial(), cut.vector(), cut.vector()
        running = norm.running_mean, norm.running_var, norm.num_batches_tracked
        unbias = cut.rows / (cut.rows - 1)
        sizes = cut.rows, cut.slab, cut.slabs
        cut.reduce("moments", x, partial, *sizes)
        cut.combine("statistics", partial, mean, invstd, *running, *sizes, norm.momentum, norm.eps, unbias)
        y = torch.empty_like(x)
        bits = torch.empty(-(-x.numel() // 8), dtype=torch.uint8, device=x.device) if relu else None
        given = x, shortcut, y, bits, mean, invstd, weight, bias, x.numel()
        cut.map("normalise", *given, ADD=shortcut is not None, RELU=relu)
        ctx.save_for_backward(x, bits, mean, invstd, weight)
        ctx.added = shortcut is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bits, mean, invstd, weight = ctx.saved_tensors
        cut, relu = _Cut(x), bits is not None
        dy = dy.contiguous(memory_format=torch.channels_last)
        partial, coefficients = cut.partial(), torch.empty(3, cut.channels, device=x.device)
        dweight, dbias = cut.vector(), cut.vector()
        cut.reduce("gradient_sums", dy, x, bits, mean, partial, cut.rows, cut.slab, cut.slabs, RELU=relu)
        given = partial, invstd, weight, dweight, dbias, coefficients, cut.rows, cut.slabs
        cut.combine("gradient_coefficients", *given)
        dx = torch.empty_like(x)
        passed = torch.empty_like(x) if ctx.added else None
        given = dy, x, bits, dx, passed, mean, coefficients, x.numel()
        cut.map("gradient", *given, ADD=ctx.added, RELU=relu)
        return dx, passed, dweight, dbias, None, None


class _Cut:
    """How an activation (N, C, H, W) is cut up among programs: a function of its shape and the GPU alone."""

    def __init__(self, x: Tensor) -> None:
        self.channels, self.device = x.shape[1], x.device
        self.rows = x.numel() // self.channels
        self.wide = min(TILE_CHANNELS, _power_of_2(self.channels))
        self.across = -(-self.channels // self.wide)  # programs side by side
        self.tall = TILE_ROWS * TILE_CHANNELS // self.wide
        wanted = min(SLABS, max(1, PROGRAMS_AN_SM * _multiprocessors(x.device) // self.across))
        self.slab = self.tall * -(-self.rows // (self.tall * wanted))  # rows of one
        self.slabs = -(-self.rows // self.slab)

    def vector(self) -> Tensor:
        return torch.empty(self.channels, device=self.device)

    def partial(self) -> Tensor:
        return torch.empty(2, self.slabs, self.channels, device=self.device)

    def reduce(self, name: str, *arguments: Any, **constants: bool) -> None:
        """Over the rows of each slab."""
        kernel = getattr(_kernels(), name)[(self.slabs, self.across)]
        kernel(*arguments, C=self.channels, BLOCK_R=self.tall, BLOCK_C=self.wide, num_warps=8, **constants)

    def combine(self, name: str, *arguments: Any) -> None:
        """Over the slabs, 8 channels a program: 32 bytes are what a GPU reads at least."""
        kernel = getattr(_kernels(), name)[(-(-self.channels // 8),)]
        kernel(*arguments, C=self.channels, BLOCK_P=_power_of_2(self.slabs), BLOCK_C=8)

    def map(self, name: str, *arguments: Any, **constants: bool) -> None:
        """Element by element."""
        kernel = getattr(_kernels(), name)[(-(-self.rows * self.channels // BLOCK),)]
        kernel(*arguments, C=self.channels, BLOCK=BLOCK, **constants)


def fuse(model: nn.Module) -> bool:
    """Make, in place, every plain BatchNorm2d of `model` a GpuBatchNorm2d; False where there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        return False
    replace(model, GpuBatchNorm2d)
    return True


def _kernels() -> Any:
    from trainer.models import gpu_kernels  # here and not above: it imports Triton, which a CPU's run does not need

    return gpu_kernels


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
