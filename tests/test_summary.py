"""The layer table."""

from __future__ import annotations

import re

import pytest
from nets import on_meta, ours, same
from torch import nn

from trainer.models.stages import format_stages, stages
from trainer.models.summary import count_macs, count_parameters, format_table, layer_table

# The tables


@pytest.mark.parametrize("name", ["resnet50", "resnet20", "timm:vit_tiny_patch16_224", "torchvision:vit_b_16"])
def test_the_layer_table_adds_up(name: str) -> None:
    model = on_meta(name)
    rows = layer_table(model, 224)
    assert sum(row.parameters for row in rows) == count_parameters(model)
    assert sum(row.macs for row in rows) == count_macs(model, 224)
    assert len({row.name for row in rows}) == len(rows)
    table = format_table(rows).splitlines()
    assert table[-1].split() == ["total", f"{count_parameters(model):,}", f"{count_macs(model, 224) / 1e6:,.1f}"]
    assert len({len(line) for line in table}) == 1
    assert sum(int(line.split()[-2].replace(",", "")) for line in table[2:-2]) == count_parameters(model)


def test_macs_of_transformers_are_those_of_their_linear_layers() -> None:
    # ViT-B/16: 196 patches; 12 layers of 12 width^2 weights on 197 tokens; a head on one.
    macs = 196 * 768 * 768 + 12 * 12 * 768**2 * 197 + 768 * 1000
    assert count_macs(on_meta("timm:vit_base_patch16_224"), 224) == macs
    assert count_macs(on_meta("torchvision:vit_b_16"), 224) == macs


def test_shared_layers_work_twice_and_count_once() -> None:
    first, second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    second.weight = first.weight
    rows = layer_table(nn.Sequential(first, second, first), 4)
    assert [(row.parameters, row.macs) for row in rows] == [(9 + 3, 2 * 9 * 16), (3, 9 * 16)]


def test_a_row_and_a_stage() -> None:
    model = ours("resnet50").train()
    model.layer1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = {row.name: row for row in layer_table(model, 64)}
    conv = rows["layer2.0.conv2"]
    assert (conv.kind, conv.output, conv.stride, conv.parameters) == ("Conv2d 3x3", (128, 8, 8), 2, 9 * 128 * 128)
    assert conv.macs == conv.parameters * 8 * 8
    assert rows["fc"].macs == 2048 * 10 and rows["fc"].parameters == 2049 * 10
    assert model.training and not model.layer1.training and not model.layer1[0].bn1.training
    assert same(model.state_dict(), before) and not any(module._forward_hooks for module in model.modules())
    table = format_stages(stages(on_meta("resnet50"), 224))
    blocks = r"\[1x1, 128; 3x3, 128, /2; 1x1, 512\] x 4"
    row = rf"layer2 +512x28x28 +{blocks} +2 +projection, then identity +1,219,584 +1,027.6 +2,055.2 "
    assert re.search(row, table)
    assert [line.split()[0] for line in table.splitlines()] == [
        *("stage", table.splitlines()[1], "stem", "maxpool", "layer1", "layer2", "layer3", "layer4", "head"),
        *(table.splitlines()[1], "total"),
    ]
