"""What bounds a run, in words, and what would help."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from trainer.report.runs import Run, stretches

# Shares of the time of a step from which something is worth saying. Ours, and round: below a tenth, no cure is worth
# the trouble.
INPUT, COMMUNICATION, STRAGGLER = 0.1, 0.15, 0.1
CROP_MARGIN = 256 / 224  # a short side below this times the training size takes detail that crops would have shown


@dataclass(frozen=True)
class Health:
    """A verdict: `bound` is compute | input | communication | straggler | unknown; `text` is a sentence or two."""

    bound: str
    text: str


@dataclass(frozen=True)
class _Means:
    """Means over the timed steps."""

    images_per_second: float
    wait: float
    allreduce: float
    excess: float  # of the rank that was slowest most of the time
    slowest: int
    by: str


def health(run: Run) -> Health:
    """What bounds `run` so far. Of several bounds, the one that costs most is told."""
    means = _means(run)
    if means is None:
        return Health("unknown", "Too few timed steps to say what bounds this run.")
    # What each costs, as a share of the step.
    costs = {
        "input": means.wait / INPUT,
        "communication": means.allreduce / COMMUNICATION,
        "straggler": means.excess / STRAGGLER,
    }
    bound = max(costs, key=costs.__getitem__)
    if costs[bound] < 1:
        return Health("compute", _healthy(means, run))
    words = {"input": _input, "communication": _communication, "straggler": _straggler}
    return Health(bound, words[bound](means, run))


def _means(run: Run) -> _Means | None:
    timed = [(steps * seconds, steps, record) for steps, seconds, record in stretches(run.train) if steps * seconds]
    total = sum(spent for spent, _, _ in timed)
    if not total:
        return None

    def mean(key: str) -> float:
        return sum(spent * (record.get(key) or 0.0) for spent, _, record in timed) / total

    by_rank: dict[Any, list[tuple[float, dict]]] = {}
    for spent, _, record in timed:
        if record.get("slowest_rank") is not None:
            by_rank.setdefault(record["slowest_rank"], []).append((spent, record))
    slowest, excess, by = 0, 0.0, "compute"
    if by_rank:
        # A rank that is slow now and then is noise: the excess counts for the share of the time that it was this one.
        slowest, slow = max(by_rank.items(), key=lambda item: sum(spent * _excess(record) for spent, record in item[1]))
        excess = sum(spent * _excess(record) for spent, record in slow) / total
        by_data = sum(spent for spent, record in slow if record.get("slowest_rank_by") == "data")
        by = "data" if 2 * by_data > sum(spent for spent, _ in slow) else "compute"
    images = run.plan.get("global_batch", 0) * sum(steps for _, steps, _ in timed)
    wait, allreduce = mean("data_wait_fraction"), mean("allreduce_fraction")
    return _Means(images / total, wait, allreduce, excess, int(slowest), by)


def _excess(record: dict[str, Any]) -> float:
    return record.get("slowest_rank_excess") or 0.0


def _healthy(means: _Means, run: Run) -> str:
    waits = [f"{means.wait:.0%} of the time is spent waiting for images"]
    if run.plan.get("ranks", 1) > 1:
        waits.append(f"{means.allreduce:.0%} for gradients to be reduced")
    return f"Compute-bound, as it should be: {', '.join(waits)}."


def _input(means: _Means, run: Run) -> str:
    """The loader's rate is known: while steps wait for it, it is what the run reaches."""
    text = f"Input-bound: {means.wait:.0%} of the time is spent waiting for images."
    loader, ranks = run.origin.get("loader"), run.plan.get("ranks", 1)
    if means.wait >= 0.99 or not loader:
        return text
    threads, cores, rate = loader["threads"], loader["cores"], means.images_per_second / ranks
    needed = math.ceil(threads / (1 - means.wait))
    text += (
        f" The loader delivers {rate:,.0f} images/s a rank with {threads} threads, and the network could take "
        f"{rate / (1 - means.wait):,.0f}:"
    )
    if needed <= cores:
        return f"{text} data.threads={needed} would do, if decoding goes on scaling with threads."
    most = f"; data.threads={cores} helps first" if threads < cores else ""
    return f"{text} that takes {needed} threads, and a rank has {cores} cores{most}. {_reencode(loader, needed, run)}"


def _reencode(loader: dict[str, Any], threads: int, run: Run) -> str:
    """Decoding costs about as much as there are pixels, so fewer pixels by the missing factor would do."""
    side = int(loader["short_side"] * math.sqrt(loader["cores"] / threads))
    least = math.ceil(run.config.get("data.image_size", 224) * CROP_MARGIN)
    other = "more cores a rank" + ("" if "CPU" in str(run.origin.get("devices")) else ", or data.decoder=gpu")
    if side >= least:
        return (
            f"Re-encoded to a short side of about {side} the images would come in time (prepare --short-side {side})."
        )
    if loader["short_side"] > least:
        return (
            f"Re-encoding to a short side of {least} (prepare --short-side {least}), the least that this run's crops "
            f"bear, helps but is not enough: {other}."
        )
    return f"The images are as small as this run's crops bear: {other}."


def _communication(means: _Means, run: Run) -> str:
    return (
        f"Communication-bound: {means.allreduce:.0%} of the time all ranks wait for gradients to be reduced. A larger "
        "batch a rank, accumulation, or a faster network would help (NCCL_DEBUG=INFO names the one in use)."
    )


def _straggler(means: _Means, run: Run) -> str:
    hosts = run.origin.get("hosts") or []
    host = f" on {hosts[means.slowest]}" if means.slowest < len(hosts) else ""
    where, cure = "computes more slowly", "its clocks, its heat and who else uses it"
    if means.by == "data":
        where, cure = "waits longer for its images", "its disk, its cores and who else uses them"
    return (
        f"Straggler: rank {means.slowest}{host} takes {means.excess:.0%} longer for a step than the median rank, and "
        f"all wait for it. It {where}: look at {cure}."
    )
