"""A network by its stages, as Table 1 of the ResNet paper (He et al. 2015, arXiv:1512.03385) shows it."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass, replace

from torch import nn

from trainer.models.activations import saved_bytes
from trainer.models.resnet import Block, PadShortcut
from trainer.models.summary import LayerRow, align, call, layer_table, shape, slash

_BLOCK = re.compile(r"layer\d+\.\d+\.(?!downsample)")  # a layer in the branch of a block of a ResNet
TITLES = ("stage", "output", "blocks", "stride", "shortcut", "parameters", "MMACs", "MFLOPs", "share", "activations MB")


@dataclass(frozen=True)
class Stage:
    """Layers of a network that stand together."""

    name: str
    output: tuple[int, ...] | None  # without the batch dimension; None: not one tensor
    blocks: str  # [1x1, 64; 3x3, 64; 1x1, 256] x 3 of a ResNet, else the class of the module
    stride: str  # side of its input over side of its output
    shortcut: str  # of its first block, then of the others; empty where that is not known
    parameters: int
    macs: int  # for one image
    saved: int  # bytes of one image kept for the backward pass (trainer.models.activations)


def stages(model: nn.Module, image_size: int) -> list[Stage]:
    """The stages of a bare model in the order of its modules; parameters, MACs and bytes add up to the model's.

    A ResNet's are its stem, its pooling, its stages and its head. Another network's are its modules, of which a
    container that holds most of the parameters is opened. `model` should lie on the device "meta".
    """
    rows = layer_table(model, image_size)
    resnet = any(_BLOCK.match(row.name) for row in rows)
    keys = [_resnet_key(row.name) if resnet else _key(model, row.name) for row in rows]
    groups: dict[str, list[LayerRow]] = {}
    for key, row in zip(keys, rows):
        groups.setdefault(key, []).append(row)
    saved: Counter[str] = Counter()
    for name, count in saved_bytes(model, image_size).items():
        saved[_owner(_resnet_key(name) if resnet else _key(model, name), list(groups))] += count
    outputs = _outputs(model, image_size)
    found, side = [], image_size
    for key, group in groups.items():
        output = outputs.get(key) or [row for row in group if "downsample" not in row.name][-1].output
        stride = ""
        if output and len(output) == 3 and output[1] == output[2]:
            stride, side = f"{side / output[2]:.3g}", output[2]
        counts = sum(row.parameters for row in group), sum(row.macs for row in group), saved[key]
        blocks = _convolutions(key, group) if resnet else _classes(model, key)
        found.append(Stage(key or "(model)", output, blocks, stride, _shortcut(model, key), *counts))
    return _merged(
        [stage for stage in found if stage.parameters or stage.macs or stage.saved or stage.name == "maxpool"]
    )


def _outputs(model: nn.Module, image_size: int) -> dict[str, tuple[int, ...] | None]:
    called = call(model, image_size)
    return {name: called[module][0] for name, module in model.named_modules() if name and module in called}


def _merged(found: list[Stage]) -> list[Stage]:
    """Neighbours that are alike but for their number as one: blocks.0 to 11."""
    merged: list[Stage] = []
    for _, alike in itertools.groupby(found, lambda stage: replace(stage, name=stage.name.rpartition(".")[0])):
        first, *others = alike
        if not others or "." not in first.name:
            merged += [first, *others]
            continue
        n = 1 + len(others)
        merged.append(
            replace(
                first,
                name=f"{first.name} to {others[-1].name.rpartition('.')[2]}",
                blocks=f"{first.blocks} x {n}",
                parameters=n * first.parameters,
                macs=n * first.macs,
                saved=n * first.saved,
            )
        )
    return merged


def format_stages(found: list[Stage]) -> str:
    """As text; the last line is the total.

    MACs, and FLOPs at two a MAC, are in millions for one image (the paper's "FLOPs" are MACs); activations in 10^6
    bytes for one image.
    """
    macs = sum(stage.macs for stage in found)
    total = sum(stage.parameters for stage in found), macs, sum(stage.saved for stage in found)
    cells = [TITLES]
    for stage in found:
        words = stage.name, shape(stage.output), stage.blocks, stage.stride, stage.shortcut
        cells.append((*words, *_numbers(stage.parameters, stage.macs, stage.saved, macs)))
    cells.append(("total", "", "", "", "", *_numbers(*total, macs)))
    return align(cells, words=5)


def _numbers(parameters: int, macs: int, saved: int, whole: int) -> tuple[str, ...]:
    share = f"{macs / whole:.1%}" if whole else ""
    return f"{parameters:,}", f"{macs / 1e6:,.1f}", f"{2 * macs / 1e6:,.1f}", share, f"{saved / 1e6:,.2f}"


# Which layers stand together.


def _resnet_key(name: str) -> str:
    first = name.partition(".")[0]
    return (
        "stem"
        if first in ("conv1", "bn1", "act1", "")
        else "head"
        if first in ("avgpool", "global_pool", "fc")
        else first
    )


def _key(model: nn.Module, name: str) -> str:
    """The module that a layer is counted with: the outermost, or one inside it while that holds most of the model."""
    whole = sum(p.numel() for p in model.parameters())
    module, key = model, ""
    for part in name.split(".") if name not in ("", "(model)") else ():
        module, key = module.get_submodule(part), f"{key}.{part}".lstrip(".")
        many = len(list(module.children())) > 1 and (key.count(".") == 0 or isinstance(module, nn.Sequential))
        if not many or sum(p.numel() for p in module.parameters()) <= whole / 2:
            break
    return key


def _owner(key: str, keys: list[str]) -> str:
    """The stage of a key that may name a module which holds stages, or none: then the first."""
    if key in keys:
        return key
    return next((k for k in keys if key and k.startswith(key + ".")), keys[0])


# What is said of them.


def _convolutions(key: str, rows: list[LayerRow]) -> str:
    branches = [row for row in rows if _BLOCK.match(row.name)]
    if not branches:
        return "; ".join(_convolution(row) for row in rows if row.macs) or rows[0].kind + slash(rows[0])
    depth = len({row.name.split(".")[1] for row in branches})
    shown = "; ".join(_convolution(row) for row in branches if row.macs and row.name.startswith(f"{key}.0."))
    return f"[{shown}] x {depth}"


def _convolution(row: LayerRow) -> str:
    """As the paper writes it: 3x3, 64, with /2 for a stride of 2."""
    if row.output is None or not row.kind.startswith("Conv"):
        return row.kind
    return f"{row.kind.partition(' ')[2]}, {row.output[0]}{slash(row)}"


def _classes(model: nn.Module, key: str) -> str:
    """The class of a module, or of what a container holds: Block x 3."""
    if not key:
        return ""
    module = model.get_submodule(key)
    if not isinstance(module, nn.Sequential | nn.ModuleList):
        return type(module).__name__
    return ", ".join(
        f"{name} x {n}" if n > 1 else name for name, n in Counter(type(m).__name__ for m in module).items()
    )


def _shortcut(model: nn.Module, key: str) -> str:
    """The kinds of the shortcuts of a stage, the first block's first."""
    if "." not in key and not hasattr(model, key):
        return ""  # the stem and the head are groups of ours
    blocks = [m for m in model.get_submodule(key).modules() if hasattr(m, "downsample")]
    return ", then ".join(dict.fromkeys(map(_kind, blocks)))


def _kind(block: nn.Module) -> str:
    shortcut = block.downsample
    if shortcut is None:  # a plain network of ours; elsewhere the input as it is
        return "none" if isinstance(block, Block) else "identity"
    if isinstance(shortcut, PadShortcut):
        return "padding"
    return "identity" if isinstance(shortcut, nn.Identity) else "projection"
