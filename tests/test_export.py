"""What is exported is the network: loaded by the libraries it names, by the lines of its card, to the same logits."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import draw, here, metrics
from nets import images, ours, scatter_norms
from trained import SMALL

from trainer.config import Model
from trainer.export import formats
from trainer.export.fold import fold
from trainer.export.libraries import libraries
from trainer.models.build import create
from trainer.target import find, read_metadata


def saved(name: str, path: Path, classes: int = 7, **options: object) -> torch.nn.Module:
    """A network whose norms all differ, its weights in the file `path`."""
    torch.manual_seed(0)
    model = create(Model(name=name, **options), classes).eval()
    scatter_norms(model)
    torch.save(model.state_dict(), path)
    return model


def logits(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"name": "resnet18"}, ["timm", "torchvision", "trainer"]),
        ({"name": "resnet18", "variant": "v1"}, ["timm", "torchvision", "trainer"]),
        ({"name": "resnet18", "variant": "d"}, ["timm", "trainer"]),
        ({"name": "timm:resnet18.a1_in1k"}, ["timm", "trainer"]),
        ({"name": "torchvision:resnet18"}, ["torchvision", "trainer"]),
        ({"name": "resnet18", "blurpool": "convs"}, ["trainer"]),
        ({"name": "resnet50", "variant": "v1"}, ["trainer"]),
        ({"name": "resnet18", "residual": False}, ["trainer"]),
        ({"name": "resnet18", "shortcut": "A"}, ["trainer"]),
        ({"name": "resnet20"}, ["trainer"]),
    ],
    ids=str,
)
def test_a_card_names_the_libraries_whose_networks_are_the_same(options: dict, names: list[str]) -> None:
    assert [library.name for library in libraries(Model(**options), 7)] == names


@pytest.mark.parametrize("variant", ["v1.5", "d"])
def test_libraries_load_strictly_and_answer_the_same(variant: str, tmp_path: Path) -> None:
    model = saved("resnet18", tmp_path / "w.pt", variant=variant)
    options = ["model.name=resnet18", f"model.variant={variant}", "model.num_classes=7", "data.image_size=64"]
    config = tmp_path / "r18.yaml"
    config.write_text(f"model: {{weights: {tmp_path / 'w.pt'}}}")
    done = here(
        "export", config, *options, f"data.root={tmp_path / 'none'}", "--output", tmp_path / "out" / "r.safetensors"
    )
    assert done.status == 0, done.errors
    assert "noise" in done.output
    run_card(tmp_path / "out", model, images(3, 64), sections=2 + (variant == "v1.5"))
    # And it is a target of its own, which needs to be told nothing.
    again = find(str(tmp_path / "out" / "r.safetensors"), [])
    assert torch.equal(logits(again.model(), images(3, 64)), logits(model, images(3, 64)))
    assert again.config.data.crop_size == 64 and again.config.model.variant == variant


def run_card(folder: Path, model: torch.nn.Module, x: torch.Tensor, sections: int) -> None:
    """Run the lines of every loading section of the card in `folder`."""
    text = (folder / "MODEL_CARD.md").read_text()
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(found) == sections
    for lines in found:
        assert len(lines.splitlines()) == 3
        space = {"images": x}
        with contextlib.chdir(folder), torch.no_grad():
            exec(lines, space)
            answer = space.get("logits")
            answer = space["model"](x) if answer is None else answer
        torch.testing.assert_close(torch.as_tensor(answer), logits(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", ["safetensors", "torchscript", "pt2", "onnx"])
@pytest.mark.parametrize("options", [[], ["--ema"], ["--fold-bn"]], ids=lambda o: "".join(o) or "raw")
def test_a_run_is_exported(format: str, options: list[str], trained: Path) -> None:
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"{package} is of the extra `export`, which is not installed here")
    if format == "safetensors" and options == ["--fold-bn"]:
        done = here("export", trained, "--format", format, *options)
        assert done.status == 2 and re.search(r"error: --fold-bn with --format safetensors: .*torchscript", done.errors)
        return
    done = here("export", trained, "--format", format, *options)
    assert done.status == 0, done.errors
    folder = trained / "export" / f"{format}{'-ema' * ('--ema' in options)}{'-folded' * ('--fold-bn' in options)}"
    model = find(str(trained), []).model(ema="--ema" in options)
    run_card(folder, model, images(5, 32), sections=1)
    assert sorted(path.name for path in folder.iterdir()) == ["MODEL_CARD.md", f"model{formats.FORMATS[format].suffix}"]
    card = (folder / "MODEL_CARD.md").read_text()
    run = json.loads((trained / "run.json").read_text())
    for fact in ("class0, class1", str(run["commit"]), "global_batch_size: 24", "8 images of", "central 32 x 32"):
        assert fact in card, fact
    assert str(trained.parent) not in card, "a card tells nothing of this machine's folders"
    if options == ["--fold-bn"]:
        assert "19 BatchNorms" in done.output, "resnet20 has 19, and shortcuts without layers"


def test_an_export_says_how_its_images_are_made(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    assert here("export", trained, "--output", path).status == 0
    about = read_metadata(path)
    assert (about["input_size"], about["resize"], about["crop_ratio"]) == ([3, 32, 32], 37, round(32 / 37, 6))
    assert about["classes"] == [f"class{i}" for i in range(4)] and about["mean"] == [0.485, 0.456, 0.406]
    assert find(str(path), []).classes == tuple(about["classes"])
    # The command evaluates it as it evaluates the run.
    line = [
        json.loads(here("evaluate", source, *rest).output) for source, rest in ((trained, []), (path, data(trained)))
    ]
    assert line[0]["top1"] == line[1]["top1"] and line[0]["loss"] == pytest.approx(line[1]["loss"], rel=1e-6)


def data(run: Path) -> list[str]:
    return [f"data.root={find(str(run), []).config.data.root}", "precision.amp=fp32"]


@pytest.mark.parametrize("name", ["resnet18", "timm:resnet18", "timm:mobilenetv2_100", "torchvision:mobilenet_v2"])
def test_folding_leaves_no_norm_and_the_logits(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "w.pt")
    before = logits(model, images())
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    assert fold(model, images()) == norms > 0
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    torch.testing.assert_close(logits(model, images()), before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


def test_what_does_not_answer_the_same_is_not_put_in_place(trained: Path, tmp_path: Path, monkeypatch) -> None:
    good = formats.FORMATS["torchscript"]

    def write(model, x, path, text):
        model.fc.bias.data[0] += 0.01
        good.write(model, x, path, text)
        model.fc.bias.data[0] -= 0.01

    broken = formats.Format(suffix=good.suffix, write=write, load=good.load, lines=good.lines)
    monkeypatch.setitem(formats.FORMATS, "torchscript", broken)
    done = here("export", trained, "--format", "torchscript", "--output", tmp_path / "bad.pt")
    assert done.status == 1 and re.search(r"error: loaded back with torchscript, the logits .* differ", done.errors)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_one_line(trained: Path, tmp_path: Path, monkeypatch) -> None:
    plain = tmp_path / "plain.pt"
    torch.save(ours("resnet20", 4).state_dict(), plain)
    yaml = tmp_path / "plain.yaml"
    yaml.write_text(f"model: {{name: resnet20, weights: {plain}}}\ndata: {{root: none, image_size: 32}}")
    (tmp_path / "MODEL_CARD.md").write_text("somebody's own")
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda package: None)
    for arguments, message in [
        ((trained, "--format", "onx"), r"--format onx is not known: did you mean onnx\? use one of: safetensors"),
        ((trained, "--format", "onnx"), r"needs the packages onnx, onnxscript, onnxruntime: pip install onnx"),
        ((tmp_path / "no.safetensors", "--format", "pt2"), r"no\.safetensors does not exist"),
        (("nothing", "--format", "pt2"), r"nothing does not exist: give a run folder"),
        ((yaml, "--ema", "model.num_classes=4", "--format", "pt2"), r"--ema: .*plain\.pt holds no averaged weights"),
        ((yaml, "--format", "pt2", "model.num_classes=9"), r"has 4 classes .* set model\.num_classes=4"),
        ((yaml, "--format", "pt2", "model.num_classes=4", "--output", tmp_path / "x.pt2"), r"card of something else"),
        ((trained, "--format", "pt2", "--output", "/proc/x/y.pt2"), r"cannot be written"),
    ]:
        done = here("export", *arguments)
        assert done.status == 2, (arguments, done.errors)
        assert re.search(message, done.errors) and done.errors.count("\n") == 1, done.errors
    with pytest.raises(SystemExit):
        here("export", trained, "--formt", "pt2")


def test_an_export_starts_a_run_on_other_classes(trained: Path, tmp_path: Path) -> None:
    exported = tmp_path / "e.safetensors"
    assert here("export", trained, "--ema", "--output", exported).status == 0
    draw(tmp_path / "own" / "train", 3, [8] * 3, seed=5)
    draw(tmp_path / "own" / "val", 3, [2] * 3, seed=6)
    (tmp_path / "c.yaml").write_text("{}")
    options = [
        *SMALL,
        f"data.root={tmp_path / 'own'}",
        f"model.weights={exported}",
        "loop.max_steps=1",
        "optim.lr=1e-9",
    ]
    refused = here("train", tmp_path / "c.yaml", *options, f"output_dir={tmp_path / 'no'}")
    assert refused.status == 2 and re.search(r"has 4 classes .* model has 3: .*model\.new_head=true", refused.errors)
    options += ["model.new_head=true", f"output_dir={tmp_path / 'run'}"]
    done = here("train", tmp_path / "c.yaml", *options)
    assert done.status == 0, done.errors
    assert "normalised otherwise" not in done.errors
    # The images' mean and deviation are part of the weights: others are not refused, but never silent.
    checkpoint = max((trained / "checkpoints").iterdir())
    for name, weights in {"export": exported, "checkpoint": checkpoint}.items():
        words = [f"model.weights={weights}", "data.std=[0.3,0.2,0.1]", f"output_dir={tmp_path / name}"]
        done = here("train", tmp_path / "c.yaml", *options, *words)
        assert done.status == 0 and re.search(r"were trained .* otherwise: data\.mean=\[.* data\.std=\[", done.errors)
    # At a rate of nothing the weights are still those that came in, under a head of its own.
    before, after = find(str(trained), []).model(ema=True), find(str(tmp_path / "run"), []).model()
    theirs = dict(before.named_parameters())
    for name, value in after.named_parameters():
        if name.startswith("fc."):
            assert value.shape[0] == 3
        else:
            torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)
    assert metrics(tmp_path / "run", "eval")[-1]["count"] == 6
