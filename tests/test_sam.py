"""The step uphill."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import images, ours
from torch.nn import functional

from trainer.sam import uphill


def gradients(model: torch.nn.Module, x: torch.Tensor, scale: float = 1.0) -> list[torch.Tensor]:
    model.zero_grad()
    (functional.cross_entropy(model(x), torch.arange(4)) * scale).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_weights_move_rho_along_the_gradient_and_come_back_bitwise(scale: float) -> None:
    model, x = ours("resnet20"), images(4, 32)
    first = [g.clone() for g in gradients(model, x, scale)]
    before = copy.deepcopy(model.state_dict())
    with uphill(model, 0.05):
        assert all(p.grad is None for p in model.parameters())
        moved = [p.detach() - before[name] for name, p in model.named_parameters()]
        norm = torch.nn.utils.get_total_norm(moved)
        assert norm == pytest.approx(0.05, rel=1e-3)
        along = sum((m * g).sum() for m, g in zip(moved, first)) / torch.nn.utils.get_total_norm(first) / norm
        assert along == pytest.approx(1.0, abs=1e-3)
        gradients(model, x, scale)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if not k.endswith("num_batches_tracked"))
    assert all(p.grad is not None for p in model.parameters())
    # The gradient is that of the point uphill, not of where the weights stand.
    assert not torch.allclose(model.fc.weight.grad, first[-2], rtol=1e-3)
    assert {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.1}
