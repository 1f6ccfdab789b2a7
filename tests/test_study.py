"""Studies without a run of their own: the grid, the table, the figure."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from xml.etree import ElementTree

import pytest

from trainer import configfile
from trainer.config import ConfigError
from trainer.study import figure, grid, records, svg, table

STUDY = """
config: recipe.yaml
output_dir: {root}/out
seeds: [3, 5]
set: {{optim.lr: 0.2, optim.momentum: 0.5}}
axes:
  kind: {{plain: {{model.residual: false}}, ResNet: {{}}}}
  layers: {{20: {{model.name: resnet20}}, 32: {{model.name: resnet32, optim.lr: 0.3}}}}
leave_out: [plain-32]
plot: {{panels: kind}}
published: {{source: nobody, error: {{ResNet-20: 8.75}}}}
"""
NAMES = ["plain-20", "ResNet-20", "ResNet-32"]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(
        "{optim: {lr: 0.1, momentum: 0.8, weight_decay: 0.01}, schedule: {epochs: 7}}"
    )
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.format(root=tmp_path))
    return path


def pretend(run: grid.Run, errors: list[tuple[float, float]], status: str = "done") -> None:
    """What a run leaves: training and test error after each of some steps."""
    run.folder.mkdir(parents=True)
    with open(run.folder / "metrics.jsonl", "w") as file:
        for step, (train, test) in enumerate(errors, start=1):
            for kind, error in (("train", train), ("eval", test)):
                record = {"kind": kind, "step": step, "epoch": step / 10, "top1": 100 - error, "loss": error / 50}
                file.write(json.dumps(record) + "\n")
        file.write('{"kind": "tra')  # cut short by a kill
    (run.folder / "run.json").write_text(json.dumps({"plan": {"samples": 256}}))
    (run.folder / "summary.json").write_text(json.dumps({"status": status, "steps": len(errors)}))


# The grid


def test_runs_are_the_crossing_seed_by_seed(study: Path) -> None:
    plan, runs = grid.load(study, [])
    assert [(run.name, run.seed) for run in runs] == [(name, seed) for seed in (3, 5) for name in NAMES]
    assert [run.folder for run in runs] == [Path(plan.output_dir) / r.name / f"seed{r.seed}" for r in runs]
    assert all(run.config.seed == run.seed for run in runs)


def test_a_point_goes_before_set_before_the_recipe_and_the_command_line_before_all(study: Path) -> None:
    _, runs = grid.load(study, ["optim.weight_decay=0.5", "seeds=[1]"])
    found = {run.name: (run.config.optim.lr, run.config.optim.momentum, run.config.optim.weight_decay) for run in runs}
    assert found == {"plain-20": (0.2, 0.5, 0.5), "ResNet-20": (0.2, 0.5, 0.5), "ResNet-32": (0.3, 0.5, 0.5)}
    assert {run.seed for run in runs} == {1} and not runs[0].config.model.residual and runs[1].config.model.residual


def test_the_words_of_a_run_are_its_config(study: Path) -> None:
    for run in grid.load(study, ["loop.stop_at={top1: 50}"])[1]:
        assert configfile.load(run.recipe, run.words) == run.config and run.config.loop.stop_at == {"top1": 50}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lrr=1"], r"plain-20: optim\.lrr=1: there is no option optim\.lrr; did you mean optim\.lr"),
        (["optim.lr=-1"], r"optim\.lr=-1"),
        (["seed=1"], r"seed=1: the study gives every run its own; use seeds=\[0,1\]"),
        (["model.name=resnet18"], r"model\.name is what axis layers varies"),
        (["seeds=[1,1]"], r"seeds=\[1, 1\] must be one or more numbers, each once"),
        (["seeds=[]"], r"seeds=\[\] must be"),
        (["plot.y=accuracy"], r"plot\.y=accuracy is not known; use one of: error, top1, loss"),
        (["plot.panels=depth"], r"plot\.panels=depth is not known; use one of: kind, layers"),
        (["leave_out=[plain-21]"], r"leave_out=plain-21 is none of .* use plain-20, plain-32, ResNet-20, ResNet-32"),
        (["leave_out=[plain-20,plain-32,ResNet-20,ResNet-32]"], r"leaves no run"),
        (["published.error.ResNet-99=1"], r"published\.error=ResNet-99 is none of"),
        (["config=none.yaml"], r"none\.yaml: no such config file"),
        (["axes.kind=plain"], r"axes\.kind must be a mapping"),
        (["axes.kind.a/b={}"], r"point 'a/b' names folders"),
        (["axes.kind.plain.seed=1"], r"axes\.kind\.plain: seed is set by the study"),
        (["axes.kind.odd=1"], r"axes\.kind\.odd must be a mapping of options"),
        (["plots.y=loss"], r"no option plots"),
    ],
)
def test_mistakes_are_named_before_anything_runs(study: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        grid.load(study, words)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_or_run_is_refused_with_the_valid_ones(study: Path) -> None:
    study.write_text(study.read_text().replace("axes:", "axis:"))
    with pytest.raises(ConfigError, match="there is no option axis; did you mean axes"):
        grid.load(study, [])
    study.write_text(study.read_text().replace("axis:", "axes:"))
    with pytest.raises(
        ConfigError, match="--only plain is none of the study's runs; use plain-20, ResNet-20, ResNet-32"
    ):
        grid.select(grid.load(study, [])[1], ["plain"])


# What has become of the runs


def test_the_table_is_of_finished_runs_and_names_the_others(study: Path) -> None:
    plan, runs = grid.load(study, ["loop.max_steps=2"])
    ends = {("plain-20", 3): (40.0, 30.0), ("plain-20", 5): (44.0, 33.0), ("ResNet-20", 3): (20.0, 12.5)}
    for run in runs:
        if (run.name, run.seed) in ends:
            pretend(run, [(90.0, 90.0), ends[run.name, run.seed]])
    stopped = next(run for run in runs if run.name == "ResNet-20" and run.seed == 5)
    pretend(stopped, [(1.0, 1.0)], status="stopped")
    text = table.table(plan, runs)
    rows = {
        line.split()[1]: [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if "of" in line[:30]
    }
    deviations = [f"{statistics.stdev(pair):.2f}" for pair in ((40, 44), (30, 33))]
    assert rows == {
        "plain-20": ["2 of 2", "2", f"42.00 ± {deviations[0]}", f"31.50 ± {deviations[1]}", ""],
        "ResNet-20": ["1 of 2", "2", "20.00", "12.50", "8.75"],
        "ResNet-32": ["0 of 2", "", "", "", ""],
    }
    waiting = text.splitlines()[-1]
    assert waiting.startswith("Not finished: ResNet-32 seed 3: not begun; ResNet-20 seed 5: stopped at step 1; ")


def test_a_finished_run_is_not_finished_once_more_is_asked_for(study: Path) -> None:
    _, runs = grid.load(study, ["loop.max_steps=2"])
    pretend(runs[0], [(1.0, 1.0), (1.0, 1.0)])
    assert records.finished(runs[0].config) and records.status(runs[0].config) == "done"
    longer = grid.load(study, ["loop.max_steps=3"])[1][0]
    assert not records.finished(longer.config) and records.status(longer.config) == "stopped at step 2"


def test_curves_are_means_over_seeds_step_by_step(study: Path) -> None:
    runs = [run for run in grid.load(study, [])[1] if run.name == "plain-20"]
    pretend(runs[0], [(80.0, 70.0), (60.0, 50.0)])
    pretend(runs[1], [(70.0, 60.0)])
    folders = [run.folder for run in runs]
    assert records.curve(folders, "train", "step", "error") == records.Curve([1.0, 2.0], [75.0, 60.0])
    assert records.curve(folders, "eval", "epoch", "top1") == records.Curve([0.1, 0.2], [35.0, 50.0])


# The figure


def lines_of(drawing: str) -> dict[str, list[list[tuple[float, float]]]]:
    """The curves by their width."""
    found: dict[str, list[list[tuple[float, float]]]] = {}
    for element in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}g"):
        for line in element:
            points = [tuple(map(float, point.split(","))) for point in line.get("points", "").split()]
            found.setdefault(line.get("stroke-width"), []).append(points)
    return found


def test_training_is_thin_and_test_is_bold_and_lower_errors_are_lower(study: Path) -> None:
    plan, runs = grid.load(study, ["seeds=[3]"])
    for number, run in enumerate(runs):
        pretend(run, [(80.0 - number, 60.0), (40.0 - number, 20.0)])
    drawing = figure.draw(plan, runs)
    curves = lines_of(drawing)
    assert len(curves["1"]) == len(curves["2.4"]) == len(runs)
    for thin, bold in zip(curves["1"], curves["2.4"]):
        assert thin[0][0] < thin[1][0] and thin[0][1] < thin[1][1] and bold[0][1] > thin[0][1]  # y grows downwards
    words = [element.text for element in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")]
    assert {"plain", "ResNet", "20", "32", "error (%)", "step"} <= set(words)
    assert words[0] == "thin: training error (with augmentation, running mean); bold: test error"


def test_a_study_without_a_record_is_drawn_empty(study: Path) -> None:
    curves, maps = (figure.draw(*grid.load(study, [f"plot.kind={kind}"])) for kind in ("curves", "gradients"))
    assert not any(lines_of(curves).values()) and "plain" in curves
    assert "<path" not in maps and ElementTree.fromstring(maps).tag.endswith("svg")


def test_heat_maps_show_layers_in_order_on_one_scale(study: Path) -> None:
    plan, runs = grid.load(study, ["seeds=[3]", "plot.kind=gradients"])
    for run, scale in zip(runs, (1.0, 0.1, 0.01)):
        run.folder.mkdir(parents=True)
        names = [
            "conv1.weight",
            "bn1.weight",
            "layer1.0.conv1.weight",
            "layer2.0.downsample.0.weight",
            "fc.weight",
            "fc.bias",
        ]
        norms = [{name: scale * 10.0**-i for i, name in enumerate(names)} for _ in range(2)]
        lines = [json.dumps({"step": 50 * (i + 1), "norms": norms[i]}) for i in range(2)]
        (run.folder / "gradients.jsonl").write_text("\n".join(lines))
    drawing = figure.draw(plan, runs)
    assert "from 1e-06 to 1 (logarithmic)" in drawing and drawing.count("(3 layers)") == 3
    first = re.findall(rf"<path d='M(\S+) (\S+?)h[^>]*fill='{svg.colour(1.0)}'", drawing)
    assert first == [(f"{figure.LEFT:.1f}", f"{figure.TOP:.1f}")]  # the largest norm: the top layer of the first map


@pytest.mark.parametrize("ends", [(0, 64000), (0, 1), (0.2, 0.9), (95, 4), (-3, 3), (7, 7)])
def test_ticks_are_few_round_and_inside(ends: tuple[float, float]) -> None:
    found = svg.ticks(*ends)
    assert (
        1 <= len(found) <= 8 and min(ends) - 1e-9 <= found[0] and found[-1] <= max(ends) + 1 and found == sorted(found)
    )
