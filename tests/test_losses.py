"""The losses against their formulas, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.config import Loss, Mix
from trainer.losses import create, distance
from trainer.mix import mix

LOGITS = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
ONE_HOT = torch.eye(5, dtype=torch.float64)[LABELS]


def soft() -> torch.Tensor:
    return mix(torch.zeros(8, 3, 6, 6), LABELS, Mix(mixup=1.0, group=2), 5, 0, 0, 0)[1].double()


def by_hand(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-t log p - (1 - t) log (1 - p) of every class, from the definition."""
    p = 1 / (1 + torch.exp(-logits))
    return -targets * p.log() - (1 - targets) * (1 - p).log()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_takes_labels_and_probabilities_alike(smoothing: float) -> None:
    loss = create(Loss(label_smoothing=smoothing))
    assert loss(LOGITS, LABELS).item() == pytest.approx(loss(LOGITS, ONE_HOT).item(), rel=1e-12)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.08])
def test_bce_is_its_formula_for_labels_and_for_probabilities(reduction: str, smoothing: float) -> None:
    loss = create(Loss(name="bce", label_smoothing=smoothing, bce_reduction=reduction))
    for given, targets in ((LABELS, ONE_HOT), (soft(), soft())):
        smooth = targets * (1 - smoothing) + smoothing / 5
        expected = by_hand(LOGITS, smooth).sum() / (8 if reduction == "sum" else 40)
        assert loss(LOGITS, given).item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_threshold_makes_what_is_mixed_in_wholly_there() -> None:
    targets = torch.tensor([[0.7, 0.3, 0, 0, 0], [0.9, 0.1, 0, 0, 0]], dtype=torch.float64)
    whole = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.float64)
    plain, cut = create(Loss(name="bce")), create(Loss(name="bce", bce_threshold=0.2))
    assert cut(LOGITS[:2], targets).item() == plain(LOGITS[:2], whole).item() != plain(LOGITS[:2], targets).item()


def test_a_head_biased_to_guessing_begins_near_the_entropy_of_one_label() -> None:
    # At p = 1/C for every class: log C for the right one, about 1 for all others together.
    logits = torch.full((4, 1000), -math.log(1000), dtype=torch.float64)
    assert create(Loss(name="bce"))(logits, torch.arange(4)).item() == pytest.approx(math.log(1000) + 1, abs=0.01)


def test_the_distance_to_a_teacher_is_zero_at_the_teacher_and_its_gradient_keeps_its_size() -> None:
    teacher = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert distance(teacher, teacher, 2.0).item() == pytest.approx(0, abs=1e-12)
    p, q = LOGITS.softmax(1), teacher.softmax(1)
    assert distance(LOGITS, teacher, 1.0).item() == pytest.approx((q * (q / p).log()).sum(1).mean().item(), rel=1e-9)
    norms = []
    for temperature in (50.0, 100.0):
        logits = LOGITS.clone().requires_grad_()
        distance(logits, teacher, temperature).backward()
        norms.append(logits.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.05)
