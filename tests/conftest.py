"""Small real data, and runs of the real commands in real processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.__main__ import main

if not torch.cuda.is_available():  # Triton's kernels run in its interpreter, if that is said before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    status: int
    output: str
    errors: str


def here(*arguments: object) -> Finished:
    """Run `python -m trainer ARGUMENTS` in this process: importing torch anew would take longer than most runs."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            status = main([str(argument) for argument in arguments])
        except Exception:
            traceback.print_exc()
            status = 1  # what Python exits with
    return Finished(status, output.getvalue(), errors.getvalue())


def workers(process: subprocess.Popen) -> list[int]:
    """The processes of the ranks that a torchrun has started, each in a session of its own."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    return [int(number) for number in found.split()]


def kill(process: subprocess.Popen) -> None:
    """End a torchrun with all its ranks."""
    for number in [process.pid, *workers(process)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, 9)


def torchrun(*arguments: object, ranks: int, timeout: float = 240) -> Finished:
    """Run `torchrun -m trainer ARGUMENTS` with some ranks of one thread each."""
    return torchrun_script("-m", "trainer", *arguments, ranks=ranks, timeout=timeout)


def torchrun_script(*arguments: object, ranks: int, options: Sequence[str] = (), timeout: float = 240) -> Finished:
    """Run `torchrun OPTIONS ARGUMENTS` with some ranks of one thread each."""
    process = start_torchrun("--standalone", "--nproc-per-node", str(ranks), *options, *map(str, arguments))
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        output, errors = process.communicate()
        pytest.fail(f"torchrun {arguments} did not end within {timeout} s:\n{output}\n{errors}")
    return Finished(process.returncode, output, errors)


def start_torchrun(*arguments: str) -> subprocess.Popen[str]:
    """A torchrun under way."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = str(REPOSITORY)  # a script's own folder comes first, an installed trainer second
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def metrics(run: Path, kind: str) -> list[dict]:
    """The records of one kind in a run folder."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def draw(folder: Path, classes: int, per_class: list[int], seed: int, side: int = 48) -> None:
    """JPEG files whose brightness gradient tells the class, of many sizes, `per_class[i]` of class i."""
    random = np.random.default_rng(seed)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(per_class[label]):
            width, height = random.integers(side, 2 * side, 2)
            y, x = np.mgrid[0:height, 0:width] / max(width, height)
            angle = 2 * np.pi * label / classes
            ramp = 128 + 80 * (np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5))
            pixels = np.clip(ramp[..., None] + random.normal(0, 12, (height, width, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{label}" / f"{number:03}.JPEG", quality=92)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 classes, 48 training images and 23 to evaluate: a number that no number of ranks here divides."""
    root = tmp_path_factory.mktemp("tiny")
    draw(root / "train", 4, [12] * 4, seed=1)
    draw(root / "val", 4, [7, 5, 6, 5], seed=2)
    return root


@pytest.fixture(scope="session")
def imagenet_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 real full-size ImageNet JPEGs, one folder a class."""
    archive = SHARED_DATA / "imagenet-sample.tar"
    if not archive.exists():
        pytest.skip("the 300 real ImageNet JPEGs are not on this machine (shared/data/imagenet-sample.tar)")
    root = tmp_path_factory.mktemp("sample")
    with tarfile.open(archive) as tar:
        # Not every Python 3.11 has the argument yet; with it there, later ones warn if it is left out.
        tar.extractall(root, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return root / "imagenet-sample"


@pytest.fixture(scope="session")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ResNet-20 on `tiny`, 6 steps long, with averaged weights."""
    from trained import train

    return train(tmp_path_factory.mktemp("trained"), tiny)
