"""One rank's step as a timeline: when, within the backward pass, each bucket of gradients is ready to be reduced.

trainer/recording.py measures it, launch/scaling.py replays it against a model of a link.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from trainer.config import ConfigError


@dataclass(frozen=True)
class Bucket:
    """Gradients that are reduced together."""

    bytes: int  # in float32
    ready: float  # seconds from the start of the backward pass


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """A step of one rank that reduces nothing; times in seconds, medians over some steps."""

    device: str
    images: int  # of a step, accumulated ones included
    step: float
    backward: float  # the pass that reduces, the last of an accumulated step
    buckets: tuple[Bucket, ...]
    passes: float = 1.0  # such passes a step: sharpness-aware steps have two

    @property
    def bytes(self) -> int:
        return sum(bucket.bytes for bucket in self.buckets)

    def scaled(self, images: int, factor: float) -> Timeline:
        """As it would be with another number of images if every time were `factor` times as long."""
        buckets = tuple(Bucket(b.bytes, b.ready * factor) for b in self.buckets)
        return replace(self, images=images, step=self.step * factor, backward=self.backward * factor, buckets=buckets)


def write(path: Path, timelines: list[Timeline]) -> None:
    """Write timelines as JSON that `read` reads back."""
    path.write_text(json.dumps([asdict(timeline) for timeline in timelines], indent=2) + "\n")


def read(path: Path) -> list[Timeline]:
    """Timelines that `write` wrote; ConfigError for a file that is none."""
    try:
        return [
            Timeline(**{**entry, "buckets": tuple(Bucket(**bucket) for bucket in entry["buckets"])})
            for entry in json.loads(path.read_text())
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a file of timelines ({error}); write one with plan --save FILE") from error
