"""The commands. Each is a thin call; torch is imported only by those that need it.

Little is imported up here: until `train` has begun, a stop signal kills the process without a word.
"""

from __future__ import annotations

import argparse
import sys

from trainer import environment
from trainer.config import ConfigError, RunError
from trainer.signals import INTERRUPTED, Stopped, StopSignals

FAILED, MISTAKE, STOPPED = 1, 2, 75  # exit statuses beside those of trainer.train
DEMO: dict[str, int] = {}  # what a test makes smaller than make_demo's defaults


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (ConfigError, RunError) as error:
        # Every rank meets the same and one says it, unless only this rank can know.
        if not error.everywhere or environment.place().rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return MISTAKE if isinstance(error, ConfigError) else FAILED
    except Stopped as stop:
        if environment.place().rank == 0:
            print(f"stopped by {stop.name} before the first step; the same command goes on", flush=True)
        return STOPPED
    except KeyboardInterrupt:
        return INTERRUPTED


def _train(options: argparse.Namespace) -> int:
    with StopSignals() as signals:
        from trainer import configfile

        config = configfile.load(options.config, options.overrides)
        from trainer.report import tensorboard

        tensorboard.demand(config.report)
        from trainer.train import train

        return train(config, sys.argv, signals)


def _evaluate(options: argparse.Namespace) -> int:
    from trainer.evaluation import evaluate_target

    return evaluate_target(options.target, options.overrides)


def _prepare(options: argparse.Namespace) -> int:
    if options.source == "demo":
        return _prepare_demo(options)
    from trainer.data.prepare.pace import pace
    from trainer.data.prepare.run import Options, prepare
    from trainer.data.prepare.transcode import Encoding

    encoding = Encoding(options.max_side, options.short_side, options.quality)
    wanted = Options(options.format, encoding, options.shard_mb, options.workers, options.skip_bad)
    print(prepare(options.source, options.destination, wanted, progress=pace()).text)
    return 0


def _prepare_demo(options: argparse.Namespace) -> int:
    if options.max_side or options.short_side or options.quality or options.format != "folder":
        raise ConfigError("prepare demo takes no options but --workers: prepare the demo set once more to re-encode it")
    from trainer.data.prepare.demo import make_demo
    from trainer.report.console import counter

    sizes = {"workers": options.workers, **DEMO}
    made = make_demo(options.destination, progress=counter("drawing images"), **sizes)
    print(f"{options.destination} {'is drawn' if made else 'is there already, whole'}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from trainer.report.comparison import write_report

    print(f"{write_report(options.runs, options.output)} is written")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    if options.dataset.endswith((".yaml", ".yml")):
        if options.decode or options.workers or options.report:
            raise ConfigError("inspect CONFIG takes no --decode, --workers or --report: they go with a DATASET")
        from trainer import configfile

        config = configfile.load(options.dataset, options.overrides)
        from trainer.readiness import inspect_run

        return inspect_run(config)
    if options.overrides:
        raise ConfigError(f"inspect DATASET takes no {options.overrides[0]}: KEY=VALUE goes with a CONFIG")
    from trainer.data.inspection import inspect_data
    from trainer.data.prepare.pace import pace

    chosen = {"decode": options.decode, "workers": options.workers, "report": options.report}
    outcome = inspect_data(options.dataset, **chosen, progress=pace())
    print(outcome.table)
    return 0 if outcome.sound else FAILED


def _benchmark(options: argparse.Namespace) -> int:
    from trainer import configfile

    config = configfile.load(options.config, options.overrides)
    from trainer import benchmark

    run, count = benchmark.COMMANDS[options.what]
    return run(config, options.count or count)


def _describe(options: argparse.Namespace) -> int:
    from trainer import configfile

    config = configfile.load(None, options.overrides)
    from trainer.models import build, summary

    model = build.create(config.model, config.model.num_classes or 1000)
    print(summary.format_table(summary.layer_table(model, config.data.image_size)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="imagenet-trainer", description="Distributed ImageNet training.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train, or resume, the run that CONFIG describes")
    train.add_argument("config", metavar="CONFIG", help="a YAML file, see configs/")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example optim.lr=0.2")
    train.set_defaults(command=_train)

    evaluate = commands.add_parser("evaluate", help="accuracy of a run, a checkpoint or a config's weights")
    evaluate.add_argument("target", metavar="RUN_OR_CHECKPOINT|CONFIG")
    evaluate.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    evaluate.set_defaults(command=_evaluate)

    prepare = commands.add_parser("prepare", help="any layout of ImageNet to a folder or to shards; the demo set")
    source = "a folder with the ILSVRC2012 archives, the Kaggle or Tiny-ImageNet layout, an ImageFolder, parquet; "
    prepare.add_argument("source", metavar="SOURCE", help=source + "demo: ten drawn classes")
    prepare.add_argument("destination", metavar="DESTINATION", help="run the same command again to go on after a stop")
    prepare.add_argument("--format", default="folder", help="folder (default) or shards (WebDataset tar files)")
    prepare.add_argument("--max-side", type=int, metavar="N", help="make copies whose long side is at most N pixels")
    prepare.add_argument("--short-side", type=int, metavar="N", help="make copies whose short side is at most N pixels")
    prepare.add_argument("--quality", type=int, metavar="Q", help="of JPEG copies, 1 to 100 (default 90)")
    prepare.add_argument("--shard-mb", type=int, default=256, metavar="N", help="10^6 bytes a shard, about (256)")
    prepare.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    prepare.add_argument("--skip-bad", action="store_true", help="leave out and list images that cannot be decoded")
    prepare.set_defaults(command=_prepare)

    report = commands.add_parser("report", help="one HTML page of a run, or of several to compare them")
    report.add_argument("runs", nargs="+", metavar="RUN", help="the output_dir of a run, finished or under way")
    where = "where to write the page (default: RUN/report.html, of several runs report.html here)"
    report.add_argument("--output", metavar="FILE", help=where)
    report.set_defaults(command=_report)

    inspect = commands.add_parser("inspect", help="is a data set sound; is this machine ready for a run, and how fast")
    what = "a folder with train/ and val/, the shards of prepare, or a YAML file for the whole of a run"
    inspect.add_argument("dataset", metavar="DATASET|CONFIG", help=what)
    inspect.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="with a CONFIG, as train takes them")
    inspect.add_argument("--decode", action="store_true", help="decode every pixel, not only the headers")
    inspect.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    inspect.add_argument("--report", metavar="FILE", help="where to write the report (default: DATASET/report.json)")
    inspect.set_defaults(command=_inspect)

    benchmark = commands.add_parser("benchmark", help="how fast one part of the run that CONFIG describes is")
    what = "loader: the input alone; end-to-end: training on real data against synthetic"
    benchmark.add_argument("what", choices=("loader", "end-to-end"), help=what)
    benchmark.add_argument("config", metavar="CONFIG")
    benchmark.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    benchmark.add_argument("--count", type=int, metavar="N", help="images (loader: 2000) or steps a block (10)")
    benchmark.set_defaults(command=_benchmark)

    describe = commands.add_parser("describe", help="the layers, parameters and multiply-adds of a network")
    describe.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example model.name=resnet101")
    describe.set_defaults(command=_describe)
    return parser


if __name__ == "__main__":
    sys.exit(main())
