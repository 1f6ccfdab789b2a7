"""The optimiser, which parameters decay, and the clipping of gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from trainer.config import Optim
from trainer.lars import Lars
from trainer.models import build

# (parameters whose gradients are clipped in place, their global 2-norm)
Clip = Callable[[list[nn.Parameter], torch.Tensor], None]


def create(options: Optim, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimiser over all trainable parameters of `model`: torch's, fused into one kernel on a GPU; timm's; Lars."""
    groups, lr, eps = decay_groups(model, options), options.lr, options.eps
    momentum, betas = options.momentum, tuple(options.betas)
    if options.name == "lars":
        return Lars(groups, lr=lr, momentum=momentum, trust=options.trust)
    if options.name == "lamb":
        from timm.optim import Lamb  # here and not above: it brings all of timm, which most runs do not need

        # Its own clipping at norm 1, on by default and easily overlooked, is optim.clip_norm=1.
        return Lamb(groups, lr=lr, betas=betas, eps=eps, max_grad_norm=None)
    if options.name == "sgdw":
        from timm.optim import SGDW

        return SGDW(groups, lr=lr, momentum=momentum, nesterov=options.nesterov)
    if options.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=device.type == "cuda")
    if options.name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=lr, alpha=betas[1], eps=eps, momentum=momentum)
    fused = device.type == "cuda"
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=options.nesterov, fused=fused)
    if fused and momentum:
        # The fused kernel makes the buffers in its first step, and leaves them uninitialised if that step is skipped
        # (torch 2.15): an overflow in the first step of fp16 would poison the run. From zero it starts the same.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def decay_groups(model: nn.Module, options: Optim) -> list[dict]:
    """Two parameter groups, with and without weight decay, each parameter in exactly one.

    Vectors (biases, norms) do not decay unless optim.decay_1d. By shape and never by name: `'bn' in name` misses the
    norms of a ResNet's downsample branches, which are called downsample.1.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1 or options.decay_1d], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1 and not options.decay_1d], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def clipping(options: Optim, model: nn.Module) -> Clip | None:
    """What clips the gradients before a step, by norm, by value or adaptively; None where nothing does."""
    if options.clip_norm is not None:
        limit = options.clip_norm
        return lambda parameters, norm: nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    if options.clip_value is not None:
        bound = options.clip_value
        return lambda parameters, norm: nn.utils.clip_grad_value_(parameters, bound)
    if options.clip_agc is not None:
        from timm.utils.agc import adaptive_clip_grad

        share = options.clip_agc
        # All but the head, as the paper advises (arXiv:2102.06171, section 4.1).
        head = {id(p) for p in build.head(build.unwrap(model)).parameters()}
        return lambda parameters, norm: adaptive_clip_grad([p for p in parameters if id(p) not in head], share)
    return None


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate of this step; where it is a tensor, as trainer/graphs.py has it, in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
