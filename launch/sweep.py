"""Several runs as one SLURM array: of one config a grid of options or a list of them, or what a study wants."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

from launch import submit
from trainer.config import Config, ConfigError
from trainer.study import grid, records

MOST = 1000  # runs; SLURM's own MaxArraySize is 1001 by default


def variants(words: list[str], file: str | None) -> list[list[str]]:
    """Each run's overrides.

    Args:
        words: `optim.lr=0.1,0.2 seed=0,1`: every combination.
        file: a YAML list, each entry a mapping of options: {optim.lr: 0.1, seed: 1}.
    """
    if bool(words) == bool(file):
        raise ConfigError("a sweep of a recipe needs --over KEY=V1,V2 ... or --list FILE, one of the two")
    found = _listed(file) if file else [list(choice) for choice in itertools.product(*map(_choices, words))]
    if not 1 < len(found) <= MOST:
        raise ConfigError(f"a sweep of {len(found)} runs: use 2 to {MOST}")
    return found


def configs(path: str, overrides: list[str], found: list[list[str]]) -> tuple[Path, list[Config]]:
    """The sweep's folder and the config of each run, in a folder below it that is named after what it varies."""
    home = Path(submit.load(path, overrides).output_dir)
    names = [name(index, variant) for index, variant in enumerate(found)]
    runs = [
        submit.load(path, [*overrides, *variant, f"output_dir={home / folder}"])
        for variant, folder in zip(found, names)
    ]
    return home, runs


def is_study(path: str) -> bool:
    """Whether the file is a study (trainer/study/grid.py) and no recipe."""
    try:
        return "axes" in OmegaConf.load(path)
    except Exception:
        return False  # whoever reads it as a recipe says what is wrong with it


def unfinished(path: str, overrides: list[str]) -> tuple[Path, list[Config]]:
    """The study's folder, and the config of each of its runs that is not trained to its end."""
    study, runs = grid.load(path, overrides)
    found = [submit.load(str(run.recipe), run.words) for run in runs if not records.finished(run.config)]
    if len(found) > MOST:
        raise ConfigError(f"a sweep of {len(found)} runs: use {MOST} or fewer")
    return Path(study.output_dir).absolute(), found


def name(index: int, variant: list[str]) -> str:
    """`00-lr=0.1-seed=1`: the number keeps names apart, the rest says what it is."""
    words = [
        re.sub(r"[^A-Za-z0-9=.+-]", "_", word.split("=", 1)[0].rsplit(".", 1)[-1] + "=" + word.split("=", 1)[1])
        for word in variant
    ]
    return f"{index:02}-{'-'.join(words)}"[:100]


def _choices(word: str) -> list[str]:
    key, equals, values = word.partition("=")
    if not equals or not values:
        raise ConfigError(f"--over {word}: write KEY=VALUE1,VALUE2")
    return [f"{key}={value}" for value in values.split(",")]


def _listed(file: str) -> list[list[str]]:
    try:
        entries = OmegaConf.load(file)
    except Exception as error:
        raise ConfigError(f"--list {file}: {' '.join(str(error).split())}") from error
    if not isinstance(entries, ListConfig) or not all(isinstance(entry, DictConfig) for entry in entries):
        raise ConfigError(f"--list {file}: must be a list, each entry a mapping such as {{optim.lr: 0.1, seed: 1}}")
    return [[f"{key}={value}" for key, value in entry.items()] for entry in entries]
