"""The arithmetic of a run: batches, accumulation, steps and epochs, derived once and said once at the start."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config import Config, ConfigError, Schedule


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The derived numbers of a run, and the words that say them.

    Step s (from 0) takes positions [s*G, (s+1)*G) of one endless row: the order of epoch 0, then of epoch 1, and so on,
    with G the global batch. So every batch is whole, no sample is left out, and a batch may span two epochs; a step
    belongs to the epoch that its first position lies in.
    """

    ranks: int
    samples: int
    epochs: float
    global_batch: int
    batch: int  # images of a rank in one forward pass
    accumulation: int  # forward passes of a rank before a step
    total_steps: int
    warmup_steps: int
    peak_lr: float

    @classmethod
    def of(cls, config: Config, ranks: int, samples: int) -> Plan:
        total = config.global_batch_size
        if total > samples:
            raise ConfigError(
                f"global_batch_size={total} is more than the {samples} training images: use {samples} or less"
            )
        if total % ranks:
            below = total // ranks * ranks
            near = [str(n) for n in (below, below + ranks) if n]
            raise ConfigError(f"global_batch_size={total} does not divide among {ranks} ranks: use {' or '.join(near)}")
        share = total // ranks
        limit = config.max_batch_per_gpu or share
        accumulation = next(a for a in range(1, share + 1) if share % a == 0 and share // a <= limit)
        schedule, optim = config.schedule, config.optim
        exponent = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[optim.scale_lr]
        plan = cls(
            ranks=ranks,
            samples=samples,
            epochs=schedule.length,
            global_batch=total,
            batch=share // accumulation,
            accumulation=accumulation,
            total_steps=-(-round(schedule.length * samples) // total),
            warmup_steps=_warmup_steps(schedule, samples, total),
            peak_lr=optim.lr * (total / optim.lr_batch) ** exponent,
        )
        plan._refuse_too_long(config)
        return plan

    def _refuse_too_long(self, config: Config) -> None:
        """ConfigError for what takes longer than the run."""
        schedule, seen = config.schedule, f"schedule.epochs={config.schedule.epochs:g}"
        # warmup_epochs is refused with the config; these two need the data's size.
        for key, given in (("warmup_steps", schedule.warmup_steps), ("warmup_samples", schedule.warmup_samples)):
            if given is not None and self.warmup_steps >= self.total_steps:
                raise ConfigError(
                    f"schedule.{key}={given} leaves nothing of {seen}, which are {self.total_steps} steps: "
                    "lower the first or raise the second"
                )
        if config.ema.half_life is not None and config.ema.half_life > self.epochs * self.samples:
            raise ConfigError(
                f"ema.half_life={config.ema.half_life:g} is longer than the run of {seen}, which sees "
                f"{round(self.epochs * self.samples)} samples: lower the first or raise the second"
            )

    @property
    def steps_per_epoch(self) -> float:
        """Not a whole number unless the batch divides the data set."""
        return self.samples / self.global_batch

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) that step `step` belongs to: the one its first position lies in."""
        return step * self.global_batch // self.samples

    def epoch_end(self, step: int) -> int:
        """The first step of the epoch after the one that step `step` belongs to."""
        return -(-(self.epoch_of(step) + 1) * self.samples // self.global_batch)

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch} = {self.ranks} ranks x {self.batch} images "
            f"x {self.accumulation} accumulated; "
            f"{self.samples} images = {self.steps_per_epoch:.5g} steps an epoch; {self.total_steps} steps, "
            f"{self.warmup_steps} of them warm-up"
        )


def _warmup_steps(schedule: Schedule, samples: int, batch: int) -> int:
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    if schedule.warmup_samples is not None:
        return round(schedule.warmup_samples / batch)
    return round(schedule.warmup_epochs * samples / batch)
