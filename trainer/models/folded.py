"""BatchNorm folded into the 1x1 convolutions of our bottlenecks, on a GPU: fewer passes over the same activations.

The convolution before a norm sums up that norm's statistics while it still holds its output; the one after bn2 norms
its input as it reads it, forward and again backward, so relu(bn2(x)) is never written, read or kept; and the gradient
of a block's input is added to its shortcut's where it is made. benchmarks/traffic.py counts the bytes. 3x3 convolutions
are cuDNN's, and so is the weight gradient of a convolution whose input is in memory anyway.

Above gpu_norm.py, whose kernels do the rest. precision.folded=true asks for it. Not measured on a GPU: the sizes of the
blocks are plain functions of the shapes, and nothing has been tuned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.models import gpu_norm
from trainer.models.gpu_norm import Cut, GpuBatchNorm2d, Statistics, multiprocessors, power_of_2
from trainer.models.resnet import Bottleneck, norm_relu

TALL = 128  # rows of a block of a product
WIDE = 128  # its columns at most; more would not leave room for the sums in the registers
WEIGHT_BLOCKS = {2: (64, 128), 4: (16, 64)}  # of a weight's gradient, by the bytes of a value: rows at once, outputs
WIDE_WEIGHT = 64  # and inputs, which are normed as they are read
LEAST = 16  # that a product of blocks needs of each side
PROGRAMS_AN_SM = 2  # of a weight's gradient; more are more sums to be read again


class FoldedBottleneck(Bottleneck):
    """Made of a Bottleneck by changing its class: names, parameters and statistics stay.

    All but a training step in channels-last memory, of fused norms, without stochastic depth, is Bottleneck's.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_path_rate > 0 or not _folds(x, self.conv1, self.bn1):
            return self._from_the_middle(norm_relu(self.bn1, self.conv1(x)), x)
        branch, x, *statistics = _Product.apply(x, self.conv1.weight, self.bn1)
        return self._from_the_middle(self.bn1._normed(branch, None, relu=True, statistics=tuple(statistics)), x)

    def _from_the_middle(self, branch: Tensor, x: Tensor) -> Tensor:
        """From the normed output of conv1, and the input of the block."""
        branch = self.conv2(branch)
        drops = self.drop_path_rate > 0
        if drops or not (_norms(self.bn2, branch) and _folds(branch, self.conv3, self.bn3)):
            return self.join(self.bn3, self.conv3(norm_relu(self.bn2, branch)), x)
        parameters = self.bn2.weight, self.bn2.bias, self.conv3.weight
        branch, *statistics = _NormedProduct.apply(branch, *parameters, self.bn2, self.bn3)
        return self._meet(branch, tuple(statistics), x)

    def _meet(self, branch: Tensor, statistics: Statistics, x: Tensor) -> Tensor:
        """`join`, of a branch whose statistics are known."""
        norm, its_statistics = None, None
        if isinstance(self.downsample, nn.Sequential):
            *layers, convolution, norm = self.downsample
            for layer in layers:
                x = layer(x)
            if _folds(x, convolution, norm):
                x, _, *found = _Product.apply(x, convolution.weight, norm)
                its_statistics = tuple(found)
            else:
                x = convolution(x)
        elif self.downsample is not None:
            x = self.downsample(x)
        if norm is not None and not _norms(norm, x):
            x, norm = norm(x), None
        shortcut = None
        if self.downsample is not None:
            shortcut = x.to(branch.dtype).contiguous(memory_format=torch.channels_last)
        if norm is None:
            return self.bn3._normed(branch, shortcut, relu=True, statistics=statistics)
        return self.bn3._joined(branch, shortcut, norm, statistics, its_statistics)


def fold(model: nn.Module) -> bool:
    """Make, in place, every Bottleneck of `model` a FoldedBottleneck; False where there is none.

    Its norms must be fused, by gpu_norm.fuse: of others nothing is folded.
    """
    found = [module for module in model.modules() if type(module) is Bottleneck]
    for module in found:
        module.__class__ = FoldedBottleneck
    return bool(found)


def _norms(norm: nn.Module, x: Tensor) -> bool:
    return type(norm) is GpuBatchNorm2d and norm._can(x)


def _folds(x: Tensor, convolution: nn.Module, norm: nn.Module) -> bool:
    """Whether `convolution` of x is a product of matrices in the type that x has, and `norm` one of the kernels'."""
    if type(convolution) is not nn.Conv2d or convolution.bias is not None or not _norms(norm, x):
        return False
    shape = convolution.kernel_size, convolution.stride, convolution.padding, convolution.groups
    kind, weight = x.device.type, convolution.weight
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return (
        shape == ((1, 1), (1, 1), (0, 0), 1)
        and x.dtype is dtype
        and x.is_contiguous(memory_format=torch.channels_last)
        and weight.is_contiguous()
    )


class _Product(torch.autograd.Function):
    """A 1x1 convolution of x; x, for a shortcut; and the statistics of the product, which move those of `norm`.

    What comes back through the shortcut is added in the pass that makes the gradient of x.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, norm: GpuBatchNorm2d) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        narrow = weight.to(x.dtype)
        y, statistics = _multiply(x, narrow, norm, None)
        ctx.save_for_backward(x, narrow)
        ctx.kind, ctx.strides = weight.dtype, weight.stride()
        ctx.mark_non_differentiable(*statistics)
        return y, x, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, passed: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            if passed is not None:
                passed = passed.contiguous(memory_format=torch.channels_last)
            dx, cut = torch.empty_like(x), _Blocks(x, weight.shape[0])
            sums = None, None, None, None, None, None, cut.rows, cut.slab, cut.slabs
            cut.multiply("input_gradient", dy, weight, dx, passed, *sums, ADD=passed is not None, NORM=False)
        if ctx.needs_input_grad[1]:
            plain = [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
            dweight = torch.ops.aten.convolution_backward(dy, x, weight, None, *plain)[1]
            dweight = dweight.to(ctx.kind).as_strided(weight.shape, ctx.strides)
        return dx, dweight, None


class _NormedProduct(torch.autograd.Function):
    """A 1x1 convolution of relu(norm(x)), which is never written; and the statistics of the product, which move those
    of `following`."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        weight: Tensor,
        norm: GpuBatchNorm2d,
        following: GpuBatchNorm2d,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        narrow = weight.to(x.dtype)
        given = *Cut(x).statistics(x, norm), gamma, beta
        y, statistics = _multiply(x, narrow, following, given)
        ctx.save_for_backward(x, narrow, *given)
        ctx.kind, ctx.strides = weight.dtype, weight.stride()
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, weight, *norm = ctx.saved_tensors
        mean, invstd, gamma, _ = norm
        dy = dy.contiguous(memory_format=torch.channels_last)
        g, cut = torch.empty_like(x), _Blocks(x, weight.shape[0])
        partial = cut.partial(2)
        given = dy, weight, g, None, x, partial, *norm, cut.rows, cut.slab, cut.slabs
        cut.multiply("input_gradient", *given, ADD=False, NORM=True)
        dgamma, dbeta, coefficients = cut.coefficients(partial, invstd, gamma, 1)
        # In place: each element is read before it is written, by one program.
        given = g, x, None, g, None, mean, coefficients, None, None, None, x.numel()
        cut.map("gradient", *given, ADD=False, JOIN=False, RELU=False)
        dweight = None
        if ctx.needs_input_grad[3]:
            dweight = _weight_gradient(dy, x, norm).to(ctx.kind).as_strided(weight.shape, ctx.strides)
        return g, dgamma, dbeta, dweight, None, None


def _multiply(
    x: Tensor, weight: Tensor, norm: GpuBatchNorm2d, given: tuple[Tensor, ...] | None
) -> tuple[Tensor, Statistics]:
    """x (N, inputs, H, W), or relu of it normed as `given`, by weight (outputs, inputs, 1, 1), and its statistics."""
    n, _, h, w = x.shape
    y = torch.empty((n, len(weight), h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    cut = _Blocks(y, x.shape[1])
    partial = cut.partial(2)
    sizes = cut.rows, cut.slab, cut.slabs
    cut.multiply("product", x, weight, y, partial, *(given or (None,) * 4), *sizes, NORM=given is not None)
    return y, cut.settle(partial, norm)


def _weight_gradient(dy: Tensor, x: Tensor, norm: list[Tensor]) -> Tensor:
    """That of a 1x1 convolution of relu(norm(x)): (outputs, inputs), float32; slabs of rows, then their sum."""
    outputs, inputs = dy.shape[1], x.shape[1]
    rows, (tall, most) = x.numel() // inputs, WEIGHT_BLOCKS[x.element_size()]
    wide_out, wide_in = (max(LEAST, min(most, power_of_2(n))) for n, most in ((outputs, most), (inputs, WIDE_WEIGHT)))
    across = -(-inputs // wide_in), -(-outputs // wide_out)
    wanted = max(1, PROGRAMS_AN_SM * multiprocessors(x.device) // (across[0] * across[1]))
    slab = tall * -(-rows // (tall * wanted))
    partial = torch.empty(-(-rows // slab), outputs, inputs, device=x.device)
    sizes = {"INNER": inputs, "C": outputs, "BLOCK_R": tall, "BLOCK_OUT": wide_out, "BLOCK_IN": wide_in}
    kernel = _kernels().weight_gradient[(*across, len(partial))]
    kernel(dy, x, partial, *norm, rows, slab, **sizes, **_how(x), num_warps=8, num_stages=4)
    return partial.sum(0)


class _Blocks(Cut):
    """How a product (rows, inner) by (inner, channels) is cut up among programs: a function of its shape alone.

    Made of the product's tensor, or one like it, (N, channels, H, W).
    """

    def __init__(self, y: Tensor, inner: int) -> None:
        self.channels, self.device, self.inner = y.shape[1], y.device, inner
        self.rows = y.numel() // self.channels
        self.wide = max(LEAST, min(WIDE, power_of_2(self.channels)))
        self.across = -(-self.channels // self.wide)
        self.tall = TALL
        self.slab = TALL * -(-self.rows // (TALL * gpu_norm.SLABS))
        self.slabs = -(-self.rows // self.slab)
        self.how = _how(y) | {"BLOCK_IN": _inner(y.dtype, inner)}

    def multiply(self, name: str, *arguments: Any, **constants: bool) -> None:
        """The programs of the same rows one after the other, so that all but the first find them in the cache."""
        kernel = getattr(_kernels(), name)[(self.across, self.slabs)]
        sizes = {"INNER": self.inner, "C": self.channels, "BLOCK_R": self.tall, "BLOCK_OUT": self.wide}
        kernel(*arguments, **sizes, **self.how, **constants, num_warps=8, num_stages=3)


def _inner(dtype: torch.dtype, inner: int) -> int:
    """How many of `inner` products are summed at once: 128 bytes of a row."""
    return max(LEAST, min(128 // dtype.itemsize, power_of_2(inner)))


def _how(x: Tensor) -> dict[str, Any]:
    """How a convolution of x is multiplied: torch's own choice for fp32."""
    precision = "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"
    return {"PRECISION": precision, "WIDE": x.device.type == "cpu"}


def _kernels() -> Any:
    from trainer.models import folded_kernels  # here and not above: it imports Triton

    return folded_kernels
