"""The arithmetic of a run: batches, accumulation, steps and epochs, derived once and said once at the start."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config import Config, ConfigError


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
        steps_per_epoch = samples / total
        return cls(
            ranks=ranks,
            samples=samples,
            epochs=config.schedule.epochs,
            global_batch=total,
            batch=share // accumulation,
            accumulation=accumulation,
            total_steps=-(-round(config.schedule.epochs * samples) // total),
            warmup_steps=round(config.schedule.warmup_epochs * steps_per_epoch),
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
