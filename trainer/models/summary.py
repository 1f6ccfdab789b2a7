"""What a model consists of: its layers, parameters and multiply-accumulates (MACs), counted by running it once.

MACs are those of convolutions and linear layers for one image, without biases, norms, activations, pooling and the
products inside attention: the convention of the ResNet paper's "FLOPs" (Table 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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


def call(model: nn.Module, image_size: int, channels: int = 3) -> dict[nn.Module, tuple[tuple[int, ...] | None, int]]:
    """The output (as in LayerRow) and the MACs of every module that one black image calls, in evaluation mode.

    The model may lie on the device "meta": then nothing is computed and no memory is needed. It is left as it was.
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
    return called


def layer_table(model: nn.Module, image_size: int, channels: int = 3) -> list[LayerRow]:
    """The layers of a bare model in the order of its modules; parameters and MACs add up to those of the model.

    Runs one image, as `call` does.
    """
    called = call(model, image_size, channels)
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
    """The rows as text, one by one. The last line is the total; MACs are in millions."""
    cells = [("layer", "output", "kind", "parameters", "MMACs")]
    cells += [(row.name, shape(row.output), row.kind + slash(row), *_counts([row])) for row in rows]
    cells.append(("total", "", "", *_counts(rows)))
    return align(cells, words=3)


def _counts(rows: list[LayerRow]) -> tuple[str, str]:
    return f"{sum(row.parameters for row in rows):,}", f"{sum(row.macs for row in rows) / 1e6:,.1f}"


def align(cells: list[tuple[str, ...]], *, words: int) -> str:
    """A table as text: a head, lines, a foot. The first `words` columns are words, set left; the others numbers."""
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    head, *body, foot = [
        "  ".join([*map(str.ljust, line[:words], widths), *map(str.rjust, line[words:], widths[words:])])
        for line in cells
    ]
    rule = "-" * len(head)
    return "\n".join([head, rule, *body, rule, foot])


def slash(row: LayerRow) -> str:
    """A layer's stride as the paper writes it: ", /2", and nothing for 1."""
    return "" if row.stride in (None, 1) else f", /{row.stride}"


def shape(output: tuple[int, ...] | None) -> str:
    """64x56x56."""
    return "x".join(map(str, output)) if output else ""
