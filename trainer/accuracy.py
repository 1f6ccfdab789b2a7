"""The accuracy of a network as `config.loop` asks for it, given up where all ranks agree to stop."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from torch import nn

from trainer import precision
from trainer.config import Config
from trainer.confusion import Confusion
from trainer.data.loader import DataSet, EvaluationBatches
from trainer.distributed import Agreement, World
from trainer.evaluate import Observe, evaluate
from trainer.metrics import Averages
from trainer.models.buffers import averaged_buffers
from trainer.plan import Plan
from trainer.precise import precise_statistics
from trainer.watchdog import Watch


@dataclass(frozen=True)
class Accuracy:
    """Evaluates networks on the validation images of one run."""

    config: Config
    data: DataSet
    plan: Plan
    here: World
    batches: EvaluationBatches
    agreement: Agreement
    watch: Watch

    def confusion(self) -> Confusion:
        """To observe one evaluation with."""
        classes = self.config.model.num_classes or len(self.data.classes)
        return Confusion(classes, self.config.report.mistakes, self.here)

    def of(self, model: nn.Module, coming: int, observe: Observe | None = None) -> tuple[Averages | None, int]:
        """(the accuracy of `model`, 0), or (None, the signal that all ranks agreed to stop for).

        `coming` is the step whose images are the next to be trained on: `loop.precise_bn` takes its statistics of them.
        Every rank calls it and gets the same. BatchNorm's statistics are the ranks' mean for the duration. `observe`:
        of trainer.evaluate.evaluate.
        """
        self.watch.enter("evaluate")
        stopped_by = 0

        def stop() -> bool:
            nonlocal stopped_by
            self.watch.moved()
            stopped_by, _ = self.agreement.agreed()
            return stopped_by != 0

        loop, dtype = self.config.loop, precision.amp_dtype(self.config.precision, self.here.device)
        statistics = nullcontext()
        if loop.precise_bn:
            statistics = precise_statistics(model, self.config, self.data, self.plan, self.here, coming, dtype)
        with statistics, averaged_buffers(model, self.here):
            found = evaluate(model, self.batches, self.here, dtype, stop, loop.eval_flip, observe)
        return found, stopped_by
