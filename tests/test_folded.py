"""BatchNorm folded into 1x1 convolutions, against torch's in float64: in Triton's interpreter without a GPU.

As in test_gpu_norm.py, the tests marked gpu are these same ones, compiled.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from exact_norm import distance
from torch import Tensor, nn

from trainer import learner
from trainer.config import Config, ConfigError, Model, Precision
from trainer.distributed import World
from trainer.models import build, folded, gpu_norm
from trainer.models.resnet import Bottleneck, PadShortcut, make_shortcut

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
pytestmark = [pytest.mark.gpu] if ON_GPU else []

SHAPES = [(2, 24, 6, 9), (1, 70, 130, 5), (3, 64, 16, 7)]  # images, inputs, outputs, side
if ON_GPU:  # blocks as a step has them
    SHAPES += [(5, 256, 64, 56), (5, 64, 256, 56), (7, 512, 2048, 7)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}

COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trainer.models import folded_kernels

IMAGES = {"x", "y", "dy", "dx", "added", "weight"}
products = {"BLOCK_R": 128, "BLOCK_OUT": 128, "BLOCK_IN": 64}
unnormed = dict.fromkeys(("mean", "invstd", "gamma", "beta"))  # None, as in a launch
for name, (warps, stages), constants in (
    ("product", (8, 3), products | {"INNER": 1024, "C": 256, "NORM": False} | unnormed),
    ("product", (8, 3), products | {"INNER": 128, "C": 512, "NORM": True}),
    (
        "input_gradient",
        (8, 3),
        products | {"INNER": 256, "C": 1024, "ADD": True, "NORM": False, "x": None, "partial": None} | unnormed,
    ),
    ("input_gradient", (8, 3), products | {"INNER": 512, "C": 128, "ADD": False, "NORM": True, "added": None}),
    ("weight_gradient", (8, 4), {"BLOCK_R": 64, "BLOCK_OUT": 128, "BLOCK_IN": 64, "INNER": 64, "C": 256}),
):
    kernel, constants = getattr(folded_kernels, name), constants | {"WIDE": False, "PRECISION": "ieee"}
    signature, fixed, aligned = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], fixed[(i,)] = "constexpr", constants[argument]
            continue
        size = argument in ("rows", "slab", "slabs")
        signature[argument] = "i32" if size else "*bf16" if argument in IMAGES else "*fp32"
        if not size or argument == "slab":
            aligned[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(ASTSource(kernel, signature, fixed, aligned), GPUTarget("cuda", 90, 32), options)
    code = compiled.asm["ptx"]
    wide = len(re.findall(r"cp.async.cg.shared.global [^;]*0x10", code))
    print(name, code.count("wgmma.mma_async"), wide, compiled.metadata.shared)
"""


@pytest.fixture(autouse=True)
def _blocks_that_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows, in each of several slabs, as a large batch has them; and fp32 that is not TF32."""
    monkeypatch.setattr(gpu_norm, "SLABS", 3)
    if not ON_GPU:
        monkeypatch.setattr(folded, "TALL", 16)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)


def leaf(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random numbers, and the same in float64."""
    given = random(*shape, dtype=dtype)
    return given.clone().requires_grad_(), given.double().requires_grad_()


def norm(channels: int) -> tuple[gpu_norm.GpuBatchNorm2d, nn.BatchNorm2d]:
    """A fused norm of random parameters, and torch's of the same in float64."""
    ours = nn.Sequential(nn.BatchNorm2d(channels, device=DEVICE))
    nn.init.uniform_(ours[0].weight, -1, 2)
    nn.init.uniform_(ours[0].bias, -1, 1)
    exact = copy.deepcopy(ours[0]).double()
    assert gpu_norm.fuse(ours)
    return ours[0], exact


def kernel(outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weight of a convolution, and in float64 what becomes of it in `dtype`."""
    weight = (torch.randn(outputs, inputs, 1, 1, device=DEVICE) / inputs**0.5).requires_grad_()
    return weight, weight.detach().to(dtype).double().requires_grad_()


def statistics_agree(found: list[Tensor], its: nn.BatchNorm2d, exact: nn.BatchNorm2d, y: Tensor) -> None:
    """Of y (N, C, H, W): those of the pass, and the running ones."""
    y = y.detach().double()
    exact(y)
    variance, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    assert (found[0] - mean).abs().max() < 1e-6 and distance(found[1], torch.rsqrt(variance + its.eps)) < 1e-6
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert distance(getattr(its, name), getattr(exact, name).double()) < 5e-6, name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_product_and_its_statistics(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    n, inputs, outputs, side = shape
    x, exact_x = leaf(n, inputs, side, side, dtype=dtype)
    weight, exact_weight = kernel(outputs, inputs, dtype)
    its, exact = norm(outputs)
    y, same, *found = folded._Product.apply(x, weight, its)
    expected = F.conv2d(exact_x, exact_weight)
    assert y.dtype is dtype and y.is_contiguous(memory_format=torch.channels_last) and torch.equal(same, x)
    assert distance(y, expected) < TOLERANCE[dtype]
    statistics_agree(found, its, exact, y)
    coming, passed = random(*y.shape, dtype=dtype), random(*x.shape, dtype=dtype)
    torch.autograd.backward([y, same], [coming, passed])
    torch.autograd.backward([expected, exact_x * 1], [coming.double(), passed.double()])
    assert distance(x.grad, exact_x.grad) < TOLERANCE[dtype]
    assert weight.grad.dtype is torch.float32 and weight.grad.stride() == weight.stride()
    assert distance(weight.grad, exact_weight.grad) < 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_product_of_normed_values(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    n, inputs, outputs, side = shape
    x, exact_x = leaf(n, inputs, side, side, dtype=dtype)
    weight, exact_weight = kernel(outputs, inputs, dtype)
    (before, exact_before), (after, exact_after) = norm(inputs), norm(outputs)
    y, *found = folded._NormedProduct.apply(x, before.weight, before.bias, weight, before, after)
    expected = F.conv2d(exact_before(exact_x).relu(), exact_weight)
    assert y.dtype is dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert distance(y, expected) < 2 * TOLERANCE[dtype]  # rounded twice
    statistics_agree(found, after, exact_after, y)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert distance(getattr(before, name), getattr(exact_before, name).double()) < 5e-6, name
    coming = random(*y.shape, dtype=dtype)
    y.backward(coming)
    expected.backward(coming.double())
    wanted = (exact_x, exact_weight, exact_before.weight, exact_before.bias)
    for mine, theirs in zip((x, weight, before.weight, before.bias), wanted):
        assert distance(mine.grad, theirs.grad) < 10 * TOLERANCE[dtype]


def test_a_mean_far_from_0_costs_no_digits_of_the_variance() -> None:
    torch.manual_seed(0)
    x, (its, _) = random(4, 8, 16, 16), norm(8)
    x[:, 0] = 1000
    weight = torch.randn(8, 8, 1, 1, device=DEVICE)
    y, _, mean, invstd = folded._Product.apply(x, weight, its)
    variance, exact = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert distance(mean, exact) < 1e-6 and distance(invstd**-2, variance + its.eps) < 1e-5


def block(inputs: int, *, stride: int = 1, variant: str = "v1.5", shortcut: str = "B") -> Bottleneck:
    """Of 6 planes, in training."""
    torch.manual_seed(0)
    made = None if shortcut == "none" else make_shortcut(shortcut, inputs, 24, stride, pooled=variant == "d")
    module = Bottleneck(inputs, 6, stride, made, variant)
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            nn.init.uniform_(each.weight, 0.5, 1.5)
            nn.init.uniform_(each.bias, -0.5, 0.5)
    return module.to(DEVICE, memory_format=torch.channels_last)


def fused(module: nn.Module, *, fold: bool) -> nn.Module:
    """A copy with fused norms, or with folded ones."""
    ours = nn.Sequential(copy.deepcopy(module))
    assert gpu_norm.fuse(ours) and (not fold or folded.fold(ours))
    return ours[0]


def functions(y: Tensor) -> list[str]:
    """The names of ours in its graph, each as often as it is there."""
    seen, ahead = set(), [y.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [each for each, _ in node.next_functions]
    return sorted(name for name in (type(node).__name__ for node in seen) if name.startswith("_"))


PRODUCT, NORMED, NORM, JOIN = "_ProductBackward", "_NormedProductBackward", "_NormBackward", "_JoinBackward"


@pytest.mark.parametrize(
    ("inputs", "options", "expected"),
    [
        (24, {}, [NORM, NORM, NORMED, PRODUCT]),
        (24, {"shortcut": "none"}, [NORM, NORM, NORMED, PRODUCT]),
        (10, {}, [JOIN, NORM, NORMED, PRODUCT, PRODUCT]),
        (10, {"stride": 2}, [JOIN, NORM, NORMED, PRODUCT]),
        (10, {"stride": 2, "variant": "v1"}, [JOIN, NORM, NORMED]),
        (10, {"stride": 2, "variant": "d"}, [JOIN, NORM, NORMED, PRODUCT, PRODUCT]),
        (10, {"stride": 2, "shortcut": "A"}, [NORM, NORM, NORMED, PRODUCT]),
    ],
    ids=str,
)
def test_a_block_is_that_of_fused_norms(inputs: int, options: dict, expected: list[str]) -> None:
    plain, found = block(inputs, **options), []
    assert isinstance(plain.downsample, PadShortcut) == (options.get("shortcut") == "A")
    given, coming = random(2, inputs, 7, 6), None
    for fold in (False, True):
        ours, x = fused(plain, fold=fold), given.clone().requires_grad_()
        assert list(ours.state_dict()) == list(plain.state_dict())
        y = ours(x)
        coming = random(*y.shape) if coming is None else coming
        y.backward(coming)
        gradients = [x.grad, *(each.grad for each in ours.parameters())]
        found.append([y.detach(), *gradients, *(each.double() for each in ours.buffers())])
    assert functions(y) == sorted(expected)
    for theirs, mine in zip(*found, strict=True):
        assert distance(mine, theirs.double()) < 2e-5


def test_the_normed_input_of_conv3_is_not_kept() -> None:
    plain, kept = block(24), []
    x = random(2, 24, 7, 6).requires_grad_()
    for fold in (False, True):
        seen: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each, seen=seen: seen.update({each.data_ptr(): each.nbytes}) or each, lambda each: each
        ):
            y = fused(plain, fold=fold)(x)
        kept.append(sum(size for size in seen.values() if size > 1500))  # neither bits nor weights
        assert y.shape == x.shape
    values = 2 * 6 * 7 * 6
    assert kept[0] - kept[1] == 4 * values


def test_the_same_bits_in_every_run() -> None:
    ours = fused(block(10), fold=True)
    given, coming, found = random(2, 10, 9, 9, dtype=torch.bfloat16), None, []
    for _ in range(2):
        ours.zero_grad()
        for each in ours.modules():
            if isinstance(each, nn.BatchNorm2d):
                each.reset_running_stats()
        x = given.clone().requires_grad_()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            y = ours(x)
        assert NORMED in functions(y)
        coming = random(*y.shape, dtype=y.dtype) if coming is None else coming
        y.backward(coming)
        found.append([y, x.grad, *(each.grad.clone() for each in ours.parameters()), *map(torch.clone, ours.buffers())])
    assert all(map(torch.equal, *found))


def test_all_but_a_training_step_is_the_blocks() -> None:
    plain = block(24)
    x = random(2, 24, 5, 5)
    ours = fused(plain, fold=True)
    assert type(ours) is folded.FoldedBottleneck
    assert torch.equal(ours.eval()(x), plain.eval()(x))
    ours.train()
    ours.drop_path_rate = 0.5
    assert PRODUCT not in functions(ours(x)) and NORMED not in functions(ours(x))
    ours.drop_path_rate = 0.0
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):  # of an input that it would cast
        assert PRODUCT not in functions(ours(x))
    for each in (ours.bn1, ours.bn2, ours.bn3):
        each.momentum = None  # the average of all batches, as precise statistics are taken
    assert not {PRODUCT, NORMED} & set(functions(ours(x)))
    with torch.no_grad():
        ours(x)


def test_what_is_not_finite_stays_so() -> None:
    ours = fused(block(24), fold=True)
    x = random(2, 24, 5, 5)
    x[0, 3, 2, 2] = float("nan")
    y = ours(x.requires_grad_())
    y.sum().backward()
    assert y.isnan().all() and x.grad.isnan().all() and ours.bn3.running_var.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_network_learns_as_one_that_is_not_folded(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 10, 3, padding=1, bias=False)
    blocks = block(10), block(24)
    plain = nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5))
    plain.to(DEVICE, memory_format=torch.channels_last)
    images, labels, losses, moved = random(4, 3, 6, 6), torch.arange(4, device=DEVICE), [], []
    for fold in (False, True):
        net = fused(plain, fold=fold)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        losses.append([])
        for _ in range(3):
            with torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype is not torch.float32):
                loss = F.cross_entropy(net(images), labels)
            assert (NORMED in functions(loss)) == fold
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        moved.append([after.detach() - before for after, before in zip(net.parameters(), plain.parameters())])
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 if dtype is torch.float32 else 2e-2)
    # Three steps on 144 values a channel: in bf16 a tenth here, and a gradient with the wrong sign is two.
    for name, theirs, mine in zip(dict(plain.named_parameters()), *moved):
        assert distance(mine, theirs.double()) < (1e-3 if dtype is torch.float32 else 0.5), name


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no GPU here: torch.cuda.is_available() is false")
def test_a_recorded_step_computes_what_one_that_is_not_does() -> None:
    ours, x = fused(block(10), fold=True), random(2, 10, 9, 9).requires_grad_()

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ours(x).square().mean(), [x, *ours.parameters()])

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # Triton compiles, and cuDNN makes its workspace
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        recorded = step()
    with torch.no_grad():
        x.copy_(random(*x.shape))
    graph.replay()
    assert ours.bn1.num_batches_tracked == ours.bn2.num_batches_tracked == ours.bn3.num_batches_tracked == 4
    for found, wanted in zip(recorded, step(), strict=True):
        assert distance(found, wanted.double()) < 1e-5


def test_the_kernels_compile_for_hopper_and_use_its_matrix_units(tmp_path: Path) -> None:
    given = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    done = subprocess.run(command, cwd=REPOSITORY, env=given, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(\w+) (\d+) (\d+) (\d+)$", done.stdout, re.MULTILINE)
    assert len(found) == 5
    for name, products, wide, shared in found:
        assert int(products) and int(wide) and int(shared) <= 227 * 1024, name


def test_it_is_there_for_a_gpu_that_asks_for_it() -> None:
    def fuse(name: str, device: str) -> nn.Module:
        config = Config(model=Model(name=name), precision=Precision(fused=True, folded=True))
        with torch.device("meta"):
            net = build.create(config.model, 5)
        learner._fuse(config, net, World(0, 0, 1, 1, torch.device(device)))
        return net

    net = fuse("resnet50", "cuda")
    assert sum(type(each) is folded.FoldedBottleneck for each in net.modules()) == 16
    with pytest.raises(ConfigError, match=r"precision\.folded=true folds .* model\.name=resnet18 has none"):
        fuse("resnet18", "cuda")
    with pytest.raises(ConfigError, match=r"precision\.folded=true needs a GPU, and device=cpu"):
        fuse("resnet50", "cpu")
    for options in ({}, {"fused": False}, {"compile": True}):
        with pytest.raises(ConfigError, match=r"precision\.folded=true needs precision\.fused=true"):
            Precision(folded=True, **options)
