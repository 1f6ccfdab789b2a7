"""BatchNorm, addition and ReLU of a GPU in one pass, against torch's in float64: in Triton's interpreter without a GPU.

The interpreter computes as the kernels say, with numpy: what a GPU's compiler and its own rounding make of them, the
tests marked gpu show, which are these same ones.
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
from exact_norm import agree, distance
from torch import Tensor, nn

from trainer import learner
from trainer.config import Config, ConfigError, Distributed, Model, Precision
from trainer.distributed import World
from trainer.models import build, gpu_norm
from trainer.models.fused_norm import FusedBatchNorm2d

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
pytestmark = [pytest.mark.gpu] if ON_GPU else []

SHAPES = [(2, 3, 5, 7), (1, 64, 7, 7), (3, 16, 9, 9), (2, 24, 11, 3), (5, 70, 9, 3), (1, 2048, 3, 1), (4, 64, 56, 20)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}

COMPILE = """
import re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trainer.models import gpu_kernels

IMAGES = {"x", "y", "dy", "dx", "shortcut", "passed"}
KINDS = {"bits": "*u8", "tracked": "*i64"} | dict.fromkeys(("rows", "slab", "slabs", "size", "which"), "i32")
KINDS |= {"momentum": "fp32", "eps": "fp32", "unbias": "fp32"}
reduction, combination, element = {"BLOCK_R": 64, "BLOCK_C": 64}, {"BLOCK_P": 512, "BLOCK_C": 8}, {"BLOCK": 2048}
for name, constants in {
    "moments": reduction,
    "statistics": combination,
    "normalise": element | {"ADD": True, "JOIN": True, "RELU": True},
    "gradient_sums": reduction | {"JOIN": True, "RELU": True},
    "gradient_coefficients": combination,
    "gradient": element | {"ADD": True, "JOIN": True, "RELU": True},
}.items():
    kernel, constants = getattr(gpu_kernels, name), constants | {"C": 64}
    signature, fixed, aligned = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], fixed[(i,)] = "constexpr", constants[argument]
            continue
        signature[argument] = "*bf16" if argument in IMAGES else KINDS.get(argument, "*fp32")
        if signature[argument].startswith("*"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(ASTSource(kernel, signature, fixed, aligned), target=GPUTarget("cuda", 90, 32))
    print(name, len(re.findall(r"ld.global[^;]*v4", compiled.asm["ptx"])))
"""


def both(channels: int) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d]:
    """A fused norm and torch's in float64, of equal random parameters."""
    plain = nn.BatchNorm2d(channels, device=DEVICE)
    nn.init.uniform_(plain.weight, -1, 2)
    nn.init.uniform_(plain.bias, -1, 1)
    exact = copy.deepcopy(plain).double()
    fused = nn.Sequential(plain)
    assert gpu_norm.fuse(fused) and list(fused.state_dict()) == [f"0.{key}" for key in exact.state_dict()]
    return fused[0], exact


def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def leaf(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize(("added", "relu"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_outputs_gradients_and_statistics_are_torchs(
    dtype: torch.dtype, shape: tuple[int, ...], added: bool, relu: bool
) -> None:
    torch.manual_seed(0)
    tolerance = TOLERANCE[dtype]
    ours, exact = both(shape[1])
    x, coming = leaf(random(shape, dtype)), random(shape, dtype)
    shortcut = leaf(random(shape, dtype)) if added else None
    agree(ours, exact, x, shortcut, coming, tolerance, relu=relu)
    # A mean is known to a share of the spread around it, which these means are far smaller than.
    for name, allowed in (("running_mean", 5e-6), ("running_var", 2e-6), ("num_batches_tracked", 0.1)):
        assert distance(getattr(ours, name), getattr(exact, name).double()) < allowed, name


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 24, 9, 9), (4, 64, 56, 20)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_two_norms_that_meet_are_torchs(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tolerance = TOLERANCE[dtype]
    (ours, exact), (its, its_exact) = both(shape[1]), both(shape[1])
    x, shortcut, coming = leaf(random(shape, dtype)), leaf(random(shape, dtype) + 1), random(shape, dtype)
    inputs = [each.detach().double().requires_grad_() for each in (x, shortcut)]
    y, unclipped = ours.add_relu(x, shortcut, its), exact(inputs[0]) + its_exact(inputs[1])
    assert type(y.grad_fn).__name__ == "_JoinBackward"
    assert y.dtype is dtype and distance(y, unclipped.relu()) < tolerance
    y.backward(coming)
    unclipped.backward(coming.double() * (y.double() > 0))
    for found, wanted in zip((x, shortcut), inputs):
        assert distance(found.grad, wanted.grad) < 10 * tolerance
    for found, wanted in ((ours, exact), (its, its_exact)):
        assert distance(found.weight.grad, wanted.weight.grad) < 10 * tolerance
        assert distance(found.bias.grad, wanted.bias.grad) < tolerance
        assert distance(found.running_mean, wanted.running_mean) < 5e-6
        assert distance(found.running_var, wanted.running_var) < 2e-6
        assert found.num_batches_tracked == 1


def test_a_mean_far_from_0_costs_no_digits_of_the_variance() -> None:
    torch.manual_seed(0)
    ours, exact = both(4)
    x = torch.randn(4, 4, 64, 64, device=DEVICE) + 3000
    y, expected = ours(x), exact(x.double())
    assert distance(ours.running_var, exact.running_var) < 1e-5 and distance(y, expected) < 1e-4


def test_what_is_kept_for_the_backward_pass_is_the_input_and_one_bit_a_value() -> None:
    norm, kept = both(64)[0], []
    x = leaf(random((2, 64, 8, 8), torch.bfloat16))
    shortcut = leaf(random((2, 64, 8, 8), torch.bfloat16))
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        norm.add_relu(x, shortcut)
    large = [each for each in kept if each.numel() > 64]
    assert [each.nbytes for each in large] == [x.nbytes, x.numel() // 8] and large[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    norm = both(3)[0]
    x = torch.randn(2, 3, 4, 4, device=DEVICE)
    x[0, 1, 2, 2] = value
    x = leaf(x)
    y = norm.add_relu(x)
    y.backward(torch.ones_like(y))
    assert y[:, 1].isnan().any() and y[:, [0, 2]].isfinite().all()
    assert not x.grad[:, 1].isfinite().any() and x.grad[:, [0, 2]].isfinite().all()
    assert not norm.running_var[1].isfinite() and norm.running_var[[0, 2]].isfinite().all()


def test_the_same_bits_in_every_run() -> None:
    torch.manual_seed(0)
    norm = both(40)[0]
    given, coming = random((4, 40, 30, 30), torch.bfloat16), random((4, 40, 30, 30), torch.bfloat16)
    found = []
    for _ in range(2):
        norm.zero_grad()
        norm.reset_running_stats()
        x = leaf(given.clone())
        y = norm.add_relu(x)
        y.backward(coming)
        found.append([y, x.grad, norm.weight.grad.clone(), norm.bias.grad.clone(), norm.running_var.clone()])
    assert all(map(torch.equal, *found))


def test_all_but_a_training_step_is_torchs() -> None:
    torch.manual_seed(0)
    norm = both(6)[0]
    x = leaf(random((2, 6, 3, 3), torch.float32))
    norm.eval()
    reference = nn.BatchNorm2d(6, device=DEVICE)
    reference.load_state_dict(norm.state_dict())
    reference.eval()
    assert torch.equal(norm.add_relu(x), reference(x).relu()) and torch.equal(norm(x), reference(x))
    for module in (norm, reference):
        module.train()
        module.momentum = None  # the average of all batches, as precise statistics are taken
        module(x)
    assert torch.equal(norm.running_var, reference.running_var)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.randn(1, 6, 1, 1, device=DEVICE))


def test_a_network_of_them_learns_as_torchs_does() -> None:
    torch.manual_seed(0)
    plain = build.create(Model(name="resnet20", shortcut="B"), 5).to(DEVICE, memory_format=torch.channels_last)
    fused = copy.deepcopy(plain)
    assert gpu_norm.fuse(fused) and any(isinstance(each, FusedBatchNorm2d) for each in fused.modules())
    images, labels = torch.randn(4, 3, 16, 16, device=DEVICE), torch.arange(4, device=DEVICE)
    for net in (plain, fused):
        F.cross_entropy(net(images.contiguous(memory_format=torch.channels_last)), labels).backward()
    for (name, theirs), ours in zip(plain.named_parameters(), fused.parameters()):
        assert distance(ours.grad, theirs.grad.double()) < 1e-3, name
    for theirs, ours in zip(plain.buffers(), fused.buffers()):
        assert torch.allclose(theirs, ours, rtol=1e-4, atol=1e-5)


def test_the_kernels_compile_for_hopper_and_read_16_bytes_at_once(tmp_path: Path) -> None:
    given = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    done = subprocess.run(command, cwd=REPOSITORY, env=given, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    wide = {name: int(count) for name, count in map(str.split, done.stdout.splitlines())}
    assert len(wide) == 6 and all(wide.values()), wide


def test_it_is_there_for_a_gpu_that_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused(asked: bool | None, **options: object) -> type:
        net = nn.Sequential(nn.BatchNorm2d(3))
        config = Config(precision=Precision(fused=asked), **options)
        learner._fuse(config, net, World(0, 0, 1, 1, torch.device("cuda")))
        return type(net[0])

    assert fused(True) is gpu_norm.GpuBatchNorm2d
    assert fused(None) is fused(False) is fused(None, distributed=Distributed(sync_bn=True)) is nn.BatchNorm2d
    with pytest.raises(ConfigError, match=r"precision\.fused=true norms the images of one rank"):
        fused(True, distributed=Distributed(sync_bn=True))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"precision\.fused=true needs the package triton"):
        fused(True)
