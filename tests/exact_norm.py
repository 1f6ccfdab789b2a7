"""What a fused norm must agree with: BatchNorm, addition and ReLU in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def distance(ours: Tensor, exact: Tensor) -> float:
    """Of two tensors of a shape, as a share of the second."""
    return ((ours.double() - exact).norm() / exact.norm()).item()


def agree(
    ours: nn.Module,
    exact: nn.Module,
    x: Tensor,
    shortcut: Tensor | None,
    coming: Tensor,
    tolerance: float,
    *,
    relu: bool,
) -> None:
    """Asserts that output and gradients of `ours` are those of `exact`, a norm of the same weights in float64.

    Args:
        x, shortcut: (N, C, H, W), channels-last leaves; `coming` is the gradient of the output.
    """
    inputs = [each.detach().double().requires_grad_() for each in (x, shortcut) if each is not None]
    y = ours.add_relu(x, shortcut) if relu else ours(x)
    unclipped = sum(inputs[1:], exact(inputs[0]))
    expected = unclipped.relu() if relu else unclipped
    assert y.dtype is x.dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert distance(y, expected) < tolerance
    y.backward(coming)  # not channels-last
    # Where y is rounded to 0 what is a little more, the ReLU's gradient is another one: counted at the rounded output.
    gate = (y.double() > 0) if relu else torch.ones_like(expected)
    unclipped.backward(coming.double() * gate)
    for found, wanted in [(x.grad, inputs[0].grad), (ours.weight.grad, exact.weight.grad)]:
        assert distance(found, wanted) < 10 * tolerance
    assert distance(ours.bias.grad, exact.bias.grad) < tolerance
    if shortcut is not None:
        assert torch.equal(shortcut.grad.double(), inputs[1].grad)
