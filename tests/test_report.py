"""What a run tells: its folder, its speed, the console, W&B."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import configfile, environment
from trainer.config import ConfigError
from trainer.plan import Plan
from trainer.report.console import Console
from trainer.report.folder import RunFolder, provenance
from trainer.report.reporter import Reporter, Silent
from trainer.report.speed import WARM_UP_STEPS, Stopwatch

PLAN = Plan.of(configfile.load(None, ["global_batch_size=10", "schedule.epochs=6"]), 1, 100)


class Clock:
    """Pushed by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_speed_counts_steps_and_nothing_else() -> None:
    clock = Clock()
    watch = Stopwatch(clock)

    def step(seconds: float) -> None:
        clock.now += seconds
        watch.step(100, 0.25)

    for _ in range(WARM_UP_STEPS):
        step(50)
    assert watch.whole() == (None, None)
    step(1)
    step(1)
    assert watch.whole() == (100, 0.25) == watch.window()
    assert watch.window() == (None, None)
    watch.skip()  # an evaluation
    step(1000)
    step(3)
    assert watch.window() == (pytest.approx(100 / 3), pytest.approx(0.25 / 3))
    assert watch.whole() == (60, 0.15)


def test_metrics_are_rewound_to_the_step_resumed_from(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.add_metrics({"kind": "train", "step": step})
    folder.release()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # a kill in mid-line
    RunFolder(tmp_path).rewind_metrics(2)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_a_run_folder_is_held_by_one_process_and_freed_by_its_death(tmp_path: Path) -> None:
    script = (
        "import sys, time; from trainer.report.folder import RunFolder\n"
        f"folder = RunFolder({str(tmp_path)!r}); folder.acquire(); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=rf"in use by process {holder.pid} on .*choose another"):
        RunFolder(tmp_path).acquire()
    holder.kill()
    holder.wait()
    folder = RunFolder(tmp_path)
    folder.acquire()
    folder.release()


def test_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.write("summary.json", {"status": "done"})

    def broken(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(ConfigError, match=r"summary\.json cannot be written \(No space"):
        folder.write("summary.json", {"status": "failed"})
    assert folder.read("summary.json") == {"status": "done"}
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match=r"summary\.json is not readable as JSON"):
        folder.read("summary.json")


def test_provenance_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    found = provenance(["train"], environment.recorded())
    assert found["environment"]["NCCL_DEBUG"] == "INFO" and "secret" not in json.dumps(found)
    assert found["commit"] and found["versions"]["torch"]


def test_a_file_gets_plain_lines_without_control_characters() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(PLAN, stream, clock)
    console.step(10)
    clock.now = 10
    console.step(20)
    record = {"step": 20, "loss": 1.5, "top1": 40.0, "lr": 0.1, "images_per_second": 1234.5, "data_wait_fraction": 0.02}
    console.train(record)
    console.evaluation({"step": 20, "count": 50_000, "seconds": 2.0, "top1": 41.0, "top5": 80.0, "loss": 1.25})
    console.close()
    first, second = stream.getvalue().splitlines()
    assert first == (
        "epoch 2.00/6  step 20/60  loss 1.5000  top-1 40.00%  lr 0.1  1,234 images/s  data 2%  0:00:40 left"
    )
    assert second.endswith("evaluated 50,000 images in 2.0 s: top-1 41.00%  top-5 80.00%  loss 1.2500")
    assert set(stream.getvalue()) <= {"\n", *map(chr, range(32, 127))}


def test_a_terminal_gets_one_live_line() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    console = Console(PLAN, stream)
    console.step(30)
    console.say("kept")
    console.close()
    assert "kept" in stream.getvalue() and "step 30/60" in stream.getvalue()


def test_every_reporter_has_every_method() -> None:
    public = {name for name in vars(Reporter) if not name.startswith("_")}
    assert public == {name for name in vars(Silent) if not name.startswith("_")}


def test_a_wandb_key_is_found_where_its_client_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not environment.has_wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert environment.has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert not environment.has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert environment.has_wandb_key()
