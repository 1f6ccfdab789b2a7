"""The benchmark command prints one line of figures, of the config's own data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import here, torchrun

SMALL = ["global_batch_size=8", "data.image_size=32", "data.eval_size=32", "model.name=resnet20", "data.threads=1"]


@pytest.mark.parametrize("layout", ["folder", "shards"])
@pytest.mark.parametrize("crop", ["resized", "padded"])
def test_the_loader_is_measured_against_decoding_alone(tiny: Path, tmp_path: Path, layout: str, crop: str) -> None:
    root = tiny
    if layout == "shards":
        root = tmp_path / "shards"
        assert here("prepare", tiny, root, "--format", "shards", "--workers", 1).status == 0
    (tmp_path / "c.yaml").write_text(f"data: {{root: {root}}}")
    done = here("benchmark", "loader", tmp_path / "c.yaml", *SMALL, f"augment.crop={crop}", "--count", 60)
    assert done.status == 0, done.errors
    figures = json.loads(done.output)
    assert figures["images"] == 64 and figures["images_per_cpu_second"] > 0
    assert figures["share_of_decoding_limit"] > 0


def test_what_has_no_decoding_of_its_own_has_no_share_of_it(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {source: synthetic, synthetic_samples: 64}")
    done = here("benchmark", "loader", tmp_path / "c.yaml", *SMALL, "--count", 16)
    assert json.loads(done.output)["share_of_decoding_limit"] is None
    done = here("benchmark", "end-to-end", tmp_path / "c.yaml", *SMALL)
    assert done.status == 2 and "data.source=synthetic has no real batches" in done.errors
    done = here("benchmark", "allreduce", tmp_path / "c.yaml", *SMALL)
    assert done.status == 2 and "benchmark allreduce needs ranks" in done.errors


def test_a_step_needs_no_data(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {root: nowhere}")
    figures = json.loads(here("benchmark", "step", tmp_path / "c.yaml", *SMALL, "--count", 2).output)
    assert figures["images_per_second"] > 0 and figures["global_batch"] == 8


@pytest.mark.end_to_end
def test_two_ranks_are_measured_together(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"data: {{root: {tiny}}}")

    def measured(what: str) -> dict:
        done = torchrun("benchmark", what, tmp_path / "c.yaml", *SMALL, "--count", 2, ranks=2)
        assert done.status == 0, done.errors
        return json.loads(done.output.splitlines()[-1])

    figures = measured("allreduce")
    assert figures["ranks"] == 2 and figures["milliseconds"] > 0
    parameters = 272_474 + 990 * 65  # ResNet-20 for 1000 classes: its head has 64 weights and a bias a class
    assert figures["megabytes"] == round(4 * parameters / 1e6, 1)
    figures = measured("end-to-end")
    assert figures["ranks"] == 2 and figures["ratio"] > 0 and set(figures["images_per_second"]) == {"synthetic", "real"}
