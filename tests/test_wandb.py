"""W&B: one run for the whole life of a job, in files and on a loopback server, and what becomes of it in trouble."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY, metrics
from PIL import Image
from wandb_server import HANGING, WandbServer, wandb_server

from launch.sync import sync
from trainer import environment
from trainer.config import ConfigError, Report
from trainer.report import rows, wandb_run, wandb_session
from trainer.report.folder import RunFolder
from trainer.report.rows import Position
from trainer.report.segments import history, written
from trainer.report.wandb_run import WandbRun
from trainer.report.wandb_session import kill_client

SYNTHETIC = """
data: {source: synthetic, synthetic_samples: 24, synthetic_classes: 2, image_size: 8}
model: {name: resnet20}
schedule: {epochs: 100000, warmup_epochs: 0}
precision: {amp: fp32}
global_batch_size: 4
device: cpu
checkpoint: {every_steps: 4}
report: {log_every: 1, wandb: offline}
"""


pytestmark = pytest.mark.timeout(900)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key, no settings, no caches and no client process but the test's own; and time enough on any machine."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for name in ("FILE_STREAM_RETRY_WAIT_MAX", "FILE_STREAM_RETRY_WAIT_MIN", "GRAPHQL_RETRY_WAIT_MAX"):
        monkeypatch.setenv(f"WANDB__{name}_SECONDS", "1")  # 60 by default
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb-own"))
    monkeypatch.setattr(wandb_run, "PATIENCE", 300)
    monkeypatch.setattr(wandb_session, "INIT_TIMEOUT", 200)
    monkeypatch.setattr(wandb_session, "FINISH_TIMEOUT", 200)
    monkeypatch.setattr(wandb_session, "PROBE_TIMEOUT", 1)
    yield
    kill_client()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with wandb_server() as found:
        monkeypatch.setenv("WANDB_BASE_URL", found.url)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        yield found


def note(folder: Path, *records: dict) -> None:
    """Append to metrics.jsonl as a run does."""
    with open(folder / "metrics.jsonl", "a") as file:
        for record in records:
            file.write(json.dumps({"epoch": record["step"] / 10, "samples": 8 * record["step"], **record}) + "\n")


def train(step: int, loss: float = 1.0) -> dict:
    return {"kind": "train", "step": step, "loss": loss, "lr": 0.1, "images_per_second": 100.0, "mfu": None}


def evaluation(step: int, top1: float = 50.0) -> dict:
    return {"kind": "eval", "step": step, "top1": top1, "ema_top1": top1 + 1, "count": 23}


def segments(run: Path) -> list[Path]:
    return sorted((run / "wandb").glob("offline-run-*/*.wandb"))


def inspected(segment: Path, *arguments: str) -> list[dict]:
    """What W&B's own reader finds in a segment."""
    command = [Path(sys.executable).parent / "wandb", "leet", "inspect", "--json", *arguments, segment]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    return [json.loads(output)] if "--summary" in arguments else [json.loads(line) for line in output.splitlines()]


def wandb_rows(run: Path) -> list[dict]:
    """The history in all segments of a run, in order, as W&B's own reader finds it."""
    found = [record for segment in segments(run) for record in inspected(segment) if record["type"] == "history"]
    return [record["history"]["item"] for record in found]


def assert_same(logged: list[dict], run: Path) -> None:
    """Each step of metrics.jsonl stands once in W&B's history, in order, with its values."""
    expected = list(rows.missing(run / "metrics.jsonl", Position(), 1e9))
    steps = [row["trainer/step"] for row in logged]
    assert steps == sorted(set(steps)) == [row["trainer/step"] for row in expected]
    for row, values in zip(logged, expected):
        assert {key: row[key] for key in values} == pytest.approx(values)


def test_rows_are_one_a_step_by_section_and_only_what_is_missing(tmp_path: Path) -> None:
    note(tmp_path, train(10, 3.0), train(20, 2.0), evaluation(20), train(30))
    (tmp_path / "metrics.jsonl").open("a").write('{"kind": "tra')
    first, second, third = rows.missing(tmp_path / "metrics.jsonl", Position(), 1e9)
    assert first == {
        "trainer/step": 10,
        "trainer/epoch": 1.0,
        "trainer/samples": 80,
        "train/loss": 3.0,
        "train/lr": 0.1,
        "perf/images_per_second": 100.0,
    }
    assert second["train/loss"] == 2.0 and second["eval/top1"] == 50 and second["eval/ema_top1"] == 51
    assert Position.of(second) == Position(20, 20) and Position.of(third) == Position(30, 0)

    def steps(position: Position, until: float) -> list[int]:
        return [row["trainer/step"] for row in rows.missing(tmp_path / "metrics.jsonl", position, until)]

    assert steps(Position(10, 0), 20) == [20]
    assert steps(Position(20, 20), 20) == []
    # Stopped while it was evaluated: the evaluation comes alone.
    (late,) = rows.missing(tmp_path / "metrics.jsonl", Position(20, 0), 20)
    assert late["eval/top1"] == 50 and "train/loss" not in late


def test_rows_wait_for_the_save_that_covers_them(tmp_path: Path) -> None:
    note(tmp_path, *(train(step) for step in (1, 2, 3, 4)))
    run = WandbRun(Report(name="tested", tags=["a"], group="g"), tmp_path, "abcd1234", {"optim": {"lr": 0.5}})
    run.saved(2)
    run.finish({"status": "failed", "steps": 4, "error": "NonFiniteError: nan"})
    # The next attempt takes steps 3 and 4 again.
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:2]))
    note(tmp_path, train(3, 7.0), train(4, 8.0), evaluation(4, 60.0))
    run = WandbRun(Report(name="tested"), tmp_path, "abcd1234", {"optim": {"lr": 0.5}})
    run.finish({"status": "done", "steps": 4, "best_top1": 60.0})
    first, second = segments(tmp_path)
    assert [row["trainer/step"] for row in history(first)] == [1, 2]
    assert_same(wandb_rows(tmp_path), tmp_path)
    (found,) = inspected(second, "--summary")
    assert found["config"]["optim"]["lr"] == 0.5 and found["summary"]["best_epoch"] == 0.4


@pytest.mark.end_to_end
@pytest.mark.timeout(3000)
def test_killed_and_resumed_twice_each_step_stands_once(tmp_path: Path) -> None:
    """kill -9 in mid-epoch, after saves and some steps more; then a stop by a signal; then to the end."""
    run = tmp_path / "run"
    (tmp_path / "c.yaml").write_text(SYNTHETIC)
    command = [sys.executable, "-m", "trainer", "train", str(tmp_path / "c.yaml"), f"output_dir={run}"]

    def interrupted(attempt: int, number: int) -> int:
        """Run the command until rows of this attempt are on disk and some later steps are done; send it a signal."""
        with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL) as process:
            try:
                wait_for(lambda: len(segments(run)) == attempt and list(history(segments(run)[-1])), 1200)
                reached = len(rows.read(run / "metrics.jsonl"))
                wait_for(lambda: len(rows.read(run / "metrics.jsonl")) >= reached + 2, 1200)
                process.send_signal(number)
                return process.wait(1200)
            finally:
                process.kill()

    assert interrupted(1, signal.SIGKILL) == -signal.SIGKILL
    assert interrupted(2, signal.SIGUSR2) == 75
    last = len(metrics(run, "train")) + 6
    assert subprocess.run([*command, f"loop.max_steps={last}"], cwd=REPOSITORY, timeout=1200).returncode == 0
    assert len(segments(run)) == 3 and len(metrics(run, "train")) == last
    assert_same(wandb_rows(run), run)


def test_the_mode_is_what_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = ("auto", "online", "offline", "disabled")
    assert [environment.wandb_mode(mode) for mode in modes] == ["offline", "offline", "offline", "disabled"]
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert [environment.wandb_mode(mode) for mode in modes] == ["online", "online", "offline", "disabled"]
    monkeypatch.setenv("WANDB_MODE", "offline")  # as a cluster's profile may say
    assert [environment.wandb_mode(mode) for mode in modes] == ["offline", "online", "offline", "disabled"]


def test_online_one_run_is_gone_on_with_where_the_server_says(tmp_path: Path, server: WandbServer) -> None:
    options = Report(entity="me", project="p", name="n", group="g", job_type="t", tags=["a", "b"], notes="words")
    note(tmp_path, *(train(step) for step in (1, 2, 3)), evaluation(3))
    run = WandbRun(options, tmp_path, "abcd1234", {"optim": {"lr": 0.5}, "run": {"commit": "c0ffee"}})
    run.saved(3)
    note(tmp_path, train(4))
    run.finish({"status": "stopped", "steps": 4, "signal": "SIGUSR2"})
    assert server.runs["abcd1234"]["preempting"] is True
    note(tmp_path, train(5), evaluation(5, 70.0))
    run = WandbRun(options, tmp_path, "abcd1234", {"optim": {"lr": 0.5}, "run": {"commit": "cafe"}})
    run.finish({"status": "done", "steps": 5, "best_top1": 70.0, "images_per_second": 9.0})
    assert_same(server.history("abcd1234"), tmp_path)
    found = server.runs["abcd1234"]
    assert json.loads(found["config"])["run"]["value"]["commit"] == "cafe"
    assert found["asked"]["groupName"] == "g" and found["asked"]["tags"] == ["a", "b"]
    assert server.summary("abcd1234") | {"best_epoch": 0.5, "images_per_second": 9.0} == server.summary("abcd1234")
    name = tmp_path.name
    assert [alert["title"] for alert in server.alerts] == [f"{name} was stopped", f"{name} is done"]
    assert not segments(tmp_path) and server.unknown == []


def test_an_unreachable_server_turns_the_run_into_an_offline_one(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wandb_session, "INIT_TIMEOUT", 1)
    server.fail = HANGING
    note(tmp_path, train(1))
    began = time.monotonic()
    run = WandbRun(Report(), tmp_path, "abcd1234", {})
    assert time.monotonic() - began < 1  # nothing waits for it
    run.finish({"status": "done", "steps": 1})
    assert_same([row for segment in segments(tmp_path) for row in history(segment)], tmp_path)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: W&B is written offline, its server cannot be had (")
    assert f"python -m launch sync {tmp_path}" in warning


@pytest.mark.parametrize("trouble", [500, HANGING])
def test_a_server_that_fails_in_mid_run_gets_the_rest_later(
    trouble: int | str,
    tmp_path: Path,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(wandb_session, "FINISH_TIMEOUT", 2)
    note(tmp_path, train(1))
    run = WandbRun(Report(), tmp_path, "abcd1234", {})
    run.saved(1)
    wait_for(lambda: "abcd1234" in server.runs)
    server.fail = trouble
    note(tmp_path, train(2))
    run.saved(2)
    run.finish({"status": "stopped", "steps": 2, "signal": "SIGINT"})
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning == (
        f"warning: W&B's server has not taken all of it yet; metrics.jsonl has all, and `python -m launch sync "
        f"{tmp_path}` uploads it"
    )
    server.fail = None
    note(tmp_path, train(3))
    WandbRun(Report(), tmp_path, "abcd1234", {}).finish({"status": "done", "steps": 3})
    assert_same(server.history("abcd1234"), tmp_path)


def test_an_alert_is_only_for_a_server_that_answers(server: WandbServer) -> None:
    assert wandb_session.answers(server.url)
    for server.fail in (500, HANGING):
        assert not wandb_session.answers(server.url)
    assert not wandb_session.answers("http://127.0.0.1:9")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_killed_client_process_is_started_anew(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note(tmp_path, train(1), train(2))
    run = WandbRun(Report(), tmp_path, "abcd1234", {})
    run.saved(1)
    wait_for(lambda: segments(tmp_path))
    for core in children("wandb-core"):
        os.kill(core, number)
        wait_for(lambda core=core: core not in children("wandb-core"))
    run.finish({"status": "done", "steps": 2})
    assert_same([row for segment in segments(tmp_path) for row in history(segment)], tmp_path)
    assert written(tmp_path, "abcd1234") == Position(2)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: W&B's process is started anew (")


def test_what_keeps_failing_is_given_up_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object) -> None:
        raise ConnectionResetError("wandb-core is gone")

    monkeypatch.setattr(wandb_run, "Session", broken)
    run = WandbRun(Report(wandb="offline"), tmp_path, "x", {})
    run.saved(1)
    run.finish({"status": "done", "steps": 1})
    (warning,) = capsys.readouterr().err.splitlines()
    assert "ConnectionResetError: wandb-core is gone" in warning


def test_sync_follows_a_run_until_it_is_done(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wandb_session, "INIT_TIMEOUT", 2)
    monkeypatch.setattr(wandb_session, "FINISH_TIMEOUT", 5)
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ConfigError, match=r"no run that has begun \(run.json\)"):
        sync(run)
    (run / "run.json").write_text('{"wandb_id": "abcd1234", "commit": "c0ffee"}')
    (run / "config.yaml").write_text("{report: {wandb: offline, name: n}}")
    # What the run itself wrote, of which the server knows nothing.
    note(run, *(train(step) for step in (1, 2, 3)))
    save(run, 2)
    itself = WandbRun(Report(wandb="offline"), run, "abcd1234", {})
    itself.saved(2)
    itself.finish({"status": "failed", "steps": 3})
    seen, happens = [], iter(range(9))

    def pause(seconds: float) -> None:
        """What happens between the rounds."""
        now = next(happens)
        seen.append((seconds, [row["trainer/step"] for row in server.history("abcd1234")]))
        if now == 0:  # the server is back
            server.fail = None
        elif now == 1:
            wait_for(lambda: len(server.history("abcd1234")) == 2)  # the client sends every 15 s
            note(run, train(4), evaluation(4, 77.0))
            save(run, 4)
        elif now == 2:
            server.fail = 500  # and ends meanwhile
            note(run, train(5))
            (run / "summary.json").write_text('{"status": "done", "steps": 5, "best_top1": 77.0}')
        elif now == 3:
            server.fail = None

    server.fail = 500
    assert sync(run, every=60, pause=pause) == 0
    assert seen[0] == (60, []) and seen[-1][1][:2] == [1, 2]
    assert_same(server.history("abcd1234"), run)
    found = server.runs["abcd1234"]
    assert (found["exitcode"], found["complete"]) == (0, True) and server.summary("abcd1234")["best_epoch"] == 0.4
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: W&B's server cannot be had (") and "the next sync" in warning
    assert sync(run) == 0 and len(server.history("abcd1234")) == 5


def test_sync_leaves_a_run_alone_that_logs_online(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"wandb_id": "abcd1234"}')
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "latest-run").symlink_to("run-20260101_000000-abcd1234")
    folder = RunFolder(tmp_path)
    folder.acquire()
    with pytest.raises(ConfigError, match="is being logged online by the run itself"):
        sync(tmp_path)
    folder.release()
    assert not folder.lease.beating()


def test_the_best_checkpoint_is_an_artifact_and_pictures_are_media(tmp_path: Path) -> None:
    for step, top1 in ((2, 60.0), (4, 70.0), (6, 65.0), (7, None)):
        save(tmp_path, step, top1)
    (tmp_path / "mistakes").mkdir()
    for name in ("examples.jpg", "mistakes/0.jpg"):
        Image.new("RGB", (16, 16), (200, 0, 0)).save(tmp_path / name)
    mistake = {"file": "a/1.JPEG", "actual": "a", "predicted": "b", "probability": 0.9, "picture": "mistakes/0.jpg"}
    mistakes = [mistake, mistake | {"picture": "mistakes/gone.jpg"}]
    found = {"step": 4, "per_class": [{"name": "a", "count": 5, "top1": 40.0}], "mistakes": mistakes}
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    note(tmp_path, evaluation(2), train(4), evaluation(4, 70.0))
    run = WandbRun(Report(artifact="best"), tmp_path, "abcd1234", {})
    run.finish({"status": "done", "steps": 7})
    (segment,) = segments(tmp_path)
    first, second = wandb_rows(tmp_path)
    assert first["train/examples._type"] == "image-file" and "eval/classes._type" not in first
    assert second["eval/classes.nrows"] == 1 and second["eval/mistakes.nrows"] == 1
    assert "train/examples._type" not in second
    table = next((segment.parent / "files").glob("media/table/eval/mistakes*.json"))
    (row,) = json.loads(table.read_text())["data"]
    assert row[1:] == ["a", "b", 0.9, "a/1.JPEG"]
    artifacts = [record["artifact"] for record in inspected(segment) if record["type"] == "artifact"]
    shown = [file["path"] for one in artifacts if "evalmistakes" in one["name"] for file in one["manifest"]["contents"]]
    assert sum(path.startswith("media/images/") for path in shown) == 1
    (best,) = [artifact for artifact in artifacts if artifact["type"] == "model"]
    assert best["name"] == "abcd1234-best" and json.loads(best["metadata"]) == {"step": 4}
    assert set(best["aliases"]) == {"best", "latest"}
    (file,) = best["manifest"]["contents"]
    assert file["local_path"] == str(tmp_path / "checkpoints" / "000000004" / "manifest.json")


def save(run: Path, step: int, top1: float | None = None) -> None:
    """What is to be seen of a checkpoint from outside."""
    folder = run / "checkpoints" / f"{step:09}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"top1": top1}))


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def children(name: str) -> list[int]:
    """The child processes of this one with that name, zombies aside."""
    found = subprocess.run(["ps", "-o", "pid=,stat=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    lines = [line.split() for line in found.stdout.splitlines()]
    return [int(pid) for pid, state, command, *_ in lines if command == name and not state.startswith("Z")]
