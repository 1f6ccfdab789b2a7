"""The run's records, as they happen, to every place that wants them. Ranks other than the main one get `Silent`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from trainer.confusion import Findings
from trainer.data.feeds import Batch
from trainer.data.table import Index
from trainer.metrics import Averages
from trainer.plan import Plan
from trainer.report.console import Console
from trainer.report.examples import Examples
from trainer.report.folder import RunFolder
from trainer.report.gallery import write_evaluation
from trainer.report.speed import Stopwatch
from trainer.report.wandb_run import WandbRun


class Silent:
    """A reporter that tells nobody. Every method is called by the training loop on every rank."""

    wall_seconds = 0.0

    def say(self, text: str) -> None: ...

    def passing(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """`batches`, unchanged, which train the network."""
        return batches

    def step(self, step: int, data_seconds: float) -> None:
        """`step` steps are done; the last one waited `data_seconds` for its images on this rank."""

    def train(self, step: int, averages: Averages, lr: float, grad_norm: float) -> None:
        """Averages since the last such record, up to `step`."""

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

    def left_out(self, kind: str, reasons: list[str], converted: int) -> None:
        """So far these training or evaluation images were skipped, and Pillow had to decode `converted` others."""

    def saved(self, step: int) -> None:
        """The save of `step` is on disk. May be called by any thread."""

    def pause(self) -> None:
        """Something other than a step took place: it does not count as training time."""

    def finish(self, status: str, **facts: Any) -> None:
        """The run ends as `status` (done | stopped | failed); `facts` go to summary.json."""


class Reporter(Silent):
    """The main rank's."""

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        wandb_run: WandbRun,
        wall_seconds: float,
        examples: Examples,
        val: Index | None,
    ) -> None:
        """
        Args:
            wall_seconds: that the run took before.
            val: what is evaluated.
        """
        self._plan, self._folder, self._wandb, self._examples, self._val = plan, folder, wandb_run, examples, val
        self._console = Console(plan)
        self._watch = Stopwatch()
        self._began = time.monotonic() - wall_seconds

    @property
    def wall_seconds(self) -> float:
        """Since the start, over all restarts."""
        return time.monotonic() - self._began

    def say(self, text: str) -> None:
        self._console.say(text)

    def passing(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        return self._examples.passing(batches)

    def step(self, step: int, data_seconds: float) -> None:
        self._examples.write()
        self._watch.step(self._plan.global_batch, data_seconds)
        self._console.step(step)

    def train(self, step: int, averages: Averages, lr: float, grad_norm: float) -> None:
        speed, wait = self._watch.window()
        figures = {"lr": lr, "grad_norm": grad_norm, "images_per_second": speed, "data_wait_fraction": wait}
        record = self._record("train", step, averages, **figures)
        self._console.train(record)

    def gradients(self, step: int, norms: dict[str, float | None]) -> None:
        rounded = {name: None if norm is None else float(f"{norm:.5g}") for name, norm in norms.items()}
        record = {"step": step, **self._progress(step), "norms": rounded}
        self._folder.add_metrics(record | {"wall_seconds": round(self.wall_seconds, 3)}, "gradients.jsonl")

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
        if findings is not None and self._val is not None:
            write_evaluation(self._folder, record, self._val, findings)
        self._console.evaluation(record)

    def left_out(self, kind: str, reasons: list[str], converted: int) -> None:
        self._folder.write(f"skipped_{kind}.json", {"skipped": reasons, "decoded_by_pillow": converted})
        if reasons:
            more = f" and {len(reasons) - 1} more" if len(reasons) > 1 else ""
            self.say(f"warning: {len(reasons)} {kind} images are skipped so far: {reasons[0]}{more}")
        if converted:
            self.say(f"warning: {converted} {kind} images that DALI refuses are decoded by Pillow so far")

    def saved(self, step: int) -> None:
        self._wandb.saved(step)

    def pause(self) -> None:
        self._watch.skip()

    def finish(self, status: str, **facts: Any) -> None:
        speed, _ = self._watch.whole()
        summary = {"status": status, **facts, "images_per_second": speed, "wall_seconds": round(self.wall_seconds, 3)}
        self._folder.try_to_write("summary.json", summary)
        self._wandb.finish(summary)
        self._console.close()
        top1 = summary.get("last_top1")
        if top1 is not None:
            self.say(f"top-1     {top1:.2f}% (best {summary['best_top1']:.2f}%)")
        if speed is not None:
            self.say(f"speed     {speed:,.0f} images/s (without warm-up, evaluation and saving)")
        self.say(f"{status:<9} {self._folder.path}")

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
        return record

    def _progress(self, step: int) -> dict[str, Any]:
        """`step` in other units."""
        samples = step * self._plan.global_batch
        return {"epoch": round(samples / self._plan.samples, 4), "samples": samples}
