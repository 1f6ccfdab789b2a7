"""The optimiser, and which parameters decay."""

from __future__ import annotations

import torch
from torch import nn

from trainer.config import Optim


def create(options: Optim, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """SGD with momentum over all trainable parameters of `model`, fused into one kernel on a GPU."""
    optimizer = torch.optim.SGD(
        decay_groups(model, options),
        lr=options.lr,
        momentum=options.momentum,
        nesterov=options.nesterov,
        fused=device.type == "cuda",
    )
    if device.type == "cuda" and options.momentum:
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


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
