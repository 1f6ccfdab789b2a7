"""Sharpness-aware minimisation (Foret et al., arXiv:2010.01412): the gradient of a point uphill, applied here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def uphill(model: nn.Module, rho: float) -> Iterator[None]:
    """The weights moved by rho along their gradient, over all layers together, for the duration; then back, bitwise.

    The gradients are dropped on the way in, and BatchNorm's statistics stay those of the weights where they stand. A
    loss scaler's factor cancels out. Waits for no device.
    """
    weights = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in weights]
    before = [p.detach().clone() for p in weights]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        factor = rho / (nn.utils.get_total_norm(gradients) + 1e-12)
        torch._foreach_add_(weights, torch._foreach_mul(gradients, factor))
    model.zero_grad(set_to_none=True)
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        with torch.no_grad():
            torch._foreach_copy_(weights, before)
