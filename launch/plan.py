"""The plan command: what a config would do on more nodes, from one GPU's measured step and a model of the links.

A timeline comes, in this order, from --measured FILE (written by --save on a machine with the GPU), from --step-ms and
--backward-ms (published, or read off a run: the moments of the buckets are then those of a small batch on this
machine's CPU, stretched), or from some real steps here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from launch import link, scaling
from launch.scaling import Cluster, Point
from trainer import configfile, timeline
from trainer.config import Config, ConfigError
from trainer.mistakes import warn
from trainer.timeline import Timeline

IMAGENET = 1_281_167
CPU_IMAGES = 8  # of a timed step on a CPU, where a whole batch may take minutes
BACKWARD = 2 / 3  # of a step, where only the step is known: a backward pass is two forward passes of arithmetic
COLUMNS = ("nodes", "GPUs", "images/GPU", "global batch", "peak LR", "step ms", "exposed ms", "images/s")
SHARES = ("efficiency", "of 1 GPU", "of added", "epoch", "run")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be planned."""

    config: Config
    nodes: list[int]
    cluster: Cluster
    base: int  # nodes that the config's batch is for
    strong: bool
    samples: int
    worth: float  # of the added GPUs' speed, below which they are not


def add_to(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command and its flags."""
    parser = commands.add_parser("plan", help="predict step, efficiency and run time on more nodes")
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the config")
    parser.add_argument("--nodes", default="1,2,4,...,128", metavar="N,N,...", help="1,2,4,...,128")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="8")
    parser.add_argument(
        "--link", default="400", metavar="GBIT|FILE", help="Gb/s a GPU (400), a node (400/node), or a profile"
    )
    parser.add_argument("--strong", action="store_true", help="keep the global batch instead of a GPU's share of it")
    parser.add_argument(
        "--base-nodes", type=int, default=1, metavar="N", help="nodes that the config's batch is for (1)"
    )
    parser.add_argument(
        "--images", type=int, metavar="N", help=f"in the training set ({IMAGENET}, or the synthetic set's)"
    )
    parser.add_argument(
        "--worth", type=float, default=0.5, metavar="SHARE", help="of added GPUs' speed that pays (0.5)"
    )
    source = parser.add_argument_group("one GPU's step, measured here unless given")
    source.add_argument("--steps", type=int, metavar="N", help="to measure, each")
    source.add_argument("--save", metavar="FILE", help="what was measured, for --measured")
    source.add_argument("--measured", metavar="FILE", action="append", help="written by --save; may be repeated")
    source.add_argument("--step-ms", type=float, metavar="MS", help="of one GPU, with its share on --base-nodes")
    source.add_argument("--backward-ms", type=float, metavar="MS", help="of it (two thirds)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=plan)
    return parser


def plan(options: argparse.Namespace) -> int:
    """Print the prediction; 0. ConfigError for what cannot be planned."""
    _check(options)
    config = configfile.load(options.config, options.overrides)
    synthetic = config.data.source == "synthetic"
    request = Request(
        config=config,
        nodes=scaling.powers(options.nodes),
        cluster=Cluster(
            gpus=options.gpus_per_node, link=link.of(options.link), bf16=config.distributed.gradients == "bf16"
        ),
        base=options.base_nodes,
        strong=options.strong,
        samples=options.images or (config.data.synthetic_samples if synthetic else IMAGENET),
        worth=options.worth,
    )
    shares = scaling.shares(config, request.nodes, request.cluster.gpus, request.base, strong=request.strong)
    timelines = _timelines(options, request, sorted({share for share in shares.values() if share}))
    found = scaling.points(config, shares, timelines, request.cluster, request.samples)
    print(as_json(request, timelines, found) if options.json else text(request, timelines, found))
    return 0


def _check(options: argparse.Namespace) -> None:
    for key in ("gpus_per_node", "base_nodes", "images", "steps"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise ConfigError(f"--{key.replace('_', '-')} {value}: use 1 or more")
    for key in ("step_ms", "backward_ms"):
        value = getattr(options, key)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{key.replace('_', '-')} {value:g}: use milliseconds above 0")
    if not 0 <= options.worth <= 1:
        raise ConfigError(f"--worth {options.worth:g}: use a share between 0 and 1")
    if options.backward_ms is not None and options.step_ms is None:
        raise ConfigError(f"--backward-ms {options.backward_ms:g} is a part of --step-ms: give both")
    if options.backward_ms is not None and options.backward_ms >= options.step_ms:
        raise ConfigError(f"--backward-ms {options.backward_ms:g} is not less than --step-ms {options.step_ms:g}")
    if options.measured and (options.step_ms is not None or options.save):
        raise ConfigError("--measured has the step already: leave out --step-ms and --save")
    if options.save and options.step_ms is not None:
        raise ConfigError("--save keeps what was measured, and --step-ms measures nothing: leave one out")


def _timelines(options: argparse.Namespace, request: Request, shares: list[int]) -> list[Timeline]:
    """One GPU's steps, of each of `shares` images if they are measured here on a GPU."""
    if options.measured:
        found = [entry for path in options.measured for entry in timeline.read(Path(path))]
        if not found:
            raise ConfigError(f"{options.measured[0]}: holds no timeline; write one with --save FILE")
        return found
    if not shares:
        raise ConfigError(
            f"global_batch_size={request.config.global_batch_size} divides among the GPUs of none of these nodes: "
            "change it, --nodes or --gpus-per-node"
        )
    from trainer import recording

    if options.step_ms is not None:
        images = request.config.global_batch_size // (request.base * request.cluster.gpus)
        shape = recording.measure(replace(request.config, device="cpu", max_batch_per_gpu=None), 2, 1)
        return [_stretched(shape, max(1, images), options.step_ms, options.backward_ms)]
    if not recording.on_gpu(request.config):
        if max(shares) > CPU_IMAGES:
            warn(f"no GPU here: {CPU_IMAGES} images a step are timed on the CPU, and more take as much longer")
        shares = sorted({min(share, CPU_IMAGES) for share in shares})
    found = [recording.measure(request.config, share, options.steps) for share in shares]
    if options.save:
        timeline.write(Path(options.save), found)
    return found


def _stretched(shape: Timeline, images: int, step_ms: float, backward_ms: float | None) -> Timeline:
    """A step whose length alone is known, its buckets where `shape` has them."""
    backward = (step_ms * BACKWARD if backward_ms is None else backward_ms) / 1000
    moved = shape.scaled(images, backward / shape.backward)
    return replace(moved, device="given: --step-ms", step=step_ms / 1000)


def text(request: Request, timelines: Sequence[Timeline], found: Sequence[Point]) -> str:
    """The table, what it rests on, and what it warns of."""
    rows = [COLUMNS + SHARES, *(_row(point) for point in found)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [_head(request, timelines), ""]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    lines += ["", *_notes(found)]
    last = scaling.last_worth(found, request.worth)
    if last is not None:
        lines.append(
            f"beyond {last.nodes} nodes more stop paying: under {request.worth:g} of the added GPUs' speed is gained"
        )
    lines.append(
        "epoch and run: training steps alone, without input, evaluation, saves and waiting for the slowest rank"
    )
    return "\n".join(lines)


def _head(request: Request, timelines: Sequence[Timeline]) -> str:
    lines = []
    for one in timelines:
        ready = ", ".join(f"{bucket.bytes / 1e6:.1f} MB at {1000 * bucket.ready:.3g}" for bucket in one.buckets)
        lines.append(
            f"one GPU ({one.device}): {one.images} images in {1000 * one.step:.4g} ms, "
            f"backward {1000 * one.backward:.4g} ms; buckets ready: {ready} ms"
        )
    kind = "strong scaling, global batch kept" if request.strong else "weak scaling, images a GPU kept"
    bf16 = ", gradients as bf16" if request.cluster.bf16 else ""
    return "\n".join([*lines, f"{kind}; link: {request.cluster.link}{bf16}"])


def _row(point: Point) -> tuple[str, ...]:
    from trainer.report.console import duration

    def shown(value: float | None, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else format(scale * value, form)

    return (
        str(point.nodes),
        str(point.ranks),
        shown(point.images, "d", 1),
        shown(point.global_batch, "d", 1),
        shown(point.lr, ".4g"),
        shown(point.step, ".4g", 1000),
        shown(point.exposed, ".3g", 1000),
        shown(point.images_per_second, ",.0f"),
        shown(point.efficiency, ".3f"),
        shown(point.of_one, ".3f"),
        shown(point.marginal, ".2f"),
        shown(point.epoch, ".1f") + ("" if point.epoch is None else " s"),
        "-" if point.run is None else duration(point.run),
    )


def _notes(found: Sequence[Point]) -> list[str]:
    """What is impossible, each; of every kind of doubt the first, which holds for the points beyond it too."""
    lines, said = [], set()
    for point in found:
        for kind, note in point.notes.items():
            if kind == scaling.IMPOSSIBLE or kind not in said:
                lines.append(f"{'' if kind == scaling.IMPOSSIBLE else 'from '}{point.nodes} nodes: {note}")
            said.add(kind)
    return lines


def as_json(request: Request, timelines: Sequence[Timeline], found: Sequence[Point]) -> str:
    """All of it for a program."""
    last = scaling.last_worth(found, request.worth)
    return json.dumps(
        {
            "scaling": "strong" if request.strong else "weak",
            "gpus_per_node": request.cluster.gpus,
            "link": asdict(request.cluster.link),
            "gradients": "bf16" if request.cluster.bf16 else "fp32",
            "timelines": [asdict(one) for one in timelines],
            "points": [asdict(point) for point in found],
            "worth": request.worth,
            "last_worth": last and last.nodes,
        },
        indent=2,
    )
