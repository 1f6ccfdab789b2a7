"""The page of a run: whole, safe, the same numbers as the run's; what bounds a run, and where its time went."""

from __future__ import annotations

import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import here
from PIL import Image

from trainer import configfile
from trainer.config import ConfigError
from trainer.report import charts, page, runs
from trainer.report.breakdown import breakdown
from trainer.report.classes import picture
from trainer.report.health import health

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
VOID = {"meta", "img", "input", "br"}
LOADER = {"threads": 8, "cores": 16, "megapixels": 0.2, "short_side": 400}


def record(step: int, **more: Any) -> dict[str, Any]:
    seconds = 2.0
    base = {"kind": "train", "step": step, "epoch": step / 100, "samples": 256 * step, "loss": 3 - step / 400}
    base |= {"top1": step / 10, "lr": 0.1, "images_per_second": 128.0, "step_seconds": seconds}
    return base | {"data_wait_fraction": 0.02, "wall_seconds": seconds * step, **more}


def make_run(folder: Path, *overrides: str, ranks: int = 4, loader: dict | None = None, **more: Any) -> runs.Run:
    """A run of 400 steps in two attempts, with an evaluation and a save every 100."""
    folder.mkdir()
    config = configfile.load(None, [f"output_dir={folder}", *overrides])
    plan = {"ranks": ranks, "samples": 25_600, "epochs": 4, "global_batch": 256, "total_steps": 400, "peak_lr": 0.1}
    hosts = [f"node{rank // 2}" for rank in range(ranks)]
    origin = {"plan": plan, "hosts": hosts, "loader": loader or LOADER, "command": ["trainer", HOSTILE]}
    (folder / "config.yaml").write_text(configfile.to_yaml(config))
    (folder / "run.json").write_text(json.dumps(origin))
    lines, happened = [], [{"kind": "start", "step": 0, "attempt": 1, "wall_seconds": 0.0, "seconds": 9.0}]
    for step in range(50, 401, 50):
        lines.append(record(step, **more))
        if step % 100 == 0:
            wall = lines[-1]["wall_seconds"]
            evaluated = {"kind": "eval", "top1": 10 + step / 10, "top5": 90, "count": 500, "seconds": 6.0}
            lines.append({**record(step), **evaluated, "wall_seconds": wall})
            happened.append({"kind": "save", "step": step, "attempt": 1, "wall_seconds": wall, "seconds": 0.5})
        if step == 200:
            happened.append({"kind": "start", "step": step, "attempt": 2, "wall_seconds": 430.0, "seconds": 9.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in happened))
    summary = {"status": "done", "wall_seconds": 840.0, "images_per_second": 128.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    return runs.read(folder)


class Balanced(HTMLParser):
    """Fails at a tag that does not close what was opened last; collects tags, attributes and words."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.tags, self.links, self.words = [], [], [], []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        names = dict(attrs)
        self.links += [names[key] for key in ("src", "href") if key in names]
        assert not any(key.startswith("on") for key in names), (tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def parsed(html: str) -> Balanced:
    parser = Balanced()
    parser.feed(html)
    assert not parser.open
    return parser


@pytest.fixture
def run(tmp_path: Path) -> runs.Run:
    return make_run(tmp_path / "a run")


def test_a_page_needs_nothing_but_itself_and_shows_the_runs_numbers(run: runs.Run) -> None:
    found = parsed(page.page([run]))
    assert found.tags.count("script") == 1 and not found.links
    words = " ".join(found.words)
    for expected in ("50.00%", "in epoch 4", "128", "14 min 00 s", "1 restart", "Compute-bound", "node0 (2 ranks)"):
        assert expected in words, expected
    assert "url(" not in page.page([run]) and "http" not in page.page([run])


def test_whatever_a_class_or_file_is_called_it_is_shown_and_does_nothing(run: runs.Run) -> None:
    (run.path / "mistakes").mkdir()
    Image.new("RGB", (8, 8)).save(run.path / "mistakes" / "0.jpg")
    wrong = {"file": HOSTILE, "actual": HOSTILE, "predicted": HOSTILE, "probability": 0.99, "picture": "mistakes/0.jpg"}
    told = {
        "step": 400,
        "epoch": 4,
        "per_class": [{"name": HOSTILE, "count": 5, "top1": 20.0}],
        "confusions": [{"actual": HOSTILE, "predicted": HOSTILE, "count": 3}],
        "mistakes": [wrong, {**wrong, "picture": HOSTILE}],
    }
    (run.path / "evaluation.json").write_text(json.dumps(told))
    found = parsed(page.page([runs.read(run.path)]))
    assert found.tags.count("script") == 1 and found.words.count(HOSTILE) >= 5
    (link,) = found.links
    assert link.startswith("data:image/jpeg;base64,")


def test_no_file_but_a_small_jpeg_of_the_run_gets_into_the_page(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("run/in.jpg", "out.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "run" / "text.jpg").write_text("secret")
    (tmp_path / "run" / "link.jpg").symlink_to(tmp_path / "out.jpg")
    (tmp_path / "run" / "big.jpg").write_bytes(b"\xff\xd8\xff" * 100_000)
    allowed = {n: picture(tmp_path / "run", n) is not None for n in ("in.jpg", "text.jpg", "big.jpg", "link.jpg")}
    assert allowed == {"in.jpg": True, "text.jpg": False, "big.jpg": False, "link.jpg": False}
    assert picture(tmp_path / "run", "../out.jpg") is picture(tmp_path / "run", str(tmp_path / "out.jpg")) is None
    assert picture(tmp_path / "run", None) is None and picture(tmp_path / "run", "a\0b") is None


def test_several_runs_are_told_apart_and_their_configs_compared(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", "optim.lr=0.5")
    second = make_run(tmp_path / "second", "optim.lr=0.25", "model.name=resnet18")
    text = " ".join(parsed(page.page([first, second])).words)
    assert all(word in text for word in ("first", "second", "optim.lr", "model.name", "resnet18"))
    assert "global_batch_size" not in text
    alike = make_run(tmp_path / "third", "optim.lr=0.5")
    assert "Their configs are the same." in page.page([first, alike])


@pytest.mark.parametrize("left", ["config.yaml", "metrics.jsonl", "run.json", "events.jsonl", "summary.json"])
def test_a_run_folder_may_lack_anything_but_its_config(run: runs.Run, left: str) -> None:
    for file in run.path.iterdir():
        if file.name not in ("config.yaml", left):
            file.unlink()
    parsed(page.page([runs.read(run.path)]))
    (run.path / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"a run is not a run folder \(it has no config\.yaml\): give the output_dir"):
        runs.read(run.path)


def test_the_report_command_writes_one_page(run: runs.Run, tmp_path: Path) -> None:
    done = here("report", run.path)
    assert done.status == 0 and (run.path / "report.html").read_text() == page.page([run])
    other = here("report", run.path, run.path, "--output", tmp_path / "both.html")
    assert other.status == 0 and other.output == f"{tmp_path / 'both.html'} is written\n"
    refused = here("report", run.path, "--output", tmp_path / "no" / "folder.html")
    assert refused.status == 2 and refused.errors.count("\n") == 1 and "cannot be written" in refused.errors


# Where the time went, and what bounds a run


def test_the_parts_of_the_time_add_up_to_it(run: runs.Run) -> None:
    parts = breakdown(run)
    assert sum(parts.values()) == pytest.approx(run.wall_seconds) == 840
    assert parts["data wait"] == pytest.approx(0.02 * 800) and parts["evaluation"] == 24 and parts["saves"] == 2


def test_a_healthy_run_is_compute_bound(run: runs.Run) -> None:
    assert health(run).bound == "compute"


@pytest.mark.parametrize(
    ("loader", "cure"),
    [
        (LOADER, "data.threads=11 would do"),
        ({**LOADER, "cores": 8}, "prepare --short-side 341"),  # 400 * sqrt(8 / 11)
        ({**LOADER, "cores": 2, "threads": 2}, "prepare --short-side 326"),  # 400 * sqrt(2 / 3)
        ({**LOADER, "cores": 2, "threads": 2, "short_side": 300}, "prepare --short-side 256"),  # not 244: crops
        ({**LOADER, "cores": 8, "short_side": 256}, "as small as this run's crops bear"),
    ],
)
def test_an_input_bound_run_hears_what_would_cure_it(tmp_path: Path, loader: dict, cure: str) -> None:
    verdict = health(make_run(tmp_path / "run", loader=loader, data_wait_fraction=0.25))
    assert verdict.bound == "input" and cure in verdict.text
    assert "25% of the time" in verdict.text and "delivers 32 images/s a rank" in verdict.text
    assert "network could take 43" in verdict.text


def test_a_straggler_is_named_with_its_host(tmp_path: Path) -> None:
    slow = {"slowest_rank": 3, "slowest_rank_excess": 0.4, "slowest_rank_by": "data", "rank_wait_fraction": 0.2}
    verdict = health(make_run(tmp_path / "run", **slow))
    assert verdict.bound == "straggler" and "rank 3 on node1 takes 40% longer" in verdict.text
    assert "waits longer for its images" in verdict.text


def test_a_rank_that_is_slow_now_and_then_is_no_straggler(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", slowest_rank_excess=0.2, slowest_rank_by="compute")
    for number, told in enumerate(run.train):
        told["slowest_rank"] = number % 4
    assert health(run).bound == "compute"


def test_a_slow_network_is_told_from_the_rest(tmp_path: Path) -> None:
    verdict = health(make_run(tmp_path / "run", allreduce_fraction=0.3))
    assert verdict.bound == "communication" and "30% of the time" in verdict.text


# Charts


@pytest.mark.parametrize("low", [0.0, -3.2, 17.0, 1e-6, 4321.0])
@pytest.mark.parametrize("width", [1e-5, 0.03, 1.0, 7.0, 99.0, 123456.0])
def test_ticks_are_few_and_round_and_hold_the_values(low: float, width: float) -> None:
    marks = charts.ticks(low, low + width)
    assert marks[0] <= low + 1e-9 * width and marks[-1] >= low + width * (1 - 1e-9) and 2 <= len(marks) <= 8
    gaps = {f"{b - a:.3e}"[:3] for a, b in itertools.pairwise(marks)}
    assert gaps <= {"1.0", "2.0", "5.0", "9.9"}


@pytest.mark.parametrize("n", [1, 2, 399, 400, 401, 800, 12_345])
def test_thinning_keeps_the_mean_and_the_last_point(n: int) -> None:
    points = [(float(i), math.sin(i)) for i in range(n)]
    thin = charts.thinned(points)
    assert len(thin) <= charts.POINTS and thin[-1] == points[-1]
    assert all(a[0] < b[0] for a, b in itertools.pairwise(thin))


def test_a_chart_of_one_point_or_of_equal_values_is_drawn() -> None:
    axis = charts.Axis("x", str)
    for points in ([(1.0, 2.0)], [(0.0, 0.0)], [(1.0, 5.0), (2.0, 5.0)], [(1.0, 2.0), (2.0, math.nan)]):
        for zero in (False, True):
            drawn = charts.chart([charts.Series("a", 0, points, "dots")], axis, axis, zero=zero)
            numbers = [
                float(n) for path in re.findall(r' d="([^"]*)"', drawn) for n in re.findall(r"-?\d+\.?\d*", path)
            ]
            assert "nan" not in drawn and all(0 <= number <= charts.SIDE for number in numbers)
    assert "Nothing to draw yet" in charts.chart([charts.Series("a", 0, [])], axis, axis)


# Colours


def schemes() -> list[dict[str, tuple[float, ...]]]:
    css = (page.HERE / "page.css").read_text()
    found = []
    for block in re.findall(r":root \{(.*?)\}", css, re.S):
        pairs = re.findall(r"--(\w+): #([0-9a-f]{6})", block)
        found.append({name: tuple(int(value[i : i + 2], 16) / 255 for i in (0, 2, 4)) for name, value in pairs})
    return found


def linear(colour: tuple[float, ...]) -> list[float]:
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]


def luminance(colour: tuple[float, ...]) -> float:
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear(colour)))


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# Machado, Oliveira and Fernandes 2009, severity 1.0: what who lacks one kind of cone sees, in linear RGB.
SEEN = {
    "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}


def lab(colour: tuple[float, ...], matrix: list[list[float]]) -> list[float]:
    """Oklab (Ottosson 2020)."""
    r, g, b = (max(0.0, sum(m * c for m, c in zip(row, linear(colour)))) for row in matrix)
    cones = [
        0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b,
        0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b,
        0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b,
    ]
    x, y, z = (cone ** (1 / 3) for cone in cones)
    return [
        0.2104542553 * x + 0.7936177850 * y - 0.0040720468 * z,
        1.9779984951 * x - 2.4285922050 * y + 0.4505937099 * z,
        0.0259040371 * x + 0.7827717662 * y - 0.8086757660 * z,
    ]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_words_and_lines_can_be_read_in_both_schemes(scheme: int) -> None:
    colours = schemes()[scheme]
    for name in ("ink", "soft", "accent", "good", "warn", "bad"):
        assert contrast(colours[name], colours["paper"]) >= 4.5, name
    for number in range(charts.COLOURS):
        assert contrast(colours[f"c{number}"], colours["paper"]) >= 3, number


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("eye", SEEN)
def test_lines_are_told_apart_by_the_colour_blind(scheme: int, eye: str) -> None:
    colours = [lab(schemes()[scheme][f"c{number}"], SEEN[eye]) for number in range(charts.COLOURS)]
    for i, one in enumerate(colours):
        for other in colours[:i]:
            assert math.dist(one, other) > 0.1, (i, colours.index(other))
