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

Statistics = tuple[Tensor, Tensor]  # mean and 1 / standard deviation of each channel, float32


class GpuBatchNorm2d(FusedBatchNorm2d):
    """The fused norm of Triton's kernels.

    Whoever has made x may know its statistics already (folded.py), and has moved the running ones.
    """

    types = frozenset({torch.float32, torch.bfloat16, torch.float16})
    joins = True

    def _normed(
        self, x: Tensor, shortcut: Tensor | None, *, relu: bool, statistics: Statistics | None = None
    ) -> Tensor:
        return _Norm.apply(x, shortcut, self.weight, self.bias, (self, statistics), relu)

    def _joined(
        self,
        x: Tensor,
        shortcut: Tensor,
        norm: nn.BatchNorm2d,
        statistics: Statistics | None = None,
        its_statistics: Statistics | None = None,
    ) -> Tensor:
        parameters = self.weight, self.bias, norm.weight, norm.bias
        return _Join.apply(x, shortcut, *parameters, (self, statistics), (norm, its_statistics))


Known = tuple[GpuBatchNorm2d, Statistics | None]  # a norm, and the statistics of its input if they are known


class _Norm(torch.autograd.Function):
    """In training; the running statistics of `norm` move in the forward pass. No call waits for the device."""

    @staticmethod
    def forward(
        ctx, x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, norm: Known, relu: bool
    ) -> Tensor:
        cut = Cut(x)
        mean, invstd = cut.statistics(x, *norm)
        y, bits = torch.empty_like(x), _bits(x) if relu else None
        given = x, shortcut, y, bits, mean, invstd, weight, bias, None, None, None, None, x.numel()
        cut.map("normalise", *given, ADD=shortcut is not None, JOIN=False, RELU=relu)
        ctx.save_for_backward(x, bits, mean, invstd, weight)
        ctx.added = shortcut is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bits, mean, invstd, weight = ctx.saved_tensors
        cut, relu = Cut(x), bits is not None
        dy = dy.contiguous(memory_format=torch.channels_last)
        partial = cut.partial(2)
        sizes = cut.rows, cut.slab, cut.slabs
        cut.reduce("gradient_sums", dy, x, bits, mean, None, None, partial, *sizes, JOIN=False, RELU=relu)
        dweight, dbias, coefficients = cut.coefficients(partial, invstd, weight, 1)
        dx = torch.empty_like(x)
        passed = torch.empty_like(x) if ctx.added else None
        given = dy, x, bits, dx, passed, mean, coefficients, None, None, None, x.numel()
        cut.map("gradient", *given, ADD=ctx.added, JOIN=False, RELU=relu)
        return dx, passed, dweight, dbias, None, None


class _Join(torch.autograd.Function):
    """relu(norm(x) + its_norm(shortcut)), of a shortcut that is a projection: its normed values are never written."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        shortcut: Tensor,
        weight: Tensor,
        bias: Tensor,
        its_weight: Tensor,
        its_bias: Tensor,
        *norms: Known,
    ) -> Tensor:
        cut = Cut(x)
        statistics, its_statistics = (cut.statistics(each, *norm) for each, norm in zip((x, shortcut), norms))
        y, bits = torch.empty_like(x), _bits(x)
        parameters = *statistics, weight, bias, *its_statistics, its_weight, its_bias
        cut.map("normalise", x, shortcut, y, bits, *parameters, x.numel(), ADD=True, JOIN=True, RELU=True)
        ctx.save_for_backward(x, shortcut, bits, *statistics, weight, *its_statistics, its_weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, shortcut, bits, mean, invstd, weight, its_mean, its_invstd, its_weight = ctx.saved_tensors
        cut = Cut(x)
        dy = dy.contiguous(memory_format=torch.channels_last)
        partial = cut.partial(3)
        given = dy, x, bits, mean, shortcut, its_mean, partial, cut.rows, cut.slab, cut.slabs
        cut.reduce("gradient_sums", *given, JOIN=True, RELU=True)
        dweight, dbias, coefficients = cut.coefficients(partial, invstd, weight, 1)
        its_dweight, its_dbias, its_coefficients = cut.coefficients(partial, its_invstd, its_weight, 2)
        dx, passed = torch.empty_like(x), torch.empty_like(shortcut)
        given = dy, x, bits, dx, passed, mean, coefficients, shortcut, its_mean, its_coefficients, x.numel()
        cut.map("gradient", *given, ADD=True, JOIN=True, RELU=True)
        return dx, passed, dweight, dbias, its_dweight, its_dbias, None, None


def _bits(x: Tensor) -> Tensor:
    return torch.empty(-(-x.numel() // 8), dtype=torch.uint8, device=x.device)


class Cut:
    """How an activation (N, C, H, W) is cut up among programs: a function of its shape and the GPU alone."""

    def __init__(self, x: Tensor) -> None:
        self.channels, self.device = x.shape[1], x.device
        self.rows = x.numel() // self.channels
        self.wide = min(TILE_CHANNELS, power_of_2(self.channels))
        self.across = -(-self.channels // self.wide)  # programs side by side
        self.tall = TILE_ROWS * TILE_CHANNELS // self.wide
        wanted = min(SLABS, max(1, PROGRAMS_AN_SM * multiprocessors(x.device) // self.across))
        self.slab = self.tall * -(-self.rows // (self.tall * wanted))  # rows of one
        self.slabs = -(-self.rows // self.slab)

    def statistics(self, x: Tensor, norm: GpuBatchNorm2d, known: Statistics | None = None) -> Statistics:
        """Those of x; the running ones of `norm` move. Nothing happens to what is known already."""
        if known is not None:
            return known
        partial = self.partial(2)
        self.reduce("moments", x, partial, self.rows, self.slab, self.slabs)
        return self.settle(partial, norm)

    def settle(self, partial: Tensor, norm: GpuBatchNorm2d) -> Statistics:
        """Statistics from the moments of the slabs; the running ones of `norm` move."""
        mean, invstd = self._vectors(2)
        sizes = self.rows, self.slab, self.slabs
        running = norm.running_mean, norm.running_var, norm.num_batches_tracked
        unbias = self.rows / (self.rows - 1)
        self._combine("statistics", partial, mean, invstd, *running, *sizes, norm.momentum, norm.eps, unbias)
        return mean, invstd

    def coefficients(
        self, partial: Tensor, invstd: Tensor, weight: Tensor, which: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dweight, dbias and the coefficients of dx, from the sums of gradient_sums."""
        (dweight, dbias), coefficients = self._vectors(2), self._vectors(3)
        given = partial, invstd, weight, dweight, dbias, coefficients, self.rows, self.slabs, which
        self._combine("gradient_coefficients", *given)
        return dweight, dbias, coefficients

    def partial(self, sums: int) -> Tensor:
        return torch.empty(sums, self.slabs, self.channels, device=self.device)

    def _vectors(self, count: int) -> Tensor:
        return torch.empty(count, self.channels, device=self.device)

    def reduce(self, name: str, *arguments: Any, **constants: bool) -> None:
        """Over the rows of each slab."""
        kernel = getattr(_kernels(), name)[(self.slabs, self.across)]
        kernel(*arguments, C=self.channels, BLOCK_R=self.tall, BLOCK_C=self.wide, num_warps=8, **constants)

    def _combine(self, name: str, *arguments: Any) -> None:
        """Over the slabs, 8 channels a program: 32 bytes are what a GPU reads at least."""
        kernel = getattr(_kernels(), name)[(-(-self.channels // 8),)]
        kernel(*arguments, C=self.channels, BLOCK_P=power_of_2(self.slabs), BLOCK_C=8)

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
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
