"""The trainer with one thing gone wrong: `torchrun tests/faulty.py FOLDER SCENARIOS`, one run after the other.

A scenario is {name, arguments, fault, rank, step}; FOLDER/NAME.RANK.json gets its exit status and what it said. The
fault happens on that rank as it fetches the batch of that step (from 0), or of the evaluation for `evaluation ...`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

RANK = int(os.environ.get("RANK", "0"))


def happen(fault: str, model: torch.nn.Module | None) -> None:
    """Whatever is not about the batch."""
    kind, _, argument = fault.partition(" ")
    if kind == "signal":
        os.kill(os.getpid(), getattr(signal, argument))
    elif kind == "raise":
        raise MemoryError("no memory left for the test")
    elif kind == "hang":
        time.sleep(10_000)
    elif kind == "flip":
        with torch.no_grad():
            bits = next(model.parameters()).view(torch.int32)
            bits.copy_(bits ^ (torch.arange(bits.numel()).reshape(bits.shape) == 5).int())


def inject(fault: str, rank: int, at: int, happened: Path) -> None:
    """Wrap what `trainer.train` calls; `happened` is made with the fault, and keeps it from happening again."""
    from trainer import train
    from trainer.data.loader import EvaluationBatches

    steps, evaluation = train.train_steps, EvaluationBatches.__iter__

    def poisoned(batches: Iterator, first: int, model: torch.nn.Module) -> Iterator:
        for step, (images, labels) in enumerate(batches, first):
            always = "always" in fault
            now = step >= at if always else step == at and not happened.exists()
            if fault and rank in (RANK, -1) and now:
                happened.touch()
                happen(fault, model)
                if fault.startswith("nan"):
                    images = images * torch.nan
            yield images, labels

    def faulty_steps(learner, batches, wanted, enter):
        return steps(learner, poisoned(batches, wanted.start, learner.model), wanted, enter)

    def faulty_evaluation(self: EvaluationBatches) -> Iterator:
        for number, batch in enumerate(evaluation(self)):
            if number == at and rank == RANK and not happened.exists():
                happened.touch()
                happen(fault.removeprefix("evaluation "), None)
            yield batch

    train.train_steps = faulty_steps if not fault.startswith("evaluation ") else steps
    EvaluationBatches.__iter__ = faulty_evaluation if fault.startswith("evaluation ") else evaluation
    inject.undo = lambda: (setattr(train, "train_steps", steps), setattr(EvaluationBatches, "__iter__", evaluation))


def main() -> int:
    """Run the scenarios; the status of the last."""
    from trainer.__main__ import main as trainer

    folder, status = Path(sys.argv[1]), 0
    for scenario in json.loads(sys.argv[2]):
        happened = folder / f"{scenario['name']}.{RANK}.happened"
        inject(scenario.get("fault", ""), scenario.get("rank", 0), scenario.get("step", 0), happened)
        output, errors = io.StringIO(), io.StringIO()
        aside = scenario.get("aside", True)  # where several run in one process
        with contextlib.ExitStack() as stack:
            if aside:
                stack.enter_context(contextlib.redirect_stdout(output))
                stack.enter_context(contextlib.redirect_stderr(errors))
            status = trainer(["train", *scenario["arguments"]])
        inject.undo()
        said = {"status": status, "output": output.getvalue(), "errors": errors.getvalue()}
        (folder / f"{scenario['name']}.{RANK}.json").write_text(json.dumps(said))
    return status


if __name__ == "__main__":
    sys.exit(main())
