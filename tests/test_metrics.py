"""Counting."""

from __future__ import annotations

import pytest
import torch

from trainer.distributed import World
from trainer.metrics import Pending, averages, sums, target_position

ALONE = World(0, 0, 1, 1, torch.device("cpu"))


def test_target_position_is_that_of_a_stable_sort() -> None:
    torch.manual_seed(0)
    logits = torch.randint(0, 6, (500, 12)).float()  # many ties
    labels = torch.randint(0, 12, (500,))
    order = logits.argsort(dim=1, descending=True, stable=True)
    assert torch.equal(target_position(logits, labels), (order == labels[:, None]).nonzero()[:, 1])


def test_a_network_that_says_the_same_for_all_classes_is_right_by_chance_only() -> None:
    labels = torch.arange(10).repeat(10)
    position = target_position(torch.zeros(100, 10), labels)
    assert (position == 0).float().mean() == 0.1


def test_nan_is_right_for_none() -> None:
    logits = torch.full((4, 10), torch.nan)
    assert (target_position(logits, torch.arange(4)) >= 5).all()
    logits = torch.zeros(1, 10)
    logits[0, 3] = torch.nan
    assert target_position(logits, torch.tensor([0])) >= 1


def test_sums_of_uneven_batches_average_as_one() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(37, 8), torch.randint(0, 8, (37,))

    def total(*pieces: slice) -> list[float]:
        loss = torch.nn.functional.cross_entropy
        parts = [sums(loss(logits[p], labels[p]), logits[p], labels[p]) for p in pieces]
        return Pending(torch.stack(parts).sum(0), ALONE).values()

    whole = averages(total(slice(0, 37)))
    parts = averages(total(slice(0, 5), slice(5, 6), slice(6, 37)))
    assert (parts.top1, parts.top5, parts.count) == (whole.top1, whole.top5, 37)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    top5 = logits.topk(5).indices.eq(labels[:, None]).any(1).float().mean()
    assert whole.top5 == pytest.approx(100 * top5.item())
    assert whole.top1 == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())


def test_five_of_fewer_than_five_classes_is_always_right() -> None:
    found = averages(sums(torch.tensor(1.0), torch.randn(9, 3), torch.randint(0, 3, (9,))).tolist())
    assert found.top5 == 100
