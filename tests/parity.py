"""The first steps of each family of recipe in plain PyTorch, from the papers and API docs: nothing of `trainer` here.

Each takes a torchvision network, batches and the numbers of its recipe, trains the network in place and returns the
losses, and the averaged weights where the recipe has them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Length:
    """How long a run is, in steps, and its rate at the top."""

    total: int
    warmup: int
    lr: float
    epoch: float  # steps of one


@dataclass
class Trained:
    losses: list[float] = field(default_factory=list)
    average: list[Tensor] | None = None  # a state dict's values


def _train(net: nn.Module, batches: Iterable[Batch], loss_of: Callable, after: Callable[[int], None]) -> Trained:
    done = Trained()
    net.train()
    for step, (images, targets) in enumerate(batches):
        net.zero_grad()
        loss = loss_of(net(images), targets)
        loss.backward()
        after(step)
        done.losses.append(loss.item())
    return done


def _set(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _matrices_and_vectors(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    return [p for p in net.parameters() if p.ndim > 1], [p for p in net.parameters() if p.ndim <= 1]


def _sgd(net: nn.Module, decay: float, momentum: float) -> torch.optim.SGD:
    decayed, exempt = _matrices_and_vectors(net)
    groups = [{"params": decayed, "weight_decay": decay}, {"params": exempt, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=1.0, momentum=momentum)


def torchvision_v1(net: nn.Module, batches: Iterable[Batch], length: Length) -> Trained:
    optimizer = torch.optim.SGD(net.parameters(), lr=length.lr, momentum=0.9, weight_decay=1e-4)
    drops = [math.ceil(30 / 90 * length.total), math.ceil(60 / 90 * length.total)]
    schedule = lr_scheduler.MultiStepLR(optimizer, drops, gamma=0.1)

    def after(step: int) -> None:
        optimizer.step()
        schedule.step()

    return _train(net, batches, nn.CrossEntropyLoss(), after)


def torchvision_v2(net: nn.Module, batches: Iterable[Batch], length: Length, decay: float, every: int) -> Trained:
    """`decay` of the average each `every` steps; during the warm-up it is a copy."""
    optimizer = _sgd(net, 2e-5, 0.9)
    _set(optimizer, length.lr)
    for group in optimizer.param_groups:
        group["initial_lr"] = length.lr
    rising = lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=length.warmup)
    falling = lr_scheduler.CosineAnnealingLR(optimizer, length.total - length.warmup)
    schedule = lr_scheduler.SequentialLR(optimizer, [rising, falling], [length.warmup])
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay), use_buffers=True
    )

    def after(step: int) -> None:
        optimizer.step()
        schedule.step()
        if (step + 1) % every == 0:
            if step < length.warmup:
                average.n_averaged.zero_()
            average.update_parameters(net)

    done = _train(net, batches, nn.CrossEntropyLoss(label_smoothing=0.1), after)
    done.average = list(average.module.state_dict().values())
    return done


def nvidia_90(net: nn.Module, batches: Iterable[Batch], length: Length) -> Trained:
    optimizer = _sgd(net, 3.0517578125e-5, 0.875)

    def after(step: int) -> None:
        if step < length.warmup:
            lr = length.lr * step / length.warmup
        else:
            lr = 0.5 * length.lr * (1 + math.cos(math.pi * (step - length.warmup) / (length.total - length.warmup)))
        _set(optimizer, lr)
        optimizer.step()

    return _train(net, batches, nn.CrossEntropyLoss(label_smoothing=0.1), after)


class Blurred(nn.Module):
    """A layer with a blur of [1, 2, 1] x [1, 2, 1] / 16 before it, or after it with the stride."""

    def __init__(self, layer: nn.Module, channels: int, after: int = 0) -> None:
        super().__init__()
        self.layer, self.after = layer, after
        row = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("kernel", (row[:, None] * row / 16).repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        groups = len(self.kernel)
        if self.after:
            return functional.conv2d(
                self.layer(x), self.kernel.to(x.dtype), stride=self.after, padding=1, groups=groups
            )
        return self.layer(functional.conv2d(x, self.kernel.to(x.dtype), padding=1, groups=groups))


def blurpool(net: nn.Module, *, pooling: bool) -> None:
    """Wrap what strides in a torchvision ResNet: convolutions of 16 inputs or more, and the max-pooling if wanted."""
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and max(child.stride) > 1 and child.in_channels >= 16:
                setattr(parent, name, Blurred(child, child.in_channels))
    if pooling:
        net.maxpool = Blurred(nn.MaxPool2d(3, stride=1, padding=1), 64, after=2)


def ffcv(net: nn.Module, batches: Iterable[Batch], length: Length) -> Trained:
    blurpool(net, pooling=False)
    optimizer = _sgd(net, 1e-4, 0.9)
    corners = [0, length.warmup, length.total], [1e-4 * length.lr, length.lr, 0]

    def after(step: int) -> None:
        _set(optimizer, float(np.interp(step, *corners)))
        optimizer.step()

    return _train(net, batches, nn.CrossEntropyLoss(label_smoothing=0.1), after)


def a3(net: nn.Module, batches: Iterable[Batch], length: Length) -> Trained:
    """LAMB (arXiv:1904.00962, algorithm 2) in float64, the gradient's norm clipped at 1."""
    moments: dict[nn.Parameter, tuple[Tensor, Tensor]] = {p: (0.0, 0.0) for p in net.parameters()}

    def after(step: int) -> None:
        if step < length.warmup:
            lr = length.lr * (0.0125 + (1 - 0.0125) * step / length.warmup)
        else:
            done = (step - length.warmup) / (length.total - length.warmup)
            lr = length.lr * (1.25e-4 + (1 - 1.25e-4) * (1 + math.cos(math.pi * done)) / 2)
        norm = sum(p.grad.double().square().sum() for p in net.parameters()).sqrt()
        for p in net.parameters():
            g = p.grad.double() / max(norm.item(), 1.0)
            m, v = moments[p]
            m, v = moments[p] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            update = m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-6)
            w = p.data.double()
            if p.ndim > 1:
                update = update + 0.02 * w
                update = update * w.norm() / update.norm()
            p.data.copy_(w - lr * update)

    def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(logits, (targets > 0.2).float())

    return _train(net, batches, loss_of, after)


def mosaic_mild(net: nn.Module, batches: Iterable[Batch], length: Length, half_life: float, every: int) -> Trained:
    """Weight decay multiplied by lr / peak on all weights; an average whose half-life is in steps."""
    blurpool(net, pooling=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.875)
    average = copy.deepcopy(net)
    kept = 0.5 ** (every / half_life)

    def after(step: int) -> None:
        if step < length.warmup:
            share = step / length.warmup
        else:
            share = 0.5 * (1 + math.cos(math.pi * (step - length.warmup) / (length.total - length.warmup)))
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1 - share * 5e-4)
        _set(optimizer, share * length.lr)
        optimizer.step()
        if (step + 1) % every == 0:
            with torch.no_grad():
                for old, new in zip(average.state_dict().values(), net.state_dict().values()):
                    old.copy_(kept * old + (1 - kept) * new if old.is_floating_point() else new)

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        classes = logits.shape[1]
        targets = functional.one_hot(labels, classes) * (1 - 0.08) + 0.08 / classes
        return functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(labels)

    done = _train(net, batches, loss_of, after)
    done.average = list(average.state_dict().values())
    return done


def mlperf_lars(net: nn.Module, batches: Iterable[Batch], length: Length) -> Trained:
    """LARS (arXiv:1708.03888, algorithm 1) in float64, polynomial of power 2; vectors take plain momentum steps."""
    buffers: dict[nn.Parameter, Tensor] = {p: torch.zeros_like(p, dtype=torch.float64) for p in net.parameters()}
    end = 1e-4 / 8.5  # of the peak

    def after(step: int) -> None:
        if step < length.warmup:
            lr = length.lr * step / length.warmup
        else:
            left = 1 - (step - length.warmup) / (length.total - length.warmup)
            lr = length.lr * ((1 - end) * left**2 + end)
        for p in net.parameters():
            g, w = p.grad.double(), p.data.double()
            rate = lr
            if p.ndim > 1:
                rate = lr * 0.001 * w.norm() / (g.norm() + 2e-4 * w.norm())
                g = g + 2e-4 * w
            buffers[p] = 0.9 * buffers[p] + rate * g
            p.data.copy_(w - buffers[p])

    return _train(net, batches, nn.CrossEntropyLoss(label_smoothing=0.1), after)
