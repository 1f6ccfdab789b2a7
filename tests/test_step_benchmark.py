"""benchmarks/step.py: candidates in processes of their own that take turns, and what is said of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

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
