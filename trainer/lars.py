"""LARS (You et al., arXiv:1708.03888) as MLPerf's ResNet-50 reference runs it.

timm has one too, but with the rate outside the momentum: what the buffer holds is then rescaled whenever the rate
moves. The paper (algorithm 1) and the reference multiply by the rate of the day what goes into the buffer, and at a
rate that falls by a power of two the two are different optimisers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Lars(torch.optim.Optimizer):
    """v <- momentum v + lr trust |w| / (|g| + decay |w|) (g + decay w);  w <- w - v, layer by layer.

    A group without weight decay (biases and norms) takes plain momentum steps, as does a layer whose |w| or
    |g| is 0. Waits for no device.
    """

    def __init__(
        self, params: Any, *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        assert closure is None, "no closure: the loop has the gradients already"
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            for p in weights:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in weights]
            updates = _directions(weights, [p.grad for p in weights], group)
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates, alpha=group["lr"])
            torch._foreach_sub_(weights, buffers)


def _directions(weights: list[torch.Tensor], gradients: list[torch.Tensor], group: dict) -> list[torch.Tensor]:
    """trust |w| / (|g| + decay |w|) (g + decay w) of each layer; the gradients themselves are left alone."""
    decay = group["weight_decay"]
    if decay == 0:
        return gradients
    norms = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(gradients))
    size, slope = norms
    ratio = group["trust"] * size / (slope + decay * size)
    ratio = torch.where((size > 0) & (slope > 0), ratio, torch.ones_like(ratio))
    directions = torch._foreach_add(gradients, weights, alpha=decay)
    torch._foreach_mul_(directions, list(ratio.unbind()))
    return directions
