"""benchmarks/step.py: candidates in processes of their own that take turns, and what is said of them."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import readers
import traffic
from nets import on_meta
from torch import nn
from turns import Candidate, Lost

ECHO = """
import os, sys
print('{"pid": %d}' % os.getpid(), flush=True)
for line in sys.stdin:
    print('{"count": %d}' % int(line), flush=True)
"""


@pytest.mark.end_to_end
@pytest.mark.timeout(660)
def test_ours_and_another_take_turns(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    command = [sys.executable, "benchmarks/step.py", "--batch", "2", "--size", "32", "--blocks", "2", "--steps", "1"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--only", "convnets", "ours", "--out", out],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and "ours is" in done.stdout, done.stderr
    result = json.loads(out.read_text())
    assert not result["failed"] and list(result["images_per_second"]) == ["convnets", "ours"]
    assert [note["during"] for note in result["machine"]] == 2 * ["limit", "convnets", "ours"]
    low, high = result["spread"]["ours"]
    assert 0 < low <= result["images_per_second"]["ours"] <= high
    middle, least, most = result["ratios"]["ours"]["convnets"]
    assert 0 < least <= middle <= most and result["limit_images_per_second"] > 0
    assert all(result["peak_memory_mb"][name] > 200 for name in ("convnets", "ours"))
    # Who waits takes no share of the cores.
    assert all(result["idle_cpu_seconds"][name] < 0.5 for name in ("convnets", "ours"))


@pytest.mark.end_to_end
@pytest.mark.timeout(660)
def test_each_reads_the_files_as_its_repository_does(tmp_path: Path) -> None:
    names = ["examples", "timm", "convnets", "ours"]
    command = [sys.executable, "benchmarks/step.py", "--batch", "2", "--size", "32", "--blocks", "1", "--steps", "1"]
    command += ["--draw", "12", "--workers", "1", "--only", *names, "--out", tmp_path / "files.json"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "files.json").read_text())
    assert not result["failed"] and list(result["images_per_second"]) == names and result["files"]


def test_inputs_are_normalised_batches_without_end(tiny: Path) -> None:
    files = readers.Files(str(tiny / "train"), 5, 24, 1, torch.device("cpu"))
    for read in (readers.torchvision_loader, readers.timm_loader, readers.convnets_dali):
        batches = itertools.islice(read(files), 30)  # more than the files have
        assert all(x.shape == (5, 3, 24, 24) and x.dtype == torch.float32 and len(y) == 5 for x, y in batches), read
        images = torch.cat([x for x, _ in itertools.islice(read(files), 10)])
        assert images.std() < 2 and images.abs().max() < 2.7, read  # (1 - 0.406) / 0.225 at most


def state(pid: int) -> str:
    """Of a process: T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_who_waits_is_stopped_with_its_workers() -> None:
    busy = "import subprocess, sys; worker = subprocess.Popen([sys.executable, '-c', 'while True: pass'])"
    candidate = Candidate(
        "busy", [sys.executable, "-c", busy + ECHO.replace("os.getpid()", "worker.pid")], 60, stops=True
    )
    worker = candidate.ready["pid"]
    try:
        for count in (1, 2):
            wait_for(lambda: state(worker) == "T")
            assert candidate.block(count, meanwhile=lambda: wait_for(lambda: state(worker) == "R")) == {"count": count}
    finally:
        candidate.end()
    wait_for(lambda: not Path(f"/proc/{worker}").exists() or state(worker) == "Z")


def wait_for(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not done():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("size", [224, 160])
def test_the_values_that_are_counted_are_those_of_the_network(size: int) -> None:
    seen = []
    net = on_meta("resnet50")
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, given, y: seen.append((given[0].numel(), y.numel())))
    net(torch.empty(1, 3, size, size, device="meta"))
    counted = [(3 * size**2, 64 * (size // 2) ** 2)]
    for each in traffic.blocks(size):
        counted += [(each.x, each.a), (each.a, each.b), (each.b, each.c)]
        counted += [(each.x, each.projection)] if each.projection else []
    assert sorted(seen) == sorted(counted)


def test_a_candidate_answers_when_asked_and_ends_with_its_commands() -> None:
    candidate = Candidate("echo", [sys.executable, "-c", ECHO], 60)
    called = []
    assert candidate.block(7, meanwhile=lambda: called.append(1)) == {"count": 7} and called == [1]
    candidate.end()
    with pytest.raises(ProcessLookupError):
        os.kill(candidate.ready["pid"], 0)


def test_one_that_fails_says_why_and_one_that_hangs_is_ended() -> None:
    with pytest.raises(Lost, match="exit status 1: out of memory"):
        Candidate("fails", [sys.executable, "-c", "raise SystemExit('out of memory')"], 60)
    began = time.monotonic()
    with pytest.raises(Lost, match="no answer within 1 s"):
        Candidate("hangs", [sys.executable, "-c", "import time; time.sleep(600)"], 1)
    assert time.monotonic() - began < 30
