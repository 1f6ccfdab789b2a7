"""What a process does with the memory that it frees."""

from __future__ import annotations

import subprocess
import sys

from conftest import REPOSITORY

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
