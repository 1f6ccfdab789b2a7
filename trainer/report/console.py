"""The console: one live line on a terminal, plain lines where the output is a file."""

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
            print(text, file=self._stream, flush=True)

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
        figures += f"  {self._left(record['step'])}"
        if self._live:
            self._live.update(self._bar, figures=figures)
        else:
            self.say(f"{self._where(record['step'])}  {figures}")

    def evaluation(self, record: dict[str, Any]) -> None:
        ema = f"  averaged weights: top-1 {record['ema_top1']:.2f}%" if "ema_top1" in record else ""
        self.say(
            f"{self._where(record['step'])}  evaluated {record['count']:,} images in {record['seconds']:.1f} s: "
            f"top-1 {record['top1']:.2f}%  top-5 {record['top5']:.2f}%  loss {record['loss']:.4f}{ema}"
        )

    def close(self) -> None:
        if self._live:
            self._live.stop()

    def _where(self, step: int) -> str:
        plan = self._plan
        return f"epoch {step * plan.global_batch / plan.samples:.2f}/{plan.epochs:g}  step {step}/{plan.total_steps}"

    def _left(self, step: int) -> str:
        """Time to the end at the pace since the start, evaluation and saving included."""
        first, began = self._begun or (step, 0.0)
        if step <= first:
            return ""
        left = int((self._clock() - began) / (step - first) * (self._plan.total_steps - step))
        hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
        return f"{hours}:{minutes:02}:{seconds:02} left"
