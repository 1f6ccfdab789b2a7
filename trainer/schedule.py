"""The learning rate as a pure function of the step: nothing to save, nothing to advance."""

from __future__ import annotations

import math

from trainer.config import Schedule
from trainer.plan import Plan


def lr_at(step: int, schedule: Schedule, plan: Plan) -> float:
    """The learning rate of step `step` (from 0), constant through the step.

    Warm-up is linear, from warmup_start * peak at step 0 to the peak at step `plan.warmup_steps`. The shape after it
    runs from there to `plan.total_steps`, where it would arrive at its end: the last step taken is one before.
    """
    if step < plan.warmup_steps:
        return plan.peak_lr * (schedule.warmup_start + (1 - schedule.warmup_start) * step / plan.warmup_steps)
    done = (step - plan.warmup_steps) / max(1, plan.total_steps - plan.warmup_steps)
    if schedule.name == "cosine":
        factor = schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * done)) / 2
    elif schedule.name == "linear":
        factor = 1 + (schedule.final - 1) * done
    elif schedule.name == "polynomial":
        factor = schedule.final + (1 - schedule.final) * (1 - done) ** schedule.power
    elif schedule.name == "step":
        # Counted in samples, so that a boundary does not move with the batch.
        epoch = step * plan.global_batch / plan.samples
        factor = schedule.step_factor ** sum(epoch >= boundary for boundary in schedule.boundaries)
    else:
        factor = 1.0
    return plan.peak_lr * factor
