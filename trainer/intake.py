"""What is said of the data while they are read: how far the scan is, and what could not be decoded."""

from __future__ import annotations

from collections.abc import Callable

from trainer.data.loader import EvaluationBatches, TrainingBatches
from trainer.distributed import World
from trainer.report.console import counter
from trainer.report.reporter import Silent
from trainer.signals import StopSignals
from trainer.watchdog import Watch


def alive(signals: StopSignals, watch: Watch) -> Callable[[], None]:
    """What long work before the first step calls: taken as a sign of life, and Stopped raised where a signal came."""

    def sign() -> None:
        signals.raise_if_caught()
        watch.moved()

    return sign


def scanning(here: World, signals: StopSignals, watch: Watch) -> Callable[[int, int], None]:
    """The progress of reading image headers, which may take minutes: said, taken as a sign of life, and stopped."""
    say, sign = counter("reading image headers"), alive(signals, watch)

    def progress(done: int, total: int) -> None:
        sign()
        if here.is_main:
            say(done, total)

    return progress


def account(here: World, reporter: Silent, training: TrainingBatches, evaluation: EvaluationBatches | None) -> None:
    """Put together what the ranks could not decode so far, and tell it; every rank calls it.

    Raises:
        UndecodableError: more training images than `data.max_skipped` allows.
    """
    evaluated = evaluation.salvage if evaluation is not None else None
    for kind, salvage in (("training", training.salvage), ("evaluation", evaluated)):
        if salvage is None:
            continue
        ranks = here.gather((salvage.bad, len(salvage.converted)))
        bad = {row: reason for found, _ in ranks for row, reason in found.items()}
        converted = sum(number for _, number in ranks)
        if bad or converted:
            reporter.left_out(kind, [bad[row] for row in sorted(bad)], converted)
        if kind == "training":
            salvage.learn(bad)
