"""`inspect CONFIG`: what it finds, what it misses, and what it foretells."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from conftest import here
from nets import ALONE

from trainer import configfile, environment, machine, readiness
from trainer.machine import Findings


@pytest.fixture
def options(tiny: Path, tmp_path: Path) -> list:
    (tmp_path / "run.yaml").write_text("{}")
    given = [f"data.root={tiny}", f"output_dir={tmp_path / 'run'}", "data.image_size=32", "global_batch_size=12"]
    return [tmp_path / "run.yaml", *given, "model.name=resnet20", "schedule.epochs=4", "schedule.warmup_epochs=1"]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOADER", "STEP", "REDUCE"):
        monkeypatch.setattr(readiness, name, 0.2)


@pytest.mark.end_to_end
def test_a_machine_that_is_ready_hears_how_long_it_will_take(options: list, tmp_path: Path, short: None) -> None:
    done = here("inspect", *options)
    assert done.status == 0, done.output + done.errors
    rows = dict(re.split(r"\s+", line, maxsplit=1) for line in done.output.splitlines() if " " in line)
    assert {"ranks", "cores", "memory", "DALI", "W&B", "plan", "disk", "loader", "step", "all-reduce"} <= rows.keys()
    assert rows["data"] == "set     48 images in 4 classes, 23 to evaluate"
    assert re.fullmatch(r"1 MB of gradients in [\d.]+ ms between two gloo processes here", rows["all-reduce"])
    loader, step = (float(rows[key].split()[0].replace(",", "")) for key in ("loader", "step"))
    together = float(re.search(r"at (\S+) images/s", rows["an"])[1].replace(",", ""))
    assert together == pytest.approx(1 / (1 / loader + 1 / step), rel=0.1)
    assert done.output.splitlines()[-1] == "ready" and not (tmp_path / "run").exists()


def test_what_is_missing_is_named_with_its_remedy(
    options: list, tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "has_wandb_key", lambda: False)
    done = here("inspect", *options, "report.wandb=online", f"data.root={tmp_path / 'nowhere'}")
    missing = [line for line in done.output.splitlines() if line.startswith("missing")]
    assert done.status == 1 and len(missing) == 2 and "ready" not in done.output.splitlines()
    assert "report.wandb=online needs a key: wandb login" in missing[0] and "nowhere" in missing[1]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = here("inspect", *options, "device=cuda")
    assert done.status == 1 and "torch sees no GPU here: use device=cpu" in done.output


def test_a_disk_too_small_for_the_checkpoints_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(1.0e9))
    config, found = configfile.load(None, [f"output_dir={tmp_path / 'a' / 'run'}"]), Findings()
    machine.look_at_disk(config, 25_000_000, found)  # 0.3 GB each, four of them
    assert found.missing == [
        f"output_dir={tmp_path / 'a' / 'run'} has 1.0 GB free and checkpoints take about 1.2 GB: make room, or lower "
        "checkpoint.keep"
    ]
    machine.look_at_disk(config, 15_000_000, found)
    assert len(found.missing) == 1


@pytest.mark.parametrize(
    ("loader", "step", "waiting", "bound"),
    [
        (None, 100.0, 0.0, "compute"),
        (200.0, 100.0, 0.05, "compute"),
        (200.0, 100.0, 0.3, "communication: 30%"),
        (100.0, 190.0, 0.3, "input: data.threads=4 would do"),
        (100.0, 900.0, 0.3, "input: that takes 18 threads a rank, and it has 4 cores"),
    ],
)
def test_the_bound_is_what_is_slowest(
    loader: float | None, step: float, waiting: float, bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "cores", lambda size: 4)
    config = configfile.load(None, ["data.threads=2"])
    assert readiness._bound(config, ALONE, loader, step, waiting).startswith(bound)


def test_a_loader_and_a_step_overlap_unless_they_share_the_cores() -> None:
    together = readiness._together
    assert together(300.0, 100.0, shared=False) == together(100.0, 300.0, shared=False) == 100
    assert together(300.0, 100.0, shared=True) == pytest.approx(75) and together(None, 100.0, shared=True) == 100


def test_a_data_set_takes_no_overrides_and_a_config_no_options_of_a_data_set(options: list, tiny: Path) -> None:
    refused = here("inspect", tiny, "optim.lr=1")
    assert refused.status == 2 and "KEY=VALUE goes with a CONFIG" in refused.errors
    refused = here("inspect", *options, "--decode")
    assert refused.status == 2 and "inspect CONFIG takes no --decode" in refused.errors
