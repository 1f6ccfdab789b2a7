"""BatchNorm folded into 1x1 convolutions, against torch's in float64: in Triton's interpreter without a GPU.

As in test_gpu_norm.py, the tests marked gpu are these same ones, compiled.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from exact_norm import distance
from torch import Tensor, nn

from trainer.models import folded, gpu_norm
from trainer.models.resnet import Bottleneck, make_shortcut

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
pytestmark = [pytest.mark.gpu] if ON_GPU else []
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}

# Images, inputs, planes, side; whether the shortcut is a projection.
SHAPES = [(2, 24, 6, 9, True), (3, 80, 20, 7, False)]


@pytest.fixture(autouse=True)
def _exact_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def _small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows a slab, as in a large batch."""
    monkeypatch.setattr(gpu_norm, "SLABS", 2)
    monkeypatch.setattr(folded, "TALL", 16)


def bottleneck(inputs: int, planes: int, *, projected: bool, stride: int = 1, variant: str = "v1.5") -> Bottleneck:
    option = "C" if projected else "B"
    shortcut = make_shortcut(option, inputs, 4 * planes, stride, pooled=variant == "d")
    block = Bottleneck(inputs, planes, stride, shortcut, variant)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return block.to(DEVICE, memory_format=torch.channels_last)


def made(block: nn.Module) -> nn.Module:
    """A folded copy of it."""
    ours = nn.Sequential(copy.deepcopy(block))
    assert gpu_norm.fuse(ours) and folded.fold(ours)
    return ours[0]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("_small_slabs")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_block(dtype: torch.dtype, shape: tuple) -> None:
    torch.manual_seed(0)
    n, inputs, planes, side, projected = shape
    plain = bottleneck(inputs, planes, projected=projected)
    ours, exact = made(plain), copy.deepcopy(plain).double()
    x = random(n, inputs, side, side, dtype=dtype).requires_grad_()
    given = x.detach().double().requires_grad_()
    with torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype is not torch.float32):
        y = ours(x)
    wanted = exact(given)
    coming = random(*y.shape)
    print(y.grad_fn, y.dtype)
    y.backward(coming.to(dtype))
    wanted.backward(coming.to(dtype).double())
    print("y", distance(y, wanted))
    print("dx", distance(x.grad, given.grad))
    for (name, mine), theirs in zip(ours.named_parameters(), exact.parameters()):
        print(name, distance(mine.grad, theirs.grad))
    for (name, mine), theirs in zip(ours.named_buffers(), exact.buffers()):
        print(name, distance(mine, theirs.double()))
