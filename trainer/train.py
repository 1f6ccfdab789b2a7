"""train(config): the stages of a run in the order of its data flow, and when to log, evaluate, save and stop."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from typing import Any

from trainer import checkpoint, configfile, intake, learner, precision, resume
from trainer.accuracy import Accuracy
from trainer.config import Config
from trainer.data.loader import DataSet, EvaluationBatches, TrainingBatches, open_data
from trainer.distributed import Agreement, World, world
from trainer.divergence import WeightCheck
from trainer.loop import train_steps
from trainer.mistakes import warn
from trainer.nonfinite import NonFiniteError, Rollback, data_step
from trainer.plan import Plan
from trainer.report.folder import RunFolder
from trainer.report.opening import introduce, open_report
from trainer.report.reporter import Silent
from trainer.saver import NoSaver, Saver, save_due
from trainer.signals import Stopped, StopSignals
from trainer.state import RunState
from trainer.tally import Due, Tally
from trainer.target import other_pixels
from trainer.watchdog import Watch

DONE, STOPPED = 0, 75  # exit statuses; 75 is EX_TEMPFAIL: run the same command again to go on


def train(config: Config, command: list[str], signals: StopSignals) -> int:
    """Run `config` to its end or to a signal, resuming what its output_dir holds; returns the exit status.

    Args:
        command: the command line, for the record.
        signals: the stop signals, whose handler has stood since the process began.

    Raises:
        ConfigError: the user's mistake, before anything is written, or an image that cannot be decoded.
        Stopped: a signal came before the first step.
        NonFiniteError: the loss is NaN or infinite.
        DivergedError: the ranks' weights are no longer the same.
        PeerLostError: another rank has ended.
    """
    with (
        world(config, signals) as here,
        Watch(here, config.output_dir, config.distributed.hang_after) as watch,
        watch.naming_a_lost_peer(),
        precision.naming_what_cannot_compile(config.precision),
    ):
        precision.set_kernels(config, here.device)
        alive = intake.alive(signals, watch)
        data = open_data(config, here, intake.scanning(here, signals, watch), alive)
        plan = Plan.of(config, here.size, data.samples)
        state = RunState(learner.create(config, plan, here, data), here)
        folder = RunFolder(config.output_dir)
        try:
            newest = here.on_main(lambda: resume.enter(folder, config, state))
            if newest is not None:
                resume.restore(state, newest, config, data)
            if caught := max(here.gather(signals.caught)):
                raise Stopped(caught)
            return _Run(config, here, Agreement(here, signals), watch, plan, data, state, folder).go(command)
        finally:
            folder.release()


@dataclass
class _Run:
    """A run under way."""

    config: Config
    here: World
    agreement: Agreement
    watch: Watch
    plan: Plan
    data: DataSet
    state: RunState
    folder: RunFolder
    reporter: Silent = field(default_factory=Silent)

    def __post_init__(self) -> None:
        config, plan = self.config, self.plan
        self.learner = self.state.learner
        self.last_step = min(plan.total_steps, config.loop.max_steps or plan.total_steps)
        self.rollbacks: list[Rollback] = self.here.on_main(lambda: resume.rollbacks(self.folder))
        self.saved_at = time.monotonic()
        self.saver = NoSaver()
        if self.here.is_main:
            self.saver = Saver(
                self.folder.checkpoints,
                config.checkpoint.keep,
                self.folder.demand_held,
                lambda text: self.reporter.say(text),
                lambda step: self.reporter.kept(step),
            )
        self.saver.guard(self.learner.optimizer)
        self.evaluation: EvaluationBatches | None = None
        if self.data.val is not None:
            self.evaluation = EvaluationBatches(config, self.data.val, self.here, plan.batch)
            self.accuracy = Accuracy(config, self.data, plan, self.here, self.evaluation, self.agreement, self.watch)
        self._begin()

    def _begin(self) -> None:
        """From where the state stands, with nothing pending."""
        self.progress = self.state.progress
        self.began = self.progress.step
        self.due: Due | None = None
        self.tally = Tally(self.config, self.learner, self.here, self.state.window)
        self.check = WeightCheck(self.state.model.parameters(), self.here, self.config.distributed.check_every)

    # What happens, in order.

    def go(self, command: list[str]) -> int:
        """Train to the end or to a signal; returns the exit status."""
        if self._complete():
            if self.here.is_main:
                print(f"{self.folder.path} is finished ({self.progress.step} steps): nothing is left to do")
            return DONE
        self.progress.target_seconds = None  # what an earlier and lower target took
        reached = self.progress.step, self.progress.wall_seconds
        self.reporter = open_report(self.config, self.plan, self.here, self.data, self.folder, command, reached)
        facts = {"classes": len(self.data.classes), "after": self.progress.step}
        introduce(self.reporter, self.config, self.plan, self.here, self.learner, **facts)
        if self.here.is_main and (differently := other_pixels(self.config)):
            warn(differently)
        try:
            with self.watch.naming_a_lost_peer():
                stopped_by = self._train()
                self.saver.finish()
                self.here.barrier()  # torchrun kills the main rank if another leaves before the save is on disk
        except BaseException as error:
            self.saver.close()
            self._finish("failed", error=f"{type(error).__name__}: {error}")
            raise
        self.watch.enter("finish")
        if stopped_by:
            self.reporter.say(f"stopped by {signal.Signals(stopped_by).name}; the same command goes on from here")
            self._finish("stopped", signal=signal.Signals(stopped_by).name)
        else:
            self._finish("done")
        return STOPPED if stopped_by else DONE

    def _train(self) -> int:
        """To the end, past what may be rolled back; returns the signal that ended it before, 0 at the end."""
        if self.config.loop.on_nonfinite == "rollback" and self.progress.step == 0:
            self._save()  # so that there is something to return to
        while True:
            try:
                return self._epochs()
            except NonFiniteError as error:
                self._roll_back(error)

    def _epochs(self) -> int:
        """From epoch's end to epoch's end; returns the signal that ended it, 0 at the end."""
        first, taken = self.progress.step, data_step(self.rollbacks)
        batches = TrainingBatches(self.config, self.data, self.plan, self.here, first, taken)
        while not self._complete():
            end = min(self.plan.epoch_end(self.progress.closed), self.last_step)
            top1, stopped_by = None, self._steps(batches, end)
            if not stopped_by and self._evaluation_due(end):
                top1, stopped_by = self._evaluate()
            if not stopped_by:
                intake.account(self.here, self.reporter, batches, self.evaluation)
                self.progress.closed = end
                self.reporter.epoch(end)
            self._save(top1)
            if stopped_by:
                return stopped_by
        return 0

    def _steps(self, batches: TrainingBatches, end: int) -> int:
        """Step until `end`; returns the signal that all ranks agreed to stop for before that, 0 for none."""
        watch, first = self.watch, self.progress.step
        for record in train_steps(self.learner, self.reporter.passing(batches), range(first, end), self._enter):
            self.progress.step = record.step + 1
            watch.enter("report")
            self.reporter.step(self.progress.step, record.data_seconds)
            self.tally.add(record)
            self.check.after(self.progress.step)
            self._tell()
            self.saver.reserve(self.state.bulk)
            self.saver.check()
            if self.progress.step % self.config.report.log_every == 0 or self.progress.step == end:
                self.due = self.tally.cut(self.progress.step, record.lr)
            watch.enter("agree")
            stopped_by, save = self.agreement.agreed(self._save_due())
            if stopped_by:
                return stopped_by
            if save and self.progress.step < end:
                self._save()
        self._tell()
        return 0

    def _enter(self, phase: str, step: int) -> None:
        self.watch.enter(phase if step > self.began else f"first {phase}", step)

    def _tell(self) -> None:
        """Report the record that fell due a step ago: by now the device has it."""
        if self.due is None:
            return
        due, self.due = self.due, None
        found = self.tally.read(due)
        if found.averages:
            self.reporter.train(due.step, found.averages, due.lr, found.grad_norm, found.figures)
        if found.norms:
            self.reporter.gradients(due.step, found.norms)
        if found.skipped:
            blame = self.tally.blame(due)
            self.reporter.say(f"warning: {found.skipped} steps before step {due.step} were skipped, {blame}")

    def _roll_back(self, error: NonFiniteError) -> None:
        """Return to the last save and leave out the data since, or raise `error` if that is not to be."""
        loop, reached = self.config.loop, self.progress.step
        if loop.on_nonfinite != "rollback" or len(self.rollbacks) >= loop.nonfinite_limit:
            raise error
        self.saver.close()
        newest = self.here.on_main(lambda: checkpoint.newest_whole(self.folder.checkpoints))
        if newest is None:
            raise error
        resume.restore(self.state, newest, self.config, self.data)
        self._begin()
        back = Rollback(self.progress.step, reached - self.progress.step, str(error))
        self.rollbacks = [*self.rollbacks, back]
        self.here.on_main(lambda: resume.record_rollbacks(self.folder, self.rollbacks))
        self.reporter.rewind(back.at)
        self.reporter.say(f"warning: {error}")
        self.reporter.say(f"rolled back to step {back.at}, leaving out the data of {back.skipped} steps")

    def _complete(self) -> bool:
        """Whether the end, or the accuracy to stop at, is reached; the same on all ranks."""
        target, progress = self.config.loop.stop_at.get("top1"), self.progress
        reached = max(progress.best_top1 or 0, progress.best_ema_top1 or 0)
        return progress.closed >= self.last_step or (target is not None and reached >= target)

    # Evaluating and saving.

    def _evaluation_due(self, end: int) -> bool:
        every = self.config.loop.eval_every
        return self.evaluation is not None and (end == self.last_step or self.plan.epoch_of(end) % every == 0)

    def _evaluate(self) -> tuple[float | None, int]:
        """Evaluate the weights and their average and report; returns the better top-1 in percent, and 0.

        None, and the signal, where all ranks agreed to stop for one: nothing is reported then.
        """
        began, progress, average = time.monotonic(), self.progress, None
        coming, confusion = data_step(self.rollbacks)(progress.step), self.accuracy.confusion()
        found, stopped_by = self.accuracy.of(self.state.model, coming, confusion.add)
        if found and self.state.average is not None:
            average, stopped_by = self.accuracy.of(self.state.average, coming)
        if found is None or stopped_by:
            return None, stopped_by
        progress.evaluated(found.top1, average.top1 if average else None)
        self.reporter.evaluation(progress.step, found, time.monotonic() - began, average, confusion.total())
        if self._complete() and progress.target_seconds is None:
            progress.target_seconds = self.reporter.wall_seconds
        return max(found.top1, average.top1 if average else 0.0), 0

    def _save_due(self) -> bool:
        """Whether this rank finds that a save is due; the clock is the main rank's alone."""
        minutes = (time.monotonic() - self.saved_at) / 60 if self.here.is_main else 0.0
        return save_due(self.config.checkpoint, self.progress.step, minutes)

    def _save(self, top1: float | None = None) -> None:
        """Begin a save on the main rank; a full disk is warned of and the run goes on."""
        self.watch.enter("save")
        self.saved_at = time.monotonic()
        self._tell()
        self.check.settle()
        self.tally.check(self.progress.step)
        ranks = self.state.gather()
        self.tally.pause()
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
        every = self.config.checkpoint.keep_every
        closing = self.progress.closed == self.progress.step
        lasting = closing and every is not None and self.plan.epoch_of(self.progress.step) % every == 0
        self.saver.save(self.progress.step, state, checkpoint.Label(top1=top1, lasting=lasting), self.state.still())
        self.reporter.saved(self.progress.step, time.monotonic() - self.saved_at)

    # Words.

    def _finish(self, status: str, **facts: Any) -> None:
        if self.config.loop.stop_at:
            facts |= {"target": self.config.loop.stop_at, "seconds_to_target": self.progress.target_seconds}
        self.reporter.finish(status, **self.state.summary(self.plan), **facts)
