"""The run's records, as they happen, to every place that wants them. Ranks other than the main one get `Silent`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainer.confusion import Findings
from trainer.data.feeds import Batch
from trainer.data.table import Index
from trainer.metrics import Averages
from trainer.plan import Plan
from trainer.report.closing import closing
from trainer.report.console import Console
from trainer.report.drawing import Drawing
from trainer.report.events import Events, process_age
from trainer.report.examples import Examples
from trainer.report.folder import RunFolder
from trainer.report.gallery import write_evaluation
from trainer.report.gauges import Gauges
from trainer.report.speed import Stopwatch
from trainer.report.tensorboard import Board
from trainer.report.wandb_run import WandbRun


class Silent:
    """A reporter that tells nobody. Every method is called by the training loop on every rank."""

    wall_seconds = 0.0

    def say(self, text: str) -> None: ...

    def passing(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """`batches`, unchanged, which train the network."""
        return batches

    def begin(self, step: int) -> None:
        """Training begins, or goes on, after `step` steps."""

    def rewind(self, step: int) -> None:
        """The run returns to where it stood after `step` steps: those after it are taken anew, and reported anew."""

    def step(self, step: int, data_seconds: float) -> None:
        """`step` steps are done; the last one waited `data_seconds` for its images on this rank."""

    def train(
        self, step: int, averages: Averages, lr: float, grad_norm: float, figures: dict[str, Any] | None = None
    ) -> None:
        """Averages since the last such record, up to `step`; `figures` are trainer.tally.Sums.figures."""

    def gradients(self, step: int, norms: dict[str, float | None]) -> None:
        """The norm of each parameter's gradient in the last of `step` steps."""

    def evaluation(
        self,
        step: int,
        averages: Averages,
        seconds: float,
        ema: Averages | None = None,
        findings: Findings | None = None,
    ) -> None:
        """Accuracy after `step` steps, and that of the averaged weights where there are any.

        Args:
            findings: what the weights, not averaged, took for what.
        """

    def epoch(self, step: int) -> None:
        """An epoch, or the run, ends after `step` steps, evaluated if that was due."""

    def saved(self, step: int, seconds: float) -> None:
        """A save was begun, which kept training for `seconds`; whoever writes it to disk goes on beside it."""

    def left_out(self, kind: str, reasons: list[str], converted: int) -> None:
        """So far these training or evaluation images were skipped, and Pillow had to decode `converted` others."""

    def kept(self, step: int) -> None:
        """The save of `step` is on disk. May be called by any thread."""

    def pause(self) -> None:
        """Something other than a step took place: it does not count as training time."""

    def finish(self, status: str, **facts: Any) -> None:
        """The run ends as `status` (done | stopped | failed); `facts` go to summary.json."""


@dataclass(frozen=True)
class Parts:
    """What a report may have besides."""

    examples: Examples | None = None
    val: Index | None = None  # what is evaluated
    gauges: Gauges | None = None
    board: Board | None = None


class Reporter(Silent):
    """The main rank's."""

    def __init__(
        self, plan: Plan, folder: RunFolder, wandb_run: WandbRun, wall_seconds: float, parts: Parts | None = None
    ) -> None:
        """As the class says; `wall_seconds` are those that the run took before."""
        self._plan, self._folder, self._wandb, self._parts = plan, folder, wandb_run, parts or Parts()
        self._console = Console(plan)
        self._watch = Stopwatch()
        self._began = time.monotonic() - wall_seconds
        self._events = Events(folder)
        self._drawing = Drawing(folder)
        self._epoch = _Epoch(wall_seconds)
        self._step = 0

    @property
    def wall_seconds(self) -> float:
        """Since the start, over all restarts."""
        return time.monotonic() - self._began

    def say(self, text: str) -> None:
        self._console.say(text)

    def passing(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        return self._parts.examples.passing(batches) if self._parts.examples else batches

    def begin(self, step: int) -> None:
        self._step = step
        self._epoch = _Epoch(self.wall_seconds)
        self._events.add("start", step, self.wall_seconds, process_age())

    def rewind(self, step: int) -> None:
        self._step = step
        self._epoch = _Epoch(self.wall_seconds)
        self._folder.rewind_metrics(step)
        if self._parts.board:
            self._parts.board.rewind(step)

    def step(self, step: int, data_seconds: float) -> None:
        self._step = step
        if self._parts.examples:
            self._parts.examples.write()
        self._watch.step(self._plan.global_batch, data_seconds)
        self._console.step(step)

    def train(
        self, step: int, averages: Averages, lr: float, grad_norm: float, figures: dict[str, Any] | None = None
    ) -> None:
        speed, wait = self._watch.window()
        pace = {
            "images_per_second": speed,
            "images_per_second_per_gpu": speed and speed / self._plan.ranks,
            "step_seconds": speed and self._plan.global_batch / speed,
            "data_wait_fraction": wait,
        }
        gauges = self._parts.gauges.read(step, speed) if self._parts.gauges else {}
        more = {"lr": lr, "grad_norm": grad_norm, **pace, **(figures or {}), **gauges}
        record = self._record("train", step, averages, **more)
        self._epoch.add(record, averages.count)
        self._console.train(record)

    def gradients(self, step: int, norms: dict[str, float | None]) -> None:
        rounded = {name: None if norm is None else float(f"{norm:.5g}") for name, norm in norms.items()}
        record = {"step": step, **self._progress(step), "norms": rounded}
        self._folder.add_line("gradients.jsonl", record | {"wall_seconds": round(self.wall_seconds, 3)})

    def evaluation(
        self,
        step: int,
        averages: Averages,
        seconds: float,
        ema: Averages | None = None,
        findings: Findings | None = None,
    ) -> None:
        more = {"ema_loss": ema.loss, "ema_top1": ema.top1, "ema_top5": ema.top5} if ema else {}
        record = self._record("eval", step, averages, count=averages.count, seconds=round(seconds, 3), **more)
        if findings is not None and self._parts.val is not None:
            write_evaluation(self._folder, record, self._parts.val, findings)
        self._epoch.evaluation = record
        self._events.add("eval", step, self.wall_seconds, seconds, top1=averages.top1)

    def epoch(self, step: int) -> None:
        self._console.epoch(step, self._epoch.training(self.wall_seconds), self._epoch.evaluation)
        self._epoch = _Epoch(self.wall_seconds)
        self._drawing.begin()

    def saved(self, step: int, seconds: float) -> None:
        self._events.add("save", step, self.wall_seconds, seconds)

    def left_out(self, kind: str, reasons: list[str], converted: int) -> None:
        self._folder.write(f"skipped_{kind}.json", {"skipped": reasons, "decoded_by_pillow": converted})
        if reasons:
            more = f" and {len(reasons) - 1} more" if len(reasons) > 1 else ""
            self.say(f"warning: {len(reasons)} {kind} images are skipped so far: {reasons[0]}{more}")
        if converted:
            self.say(f"warning: {converted} {kind} images that DALI refuses are decoded by Pillow so far")

    def kept(self, step: int) -> None:
        self._wandb.saved(step)

    def pause(self) -> None:
        self._watch.skip()

    def finish(self, status: str, **facts: Any) -> None:
        speed, _ = self._watch.whole()
        summary = {"status": status, **facts, "images_per_second": speed, "wall_seconds": round(self.wall_seconds, 3)}
        self._events.add("end", self._step, self.wall_seconds, 0.0, status=status)
        more, rows = closing(self._folder.path, summary)
        summary |= more
        self._folder.try_to_write("summary.json", summary)
        if self._parts.board:
            self._parts.board.close()
        self._wandb.finish(summary)
        self._drawing.finish()
        self._console.close(rows)

    def _record(self, kind: str, step: int, averages: Averages, **more: Any) -> dict[str, Any]:
        """Write a record down, and return it."""
        record = {
            "kind": kind,
            "step": step,
            **self._progress(step),
            "loss": averages.loss,
            "top1": averages.top1,
            "top5": averages.top5,
            **more,
            "wall_seconds": round(self.wall_seconds, 3),
        }
        self._folder.add_metrics(record)
        if self._parts.board:
            self._parts.board.log(record)
        return record

    def _progress(self, step: int) -> dict[str, Any]:
        """`step` in other units."""
        samples = step * self._plan.global_batch
        return {"epoch": round(samples / self._plan.samples, 4), "samples": samples}


class _Epoch:
    """What the records of one epoch come to."""

    def __init__(self, began: float) -> None:
        self.evaluation: dict[str, Any] | None = None
        self._began = began
        self._images, self._loss, self._right = 0, 0.0, 0.0
        self._timed, self._seconds = 0, 0.0

    def add(self, record: dict[str, Any], images: int) -> None:
        self._images += images
        self._loss += images * record["loss"]
        self._right += images * record["top1"]
        if record["images_per_second"]:
            self._timed += images
            self._seconds += images / record["images_per_second"]

    def training(self, now: float) -> dict[str, Any]:
        """For Console.epoch; each None where it is not known."""
        return {
            "loss": self._loss / self._images if self._images else None,
            "top1": self._right / self._images if self._images else None,
            "images_per_second": self._timed / self._seconds if self._seconds else None,
            "seconds": now - self._began,
        }
