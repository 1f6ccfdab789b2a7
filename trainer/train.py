"""train(config): the stages of a run in the order of its data flow, and when to log, evaluate, save and stop."""

from __future__ import annotations

import secrets
import signal
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from trainer import checkpoint, configfile, environment, learner, precision, resume
from trainer.config import Config
from trainer.data.loader import DataSet, EvaluationBatches, TrainingBatches, open_data
from trainer.distributed import Agreement, World, naming_a_lost_peer, world
from trainer.evaluate import evaluate
from trainer.loop import train_steps
from trainer.metrics import Averages, Pending, averages, demand_finite
from trainer.models.buffers import averaged_buffers
from trainer.plan import Plan
from trainer.precise import precise_statistics
from trainer.report.console import counter
from trainer.report.folder import RunFolder, provenance
from trainer.report.reporter import Reporter, Silent
from trainer.report.wandb_run import WandbRun
from trainer.state import RunState

DONE, STOPPED = 0, 75  # exit statuses; 75 is EX_TEMPFAIL: run the same command again to go on


def train(config: Config, command: list[str]) -> int:
    """Run `config` to its end or to a signal, resuming what its output_dir holds; returns the exit status.

    Args:
        command: the command line, for the record.

    Raises:
        ConfigError: the user's mistake, before anything is written, or an image that cannot be decoded.
        NonFiniteError: the loss is NaN or infinite.
    """
    with world(config) as here, Agreement(here) as agreement:
        precision.set_kernels(config, here.device)
        data = open_data(config, here, counter("reading image headers") if here.is_main else None)
        plan = Plan.of(config, here.size, data.samples)
        state = RunState(learner.create(config, plan, here, data), here)
        folder = RunFolder(config.output_dir)
        newest = here.on_main(lambda: resume.enter(folder, config))
        try:
            if newest is not None:
                resume.restore(state, newest, config, data)
            return _Run(config, here, agreement, plan, data, state, folder).go(command)
        finally:
            folder.release()


@dataclass
class _Run:
    """A run under way."""

    config: Config
    here: World
    agreement: Agreement
    plan: Plan
    data: DataSet
    state: RunState
    folder: RunFolder
    reporter: Silent = field(default_factory=Silent)

    def __post_init__(self) -> None:
        config, plan = self.config, self.plan
        self.progress, self.learner = self.state.progress, self.state.learner
        self.last_step = min(plan.total_steps, config.loop.max_steps or plan.total_steps)
        self.due: _Due | None = None
        self.saved_at = time.monotonic()
        self.evaluation: EvaluationBatches | None = None
        if self.data.val is not None:
            self.evaluation = EvaluationBatches(config, self.data.val, self.here, plan.batch)

    # What happens, in order.

    def go(self, command: list[str]) -> int:
        """Train to the end or to a signal; returns the exit status."""
        if self._complete():
            if self.here.is_main:
                print(f"{self.folder.path} is finished ({self.progress.step} steps): nothing is left to do")
            return DONE
        self.progress.target_seconds = None  # what an earlier and lower target took
        if self.here.is_main:
            self._open_report(command)
        self._introduce()
        try:
            with naming_a_lost_peer(self.here):
                stopped_by = self._train()
        except BaseException as error:
            self._finish("failed", error=f"{type(error).__name__}: {error}")
            raise
        if stopped_by:
            self.reporter.say(f"stopped by {signal.Signals(stopped_by).name}; the same command goes on from here")
        self._finish("stopped" if stopped_by else "done")
        return STOPPED if stopped_by else DONE

    def _train(self) -> int:
        """From epoch's end to epoch's end; returns the signal that ended it, 0 at the end."""
        batches = TrainingBatches(self.config, self.data, self.plan, self.here, self.progress.step)
        while not self._complete():
            end = min(self.plan.epoch_end(self.progress.closed), self.last_step)
            stopped_by = self._steps(batches, end)
            if stopped_by:
                self._save()
                return stopped_by
            top1 = self._evaluate() if self._evaluation_due(end) else None
            self._account(batches)
            self.progress.closed = end
            self._save(top1)
        return 0

    def _steps(self, batches: TrainingBatches, end: int) -> int:
        """Step until `end`; returns the signal that all ranks agreed to stop for before that, 0 for none."""
        for record in train_steps(self.learner, batches, range(self.progress.step, end)):
            self.progress.step = record.step + 1
            self.reporter.step(self.progress.step, record.data_seconds)
            self.state.window[:5] += record.totals
            self.state.window[5] += 1
            self._tell()
            if self.progress.step % self.config.report.log_every == 0 or self.progress.step == end:
                self.due = _Due(self.progress.step, record.lr, Pending(self.state.window, self.here))
                self.state.window.zero_()
            stopped_by, save = self.agreement.agreed(self._save_due())
            if stopped_by:
                return stopped_by
            if save and self.progress.step < end:
                self._save()
        self._tell()
        return 0

    def _tell(self) -> None:
        """Report the record that fell due a step ago: by now the device has it."""
        if self.due is None:
            return
        due, self.due = self.due, None
        *totals, norms, steps = due.totals.values()
        # An infinite norm under a loss scaler is its business: it skips that step and lowers the scale.
        value = totals[0] if self.learner.scaler.is_enabled() else totals[0] + norms
        demand_finite(value, due.step - int(steps / self.here.size), due.step - 1)
        self.reporter.train(due.step, averages(totals), due.lr, norms / steps)

    def _account(self, batches: TrainingBatches) -> None:
        """Put together what the ranks could not decode, tell it, and stop if it is too much."""
        for kind, salvage in (
            ("training", batches.salvage),
            ("evaluation", self.evaluation and self.evaluation.salvage),
        ):
            if salvage is None:
                continue
            ranks = self.here.gather((salvage.bad, len(salvage.converted)))
            bad = {row: reason for found, _ in ranks for row, reason in found.items()}
            converted = sum(number for _, number in ranks)
            if bad or converted:
                self.reporter.left_out(kind, [bad[row] for row in sorted(bad)], converted)
            if kind == "training":
                salvage.learn(bad)

    def _complete(self) -> bool:
        """Whether the end, or the accuracy to stop at, is reached; the same on all ranks."""
        target, progress = self.config.loop.stop_at.get("top1"), self.progress
        reached = max(progress.best_top1 or 0, progress.best_ema_top1 or 0)
        return progress.closed >= self.last_step or (target is not None and reached >= target)

    # Evaluating and saving.

    def _evaluation_due(self, end: int) -> bool:
        every = self.config.loop.eval_every
        return self.evaluation is not None and (end == self.last_step or self.plan.epoch_of(end) % every == 0)

    def _evaluate(self) -> float:
        """Evaluate the weights and their average, report, and return the better top-1 in percent."""
        began, progress = time.monotonic(), self.progress
        found, average = self._accuracy(self.state.model), None
        progress.last_top1 = found.top1
        progress.best_top1 = max(found.top1, progress.best_top1 or 0.0)
        if self.state.average is not None:
            average = self._accuracy(self.state.average)
            progress.last_ema_top1 = average.top1
            progress.best_ema_top1 = max(average.top1, progress.best_ema_top1 or 0.0)
        self.reporter.evaluation(progress.step, found, time.monotonic() - began, average)
        if self._complete() and progress.target_seconds is None:
            progress.target_seconds = self.reporter.wall_seconds
        self.reporter.pause()
        return max(found.top1, average.top1 if average else 0.0)

    def _accuracy(self, model: torch.nn.Module) -> Averages:
        assert self.evaluation is not None
        dtype, loop, statistics = self.learner.dtype, self.config.loop, nullcontext()
        if loop.precise_bn:
            where = (self.config, self.data, self.plan, self.here, self.progress.step)
            statistics = precise_statistics(model, *where, dtype)
        with statistics, averaged_buffers(model, self.here):
            return evaluate(model, self.evaluation, self.here, dtype, flip=loop.eval_flip)

    def _save_due(self) -> bool:
        """Whether this rank finds that a save is due; the clock is the main rank's alone."""
        options = self.config.checkpoint
        by_steps = options.every_steps is not None and self.progress.step % options.every_steps == 0
        minutes = (time.monotonic() - self.saved_at) / 60
        return by_steps or (
            self.here.is_main and options.every_minutes is not None and minutes >= options.every_minutes
        )

    def _save(self, top1: float | None = None) -> None:
        """Save on the main rank; a full disk is warned of and the run goes on."""
        self._tell()
        unfinished = Pending(self.state.window, self.here).values()
        demand_finite(unfinished[0], self.progress.step - int(unfinished[5] / self.here.size), self.progress.step - 1)
        ranks = self.state.gather()
        self.saved_at = time.monotonic()
        self.reporter.pause()
        if not self.here.is_main:
            return
        self.progress.wall_seconds = self.reporter.wall_seconds
        state = self.state.state_dict(ranks) | {
            "config": configfile.to_dict(self.config),
            "classes": list(self.data.classes),
            "data": self.data.digest,
            "wandb_id": (self.folder.read("run.json") or {}).get("wandb_id"),
        }
        try:
            checkpoint.save(self.folder.checkpoints, self.progress.step, state, top1)
            checkpoint.prune(self.folder.checkpoints, self.config.checkpoint.keep)
        except (OSError, RuntimeError) as error:  # torch.save says a full disk as RuntimeError
            self.reporter.say(f"warning: step {self.progress.step} is not saved ({error}); training goes on")

    # Words.

    def _introduce(self) -> None:
        """Say once what is trained, where, and the arithmetic."""
        config, progress = self.config, self.progress
        parameters = sum(p.numel() for p in self.state.model.parameters()) / 1e6
        dtype = str(self.learner.dtype or torch.float32).removeprefix("torch.")
        begun = f", going on after step {progress.step}" if progress.step else ""
        self.reporter.say(f"run       {self.folder.path}{begun}")
        self.reporter.say(
            f"model     {config.model.name}: {parameters:.2f} M parameters, {len(self.data.classes)} classes"
        )
        self.reporter.say(f"devices   {self.here.size} x {self.here.device_name}, {dtype}")
        self.reporter.say(f"plan      {self.plan}")
        self.reporter.say(f"optim     {config.optim.name}, peak lr {self._peak_lr()}")

    def _peak_lr(self) -> str:
        optim, peak = self.config.optim, self.plan.peak_lr
        if optim.scale_lr == "none":
            return f"{peak:g} as given: nothing is scaled"
        ratio = f"{self.plan.global_batch} / {optim.lr_batch}"
        factor = ratio if optim.scale_lr == "linear" else f"sqrt({ratio})"
        return f"{peak:g} = {optim.lr:g} x {factor}, as optim.scale_lr={optim.scale_lr} asks"

    def _open_report(self, command: list[str]) -> None:
        """On the main rank: write down where the run comes from, and begin to report."""
        self.folder.rewind_metrics(self.progress.step)
        before = self.folder.read("run.json") or {}
        origin = {
            **provenance(command, environment.recorded()),
            "devices": f"{self.here.size} x {self.here.device_name}",
            "seed": self.config.seed,
            "plan": asdict(self.plan),
            "wandb_id": before.get("wandb_id") or secrets.token_hex(4),
        }
        self.folder.write("run.json", origin)
        facts = configfile.to_dict(self.config) | {"run": origin}
        wandb_run = WandbRun(self.config.report, self.folder.path, origin["wandb_id"], facts)
        self.reporter = Reporter(self.plan, self.folder, wandb_run, self.progress.wall_seconds)

    def _finish(self, status: str, **facts: Any) -> None:
        progress = self.progress
        if self.state.average is not None:
            facts |= {"best_ema_top1": progress.best_ema_top1, "last_ema_top1": progress.last_ema_top1}
        if self.config.loop.stop_at:
            facts |= {"target": self.config.loop.stop_at, "seconds_to_target": progress.target_seconds}
        self.reporter.finish(
            status,
            best_top1=progress.best_top1,
            last_top1=progress.last_top1,
            epochs=round(progress.step * self.plan.global_batch / self.plan.samples, 4),
            steps=progress.step,
            **facts,
        )


@dataclass(frozen=True)
class _Due:
    """A record to be reported a step later."""

    step: int
    lr: float
    totals: Pending
