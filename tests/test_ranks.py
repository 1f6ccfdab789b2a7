"""Ranks that die and hang, in real processes under torchrun: who is named, and what a restart goes on with."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from pathlib import Path

import pytest
import torch
from conftest import Finished, kill, metrics, start_torchrun, summary, torchrun_script, workers
from test_faults import SMALL

from trainer import checkpoint

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(1200)]


def scenario(folder: Path, data: Path, fault: str, *overrides: str) -> list[str]:
    (folder / "empty.yaml").write_text("{}")
    arguments = [str(folder / "empty.yaml"), f"data.root={data}", f"output_dir={folder / 'run'}", *SMALL, *overrides]
    # The fault in step 7; the last save before it is that of step 6.
    one = {"name": "one", "arguments": arguments, "fault": fault, "rank": 1, "step": 7, "aside": False}
    return ["tests/faulty.py", str(folder), json.dumps([one])]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.newest_whole(folder / "run" / "checkpoints"))["model"]


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks make of it undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    done = torchrun_script(*scenario(folder, tiny, ""), ranks=2, timeout=600)
    assert done.status == 0, done.errors
    return folder


# A process that is killed or stopped was last heard of up to a beat before; its peer waits for it in the step itself.
FAULTS = {
    "signal SIGKILL": r"rank 0 of 2, in step 7, .* lost rank 1 \(process \d+ on {host}, last heard of in",
    "raise": r"rank 0 of 2, in step 7, .* in step 7, phase data; MemoryError: no memory left",
    "hang": r"ends: no progress for 8 s .*: rank 1 holds up the run \(process \d+ on {host}, .* step 7, phase data",
    "signal SIGSTOP": r"no progress for 8 s .*: rank 1 no longer answers \(process \d+ on {host}, last heard of in",
}


@pytest.mark.parametrize(
    "fault", ["signal SIGKILL", *(pytest.param(fault, marks=pytest.mark.faults) for fault in list(FAULTS)[1:])]
)
def test_a_lost_rank_is_named_and_torchrun_restarts_from_the_last_save(
    tiny: Path, tmp_path: Path, whole: Path, fault: str
) -> None:
    run = scenario(tmp_path, tiny, fault, "distributed.hang_after=8")
    done: Finished = torchrun_script(*run, ranks=2, options=["--max-restarts", "1"], timeout=900)
    assert done.status == 0, done.errors
    assert re.search(FAULTS[fault].format(host=re.escape(socket.gethostname())), done.errors), done.errors
    assert "going on after step 6" in done.output and summary(tmp_path / "run")["status"] == "done"
    assert [r["step"] for r in metrics(tmp_path / "run", "train")] == list(range(1, 13))
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path).items())
    if fault == "hang":
        assert "in happen" in (tmp_path / "run" / "stacks-rank1.txt").read_text()


@pytest.mark.faults
def test_with_fewer_nodes_the_run_goes_on(tiny: Path, tmp_path: Path) -> None:
    run = scenario(tmp_path, tiny, "", "schedule.epochs=400", "loop.max_steps=400", "checkpoint.every_steps=5")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    elastic = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
    elastic += ["--rdzv-endpoint", f"localhost:{port}", "--rdzv-conf", "last_call_timeout=8"]
    first = start_torchrun(*elastic, *run)
    second = None
    try:
        time.sleep(2)  # so that it is the first that keeps the store
        second = start_torchrun(*elastic, *run)
        log = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while (not log.exists() or len(log.read_text().splitlines()) < 10) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert json.loads((tmp_path / "run" / "run.json").read_text())["plan"]["ranks"] == 2
        for number in [*workers(second), second.pid]:
            os.kill(number, 9)
        output, errors = first.communicate(timeout=600)
    finally:
        for process in (first, second):
            if process is not None:
                kill(process)
                process.wait()
    assert first.returncode == 0, errors
    assert re.search(r"going on after step \d+", output) and "lost rank" in errors
    assert json.loads((tmp_path / "run" / "run.json").read_text())["plan"]["ranks"] == 1
    assert [r["step"] for r in metrics(tmp_path / "run", "train")] == list(range(1, 401))
