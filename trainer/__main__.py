"""The commands. Each is a thin call; torch is imported only by those that need it.

Little is imported up here: until `train` has begun, a stop signal kills the process without a word.
"""

from __future__ import annotations

import argparse
import sys

from trainer import environment, memory
from trainer.config import ConfigError, RunError
from trainer.signals import INTERRUPTED, Stopped, StopSignals

FAILED, MISTAKE, STOPPED = 1, 2, 75  # exit statuses beside those of trainer.train
DEMO: dict[str, int] = {}  # what a test makes smaller than make_demo's defaults


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _options(arguments)
    try:
        return options.command(options)
    except (ConfigError, RunError) as error:
        # Every rank meets the same and one says it, unless only this rank can know.
        if not error.everywhere or environment.place().rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return MISTAKE if isinstance(error, ConfigError) else FAILED
    except (RuntimeError, MemoryError) as error:
        if not memory.ran_out(error):
            raise
        print(f"error: {memory.advice(error, environment.place().rank)}", file=sys.stderr, flush=True)
        return FAILED
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
    from trainer.evaluation import Wanted, evaluate_target

    keys = ("real", "numbered", "subset", "classes", "output", "table")
    return evaluate_target(options.target, options.overrides, Wanted(**{key: getattr(options, key) for key in keys}))


def _predict(options: argparse.Namespace) -> int:
    from trainer.predict import predict

    how = "json" if options.json else "table"
    return predict(options.target, options.images, top=options.top, ema=options.ema, how=how, grid=options.grid)


def _export(options: argparse.Namespace) -> int:
    from trainer.export.command import export

    keys = ("format", "ema", "fold_bn", "output")
    return export(options.target, options.overrides, **{key: getattr(options, key) for key in keys})


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
    from trainer.models import describe

    print(describe.describe(options.overrides, layers=options.layers))
    return 0


def _study(options: argparse.Namespace) -> int:
    from trainer.study import command

    chosen = command.Choice(options.ranks, options.only, listing=options.list, drawing=options.draw)
    return command.study(options.study, options.overrides, chosen)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line. argparse takes no key=value and no image behind an option, so those come in here."""
    parser = _parser()
    options, late = parser.parse_known_args(arguments)
    many = getattr(options, "images", getattr(options, "overrides", None))
    if late and (many is None or any(text.startswith("-") for text in late)):
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    if late:
        many += late
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="imagenet-trainer", description="Distributed ImageNet training.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train, or resume, the run that CONFIG describes")
    train.add_argument("config", metavar="CONFIG", help="a YAML file, see configs/")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example optim.lr=0.2")
    train.set_defaults(command=_train)

    _add_use(commands)

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

    _add_experiments(commands)
    return parser


def _add_experiments(commands: argparse._SubParsersAction) -> None:
    """The commands that measure or compare."""
    benchmark = commands.add_parser("benchmark", help="how fast one part of the run that CONFIG describes is")
    what = "loader: the input alone; step: training on a synthetic batch; end-to-end: on real data against synthetic; "
    what += "allreduce: the sum of all gradients over the ranks"
    benchmark.add_argument("what", choices=("loader", "step", "end-to-end", "allreduce"), help=what)
    benchmark.add_argument("config", metavar="CONFIG")
    benchmark.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    benchmark.add_argument("--count", type=int, metavar="N", help="images (loader: 400), steps or sums (10) a block")
    benchmark.set_defaults(command=_benchmark)

    describe = commands.add_parser("describe", help="the layers, parameters and multiply-adds of a network")
    describe.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example model.name=resnet101")
    describe.add_argument("--layers", action="store_true", help="every layer instead of every stage")
    describe.set_defaults(command=_describe)

    study = commands.add_parser("study", help="train a grid of configs; a table and a figure of it")
    study.add_argument("study", metavar="STUDY", help="a YAML file, see configs/studies/")
    study.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of every run, or of the study: seeds=[0,1]")
    study.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these runs and no others")
    study.add_argument("--ranks", type=int, default=1, metavar="N", help="processes of a run, by torchrun (1)")
    study.add_argument("--list", action="store_true", help="the runs, where they stand, their commands; train nothing")
    study.add_argument("--draw", action="store_true", help="table and figure of what there is; train nothing")
    study.set_defaults(command=_study)


_TARGET = "a run folder (its newest checkpoint), a checkpoint folder, an exported .safetensors file, a CONFIG with "
_TARGET += "model.weights, timm:NAME[.TAG] or torchvision:NAME[.TAG] (its own weights, or model.weights=FILE)"


def _add_use(commands: argparse._SubParsersAction) -> None:
    """The commands that use a trained network."""
    evaluate = commands.add_parser("evaluate", help="accuracy of trained weights, and where they are wrong")
    evaluate.add_argument("target", metavar="TARGET", help=_TARGET)
    overrides = "for example data.root=FOLDER data.image_size=288 loop.eval_flip=true"
    evaluate.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides)
    evaluate.add_argument("--output", metavar="FILE", help="JSON of everything found: classes, confusions, calibration")
    evaluate.add_argument("--table", action="store_true", help="print the classes and the confusions too")
    evaluate.add_argument("--real", metavar="FILE", help="ImageNet-ReaL's real.json: its top-1 as well")
    numbered = "folders are named by labels, 0 to 999, as in ImageNet-V2 (data.val=. if they lie in data.root itself)"
    evaluate.add_argument("--numbered", action="store_true", help=numbered)
    subset = "compare only the logits of the classes that the set has, as for ImageNet-A and -R"
    evaluate.add_argument("--subset", action="store_true", help=subset)
    classes = "class_index.json that names the network's classes, where the weights do not"
    evaluate.add_argument("--classes", metavar="FILE", help=classes)
    evaluate.set_defaults(command=_evaluate)

    predict = commands.add_parser("predict", help="the most likely classes of images")
    predict.add_argument("target", metavar="TARGET", help=_TARGET)
    images = "files, folders or 'globs'; what holds = and is no file is KEY=VALUE"
    predict.add_argument("images", nargs="+", metavar="IMAGE", help=images)
    predict.add_argument("--top", type=int, default=5, metavar="K", help="classes an image (5)")
    predict.add_argument("--ema", action="store_true", help="by the averaged weights of a checkpoint")
    predict.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    predict.add_argument("--grid", metavar="FILE", help="also draw the images with their classes into FILE")
    predict.set_defaults(command=_predict)

    export = commands.add_parser("export", help="write weights in a format that others load, checked by loading it")
    export.add_argument("target", metavar="TARGET", help=_TARGET)
    export.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    export.add_argument("--format", default="safetensors", help="safetensors (default), torchscript, onnx or pt2")
    export.add_argument("--ema", action="store_true", help="the averaged weights of a checkpoint")
    export.add_argument("--fold-bn", action="store_true", help="fold BatchNorm into the convolutions before it")
    export.add_argument("--output", metavar="FILE", help="default: RUN/export/..., or exports/... for what is no run")
    export.set_defaults(command=_export)


if __name__ == "__main__":
    sys.exit(main())
