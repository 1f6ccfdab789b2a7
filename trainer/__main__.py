"""The commands. Each is a thin call; torch is imported only by those that need it."""

from __future__ import annotations

import argparse
import sys

from trainer import configfile, environment
from trainer.config import ConfigError, RunError

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130  # exit statuses beside those of trainer.train
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
    except KeyboardInterrupt:
        return INTERRUPTED


def _train(options: argparse.Namespace) -> int:
    config = configfile.load(options.config, options.overrides)
    from trainer.train import train

    return train(config, sys.argv)


def _evaluate(options: argparse.Namespace) -> int:
    from trainer.evaluation import evaluate_target

    return evaluate_target(options.target, options.overrides)


def _prepare(options: argparse.Namespace) -> int:
    if options.source != "demo":
        raise ConfigError(
            f"prepare {options.source}: the only source so far is demo; an ImageFolder needs no preparing"
        )
    from trainer.data.prepare.demo import make_demo
    from trainer.report.console import counter

    made = make_demo(options.destination, progress=counter("drawing images"), **DEMO)
    print(f"{options.destination} {'is drawn' if made else 'is there already, whole'}")
    return 0


def _describe(options: argparse.Namespace) -> int:
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

    prepare = commands.add_parser("prepare", help="make a data set")
    prepare.add_argument("source", metavar="SOURCE", help="demo: ten drawn classes")
    prepare.add_argument("destination", metavar="DESTINATION")
    prepare.set_defaults(command=_prepare)

    describe = commands.add_parser("describe", help="the layers, parameters and multiply-adds of a network")
    describe.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example model.name=resnet101")
    describe.set_defaults(command=_describe)
    return parser


if __name__ == "__main__":
    sys.exit(main())
