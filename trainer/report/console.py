"""The console: one live line on a terminal; where the output is a file, plain lines with the time of day."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import IO, Any

from trainer.plan import Plan


def counter(
    what: str, every: float = 2.0, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic
) -> Callable[[int, int], None]:
    """A progress(done, total) that says a line every so many seconds, and nothing of what is done sooner."""
    began = last = clock()

    def count(done: int, total: int) -> None:
        nonlocal last
        now = clock()
        if now - last >= every and done:
            last = now
            left = (now - began) / done * (total - done)
            print(f"{what}: {done:,} of {total:,}, {left:.0f} s left", file=stream or sys.stderr, flush=True)

    return count


class Console:
    """Says how a run goes. `close()` leaves the terminal as it was."""

    def __init__(self, plan: Plan, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan, self._stream, self._clock = plan, stream or sys.stdout, clock
        self._live = self._bar = None
        self._begun: tuple[int, float] | None = None
        if self._stream.isatty():
            from rich import console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = [
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}"),
            ]
            self._live = Progress(*columns, transient=True, console=console.Console(file=self._stream))
            self._bar = self._live.add_task("", total=plan.total_steps, figures="")
            self._live.start()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._live:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            print(*(f"{stamp}  {line}" for line in _printable(text)), sep="\n", file=self._stream, flush=True)

    def step(self, step: int) -> None:
        """`step` steps are done."""
        if self._begun is None:
            self._begun = step, self._clock()
        if self._live:
            self._live.update(self._bar, completed=step, description=self._where(step))

    def train(self, record: dict[str, Any]) -> None:
        figures = f"loss {record['loss']:.4f}  top-1 {record['top1']:.2f}%  lr {record['lr']:.4g}"
        if record["images_per_second"] is not None:
            figures += f"  {record['images_per_second']:,.0f} images/s  data {record['data_wait_fraction']:.0%}"
        figures += self._left(record["step"])
        if self._live:
            self._live.update(self._bar, figures=figures)
        else:
            self.say(f"{self._where(record['step'])}  {figures}")

    def epoch(self, step: int, training: dict[str, Any], evaluation: dict[str, Any] | None) -> None:
        """The line of an epoch; `training` holds what its records came to: loss, top1, images_per_second, seconds."""
        words = [self._where(step), f"took {duration(training['seconds'])}"]
        if training["loss"] is not None:
            words.append(f"training loss {training['loss']:.4f}, top-1 {training['top1']:.2f}%")
        if training["images_per_second"] is not None:
            words.append(f"{training['images_per_second']:,.0f} images/s")
        if evaluation is not None:
            words.append(
                f"evaluated {evaluation['count']:,} images in {evaluation['seconds']:.1f} s: top-1 "
                f"{evaluation['top1']:.2f}%, top-5 {evaluation['top5']:.2f}%, loss {evaluation['loss']:.4f}"
            )
            if "ema_top1" in evaluation:
                words.append(f"averaged weights: top-1 {evaluation['ema_top1']:.2f}%")
        self.say("  ".join(words))

    def close(self, rows: list[tuple[str, str]] | None = None) -> None:
        """End the live line, and print `rows` of (what, figures) as a table."""
        if self._live:
            self._live.stop()
        for what, figures in rows or []:
            print(f"{what:<9} {' '.join(_printable(figures))}", file=self._stream, flush=True)

    def _where(self, step: int) -> str:
        plan = self._plan
        return f"epoch {step * plan.global_batch / plan.samples:.2f}/{plan.epochs:g}  step {step}/{plan.total_steps}"

    def _left(self, step: int) -> str:
        """Time to the ends of the epoch and of the run at the pace since the start, evaluation and saving included."""
        first, began = self._begun or (step, 0.0)
        if step <= first:
            return ""
        pace = (self._clock() - began) / (step - first)
        total = self._plan.total_steps
        epoch = min(self._plan.epoch_end(max(step - 1, 0)), total)
        return f"  left {duration(pace * (epoch - step))} of the epoch, {duration(pace * (total - step))} of the run"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _printable(text: str) -> list[str]:
    """The lines of a text without control characters: a log is read with less and grep."""
    return ["".join(c if c.isprintable() else "?" for c in line) for line in text.splitlines()] or [""]
