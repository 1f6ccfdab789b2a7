"""The table by stages, and what is counted as kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
from conftest import here
from nets import on_meta
from torch import nn

from trainer.models.activations import saved_bytes
from trainer.models.stages import format_stages, stages
from trainer.models.summary import count_macs, count_parameters

NETS = ["resnet50", "resnet20", "timm:resnet50d", "timm:regnety_002", "timm:test_convnext", "timm:vit_tiny_patch16_224"]
NETS += ["torchvision:vit_b_16", "torchvision:densenet121"]


@pytest.mark.parametrize("name", NETS)
def test_the_stages_add_up_to_the_network(name: str) -> None:
    found = stages(on_meta(name), 224)
    assert sum(stage.parameters for stage in found) == count_parameters(on_meta(name))
    assert sum(stage.macs for stage in found) == count_macs(on_meta(name), 224)
    assert sum(stage.saved for stage in found) == sum(saved_bytes(on_meta(name), 224).values())
    assert 3 < len(found) < 20 and len({stage.name for stage in found}) == len(found)
    assert len({len(line) for line in format_stages(found).splitlines()}) == 1


def test_neighbours_that_are_alike_are_one_row() -> None:
    rows = {stage.name: stage for stage in stages(on_meta("timm:vit_tiny_patch16_224"), 224)}
    assert rows["blocks.0 to 11"].blocks == "Block x 12" and rows["blocks.0 to 11"].output == (197, 192)


@pytest.mark.parametrize(
    ("name", "options", "shortcuts"),
    [
        ("resnet34", {"shortcut": "A"}, ["identity", "padding, then identity"]),
        ("resnet34", {}, ["identity", "projection, then identity"]),
        ("resnet34", {"shortcut": "C"}, ["projection", "projection"]),
        ("resnet34", {"residual": False}, ["none", "none"]),
        ("timm:resnet34", {}, ["identity", "projection, then identity"]),
        ("torchvision:resnet34", {}, ["identity", "projection, then identity"]),
    ],
)
def test_shortcuts_and_strides_are_named(name: str, options: dict[str, object], shortcuts: list[str]) -> None:
    rows = {stage.name: stage for stage in stages(on_meta(name, **options), 224)}
    assert [rows["layer1"].shortcut, rows["layer2"].shortcut] == shortcuts
    assert [rows[key].stride for key in ("stem", "maxpool", "layer1", "layer2")] == ["2", "2", "1", "2"]


def test_what_the_backward_pass_needs_is_counted_once() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    net.append(nn.Conv2d(8, 4, 1, bias=False))
    image, wide, statistics = 3 * 16 * 16 * 4, 8 * 16 * 16 * 4, 2 * 8 * 4 // 2  # of BatchNorm: one set a batch of 2
    # The first convolution keeps the image; the norm its input; the ReLU its result, which the next convolution shares.
    assert saved_bytes(net.to("meta"), 16) == {"0": image, "1": wide + statistics, "2": wide}


def test_a_count_on_no_device_is_that_of_a_real_one() -> None:
    with torch.device("cpu"):
        real = saved_bytes(on_meta("resnet20").to_empty(device="cpu"), 32)
    assert real == saved_bytes(on_meta("resnet20"), 32)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.name=resnet56"], "resnet56, 32 x 32 pixels, 10 classes"),
        (["model.name=timm:test_convnext"], "timm:test_convnext, 160 x 160 pixels, 1000 classes"),
        (["model.name=resnet18", "data.image_size=64", "model.num_classes=7"], "resnet18, 64 x 64 pixels, 7 classes"),
        (["model.name=resnet18", "--layers"], "layer1.1.bn2"),
    ],
)
def test_describe_takes_the_size_that_a_network_is_for(words: list[str], said: str) -> None:
    done = here("describe", *words)
    assert done.status == 0 and said in done.output, done


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.name=resnet19"], "model.name=resnet19 is not known: did you mean resnet1"),
        (["model.name=timm:vit_tiny_patch16_224", "data.image_size=100"], "data.image_size=100 does not fit"),
    ],
)
def test_describe_refuses_in_one_line(words: list[str], said: str) -> None:
    done = here("describe", *words)
    assert done.status == 2 and done.errors.startswith(f"error: {said}") and done.errors.count("\n") == 1, done
