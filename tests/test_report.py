"""What a run tells: its folder, its speed, the console, W&B."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path

import pytest
from conftest import here, metrics, summary

from trainer import configfile, environment
from trainer.config import ConfigError, Report
from trainer.plan import Plan
from trainer.report import events, page, tensorboard
from trainer.report.console import Console
from trainer.report.drawing import Drawing
from trainer.report.events import Events
from trainer.report.folder import RunFolder, provenance
from trainer.report.reporter import Reporter, Silent
from trainer.report.speed import WARM_UP_STEPS, Stopwatch
from trainer.report.tensorboard import Board

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


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_metrics_are_rewound_to_the_step_resumed_from_wherever_a_kill_cut(tmp_path: Path, cut: int) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.add_metrics({"kind": "train", "step": step, "loss": 0.25})
    folder.release()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])  # of a line of 40 bytes
    resumed = RunFolder(tmp_path)
    resumed.rewind_metrics(2)
    resumed.add_metrics({"kind": "train", "step": 3, "loss": 0.5})
    resumed.release()
    text = path.read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2, 3]  # as pandas.read_json(lines=True)
    assert text.endswith('"loss": 0.5}\n')


def test_events_outlast_a_kill_in_mid_line(tmp_path: Path) -> None:
    for attempt in (1, 2):
        folder = RunFolder(tmp_path)
        told = Events(folder)
        told.add("start", 0, 0.0, 1.5)
        told.add("save", 5, 2.0, 0.01)
        folder.release()
        (tmp_path / "events.jsonl").write_bytes((tmp_path / "events.jsonl").read_bytes()[:-10])
        found = events.read(tmp_path)
        assert [(e["kind"], e["attempt"]) for e in found] == [("start", n) for n in range(1, attempt + 1)]
    assert found[0]["seconds"] == 1.5 and datetime.fromisoformat(found[0]["time"]).tzinfo


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


def test_a_file_gets_plain_lines_with_the_time_and_without_control_characters() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(PLAN, stream, clock)
    console.step(10)
    clock.now = 10
    console.step(25)
    record = {"step": 25, "loss": 1.5, "top1": 40.0, "lr": 0.1, "images_per_second": 1234.5, "data_wait_fraction": 0.02}
    console.train(record)
    training = {"loss": 1.5, "top1": 40.0, "images_per_second": 1200.0, "seconds": 62}
    console.epoch(30, training, {"count": 50_000, "seconds": 2.0, "top1": 41.0, "top5": 80.0, "loss": 1.25})
    console.epoch(30, training | {"loss": None, "images_per_second": None}, None)
    console.say("class \x1b[31mred\x07")
    console.close([("top-1", "41.00%"), ("done", "runs/a")])
    *stamped, top1, done = stream.getvalue().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in stamped)
    step, epoch, bare, hostile = (line[21:] for line in stamped)
    assert step == (
        "epoch 2.50/6  step 25/60  loss 1.5000  top-1 40.00%  lr 0.1  1,234 images/s  data 2%"
        "  left 0:00:03 of the epoch, 0:00:23 of the run"
    )
    assert epoch == (
        "epoch 3.00/6  step 30/60  took 0:01:02  training loss 1.5000, top-1 40.00%  1,200 images/s  "
        "evaluated 50,000 images in 2.0 s: top-1 41.00%, top-5 80.00%, loss 1.2500"
    )
    assert bare == "epoch 3.00/6  step 30/60  took 0:01:02" and hostile == "class ?[31mred?"
    assert (top1, done) == ("top-1     41.00%", "done      runs/a")
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


def test_tensorboard_is_refused_at_the_start_where_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard.util, "find_spec", lambda name: None)
    (tmp_path / "empty.yaml").write_text("{}")
    options = [tmp_path / "empty.yaml", f"output_dir={tmp_path / 'run'}", "report.tensorboard=true"]
    refused = here("train", *options)
    assert refused.status == 2 and refused.errors.count("\n") == 1 and not (tmp_path / "run").exists()
    assert "report.tensorboard=true needs the package tensorboard: pip install" in refused.errors


def test_tensorboard_shows_every_scalar_and_of_a_resumed_run_each_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = {"kind": "train", "epoch": 1, "samples": 9, "mfu": None, "slowest_rank_by": "data"}
    for done, until, loss in ((0, 8, 0.5), (4, 6, 0.25)):
        board = Board(Report(tensorboard=True), tmp_path, done)
        for step in range(done + 1, until + 1):
            board.log(record | {"step": step, "loss": loss})
        board.close()
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert shown.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value) for e in shown.Scalars("train/loss")] == [
        *((s, 0.5) for s in range(1, 5)),
        (5, 0.25),
        (6, 0.25),
    ]


def test_a_failure_of_tensorboard_ends_it_once_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("in the way of the folder")
    board = Board(Report(tensorboard=True), tmp_path, 0)
    for step in (1, 2):
        board.log({"kind": "train", "step": step, "loss": 0.5})
    board.close()
    assert capsys.readouterr().err.count("no TensorBoard from here on") == 1
    Board(Report(), tmp_path, 0).log({"kind": "train", "step": 1, "loss": 0.5})


def test_a_page_that_fails_warns_once_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = RunFolder(tmp_path)
    drawing = Drawing(folder)  # of a folder without a config
    for _ in range(3):
        drawing.begin()
        drawing.finish()
    assert capsys.readouterr().err.count("no more report.html") == 1 and not (tmp_path / "report.html").exists()


def test_an_epochs_end_does_not_wait_for_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on = threading.Event(), threading.Event()

    def slow(found: list) -> str:
        began.set()
        assert go_on.wait(60)
        return "page"

    monkeypatch.setattr(page, "page", slow)
    (tmp_path / "config.yaml").write_text("{}")
    drawing = Drawing(RunFolder(tmp_path))
    drawing.begin()
    assert began.wait(60)
    drawing.begin()  # while the first is still being made
    assert not (tmp_path / "report.html").exists()
    go_on.set()
    drawing.finish()
    assert (tmp_path / "report.html").read_text() == "page"


@pytest.mark.end_to_end
def test_a_run_in_two_attempts_tells_what_happened_and_leaves_its_page(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("{}")
    options = [tmp_path / "empty.yaml", f"data.root={tiny}", f"output_dir={tmp_path / 'run'}", "data.image_size=32"]
    options += ["global_batch_size=12", "schedule.epochs=4", "schedule.warmup_epochs=1", "model.name=resnet20"]
    options += ["report.wandb=disabled", "report.log_every=2", "checkpoint.every_steps=3", "ema.half_life=48"]
    first = here("train", *options, "loop.max_steps=6")
    assert first.status == 0, first.errors
    second = here("train", *options)
    assert second.status == 0, second.errors

    told = events.read(tmp_path / "run")
    starts = [(e["attempt"], e["step"]) for e in told if e["kind"] == "start"]
    assert starts == [(1, 0), (2, 6)] and [e["status"] for e in told if e["kind"] == "end"] == ["done", "done"]
    assert [e["step"] for e in told if e["kind"] == "eval"] == [4, 6, 8, 12, 16]
    saves = [e for e in told if e["kind"] == "save"]
    assert {e["step"] for e in saves} == {3, 4, 6, 8, 9, 12, 15, 16} and all(0 < e["seconds"] < 60 for e in saves)
    for attempt in (1, 2):  # the second goes on from the time of the save, which is before the first's end
        times = [e["wall_seconds"] for e in told if e["attempt"] == attempt]
        assert times == sorted(times)

    last = [r for r in metrics(tmp_path / "run", "train") if r["images_per_second"]][-1]
    assert last["step_seconds"] == pytest.approx(12 / last["images_per_second"])
    assert last["images_per_second_per_gpu"] == last["images_per_second"] and 0 < last["ema_decay"] < 1
    absent = ("allreduce_fraction", "mfu", "max_memory_gb", "gpu_utilisation", "loss_scale")
    assert all(last[key] is None for key in absent)

    found = summary(tmp_path / "run")
    assert found["bound"] in ("compute", "input") and found["health"] and "Too few" not in found["health"]
    assert sum(found["seconds_by_part"].values()) == pytest.approx(found["wall_seconds"], rel=0.05)
    *stamped, time, health, top1, averaged, speed, done = second.output.splitlines()
    assert [line.split()[0] for line in (time, health, top1, averaged, speed, done)] == [
        *("time", "health", "top-1", "averaged", "speed", "done")
    ]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in stamped)
    assert sum("  took 0:" in line for line in stamped) == 3, "a line an epoch"
    assert set(second.output) <= {"\n", *map(chr, range(32, 127))}

    text = (tmp_path / "run" / "report.html").read_text()
    assert "started again at step 6 (attempt 2)" in text and f"{found['best_top1']:.2f}%" in text and ">done<" in text
