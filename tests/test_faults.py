"""What a run does when something goes wrong in it: real ranks, DALI, signals, and a fault put in (tests/faulty.py)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import here, metrics, summary, torchrun_script

from trainer import checkpoint

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(1200)]  # under 60 s where nothing else runs

# 48 images, 8 a step: 6 steps an epoch, 12 in all.
SMALL = ["model.name=resnet20", "data.image_size=32", "global_batch_size=8", "schedule.epochs=2", "optim.lr=0.01"]
NO_BATCHNORM = ["model.name=timm:test_convnext"]  # so that the split over ranks changes nothing
SMALL += ["schedule.warmup_epochs=0", "report.log_every=1", "report.wandb=disabled", "precision.amp=fp32"]
ROLLBACK = ["loop.on_nonfinite=rollback", "checkpoint.every_steps=2"]


@dataclass
class Scenarios:
    """Runs of one torchrun of two ranks, in a folder."""

    folder: Path
    data: Path

    def one(self, name: str, fault: str = "", *overrides: str, run: str = "", **where: int) -> dict:
        """`run`: whose run folder to go on with; its own if not said."""
        arguments = [str(self.folder / "empty.yaml"), f"data.root={self.data}", f"output_dir={self.run(run or name)}"]
        return {"name": name, "fault": fault, "arguments": [*arguments, *SMALL, *overrides], **where}

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def start(self, *scenarios: dict) -> None:
        done = torchrun_script("tests/faulty.py", self.folder, json.dumps(scenarios), ranks=2, timeout=1200)
        assert len(list(self.folder.glob("*.json"))) == 2 * len(scenarios), done.output + done.errors

    def said(self, name: str) -> list[dict]:
        """By rank: status, output, errors."""
        return [json.loads((self.folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]

    def statuses(self, name: str) -> set[int]:
        return {said["status"] for said in self.said(name)}

    def steps(self, name: str) -> list[int]:
        return [record["step"] for record in metrics(self.run(name), "train")]

    def saved(self, name: str) -> int:
        return checkpoint.listing(self.run(name) / "checkpoints")[-1].step

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return checkpoint.load(checkpoint.newest_whole(self.run(name) / "checkpoints"))["model"]


@pytest.fixture(scope="module")
def done(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Scenarios:
    """All that can be tried in one start of two ranks: starting takes longer than the runs."""
    s = Scenarios(tmp_path_factory.mktemp("faults"), tiny)
    (s.folder / "empty.yaml").write_text("{}")
    for name, overrides in (("one rank", []), ("one, then two", ["loop.max_steps=4"])):
        assert here("train", *s.one(name, "", *NO_BATCHNORM, *overrides)["arguments"]).status == 0
    s.start(
        s.one("whole"),
        s.one("two", "", *NO_BATCHNORM, run="one, then two"),
        s.one("usr1", "signal SIGUSR1", rank=1, step=3),
        s.one("int", "signal SIGINT", rank=-1, step=2),
        s.one("evaluation", "evaluation signal SIGTERM", rank=1, step=1),
        s.one("evaluation again", run="evaluation"),
        s.one("nan", "nan", "report.log_every=6", rank=1, step=3),
        s.one("skip", "nan", "loop.on_nonfinite=skip", rank=1, step=3),
        s.one("skip always", "nan always", "loop.on_nonfinite=skip", "loop.nonfinite_limit=3", rank=0, step=3),
        s.one("rollback", "nan", *ROLLBACK, rank=1, step=3),
        s.one("far back", "nan", *ROLLBACK, "checkpoint.every_steps=5", "report.tensorboard=true", rank=1, step=3),
        s.one("cut", "nan", *ROLLBACK, "loop.max_steps=5", rank=1, step=3),
        s.one("cut, then on", "", *ROLLBACK, run="cut"),
        s.one("rollback always", "nan always", "loop.on_nonfinite=rollback", "loop.nonfinite_limit=2", rank=1, step=3),
        s.one("flip", "flip", "distributed.check_every=2", rank=1, step=4),
    )
    return s


def test_resumed_on_more_ranks_the_losses_are_the_same(done: Scenarios) -> None:
    assert done.statuses("two") == {0} and "going on after step 4" in done.said("two")[0]["output"]
    ours, theirs = (
        torch.tensor([[r["step"], r["loss"], r["lr"]] for r in metrics(done.run(name), "train")])
        for name in ("one, then two", "one rank")
    )
    assert len(ours) == 12 and torch.allclose(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize(("name", "step", "number"), [("usr1", 3, "SIGUSR1"), ("int", 2, "SIGINT")])
def test_all_ranks_stop_after_the_step_in_which_a_signal_came(
    done: Scenarios, name: str, step: int, number: str
) -> None:
    assert done.statuses(name) == {75}
    found = summary(done.run(name))
    assert found["status"] == "stopped" and f"stopped by {number}" in done.said(name)[0]["output"]
    assert done.saved(name) == found["steps"] == done.steps(name)[-1] == step + 1


def test_a_signal_in_an_evaluation_stops_it_and_it_is_redone(done: Scenarios) -> None:
    assert done.statuses("evaluation") == {75} and done.statuses("evaluation again") == {0}
    assert [r["step"] for r in metrics(done.run("evaluation"), "eval")] == [6, 12]
    assert done.steps("evaluation") == done.steps("whole")
    whole = done.weights("whole")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in done.weights("evaluation").items())
    top1 = [[r["top1"] for r in metrics(done.run(name), "eval")] for name in ("whole", "evaluation")]
    assert top1[0] == top1[1]


def test_a_loss_that_is_not_finite_is_named_with_its_rank_and_step(done: Scenarios) -> None:
    assert done.statuses("nan") == {1}
    (said, silent) = done.said("nan")
    assert re.match(
        r"error: the loss .* in steps 0 to 5, first in step 3, in the loss of rank 1: lower", said["errors"]
    )
    assert not silent["errors"] and "rank 1" in summary(done.run("nan"))["error"]


def test_a_skipped_step_changes_nothing_on_any_rank(done: Scenarios) -> None:
    assert done.statuses("skip") == {0}
    assert done.steps("skip") == [1, 2, 3, *range(5, 13)]
    assert (
        "warning: 1 steps before step 4 were skipped, first in step 3, in the loss of rank 1"
        in (done.said("skip")[0]["output"])
    )
    losses = [{r["step"]: r["loss"] for r in metrics(done.run(name), "train")} for name in ("whole", "skip")]
    assert [losses[0][s] == losses[1][s] for s in (1, 2, 3)] == [True] * 3
    assert all(tensor.isfinite().all() for tensor in done.weights("skip").values() if tensor.is_floating_point())
    saved = checkpoint.load(checkpoint.newest_whole(done.run("skip") / "checkpoints"))
    for rank in saved["ranks"]:  # each one's BatchNorm statistics: the forward pass on NaN has left no trace
        assert all(tensor.isfinite().all() for tensor in rank["buffers"].values() if tensor.is_floating_point())


def test_too_many_skipped_in_a_row_stop_the_run(done: Scenarios) -> None:
    assert done.statuses("skip always") == {1}
    # Seen a step late; nothing was applied meanwhile, so the last good weights are still there.
    assert done.steps("skip always") == [1, 2, 3]
    assert re.search(
        r"step 5, in the loss of rank 0|step 3, in the loss of rank 0", done.said("skip always")[0]["errors"]
    )


def test_a_rollback_goes_on_from_the_last_save_without_the_data_since(done: Scenarios) -> None:
    assert done.statuses("rollback") == {0}
    recorded = json.loads((done.run("rollback") / "rollbacks.json").read_text())["rollbacks"]
    assert [(r["at"], r["skipped"] > 0) for r in recorded] == [(2, True)] and "rank 1" in recorded[0]["why"]
    assert done.steps("rollback") == list(range(1, 13))
    assert all(tensor.isfinite().all() for tensor in done.weights("rollback").values() if tensor.is_floating_point())
    # Stopped after it, and run again: the same data is left out.
    assert done.statuses("cut") == done.statuses("cut, then on") == {0}
    whole = done.weights("rollback")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in done.weights("cut").items())
    # What is bad at every try ends the run after so many.
    assert done.statuses("rollback always") == {1}
    recorded = json.loads((done.run("rollback always") / "rollbacks.json").read_text())["rollbacks"]
    assert [r["at"] for r in recorded] == [0, 0]


def test_steps_thrown_away_by_a_rollback_are_reported_once(done: Scenarios) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert done.statuses("far back") == {0}
    recorded = json.loads((done.run("far back") / "rollbacks.json").read_text())["rollbacks"]
    assert [(r["at"], r["skipped"] >= 3) for r in recorded] == [(0, True)]
    assert done.steps("far back") == list(range(1, 13))
    shown = EventAccumulator(str(done.run("far back") / "tensorboard")).Reload()
    assert [e.step for e in shown.Scalars("train/loss")] == list(range(1, 13))


def test_one_flipped_bit_stops_the_run_and_is_found_between_two_comparisons(done: Scenarios) -> None:
    assert done.statuses("flip") == {1}
    said = done.said("flip")[0]["errors"]
    assert re.match(r"error: the weights of the ranks \[0\] and \[1\] differ.* after step 6.*equal after step 4", said)
