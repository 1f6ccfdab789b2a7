"""Which parameters decay."""

from __future__ import annotations

import torch

from trainer.config import Model, Optim
from trainer.models import build
from trainer.optim import create, decay_groups, set_lr


def test_on_the_real_resnet50_every_vector_is_exempt() -> None:
    model = build.create(Model(name="resnet50"), 1000)
    decayed, exempt = decay_groups(model, Optim(weight_decay=3e-5))
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (3e-5, 0.0)
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in exempt["params"])
    found = [names[id(p)] for group in (decayed, exempt) for p in group["params"]]
    assert sorted(found) == sorted(names.values()), "every parameter in exactly one group"
    # The norms of the downsample branches, which a search for 'bn' in the name misses, and the head's bias.
    assert {"layer1.0.downsample.1.weight", "fc.bias", "bn1.weight"} <= {names[id(p)] for p in exempt["params"]}
    assert len(decayed["params"]) == 54 and len(exempt["params"]) == 2 * 53 + 1


def test_decay_1d_takes_all() -> None:
    model = build.create(Model(name="resnet20"), 10)
    (group,) = decay_groups(model, Optim(decay_1d=True))
    assert len(group["params"]) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out() -> None:
    model = torch.nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    (group,) = decay_groups(model, Optim())
    assert group["params"] == [model.bias]


def test_the_learning_rate_of_a_step_is_every_groups() -> None:
    optimizer = create(Optim(), torch.nn.Linear(3, 2), torch.device("cpu"))
    set_lr(optimizer, 0.7)
    assert [group["lr"] for group in optimizer.param_groups] == [0.7, 0.7]
