"""BatchNorm, addition and ReLU of a CPU in one pass, against torch's in float64."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from exact_norm import agree, distance
from torch import Tensor, nn

from trainer import environment, learner
from trainer.config import Config, ConfigError, Precision
from trainer.distributed import World
from trainer.models import cpu_norm

SHAPES = [(2, 3, 5, 7), (1, 64, 7, 7), (8, 70, 9, 3), (3, 256, 28, 28), (2, 2048, 7, 7), (1, 70_000, 2, 1)]

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here: torch's kernels are used"
)


def both(channels: int) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d]:
    """A fused norm and torch's in float64, of equal random parameters."""
    plain = nn.BatchNorm2d(channels)
    nn.init.uniform_(plain.weight, -1, 2)
    nn.init.uniform_(plain.bias, -1, 1)
    exact = nn.BatchNorm2d(channels)
    exact.load_state_dict(plain.state_dict())
    fused = nn.Sequential(plain)
    assert cpu_norm.fuse(fused) and list(fused.state_dict()) == [f"0.{key}" for key in exact.state_dict()]
    return fused[0], exact.double()


def leaf(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


@needs_compiler
@pytest.mark.parametrize(("added", "relu"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
def test_outputs_gradients_and_statistics_are_torchs(
    dtype: torch.dtype, tolerance: float, shape: tuple[int, ...], added: bool, relu: bool
) -> None:
    torch.manual_seed(0)
    ours, exact = both(shape[1])
    x, coming = leaf(torch.randn(shape), dtype), torch.randn(shape).to(dtype)
    shortcut = leaf(torch.randn(shape), dtype) if added else None
    agree(ours, exact, x, shortcut, coming, tolerance, relu=relu)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert distance(getattr(ours, name), getattr(exact, name).double()) < tolerance


@needs_compiler
def test_a_mean_far_from_0_costs_no_digits_of_the_variance() -> None:
    ours, exact = both(4)
    x = torch.randn(4, 4, 64, 64) + 3000
    ours(x)
    exact(x.double())
    assert distance(ours.running_var, exact.running_var) < 1e-5


@needs_compiler
def test_threads_change_no_bit() -> None:
    torch.manual_seed(0)
    shape, before = (4, 48, 40, 40), torch.get_num_threads()
    given = torch.randn(shape), torch.randn(shape), torch.randn(shape)
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            norm = both(shape[1])[0]
            nn.init.ones_(norm.weight)
            nn.init.zeros_(norm.bias)
            x, shortcut = (leaf(each, torch.float32) for each in given[:2])
            y = norm.add_relu(x, shortcut)
            y.backward(given[2])
            found.append([y, x.grad, shortcut.grad, norm.weight.grad, norm.bias.grad, norm.running_var])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so(value: float, dtype: torch.dtype) -> None:
    norm = both(3)[0]
    x = torch.randn(2, 3, 4, 4)
    x[0, 1, 2, 2] = value
    x = leaf(x, dtype)
    y = norm.add_relu(x)
    y.backward(torch.ones_like(y))
    assert y[:, 1].isnan().any() and y[:, [0, 2]].isfinite().all()
    assert not x.grad[:, 1].isfinite().any() and x.grad[:, [0, 2]].isfinite().all()
    assert not norm.running_var[1].isfinite() and norm.running_var[[0, 2]].isfinite().all()


@needs_compiler
def test_all_but_a_training_step_is_torchs() -> None:
    torch.manual_seed(0)
    norm = both(6)[0]
    x = leaf(torch.randn(2, 6, 3, 3), torch.float32)
    norm.eval()
    reference = nn.BatchNorm2d(6)
    reference.load_state_dict(norm.state_dict())
    reference.eval()
    assert torch.equal(norm.add_relu(x), reference(x).relu()) and torch.equal(norm(x), reference(x))
    for module in (norm, reference):
        module.train()
        module.momentum = None  # the average of all batches, as precise statistics are taken
        module(x)
    assert torch.equal(norm.running_var, reference.running_var)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.randn(1, 6, 1, 1))


def test_without_a_compiler_nothing_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    cpu_norm._library.cache_clear()
    try:
        net = nn.Sequential(nn.BatchNorm2d(3))
        assert not cpu_norm.fuse(net) and type(net[0]) is nn.BatchNorm2d
    finally:
        cpu_norm._library.cache_clear()


@needs_compiler
def test_a_compiler_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "cache", lambda name: tmp_path / name)
    monkeypatch.setattr(cpu_norm, "FLAGS", ("--no-such-flag",))
    cpu_norm._library.cache_clear()
    try:
        assert not cpu_norm.fuse(nn.Sequential(nn.BatchNorm2d(3))) and not list((tmp_path / "kernels").iterdir())
    finally:
        cpu_norm._library.cache_clear()


@pytest.mark.parametrize(
    ("fused", "compiler", "expected"),
    [(None, False, nn.BatchNorm2d), (False, True, nn.BatchNorm2d), (True, False, None)],
)
def test_it_is_the_default_and_refused_only_where_it_was_asked_for(
    fused: bool | None, compiler: bool, expected: type | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_norm, "_library", lambda: object() if compiler else None)
    net, here = nn.Sequential(nn.BatchNorm2d(3)), World(0, 0, 1, 1, torch.device("cpu"))
    config = Config(precision=Precision(fused=fused))
    if expected is None:
        with pytest.raises(ConfigError, match=r"precision\.fused=true needs a C compiler"):
            learner._fuse(config, net, here)
        return
    learner._fuse(config, net, here)
    assert type(net[0]) is expected
    monkeypatch.setattr(cpu_norm, "_library", lambda: object())
    learner._fuse(Config(), net, here)
    assert type(net[0]) is cpu_norm.CpuBatchNorm2d


@needs_compiler
def test_bf16_is_float32_rounded_to_nearest() -> None:
    torch.manual_seed(0)
    norm = both(64)[0]
    x, shortcut = (leaf(torch.randn(4, 64, 14, 14), torch.bfloat16) for _ in range(2))
    exact = norm.add_relu(x.float(), shortcut.float())
    rounded = exact.bfloat16()
    assert torch.equal(norm.add_relu(x, shortcut), rounded) and not torch.equal(exact, rounded.float())
