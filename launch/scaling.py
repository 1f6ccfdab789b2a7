"""From one rank's step to the step of many: the reductions of a backward pass replayed against a link.

Reductions run one after the other on a stream of their own, as DDP's do: each begins when its bucket is ready and the
one before it is done. What they last beyond the backward pass is exposed and lengthens the step; where the link takes
part of the processor, the pass itself slows down while they run. Not in the model: that ranks wait for the slowest of
them, that GPUs of one node share power, memory and the CPU that decodes, and that networks are shared.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from launch.link import Link
from trainer.config import Config, ConfigError
from trainer.plan import Plan
from trainer.timeline import Timeline

IMPOSSIBLE = "impossible"
SGD_BATCH = 8192  # as far as SGD with a linearly scaled rate kept its accuracy (Goyal et al. 2017, arXiv:1706.02677)
FEW_IMAGES = (
    16  # a GPU, below which BatchNorm's statistics are noisy: 32 and 16 lose little, 8 and less do (1803.08494)
)


@dataclass(frozen=True)
class Replay:
    """What reductions add to a step, in seconds."""

    exposed: float  # from the end of the backward pass to that of the last reduction
    slowed: float  # by which the pass itself is longer


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of how many GPUs, on which links."""

    gpus: int
    link: Link
    bf16: bool = False  # gradients travel as bfloat16

    def reduction(self, nodes: int) -> Callable[[int], float]:
        """Seconds that an all-reduce of so many float32 bytes takes on `nodes` nodes."""
        return lambda size: self.link.seconds(size // 2 if self.bf16 else size, nodes, self.gpus)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A number of nodes; None throughout where the batch cannot be divided among them, and `notes` says why."""

    nodes: int
    ranks: int
    images: int | None = None  # of a rank in a step
    global_batch: int | None = None
    lr: float | None = None  # at its peak
    step: float | None = None  # seconds
    exposed: float | None = None  # seconds of it
    images_per_second: float | None = None
    efficiency: float | None = None  # images a second of a GPU, of the first point's
    of_one: float | None = None  # the same, of one GPU that reduces nothing
    marginal: float | None = None  # share of the added GPUs that comes out as images a second; None at the first point
    epoch: float | None = None  # seconds; no input, evaluation or saves in it
    run: float | None = None  # seconds
    notes: dict[str, str] = field(default_factory=dict)  # by kind: IMPOSSIBLE, batch, lr, sgd, images


def replay(timeline: Timeline, reduction: Callable[[int], float], steal: float = 0.0) -> Replay:
    """Reduce the buckets of `timeline` as their gradients come.

    Args:
        reduction: bytes to the seconds that an all-reduce of them takes, alone.
        steal: the share of the processor that is then missing to the backward pass, 0 to 1.
    """
    whole, now, done, ended = timeline.backward, 0.0, 0.0, None
    for bucket in timeline.buckets:
        now, done = now + max(0.0, bucket.ready - done), max(done, bucket.ready)
        lasts, left = reduction(bucket.bytes), max(0.0, whole - done)
        if ended is None and lasts * (1 - steal) >= left:
            ended = now + (left / (1 - steal) if left else 0.0)  # the pass ends while this reduction runs
        done += min(left, lasts * (1 - steal))
        now += lasts
    if ended is None:
        ended = now + whole - done
        now = ended
    return Replay(timeline.passes * (now - ended), timeline.passes * (ended - whole))


def at(timelines: Sequence[Timeline], images: int) -> Timeline:
    """A timeline of steps of `images` images, from measured ones.

    The measured one, or times in proportion to a line through the two nearest (through 0 where there is but one, which
    takes a GPU to be as quick an image at any batch: it is slower at small ones).
    """
    exact = next((t for t in timelines if t.images == images), None)
    if exact:
        return exact
    near = sorted(timelines, key=lambda t: abs(t.images - images))[:2]
    step = near[0].step * images / near[0].images
    if len(near) == 2:
        slope = (near[1].step - near[0].step) / (near[1].images - near[0].images)
        step = max(near[0].step + slope * (images - near[0].images), 1e-9)
    return near[0].scaled(images, step / near[0].step)


def shares(config: Config, nodes: Sequence[int], gpus: int, base: int, *, strong: bool) -> dict[int, int | None]:
    """Images of a rank in a step for each number of nodes; None where the batch does not divide.

    Weak scaling keeps the share that `config` has on `base` nodes, and its global batch grows; strong scaling keeps the
    global batch. Raises ConfigError if it does not divide among the ranks of `base` nodes.
    """
    total = config.global_batch_size
    if strong:
        return {n: total // (n * gpus) if total % (n * gpus) == 0 else None for n in nodes}
    if total % (base * gpus):
        raise ConfigError(
            f"global_batch_size={total} does not divide among {base * gpus} ranks: "
            "say with --base-nodes how many nodes it is for"
        )
    return dict.fromkeys(nodes, total // (base * gpus))


def points(
    config: Config, images: dict[int, int | None], timelines: Sequence[Timeline], cluster: Cluster, samples: int
) -> list[Point]:
    """The prediction for each number of nodes, whose ranks take `images` of them in a step, in the order given."""
    found: list[Point] = []
    first = None
    for nodes, share in images.items():
        point = _point(config, nodes, share, timelines, cluster, samples)
        if point.step is not None:
            reached = [p for p in found if p.step is not None]
            first = first or point
            rate = point.images_per_second / point.ranks
            before = reached[-1] if reached else None
            marginal = None
            if before:
                grown = point.images_per_second / before.images_per_second - 1
                marginal = grown / (point.nodes / before.nodes - 1)
            one = at(timelines, first.images)
            point = replace(
                point,
                efficiency=rate / (first.images_per_second / first.ranks),
                of_one=rate / (one.images / one.step),
                marginal=marginal,
            )
        found.append(point)
    return found


def _point(
    config: Config, nodes: int, share: int | None, timelines: Sequence[Timeline], cluster: Cluster, samples: int
) -> Point:
    ranks = nodes * cluster.gpus
    if share is None:
        total = config.global_batch_size
        why = f"global_batch_size={total} does not divide among {ranks} ranks"
        why += "" if total >= ranks else ": less than an image each"
        return Point(nodes=nodes, ranks=ranks, notes={IMPOSSIBLE: why})
    try:
        plan = Plan.of(replace(config, global_batch_size=share * ranks), ranks, samples)
    except ConfigError as error:
        return Point(nodes=nodes, ranks=ranks, images=share, global_batch=share * ranks, notes={IMPOSSIBLE: str(error)})
    timeline = at(timelines, share)
    cost = replay(timeline, cluster.reduction(nodes), cluster.link.steal)
    step = timeline.step + cost.exposed + cost.slowed
    return Point(
        nodes=nodes,
        ranks=ranks,
        images=share,
        global_batch=plan.global_batch,
        lr=plan.peak_lr,
        step=step,
        exposed=cost.exposed,
        images_per_second=plan.global_batch / step,
        epoch=plan.steps_per_epoch * step,
        run=plan.total_steps * step,
        notes=_doubts(config, plan),
    )


def _doubts(config: Config, plan: Plan) -> dict[str, str]:
    """What the recipe's source never tried, or networks do not bear."""
    doubts = {}
    total, limit = plan.global_batch, config.global_batch_size
    if total > limit:
        doubts["batch"] = f"global batch {total} is {total / limit:.3g} times the recipe's {limit}: accuracy unknown"
        if config.optim.scale_lr == "none":
            doubts["lr"] = (
                f"optim.scale_lr=none leaves the rate at {plan.peak_lr:.4g}; linear scaling would make it "
                f"{config.optim.lr * total / limit:.4g} (optim.scale_lr=linear optim.lr_batch={limit})"
            )
        if config.optim.name in ("sgd", "sgdw") and total > SGD_BATCH:
            doubts["sgd"] = (
                f"beyond {SGD_BATCH} images SGD lost accuracy (arXiv:1706.02677): see the mlperf_lars recipes"
            )
    if plan.batch < FEW_IMAGES:
        doubts["images"] = f"{plan.batch} images a GPU: BatchNorm loses accuracy below {FEW_IMAGES} (arXiv:1803.08494)"
    return doubts


def last_worth(found: Sequence[Point], threshold: float) -> Point | None:
    """The point before the first whose added GPUs give less than `threshold` of their speed; None: all give more."""
    before = None
    for point in found:
        if point.step is None:
            continue
        if point.marginal is not None and point.marginal < threshold:
            return before
        before = point
    return None


def powers(text: str) -> list[int]:
    """Numbers of nodes from `1,2,4,...,128`: `...` goes on doubling, or by the step before it, up to what follows.

    Raises:
        ConfigError: it is not a rising list of whole numbers.
    """
    wrong = ConfigError(f"--nodes {text}: write rising whole numbers, such as 1,2,4,8 or 1,2,4,...,128")
    found: list[int] = []
    words = [word.strip() for word in text.split(",")]
    try:
        for i, word in enumerate(words):
            if word != "...":
                found.append(int(word))
                continue
            if len(found) < 2 or i + 2 != len(words):
                raise wrong
            found += _between(found[-2], found[-1], int(words[i + 1]))
    except ValueError:
        raise wrong from None
    if not found or found[0] < 1 or any(a >= b for a, b in itertools.pairwise(found)):
        raise wrong
    return found


def _between(before: int, last: int, end: int) -> list[int]:
    """What `...` stands for between `last` and `end`."""
    found: list[int] = []
    doubles = last == 2 * before
    while (following := 2 * last if doubles else 2 * last - before) < end and len(found) < 1000:
        found.append(following)
        before, last = last, following
    return found
