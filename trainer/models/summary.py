"""What a model consists of: its layers, parameters and multiply-accumulates (MACs), counted by running it once.

MACs are those of convolutions and linear layers for one image, without biases, norms, activations, pooling and the
products inside attention: the convention of the ResNet paper's "FLOPs" (Table 1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = re.compile(r"layer\d+\.\d+\.(?!downsample)")  # a layer in the branch of a block


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One layer, or the parameters that a container holds itself."""

    name: str  # as in the state dict: layer1.0.conv1
    kind: str  # class and kernel: Conv2d 3x3
    output: tuple[int, ...] | None  # without the batch dimension; None: does not return one tensor, or is not called
    stride: int | tuple[int, ...] | None
    parameters: int
    macs: int  # for one image


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, trainable or not; a shared one counts once. Buffers are none."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, image_size: int, channels: int = 3) -> int:
    """MACs of one image of `image_size` x `image_size` pixels: 4.089e9 for ResNet-50 v1.5 at 224."""
    return sum(row.macs for row in layer_table(model, image_size, channels))


def layer_table(model: nn.Module, image_size: int, channels: int = 3) -> list[LayerRow]:
    """The layers of a bare model in the order of its modules; parameters and MACs add up to those of the model.

    Runs one black image in evaluation mode on the model's device, which may be "meta": then nothing is computed and no
    memory is needed. The model is left as it was.
    """
    called: dict[nn.Module, tuple[tuple[int, ...] | None, int]] = {}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        shape = tuple(output.shape[1:]) if isinstance(output, Tensor) else None
        before = called[module][1] if module in called else 0  # a layer may be called more than once
        called[module] = (shape, before + _macs(module, output))

    modes = {module: module.training for module in model.modules()}
    hooks = [module.register_forward_hook(note) for module in model.modules()]
    first = next(model.parameters())
    try:
        model.eval()
        with torch.no_grad():
            model(torch.zeros(1, channels, image_size, image_size, device=first.device, dtype=first.dtype))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training

    rows = []
    counted: set[Tensor] = set()
    for name, module in model.named_modules():
        own = set(module.parameters(recurse=False)) - counted
        counted |= own
        leaf = not any(True for _ in module.children())
        if not own and (not leaf or module not in called or isinstance(module, nn.Identity)):
            continue
        output, macs = called.get(module, (None, 0))
        rows.append(
            LayerRow(
                name=name or "(model)",
                kind=_kind(module),
                output=output,
                stride=_stride(module),
                parameters=sum(parameter.numel() for parameter in own),
                macs=macs,
            )
        )
    return rows


def _macs(module: nn.Module, output: Any) -> int:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return output.numel() * module.weight[0].numel()
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    if isinstance(module, nn.MultiheadAttention):
        # Its four projections are linear layers that it applies itself, to as many tokens as it returns.
        return 4 * output[0].numel() * module.embed_dim
    return 0


def _kind(module: nn.Module) -> str:
    kernel = getattr(module, "kernel_size", None)
    if isinstance(kernel, int):
        kernel = (kernel, kernel)
    name = type(module).__name__
    return f"{name} {'x'.join(map(str, kernel))}" if isinstance(kernel, tuple) else name


def _stride(module: nn.Module) -> int | tuple[int, ...] | None:
    stride = getattr(module, "stride", None)
    if isinstance(stride, tuple) and len(set(stride)) == 1:
        return stride[0]
    return stride if isinstance(stride, (int, tuple)) else None


def format_table(rows: list[LayerRow]) -> str:
    """The rows as text: by stage, as in Table 1 of the paper, when the layers are named as a ResNet's; else one by one.

    The last line is the total. MACs are in millions. A stage shows the convolutions of its first block, the one with
    the strides; its shortcuts are counted and not shown.
    """
    if any(_BLOCK.match(row.name) for row in rows):
        title, lines = ("stage", "output", "blocks"), [_stage(*item) for item in _by_stage(rows).items()]
    else:
        title = ("layer", "output", "kind")
        lines = [(row.name, _shape(row), row.kind + _slash(row), row.parameters, row.macs) for row in rows]
    total = ("total", "", "", sum(row.parameters for row in rows), sum(row.macs for row in rows))
    cells = [(*title, "parameters", "MMACs")]
    cells += [(*words, f"{parameters:,}", f"{macs / 1e6:,.1f}") for *words, parameters, macs in [*lines, total]]
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    head, *body, foot = [
        "  ".join([*map(str.ljust, line[:3], widths), *map(str.rjust, line[3:], widths[3:])]) for line in cells
    ]
    rule = "-" * len(head)
    return "\n".join([head, rule, *body, rule, foot])


def _by_stage(rows: list[LayerRow]) -> dict[str, list[LayerRow]]:
    stages: dict[str, list[LayerRow]] = {}
    for row in rows:
        first = row.name.partition(".")[0]
        stage = "stem" if first in ("conv1", "bn1") else first
        if row.parameters or stage == "maxpool":  # the other layers without parameters say nothing here
            stages.setdefault(stage, []).append(row)
    return stages


def _stage(name: str, rows: list[LayerRow]) -> tuple[str, str, str, int, int]:
    branches = [row for row in rows if _BLOCK.match(row.name)]
    if branches:
        depth = len({row.name.split(".")[1] for row in branches})
        shown = "; ".join(_convolution(row) for row in branches if row.macs and row.name.startswith(f"{name}.0."))
        blocks = f"[{shown}] x {depth}"
    else:
        blocks = "; ".join(_convolution(row) for row in rows if row.macs) or rows[0].kind + _slash(rows[0])
    output = _shape((branches or rows)[-1])
    return name, output, blocks, sum(row.parameters for row in rows), sum(row.macs for row in rows)


def _convolution(row: LayerRow) -> str:
    """As the paper writes it: 3x3, 64, with /2 for a stride of 2."""
    if row.output is None or not row.kind.startswith("Conv"):
        return row.kind
    return f"{row.kind.partition(' ')[2]}, {row.output[0]}{_slash(row)}"


def _slash(row: LayerRow) -> str:
    return "" if row.stride in (None, 1) else f", /{row.stride}"


def _shape(row: LayerRow) -> str:
    return "x".join(map(str, row.output)) if row.output else ""
