"""Where a run's time went, from its records and events."""

from __future__ import annotations

from trainer.report.runs import Run, stretches

# In the order they are shown; "other" is starting up, the first steps, and whatever else is not a timed step.
PARTS = ("compute", "data wait", "all-reduce", "other ranks", "evaluation", "saves", "other")


def breakdown(run: Run) -> dict[str, float]:
    """Seconds of training's time by part, adding up to `wall_seconds` (to more, if parts were timed more than once).

    Of the steps: the main rank's wait for images; waiting for gradients to be reduced, the network's part and that
    which other ranks cause; and the rest, which is computing. What a kill threw away is in no record and not here.
    """
    parts = dict.fromkeys(PARTS, 0.0)
    for steps, seconds, record in stretches(run.train):
        spent = steps * seconds
        shares = {
            "data wait": record.get("data_wait_fraction") or 0.0,
            "all-reduce": record.get("allreduce_fraction") or 0.0,
            "other ranks": record.get("rank_wait_fraction") or 0.0,
        }
        for part, share in shares.items():
            parts[part] += spent * share
        parts["compute"] += spent * max(0.0, 1 - sum(shares.values()))
    parts["evaluation"] = sum(record.get("seconds") or 0.0 for record in run.evaluations)
    kept = {event["step"]: event for event in run.events if event["kind"] == "save"}  # the last try of each
    parts["saves"] = sum(event["seconds"] for event in kept.values())
    parts["other"] = max(0.0, run.wall_seconds - sum(parts.values()))
    return parts


def shares(parts: dict[str, float]) -> dict[str, float]:
    """The same as shares of all of it; {} where nothing is timed yet."""
    total = sum(parts.values())
    return {part: seconds / total for part, seconds in parts.items()} if total else {}
