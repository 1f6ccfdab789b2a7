"""Networks and images that several tests build."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.config import Model
from trainer.distributed import World
from trainer.models.build import create
from trainer.models.resnet import ResNet

CPU = torch.device("cpu")
ALONE = World(rank=0, local_rank=0, size=1, local_size=1, device=CPU)


def ours(name: str, classes: int = 10, **options: object) -> ResNet:
    torch.manual_seed(0)
    model = create(Model(name=name, **options), classes)
    assert isinstance(model, ResNet)
    return model


def on_meta(name: str, classes: int = 1000, **options: object) -> nn.Module:
    with torch.device("meta"):
        return create(Model(name=name, **options), classes)


def torchvisions(name: str, **options: object) -> nn.Module:
    from torchvision import models  # here and not above: the two ranks of a test below import this file as well

    torch.manual_seed(0)
    return models.get_model(name, weights=None, num_classes=10, **options)


def images(n: int = 2, size: int = 64) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def scatter_norms(model: nn.Module) -> None:
    """Gives every norm statistics and an affine part of its own, so that swapping two of them shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                nn.init.normal_(tensor, std=0.1)
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 1.5)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)
