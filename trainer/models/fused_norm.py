"""What the fused BatchNorms of a CPU and of a GPU share: how they are made of torch's, and when torch's is taken."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d with `add_relu`. Made of one by changing its class: names, parameters and statistics stay.

    The kernels do what a training step does in channels-last memory; all else, evaluation too, is torch's.
    """

    types: frozenset[torch.dtype] = frozenset()  # of images that the kernels read
    joins = False  # whether they also norm the shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self._laid_out(x, None, relu=False) if self._can(x) else super().forward(x)

    def add_relu(self, x: Tensor, shortcut: Tensor | None = None, norm: nn.Module | None = None) -> Tensor:
        """relu(self(x) + shortcut), of the shape and dtype of x (N, C, H, W); without a shortcut relu(self(x)).

        With `norm` the shortcut is normed by that first: relu(self(x) + norm(shortcut)).
        """
        if norm is not None and shortcut is not None:
            alike = type(norm) is type(self) and shortcut.dtype == x.dtype
            if self.joins and alike and self._can(x) and norm._can(shortcut):
                given = (each.contiguous(memory_format=torch.channels_last) for each in (x, shortcut))
                return self._joined(*given, norm)
            shortcut = norm(shortcut)
        if self._can(x) and (shortcut is None or shortcut.dtype == x.dtype):
            return self._laid_out(x, shortcut, relu=True)
        y = super().forward(x)
        return F.relu(y if shortcut is None else y.add_(shortcut), inplace=True)

    def _can(self, x: Tensor) -> bool:
        return (
            self.training
            and self.momentum is not None
            and x.dtype in self.types
            and x.numel() > x.shape[1]
            and self.weight.dtype is torch.float32
        )

    def _laid_out(self, x: Tensor, shortcut: Tensor | None, *, relu: bool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if shortcut is not None:
            shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        return self._normed(x, shortcut, relu=relu)

    def _normed(self, x: Tensor, shortcut: Tensor | None, *, relu: bool) -> Tensor:
        """What the kernels do, of tensors in channels-last memory."""
        raise NotImplementedError

    def _joined(self, x: Tensor, shortcut: Tensor, norm: nn.Module) -> Tensor:
        """relu(self(x) + norm(shortcut)), likewise, where the class `joins`."""
        raise NotImplementedError


def replace(model: nn.Module, kind: type[FusedBatchNorm2d]) -> None:
    """Make, in place, every plain BatchNorm2d of `model` one of `kind`.

    Our ResNets gain by `add_relu`, any other network by the norms alone. SyncBatchNorm stays what it is.
    """
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats:
            module.__class__ = kind
