"""The command `study`: run what is not finished, then the table and the figure."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from trainer import environment
from trainer.config import ConfigError
from trainer.signals import Stopped
from trainer.study import execute, figure, grid, records, table

DONE, FAILED = 0, 1  # exit statuses, beside execute.STOPPED


@dataclass(frozen=True)
class Choice:
    """What of a study is wanted now."""

    ranks: int = 1
    only: list[str] = field(default_factory=list)  # names of runs; empty: all
    listing: bool = False
    drawing: bool = False


def study(path: str, words: list[str], choice: Choice) -> int:
    """Run the study in file `path`, or list or draw it; returns the exit status.

    ConfigError for any mistake in any of its runs' options, before anything runs.
    """
    if choice.ranks < 1:
        raise ConfigError(f"--ranks {choice.ranks}: use 1 or more")
    if environment.place().size > 1:
        raise ConfigError("study starts the ranks of its runs itself: start it without torchrun, with --ranks N")
    plan, runs = grid.load(path, words)
    chosen = grid.select(runs, choice.only)
    if choice.listing:
        for run in chosen:
            print(f"{run}: {records.status(run.config)}\n    {shlex.join(execute.command(run, choice.ranks))}")
        return DONE
    failed, stop = [], None
    if not choice.drawing:
        _demand_networks(chosen)
        try:
            failed = execute.execute(chosen, choice.ranks)
        except Stopped as stopped:
            stop = stopped
    _draw(plan, chosen)
    if stop:
        print(f"study stopped by {stop.name}; the same command goes on from here", flush=True)
        return execute.STOPPED
    for run in failed:
        print(f"failed: {run}")
    return FAILED if failed else DONE


def _demand_networks(runs: list[grid.Run]) -> None:
    """ConfigError for a network that cannot be built: better now than when its turn comes."""
    import torch

    from trainer.models import build

    for number, run in enumerate(runs):
        if run.config.model not in [before.config.model for before in runs[:number]]:
            try:
                with torch.device("meta"):
                    build.create(run.config.model, run.config.model.num_classes or 10)
            except ConfigError as error:
                raise ConfigError(f"{run.name}: {error}") from error


def _draw(plan: grid.Study, runs: list[grid.Run]) -> None:
    home = Path(plan.output_dir)
    home.mkdir(parents=True, exist_ok=True)
    found = table.table(plan, runs)
    (home / "table.md").write_text(found)
    (home / "figure.svg").write_text(figure.draw(plan, runs))
    print(f"\n{found}\n{home / 'table.md'}\n{home / 'figure.svg'}", flush=True)
