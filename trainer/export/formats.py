"""The formats of an export: how each is written and loaded back, on the CPU, in float32, for any batch size."""

from __future__ import annotations

import difflib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.config import ConfigError

Run = Callable[[Tensor], Tensor]  # images (n, 3, h, w) to logits (n, classes)


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format. `write` takes a network in evaluation mode, example images (2 or more) and text to go along."""

    suffix: str
    write: Callable[[nn.Module, Tensor, Path, dict[str, str]], None]
    load: Callable[[Path], Run] | None  # None: a state dict, which needs a network: see trainer/export/libraries.py
    lines: tuple[str, ...] = ()  # of Python, to load FILE and ask it for `images`
    packages: tuple[str, ...] = ()


def find(name: str) -> Format:
    """The format; ConfigError for one that is not known, or whose package is missing."""
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"--format {name} is not known: {hint}use one of: {', '.join(FORMATS)}")
    missing = [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"--format {name} needs the package{'s' if len(missing) > 1 else ''} {', '.join(missing)}: "
            f"pip install {' '.join(missing)}"
        )
    return FORMATS[name]


def _write_safetensors(model: nn.Module, images: Tensor, path: Path, text: dict[str, str]) -> None:
    from safetensors.torch import save_file

    # Cloned, because tensors that share memory are refused, and BatchNorm's counters may not be written as views.
    state = {
        key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in model.state_dict().items()
    }
    save_file(state, path, {"format": "pt", **text})


def _write_torchscript(model: nn.Module, images: Tensor, path: Path, text: dict[str, str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises torch.export, which is the format pt2
        traced = torch.jit.trace(model, images)
        torch.jit.save(traced, path, _extra_files=dict(text))


def _load_torchscript(path: Path) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(path)


def _write_pt2(model: nn.Module, images: Tensor, path: Path, text: dict[str, str]) -> None:
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path, extra_files=dict(text))


def _load_pt2(path: Path) -> Run:
    return torch.export.load(path).module()


def _write_onnx(model: nn.Module, images: Tensor, path: Path, text: dict[str, str]) -> None:
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None, "the exporter of torch.export returns its program"
    program.model.metadata_props.update(text)
    program.save(path, external_data=False)


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


FORMATS = {
    "safetensors": Format(suffix=".safetensors", write=_write_safetensors, load=None, packages=("safetensors",)),
    "torchscript": Format(
        suffix=".torchscript.pt",
        write=_write_torchscript,
        load=_load_torchscript,
        lines=("import torch", 'model = torch.jit.load("FILE")', "logits = model(images)"),
    ),
    "pt2": Format(
        suffix=".pt2",
        write=_write_pt2,
        load=_load_pt2,
        lines=("import torch", 'model = torch.export.load("FILE").module()', "logits = model(images)"),
    ),
    "onnx": Format(
        suffix=".onnx",
        write=_write_onnx,
        load=_load_onnx,
        lines=(
            "import onnxruntime",
            'session = onnxruntime.InferenceSession("FILE")',
            'logits = session.run(["logits"], {"images": images.numpy()})[0]',
        ),
        packages=("onnx", "onnxscript", "onnxruntime"),
    ),
}
