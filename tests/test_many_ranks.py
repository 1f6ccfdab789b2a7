"""Eight ranks on one machine start, train and end; what a rank takes of memory is read in between."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from conftest import REPOSITORY


def many_ranks():
    spec = importlib.util.spec_from_file_location("many_ranks", REPOSITORY / "benchmarks" / "many_ranks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.end_to_end
@pytest.mark.timeout(1200)
def test_eight_ranks_start_train_and_end(tmp_path: Path) -> None:
    found = many_ranks().run(8, 15, tmp_path)
    assert found["ranks"] == 8
    size = found["megabytes_of_a_rank"]
    assert 50 < size["pss"]["median"] < size["rss"]["median"] < 4000
    assert found["megabytes_of_all"] >= 8 * 0.8 * size["pss"]["median"]
    assert found["seconds"] > found["seconds_to_the_first_record"] > 0


def test_ranks_that_end_before_they_work_are_told_of(tmp_path: Path) -> None:
    module = many_ranks()
    module.CONFIG = "model: {nam: resnet20}"
    with pytest.raises(module.Failed, match=r"(?s)ended with .* before its ranks were at work.*there is no option"):
        module.run(1, 5, tmp_path)


def test_memory_is_that_of_the_process_asked_for() -> None:
    module = many_ranks()
    mine = module.memory(os.getpid())
    assert 0 < mine["pss"] <= mine["rss"]
    assert module.memory(2**22 + 1) is None  # no process has this number
