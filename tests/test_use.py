"""evaluate and predict, on runs, checkpoints, exports and the weights of timm and torchvision."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import here, torchrun
from nets import same
from PIL import Image

from trainer.config import Model
from trainer.models import pretrained
from trainer.models.build import create
from trainer.target import find


def line(*arguments: object) -> dict:
    done = here("evaluate", *arguments)
    assert done.status == 0, done.errors
    return json.loads(done.output.splitlines()[-1])


def test_what_is_found_adds_up_over_two_ranks(trained: Path, tmp_path: Path) -> None:
    alone, pair = tmp_path / "one.json", tmp_path / "two.json"
    done = here("evaluate", trained, "--output", alone, "--table")
    assert done.status == 0, done.errors
    assert "taken for one another" in done.output and re.search(r"class3 +5 ", done.output)
    brief, one = json.loads(done.output.splitlines()[-1]), json.loads(alone.read_text())
    assert brief["count"] == 23 and brief["calibration_error"] == one["calibration_error"]
    assert brief["ema_calibration_error"] == one["ema"]["calibration_error"] != one["calibration_error"]
    for part in (one, one["ema"]):
        assert [row["count"] for row in part["per_class"]] == [7, 5, 6, 5]
        right = sum(row["count"] * row["top1"] for row in part["per_class"]) / 100
        assert right == pytest.approx(23 * part["top1"] / 100, abs=1e-3)
        assert sum(pair["count"] for pair in part["confusions"]) == 23 - round(right)
    done = torchrun("evaluate", trained, "--output", pair, ranks=2)
    assert done.status == 0, done.errors
    two = json.loads(pair.read_text())
    for part, other in ((one, two), (one["ema"], two["ema"])):
        for key in ("top1", "top5", "count", "per_class", "confusions"):
            assert part[key] == other[key], key
        assert part["calibration_error"] == pytest.approx(other["calibration_error"], abs=1e-5)


def test_a_subset_has_the_logits_of_its_classes_alone(trained: Path, tiny: Path, tmp_path: Path) -> None:
    for name in ("class1", "class3"):
        shutil.copytree(tiny / "val" / name, tmp_path / "val" / name)
    done = here("evaluate", trained, f"data.root={tmp_path}")
    assert done.status == 2 and "add --subset" in done.errors
    found = line(trained, f"data.root={tmp_path}", "--subset")
    assert found["count"] == 10
    model = find(str(trained), []).model()
    asked = here("predict", trained, tmp_path / "val", "--json", "--top", 4)
    records = [json.loads(text) for text in asked.output.splitlines()]
    right = 0
    for record in records:
        best = next(entry["class"] for entry in record["top"] if entry["class"] in ("class1", "class3"))
        right += best == Path(record["file"]).parent.name
    assert found["top1"] == pytest.approx(100 * right / 10)
    assert model.fc.out_features == 4


def test_real_and_numbered_sets(trained: Path, tiny: Path, tmp_path: Path) -> None:
    # All images as ImageNet names them, each with the label that is predicted or none.
    shutil.copytree(tiny / "val", tmp_path / "val")
    files = sorted((tmp_path / "val").glob("*/*.JPEG"))
    for number, file in enumerate(files, 1):
        file.rename(file.with_name(f"ILSVRC2012_val_{number:08}.JPEG"))
    records = [json.loads(t) for t in here("predict", trained, tmp_path / "val", "--json").output.splitlines()]
    answers = [[int(r["top"][0]["class"][-1])] if number % 3 else [] for number, r in enumerate(records)]
    (tmp_path / "real.json").write_text(json.dumps(answers))
    found = line(trained, f"data.root={tmp_path}", "--real", tmp_path / "real.json")
    assert (found["real_top1"], found["real_count"]) == (100.0, sum(map(bool, answers)))
    assert found["top1"] == line(trained)["top1"]
    for number in range(4):
        (tmp_path / "val" / f"class{number}").rename(tmp_path / "val" / str(number))
    renamed = line(trained, f"data.root={tmp_path / 'val'}", "data.val=.", "--numbered")
    assert renamed["top1"] == found["top1"]


@pytest.mark.parametrize("name", ["timm:resnet18.a1_in1k", "torchvision:resnet18"])
def test_a_librarys_weights_from_a_file(name: str, tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(create(Model(name=name), 1000).state_dict(), tmp_path / "w.pt")
    # Made as the library says, and by number as anybody's.
    target = find(name, [f"model.weights={tmp_path / 'w.pt'}"])
    size = {"timm:resnet18.a1_in1k": (288, 288), "torchvision:resnet18": (224, 256)}[name]
    assert (target.config.data.crop_size, target.config.data.short_side) == size
    assert target.classes == pretrained.wnids() and len(target.classes) == 1000
    smaller = find(name, [f"model.weights={tmp_path / 'w.pt'}", "data.image_size=112"]).config.data
    assert (smaller.crop_size, smaller.short_side) == (112, round(112 * size[1] / size[0]))
    done = here(
        "predict",
        name,
        next((tiny / "val").rglob("*.JPEG")),
        f"model.weights={tmp_path / 'w.pt'}",
        "data.image_size=64",
        "--json",
    )
    assert done.status == 0, done.errors
    (record,) = map(json.loads, done.output.splitlines())
    assert all(re.fullmatch(r"n\d{8}", entry["class"]) and entry["name"] != entry["class"] for entry in record["top"])
    for number in range(4):
        shutil.copytree(tiny / "val" / f"class{number}", tmp_path / "set" / "val" / pretrained.wnids()[10 * number])
    options = [f"model.weights={tmp_path / 'w.pt'}", f"data.root={tmp_path / 'set'}", "data.image_size=64", "--subset"]
    assert line(name, *options)["count"] == 23


def test_predictions_are_the_networks(trained: Path, tiny: Path, tmp_path: Path) -> None:
    files = sorted((tiny / "val").rglob("*.JPEG"))
    done = here("predict", trained, tiny / "val" / "class0", tiny / "val/class[123]/*.JPEG", "--json", "--top", 2)
    assert done.status == 0, done.errors
    records = [json.loads(text) for text in done.output.splitlines()]
    assert [record["file"] for record in records] == [str(file) for file in files]
    right = sum(record["top"][0]["class"] == Path(record["file"]).parent.name for record in records)
    assert 100 * right / len(files) == pytest.approx(line(trained)["top1"])
    for record in records:
        first, second = (entry["probability"] for entry in record["top"])
        assert 1 >= first >= second >= 0
    # A table, and a picture of the same; one image alone is what it is in a batch.
    done = here("predict", trained, files[3], "--grid", tmp_path / "g.png", "--ema")
    assert done.status == 0 and done.output.count("%") == 4, done.errors
    assert Image.open(tmp_path / "g.png").size == (192, 212)
    alone = json.loads(here("predict", trained, files[3], "--json", "--top", 2).output)
    assert alone["top"][0]["probability"] == pytest.approx(records[3]["top"][0]["probability"], abs=1e-5)


def test_mistakes_are_one_line(trained: Path, tiny: Path, tmp_path: Path) -> None:
    good = next((tiny / "val").rglob("*.JPEG"))
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    whole = good.read_bytes()
    (tmp_path / "torn.jpg").write_bytes(whole[:300] + bytes(200) + b"\xff\xd9")  # a header, no picture
    (tmp_path / "nothing").mkdir()
    wide = tmp_path / "wide.pt"
    torch.save(find(str(trained), []).model().state_dict(), wide)
    for arguments, message in [
        (
            ("predict", trained, good, tmp_path / "text.jpg", tmp_path / "empty.png"),
            r"2 of 3 files: .*text\.jpg is not an image; .*empty\.png is empty",
        ),
        (("predict", trained, tmp_path / "nothing"), r"nothing holds no images"),
        (("predict", trained, tmp_path / "*.gif"), r"no glob that anything matches"),
        (("predict", trained, "data.image_size=32"), r"no image is named"),
        (("predict", trained, good, "--top", "0"), r"--top 0 is too small"),
        (("predict", trained, good, "--grid", tmp_path / "no" / "g.png"), r"--grid .*cannot be written"),
        (("predict", "timm:resnet18x", good, f"model.weights={wide}"), r"timm:resnet18x is not known: did you mean"),
        (("predict", "torchvision:resnet18.V9", good), r"has no weights V9: use one of IMAGENET1K_V1"),
        (("predict", "timm:resnet18.zzz", good), r"resnet18\.zzz has no such weights"),
        (("predict", "resnet18", good), r"resnet18 has no weights of its own: add model\.weights=FILE"),
        (("predict", "timm:resnet18x", good), r"timm:resnet18x is not known: did you mean"),
        (("predict", "torchvision:resnet19", good), r"torchvision:resnet19 is not known: did you mean"),
        (("predict", good, good), r"is of no known kind: give a run folder"),
        (("evaluate", trained, "--subset", "--numbered"), r"--subset and --numbered are for different sets"),
        (("evaluate", trained, "--output", tmp_path / "no" / "x.json"), r"--output .*there is no folder"),
        (("evaluate", trained, f"data.root={tmp_path / 'none'}"), r"none does not exist"),
        (
            ("evaluate", "torchvision:resnet18", f"model.weights={wide}", f"data.root={tiny}"),
            r"has 1000 classes and .* has 4",
        ),
    ]:
        done = here(*arguments)
        assert done.status == 2, (arguments, done.output, done.errors)
        assert re.search(message, done.errors) and done.errors.count("\n") == 1, done.errors
        assert done.output == ""
    done = here("predict", trained, good, tmp_path / "torn.jpg")
    assert done.status == 2 and "1 of 2 files" in done.errors and "torn.jpg" in done.errors and done.output == ""


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """torch's hub folder, empty, on a machine without a network."""

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("Name or service not known\nand more")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18.a1_in1k"])
def test_no_network_is_one_line(name: str, tiny: Path, unreachable: Path) -> None:
    done = here("predict", name, next((tiny / "val").rglob("*.JPEG")))
    assert done.status == 2 and done.errors.count("\n") == 1, done.errors
    assert re.search(rf"weights of {name} cannot be fetched .*model\.weights=FILE", done.errors)


def test_a_librarys_own_weights_come_from_its_cache(tiny: Path, unreachable: Path) -> None:
    model = create(Model(name="torchvision:resnet18"), 1000)
    (unreachable / "checkpoints").mkdir(parents=True)
    torch.save(model.state_dict(), unreachable / "checkpoints" / "resnet18-f37072fd.pth")
    found = find("torchvision:resnet18.IMAGENET1K_V1", []).model()
    assert same(dict(found.state_dict()), dict(model.state_dict())) and not found.training


def test_late_options_are_taken_and_unknown_ones_refused(trained: Path, tiny: Path) -> None:
    assert line(trained, "--table", "data.eval_size=48")["count"] == 23
    files = sorted((tiny / "val").rglob("*.JPEG"))[:2]
    done = here("predict", trained, files[0], "--json", files[1])
    assert [json.loads(text)["file"] for text in done.output.splitlines()] == [str(file) for file in files]
    with pytest.raises(SystemExit):
        here("evaluate", trained, "--tabel")
    assert np.isfinite(line(trained, "loop.eval_flip=true")["loss"])
