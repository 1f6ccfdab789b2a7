"""What is taken for what: exact for any number of ranks, and what a run writes down of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import here, metrics, torchrun
from PIL import Image

from trainer import confusion
from trainer.confusion import Confusion, Findings
from trainer.distributed import World


class Ranks:
    """Some ranks in one process, one after the other: the last gets the sum of all."""

    def __init__(self, size: int) -> None:
        self.size, self.device, self.rank = size, torch.device("cpu"), 0
        self.total = torch.zeros((), dtype=torch.int32)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.total = self.total + tensor
        return self.total


def found(logits: torch.Tensor, labels: torch.Tensor, ranks: int, batch: int, keep: int) -> Findings:
    world = Ranks(ranks)
    for rank in range(ranks):
        world.rank = rank
        counts = Confusion(logits.shape[1], keep, world)
        share = torch.arange(len(labels) * rank // ranks, len(labels) * (rank + 1) // ranks)
        for rows in share.split(batch):
            counts.add(logits[rows], labels[rows], rows)
        result = counts.total()
    return result


@pytest.mark.parametrize("most", [2000, 5])
def test_any_number_of_ranks_finds_the_same(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confusion, "LARGEST", most)
    torch.manual_seed(0)
    # Few values, so that many mistakes are equally confident.
    logits, labels = torch.randint(0, 3, (101, 7)).float(), torch.randint(0, 7, (101,))
    whole = found(logits, labels, 1, 101, 16)
    # Not softmax: rounded otherwise, equals would be none.
    predicted, probability = logits.argmax(1), (logits.max(1).values - logits.logsumexp(1)).exp()
    for label in range(7):
        assert whole.counts[label] == (labels == label).sum()
        assert whole.right[label] == ((labels == label) & (predicted == label)).sum()
    wrong = sorted((row for row in range(101) if predicted[row] != labels[row]), key=lambda r: (-probability[r], r))
    assert [one.row for one in whole.mistakes] == wrong[:16]
    assert [one.actual for one in whole.mistakes] == labels[wrong[:16]].tolist()
    assert sum(n for *_, n in whole.pairs) == (len(wrong) if most > 7 else 0)
    for actual, taken, count in whole.pairs:
        assert count == ((labels == actual) & (predicted == taken)).sum() and actual != taken
    for ranks, batch in ((1, 8), (2, 13), (3, 8), (3, 101), (200, 1)):
        again = found(logits, labels, ranks, batch, 16)
        assert again.mistakes == whole.mistakes and again.pairs == whole.pairs
        assert torch.equal(again.counts, whole.counts) and torch.equal(again.right, whole.right)


def test_a_broken_network_is_confident_of_nothing() -> None:
    logits = torch.full((4, 3), float("nan"))
    assert found(logits, torch.tensor([0, 1, 2, 0]), 1, 4, 16).mistakes == []
    assert found(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), 1, 4, 0).mistakes == []


def test_real_ranks_add_up() -> None:
    world = World(0, 0, 1, 1, torch.device("cpu"))
    counts = Confusion(3, 2, world)
    counts.add(torch.eye(3), torch.tensor([0, 2, 2]), torch.arange(3))
    result = counts.total()
    assert result.pairs == [(2, 1, 1)] and result.right.tolist() == [1, 0, 1]


RUN = ["data.image_size=32", "global_batch_size=24", "schedule.epochs=2", "schedule.warmup_epochs=0"]
# No BatchNorm, whose statistics would be each rank's own.
RUN += ["model.name=timm:test_convnext", "precision.amp=fp32", "optim.lr=1e-6"]
RUN += ["report.wandb=disabled", "report.mistakes=30"]


@pytest.mark.end_to_end
def test_two_ranks_write_down_what_one_does(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("{}")
    for ranks in (1, 2):
        options = ["train", tmp_path / "empty.yaml", *RUN, f"data.root={tiny}", f"output_dir={tmp_path / str(ranks)}"]
        done = here(*options) if ranks == 1 else torchrun(*options, ranks=2)
        assert done.status == 0, done.errors
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("1", "2"))
    assert one["per_class"] == two["per_class"] and one["confusions"] == two["confusions"]
    assert [m["file"] for m in one["mistakes"]] == [m["file"] for m in two["mistakes"]]
    (*_, record) = metrics(tmp_path / "1", "eval")
    assert (one["step"], one["top1"]) == (record["step"], record["top1"])
    hits = sum(c["count"] * c["top1"] / 100 for c in one["per_class"])
    assert hits == pytest.approx(23 * record["top1"] / 100, abs=1e-3)
    assert len(one["mistakes"]) == 23 - round(hits) == sum(c["count"] for c in one["confusions"])
    for run in ("1", "2"):
        pictures = {f"mistakes/{path.name}" for path in (tmp_path / run / "mistakes").iterdir()}
        assert pictures == {m["picture"] for m in one["mistakes"]}
        with Image.open(tmp_path / run / one["mistakes"][0]["picture"]) as picture:
            assert min(picture.size) == 128
        with Image.open(tmp_path / run / "examples.jpg") as sheet:
            assert sheet.size == (8 * 32, (24 // int(run) + 7) // 8 * 32)
