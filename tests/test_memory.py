"""What a process does with the memory that it frees, and says where there is too little."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, here, summary

from trainer import memory

FAULTS = """
import resource, sys, torch
from torch import nn
from trainer import memory

if "keep" in sys.argv:
    assert memory.keep_freed()
torch.set_num_threads(1)
net = nn.Sequential(*(nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU()) for _ in range(4)))
images = torch.randn(160, 16, 64, 64)  # 42 MB, as is each activation: above what glibc ever keeps by itself

def faults():
    for _ in range(3):
        net(images).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

before = faults()
print(faults() - before)
"""


def faults(*arguments: str) -> int:
    command = [sys.executable, "-c", FAULTS, *arguments]
    return int(subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout)


def test_a_step_does_not_fault_in_again_what_the_one_before_has_freed() -> None:
    kept, returned = faults("keep"), faults()
    assert kept < returned / 10, (kept, returned)


def test_a_batch_that_does_not_fit_is_answered_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_text("{}")
    options = ["data.source=synthetic", "data.synthetic_samples=2_000_000_000", "global_batch_size=1_000_000_000"]
    options += [f"output_dir={tmp_path / 'run'}", "model.name=resnet18", "loop.eval_every=0", "report.wandb=disabled"]
    done = here("train", tmp_path / "big.yaml", *options)  # 602 TB: more than a processor can name
    assert done.status == 1
    said = [line for line in done.errors.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "Traceback" not in done.errors
    assert "rank 0 has run out of memory" in said[0] and "max_batch_per_gpu" in said[0]
    assert summary(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which "
                "1.19 GiB is free. Including non-PyTorch memory, this process has 77.9 GiB memory in use."
            ),
            "(CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which "
            "1.19 GiB is free):",
        ),
        (RuntimeError("Critical error in pipeline:\nCan't allocate 4096 bytes on device 0."), "(Can't allocate 4096"),
        (MemoryError(), "(MemoryError)"),
    ],
    ids=["torch", "DALI", "Python"],
)
def test_what_ran_out_is_said(error: BaseException, words: str) -> None:
    assert memory.ran_out(error) and words in memory.advice(error, 3)


def test_other_errors_are_no_want_of_memory() -> None:
    assert not memory.ran_out(RuntimeError("CUDA error: an illegal memory access was encountered"))
