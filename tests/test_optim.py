"""Which parameters decay, the optimisers against their formulas, clipping."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.config import Model, Optim
from trainer.models import build
from trainer.optim import clipping, create, decay_groups, set_lr


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


# Against the formulas, in float64: one function a step, from the papers, of (w, g, state, lr, decay, step).

LRS = (0.1, 0.3, 0.2, 0.05)  # moves every step, so that where the rate stands in the formula shows


def _sgd(w, g, s, lr, decay, step):
    s["v"] = 0.9 * s.get("v", 0) + g + decay * w
    return w - lr * s["v"]


def _nesterov(w, g, s, lr, decay, step):
    g = g + decay * w
    s["v"] = 0.9 * s.get("v", 0) + g
    return w - lr * (g + 0.9 * s["v"])


def _sgdw(w, g, s, lr, decay, step):
    s["v"] = 0.9 * s.get("v", 0) + g
    return w * (1 - lr * decay) - lr * s["v"]


def _lars(w, g, s, lr, decay, step):
    trust = 0.001 * w.norm() / (g.norm() + decay * w.norm()) if decay else 1.0  # the reference adapts what decays alone
    s["v"] = 0.9 * s.get("v", 0) + lr * trust * (g + decay * w)
    return w - s["v"]


def _adam(g, s, step):
    s["m"], s["n"] = 0.9 * s.get("m", 0) + 0.1 * g, 0.999 * s.get("n", 0) + 0.001 * g**2
    return (s["m"] / (1 - 0.9**step)) / ((s["n"] / (1 - 0.999**step)).sqrt() + 1e-6)


def _adamw(w, g, s, lr, decay, step):
    return w * (1 - lr * decay) - lr * _adam(g, s, step)


def _lamb(w, g, s, lr, decay, step):
    update = _adam(g, s, step) + decay * w
    return w - lr * (w.norm() / update.norm() if decay else 1.0) * update


def _rmsprop(w, g, s, lr, decay, step):
    g = g + decay * w
    s["n"] = 0.999 * s.get("n", 0) + 0.001 * g**2
    s["v"] = 0.9 * s.get("v", 0) + g / (s["n"].sqrt() + 1e-6)
    return w - lr * s["v"]


FORMULAS = {"sgd": _sgd, "sgdw": _sgdw, "lars": _lars, "adamw": _adamw, "lamb": _lamb, "rmsprop": _rmsprop}


@pytest.mark.parametrize("name", [*FORMULAS, "nesterov"])
def test_every_optimiser_is_its_formula(name: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3).double()
    options = Optim(name="sgd" if name == "nesterov" else name, nesterov=name == "nesterov", weight_decay=0.02)
    optimizer = create(options, model, torch.device("cpu"))
    expected = [(p.detach().clone(), {}, decay) for p, decay in ((model.weight, 0.02), (model.bias, 0.0))]
    for step, lr in enumerate(LRS, 1):
        set_lr(optimizer, lr)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        gradients = [p.grad.clone() for p in model.parameters()]
        formula = FORMULAS.get(name, _nesterov)
        expected = [(formula(w, g, s, lr, d, step), s, d) for (w, s, d), g in zip(expected, gradients)]
        optimizer.step()
        for p, (w, _, _) in zip(model.parameters(), expected):
            # timm writes its scalars as float32 where it multiplies many tensors at once.
            torch.testing.assert_close(p.detach(), w, rtol=1e-6, atol=1e-9)


def test_lars_steps_plainly_where_a_norm_is_zero() -> None:
    model = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = create(Optim(name="lars", lr=0.5), model, torch.device("cpu"))
    model.weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert (model.weight == -0.5).all()


@pytest.mark.parametrize("name", FORMULAS)
def test_an_optimiser_that_is_saved_and_loaded_goes_on_bitwise(name: str, tmp_path: Path) -> None:
    nets = [torch.nn.Linear(5, 3) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    first, second = (create(Optim(name=name), net, torch.device("cpu")) for net in nets)

    def step(optimizer: torch.optim.Optimizer, net: torch.nn.Module, seed: int) -> None:
        torch.manual_seed(seed)
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()

    step(first, nets[0], 1)
    torch.save({"net": nets[0].state_dict(), "optimizer": first.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    nets[1].load_state_dict(state["net"])
    second.load_state_dict(state["optimizer"])
    for optimizer, net in ((first, nets[0]), (second, nets[1])):
        step(optimizer, net, 2)
    assert torch.equal(nets[0].weight, nets[1].weight) and torch.equal(nets[0].bias, nets[1].bias)


def test_each_clipping_holds_its_bound() -> None:
    model = build.create(Model(name="resnet20"), 10)
    parameters = list(model.parameters())

    def clipped(**options: float) -> list[torch.Tensor]:
        torch.manual_seed(0)
        for p in parameters:
            p.grad = torch.randn_like(p)
        clipping(Optim(**options), model)(parameters, torch.nn.utils.get_total_norm([p.grad for p in parameters]))
        return [p.grad for p in parameters]

    assert torch.nn.utils.get_total_norm(clipped(clip_norm=2.0)) == pytest.approx(2.0, rel=1e-4)
    assert max(g.abs().max() for g in clipped(clip_value=0.1)) <= 0.1
    for p, g in zip(parameters, clipped(clip_agc=0.01)):
        if p is model.fc.weight or p is model.fc.bias:
            assert g.abs().max() > 0.5, "the head is not clipped"
        elif p.ndim > 1:
            share = g.flatten(1).norm(dim=1) / p.flatten(1).norm(dim=1).clamp(min=1e-3)
            assert share.max() <= 0.01 * (1 + 1e-5)
    assert clipping(Optim(), model) is None
