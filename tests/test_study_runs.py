"""Studies that train, in real processes: failures, stops, resumption, gradients by layer; studies as SLURM arrays."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, here, metrics, summary

from launch.__main__ import main as launch
from trainer.study import execute

RECIPE = """
global_batch_size: 4
data: {source: synthetic, image_size: 8, synthetic_samples: 64, synthetic_classes: 2}
model: {name: resnet20}
schedule: {epochs: 1000, warmup_epochs: 0}
loop: {eval_every: 0}
report: {log_every: 1, wandb: disabled, gradient_norms: true}
"""
STUDY = """
config: recipe.yaml
axes: {net: {broken: {global_batch_size: 100}, plain: {model.residual: false}, ResNet: {}}}
plot: {kind: gradients}
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "study.yaml").write_text(STUDY + f"output_dir: {tmp_path}/out\n")
    return tmp_path / "study.yaml"


@pytest.mark.end_to_end
def test_a_study_survives_a_failure_stops_on_a_signal_and_goes_on(
    study: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = study.parent / "out" / "plain" / "seed0"
    command = [sys.executable, "-u", "-m", "trainer", "study", str(study)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as going:
        try:
            while not (run / "metrics.jsonl").exists() and going.poll() is None:
                time.sleep(0.05)
            going.send_signal(signal.SIGTERM)
            said, _ = going.communicate(timeout=240)
        finally:
            going.kill()
    assert going.returncode == 75, said
    assert "broken seed 0 failed with exit status 2; the others go on" in said
    assert "global_batch_size=100 is more than the 64 training images" in said and "study stopped by SIGTERM" in said
    assert f"{sys.executable} -m trainer train {study.parent}/recipe.yaml model.residual=false seed=0" in said
    assert summary(run)["status"] == "stopped" and not (study.parent / "out" / "ResNet").exists()

    # The same command, and an end to come to.
    reached = summary(run)["steps"] + 3
    done = here("study", study, f"loop.max_steps={reached}", "--only", "broken", "plain")
    assert done.status == 1 and "failed: broken seed 0 (exit status 2" in done.output, capfd.readouterr()
    assert summary(run)["status"] == "done" and summary(run)["steps"] == reached
    assert "| plain  | 1 of 1 | " in (study.parent / "out" / "table.md").read_text()

    # Each layer's norms make the whole gradient's, at every step once, though the run was stopped in between.
    lines = [json.loads(line) for line in (run / "gradients.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [record["step"] for record in metrics(run, "train")]
    assert [line["step"] for line in lines] == list(range(1, reached + 1))
    for line, record in zip(lines, metrics(run, "train")):
        assert math.dist(line["norms"].values(), [0.0] * len(line["norms"])) == pytest.approx(
            record["grad_norm"], rel=1e-3
        )
    assert {"conv1.weight", "layer3.2.bn2.bias", "fc.bias"} < set(lines[0]["norms"])

    # What is finished is not run again.
    monkeypatch.setattr(execute.subprocess, "Popen", lambda *_, **__: pytest.fail("a finished run is started"))
    done = here("study", study, f"loop.max_steps={reached}", "--only", "plain")
    assert done.status == 0 and f"study 1/1 plain seed 0: finished, {run}" in done.output
    assert "(20 layers)" in (study.parent / "out" / "figure.svg").read_text()


def test_a_signal_that_comes_while_a_run_is_started_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen

    def slowly(*arguments: object, **options: object) -> subprocess.Popen:
        process = start(*arguments, **options)
        os.kill(os.getpid(), signal.SIGUSR1)  # before the caller knows the process
        return process

    monkeypatch.setattr(execute.subprocess, "Popen", slowly)
    with execute._PassingOn() as signals:
        assert signals.run(["sleep", "60"]) == -signal.SIGTERM and signals.caught == signal.SIGUSR1
        assert signals.run(["sleep", "60"]) == execute.STOPPED  # and nothing more is started


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.variant=v3"], "broken: model.variant=v3 is not known"),
        (["--only", "planes"], "--only planes is none of the study's runs; use broken, plain, ResNet"),
        (["--ranks", "0"], "--ranks 0: use 1 or more"),
        (["config=other.yaml"], "plain: model.name=resnet21 is not known: did you mean resnet"),
    ],
)
def test_a_mistake_ends_a_study_before_anything_runs(study: Path, words: list[str], said: str) -> None:
    (study.parent / "other.yaml").write_text(RECIPE.replace("resnet20", "resnet21"))
    only = [] if "--only" in words or "--ranks" in words else ["--only", "plain", "ResNet"]
    done = here("study", study, *words, *only)
    assert done.status == 2 and said in done.errors and done.errors.count("\n") == 1, done
    assert not (study.parent / "out").exists()


def test_a_list_says_where_runs_stand_and_how_they_are_run(study: Path) -> None:
    done = here("study", study, "--list", "--ranks", "2")
    assert done.status == 0 and not (study.parent / "out").exists()
    assert "plain seed 0: not begun\n" in done.output
    start = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 -m trainer train"
    assert done.output.count(start) == 3


def test_a_study_is_an_array_of_its_unfinished_runs(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = study.parent / "out" / "plain" / "seed0"
    run.mkdir(parents=True)
    (run / "summary.json").write_text('{"status": "done", "steps": 16000}')
    (run / "run.json").write_text('{"plan": {"samples": 64}}')
    command = ["sweep", str(study), "--cluster", str(REPOSITORY / "slurm" / "test.yaml"), "--dry-run"]
    assert launch([*command, "seeds=[0,1]", "leave_out=[broken]"]) == 0
    output = capsys.readouterr().out
    assert "--array=0-2" in output and f"output_dir: {study.parent}/out/ResNet/seed0" in output
    assert launch([*command, "leave_out=[broken,ResNet]"]) == 0
    assert f"{study.parent}/out is finished" in capsys.readouterr().out
    assert launch(["sweep", str(study.parent / "recipe.yaml"), *command[2:]]) == 2
    assert "needs --over KEY=V1,V2 ... or --list FILE" in capsys.readouterr().err
