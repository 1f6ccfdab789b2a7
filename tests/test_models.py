"""The ResNet family against torchvision, timm and the numbers of the papers."""

from __future__ import annotations

import re

import pytest
import torch
from nets import images, on_meta, ours, same, scatter_norms, torchvisions
from torch import nn

from trainer.models.resnet import CIFAR, FAMILY, IMAGENET, PadShortcut, drop_path
from trainer.models.summary import count_macs, count_parameters

# Against torchvision and timm


@pytest.mark.parametrize("name", IMAGENET)
def test_logits_and_keys_are_torchvisions_both_ways(name: str) -> None:
    model, theirs = ours(name).eval(), torchvisions(name).eval()
    scatter_norms(theirs)
    model.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), theirs(images()), rtol=1e-5, atol=1e-5)
    scatter_norms(model)
    theirs.load_state_dict(model.state_dict(), strict=True)
    assert same(theirs.state_dict(), model.state_dict())


@pytest.mark.parametrize(("name", "zero"), [("resnet18", False), ("resnet50", True)])
def test_one_seed_gives_torchvisions_initial_weights(name: str, zero: bool) -> None:
    model, theirs = (make(name, zero_init_residual=zero) for make in (ours, torchvisions))
    assert same(model.state_dict(), theirs.state_dict())


def test_a_training_step_is_torchvisions() -> None:
    model, theirs = ours("resnet18"), torchvisions("resnet18")
    theirs.load_state_dict(model.state_dict())
    losses = [nn.functional.cross_entropy(net(images(4)), torch.arange(4)) for net in (model, theirs)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, mine), other in zip(model.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)
    assert same(model.state_dict(), theirs.state_dict())  # the running statistics moved alike


def test_v1_is_torchvision_with_the_stride_on_the_first_convolution() -> None:
    model, theirs = ours("resnet50", variant="v1").eval(), torchvisions("resnet50").eval()
    for stage in (theirs.layer2, theirs.layer3, theirs.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    theirs.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(images()), theirs(images()))


@pytest.mark.parametrize(("variant", "strides"), [("v1", (2, 1)), ("v1.5", (1, 2)), ("d", (1, 2))])
def test_where_the_stride_sits(variant: str, strides: tuple[int, int]) -> None:
    for stage in on_meta("resnet50", variant=variant).stages()[1:]:
        assert (stage[0].conv1.stride[0], stage[0].conv2.stride[0]) == strides
        assert all(block.conv1.stride == block.conv2.stride == (1, 1) for block in stage[1:])


def test_basic_blocks_have_one_stride_to_place() -> None:
    x = images()
    torch.testing.assert_close(ours("resnet18", variant="v1").eval()(x), ours("resnet18").eval()(x))


@pytest.mark.parametrize("size", [64, 75])  # an odd size needs the pooling to round up
def test_d_is_timms(size: int) -> None:
    import timm

    model, theirs = ours("resnet50", variant="d").eval(), timm.create_model("resnet50d", num_classes=10).eval()
    scatter_norms(theirs)
    model.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model(images(size=size)), theirs(images(size=size)), rtol=1e-5, atol=1e-5)


# The shape of the family

# ImageNet nets at 1000 classes: torchvision's documented `num_params`. CIFAR nets at 10: 0.27, 0.46, 0.66, 0.85 and
# 1.7 M in Table 6 of the paper; in full as counted by akamaster/pytorch_resnet_cifar10 for option A.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
}


@pytest.mark.parametrize("name", FAMILY)
def test_parameters_and_depth(name: str) -> None:
    model = on_meta(name, 10 if name in CIFAR else 1000)
    assert count_parameters(model) == PARAMETERS[name]
    weighted = [key for key in model.state_dict() if re.search(r"(conv\d|fc)\.weight$", key)]
    assert f"resnet{len(weighted)}" == name  # the paper counts the layers with weights, shortcuts aside


def test_variants_in_parameters_and_macs() -> None:
    nets = {variant: on_meta("resnet50", variant=variant) for variant in ("v1.5", "v1", "d")}
    assert {v: count_parameters(net) for v, net in nets.items()} == {
        "v1.5": 25_557_032,
        "v1": 25_557_032,
        "d": 25_576_264,
    }
    macs = {v: count_macs(net, 224) / 1e9 for v, net in nets.items()}
    assert macs == pytest.approx({"v1.5": 4.089, "v1": 3.858, "d": 4.329}, abs=5e-4)
    assert count_macs(on_meta("resnet20", 10), 32) == 40_551_040


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet56"])
def test_a_dead_block_silences_a_plain_net_and_not_a_residual_one(name: str) -> None:
    for residual in (True, False):
        model = ours(name, residual=residual).eval()
        assert any("downsample" in key for key in model.state_dict()) == (residual and name not in CIFAR)
        for module in model.stages()[1][1].modules():
            if isinstance(module, nn.Conv2d):
                nn.init.zeros_(module.weight)
        with torch.no_grad():
            moved = (model(images()) - model.fc.bias).abs().max()
        assert (moved > 1e-3) if residual else (moved == 0)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20"])
def test_zero_init_starts_every_block_as_its_shortcut(name: str) -> None:
    block = ours(name, zero_init_residual=True).stages()[1][1]
    x = torch.rand(2, block.conv1.in_channels, 8, 8)
    assert torch.equal(block(x), x)
    assert not torch.equal(ours(name).stages()[1][1](x), x)


def test_conv_init_is_by_fan_in_on_request() -> None:
    for mode, fan in (("fan_out", 64 * 49), ("fan_in", 3 * 49)):
        assert ours("resnet18", conv_init=mode).conv1.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.05)


def test_shortcut_options() -> None:
    def projections(option: str | None, name: str = "resnet18") -> int:
        return len(re.findall(r"downsample\.0\.weight", " ".join(on_meta(name, shortcut=option).state_dict())))

    assert [projections(option) for option in (None, "A", "B", "C")] == [3, 0, 3, 8]
    assert [projections(option, "resnet20") for option in (None, "A", "B", "C")] == [0, 0, 2, 9]
    x = images(size=7)
    y = PadShortcut(2, 2)(x)
    assert y.shape == (2, 5, 4, 4) and torch.equal(y[:, :3], x[:, :, ::2, ::2]) and not y[:, 3:].any()


@pytest.mark.parametrize(("name", "options"), [("resnet50", {"variant": "d"}), ("resnet50", {}), ("resnet20", {})])
def test_channels_last_stays_so_in_every_layer(name: str, options: dict[str, str]) -> None:
    model = ours(name, **options).to(memory_format=torch.channels_last)
    layouts = {}
    for layer, module in model.named_modules():
        module.register_forward_hook(lambda _, __, y, layer=layer: layouts.update({layer: y.detach()}))
    model(images().to(memory_format=torch.channels_last))
    maps = {layer: y for layer, y in layouts.items() if y.dim() == 4 and layer != "avgpool"}
    assert len(maps) > 50
    assert [layer for layer, y in maps.items() if not y.is_contiguous(memory_format=torch.channels_last)] == []


# Dropout and stochastic depth


def test_drop_path_drops_whole_samples_and_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    dropped = drop_path(torch.ones(4000, 3, 2, 2), 0.2)
    assert torch.equal(dropped, dropped[:, :1, :1, :1].expand_as(dropped))
    assert dropped.unique().tolist() == [0, 1.25]
    assert dropped.mean() == pytest.approx(1, abs=0.03)


def test_a_dropped_branch_leaves_the_shortcut() -> None:
    block = ours("resnet18", drop_path_rate=0.5).blocks()[-1]
    x = torch.rand(64, 512, 2, 2)
    y = block(x)
    gone = (y == x).flatten(1).all(dim=1)
    assert 16 < gone.sum() < 48
    branch = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
    torch.testing.assert_close(y[~gone], (x + 2 * branch)[~gone].relu())


def test_drop_rates_are_linear_in_depth_and_only_train() -> None:
    model = ours("resnet18", drop_path_rate=0.7, drop_rate=0.5)
    assert [block.drop_path_rate for block in model.blocks()] == pytest.approx([0.1 * i for i in range(8)])
    model.eval()
    assert torch.equal(model(images()), ours("resnet18").eval()(images()))
    for options in ({"drop_rate": 0.5}, {"drop_path_rate": 0.5}):
        model = ours("resnet18", **options)
        assert not torch.equal(model(images()), model(images()))
    assert torch.equal(ours("resnet18")(images()), ours("resnet18")(images()))


def test_the_forward_pass_is_one_graph() -> None:
    """No host work that depends on data: dynamo would have to break the graph there."""
    torch._dynamo.reset()
    model = ours("resnet20", drop_path_rate=0.1, drop_rate=0.1)
    assert torch.compile(model, backend="eager", fullgraph=True)(images(size=32)).shape == (2, 10)
