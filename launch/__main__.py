"""The launcher's commands. Each is a thin call."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from launch import plan, profile, record
from trainer.config import ConfigError

MISTAKE = 2


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = _parser()
    # argparse takes key=value only right behind CONFIG; here they may follow the flags too.
    options, rest = parser.parse_known_args(arguments)
    strange = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(options, "overrides")]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        options.overrides += rest
    try:
        return options.command(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return MISTAKE
    except KeyboardInterrupt:
        return 130


def _submit(options: argparse.Namespace) -> int:
    from launch import submit

    config = submit.load(options.config, options.overrides)
    order = submit.Order([config], _profile(options), options.nodes, Path(config.output_dir))
    submit.check(order)
    if options.dry_run:
        print(submit.dry_run(order))
        return 0
    if submit.finished(order):
        print(f"{order.home} is finished: nothing is left to do")
        return 0
    if options.local:
        return submit.run_here(order)
    submit.say(order, submit.submit(order))
    return 0


def _freeze(options: argparse.Namespace) -> int:
    from launch import submit

    config = submit.load(options.config, options.overrides)
    ranks = profile.Profile(gpus_per_node=0, ranks_per_node=options.ranks_per_node)
    order = submit.Order([config], ranks, options.nodes, Path(config.output_dir))
    submit.check(order)
    print(submit.freeze(order))
    return 0


def _status(options: argparse.Namespace) -> int:
    from launch import status

    print(status.table([run for path in options.runs for run in record.runs_of(Path(path))]))
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from launch import submit, sweep

    if not options.over and not options.list and sweep.is_study(options.config):
        home, configs = sweep.unfinished(options.config, options.overrides)
        if not configs:
            print(f"{home} is finished: nothing is left to do but python -m trainer study --draw")
            return 0
    else:
        found = sweep.variants(options.over, options.list)
        home, configs = sweep.configs(options.config, options.overrides, found)
    order = submit.Order(configs, _profile(options), options.nodes, home, options.limit)
    submit.check(order)
    if options.dry_run:
        print(submit.dry_run(order))
        return 0
    submit.say(order, submit.submit(order))
    return 0


def _logs(options: argparse.Namespace) -> int:
    from launch import logs

    if not options.follow:
        print(logs.text(Path(options.run), options.rank), end="")
        return 0
    for piece in logs.follow(Path(options.run), options.rank):
        print(piece, end="", flush=True)
    return 0


def _cancel(options: argparse.Namespace) -> int:
    from launch import cancel

    for run in [run for path in options.runs for run in record.runs_of(Path(path))]:
        print(cancel.cancel(run, options.wait))
    return 0


def _sync(options: argparse.Namespace) -> int:
    from launch import sync

    return sync.sync(Path(options.run), options.every)


def _profile(options: argparse.Namespace) -> profile.Profile:
    given = {name: getattr(options, name) for name, _ in profile.flags() if getattr(options, name) is not None}
    return profile.load(options.cluster, [f"{name}={value}" for name, value in given.items()])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="imagenet-launch", description="ImageNet training on SLURM.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    submit = commands.add_parser("submit", help="put the run that CONFIG describes into the queue")
    submit.add_argument("config", metavar="CONFIG", help="a YAML file, see configs/")
    submit.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the config: optim.lr=0.2")
    _cluster(submit)
    submit.add_argument("--dry-run", action="store_true", help="print the batch script and the resolved config")
    submit.add_argument("--local", action="store_true", help="run the same job on this machine, one node")
    submit.set_defaults(command=_submit)

    freeze = commands.add_parser("freeze", help="copy code and config to the run folder (slurm/train.sbatch)")
    freeze.add_argument("config", metavar="CONFIG")
    freeze.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    freeze.add_argument("--nodes", type=int, default=1)
    freeze.add_argument("--ranks-per-node", type=int, default=1)
    freeze.set_defaults(command=_freeze)

    plan.add_to(commands)

    status = commands.add_parser("status", help="where runs stand: queue, step, accuracy, speed, time left")
    status.add_argument("runs", nargs="+", metavar="RUN")
    status.set_defaults(command=_status)

    sweep = commands.add_parser("sweep", help="several runs of one config, or those of a study, as an array")
    sweep.add_argument("config", metavar="CONFIG|STUDY", help="a study's unfinished runs need no --over and no --list")
    sweep.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of all runs")
    _cluster(sweep)
    sweep.add_argument("--over", nargs="+", default=[], metavar="KEY=V1,V2", help="every combination")
    sweep.add_argument("--list", metavar="FILE", help="a YAML list of mappings, one a run")
    sweep.add_argument("--limit", type=int, default=4, metavar="N", help="runs at a time (4)")
    sweep.add_argument("--dry-run", action="store_true", help="print the batch script and the first run's config")
    sweep.set_defaults(command=_sweep)

    logs = commands.add_parser("logs", help="what a rank said, of every attempt")
    logs.add_argument("run", metavar="RUN")
    logs.add_argument("--rank", type=int, default=0, metavar="N")
    logs.add_argument("--follow", action="store_true", help="as it grows, over requeues, until the job has ended")
    logs.set_defaults(command=_logs)

    cancel = commands.add_parser("cancel", help="save, then cancel the job")
    cancel.add_argument("runs", nargs="+", metavar="RUN")
    cancel.add_argument("--wait", type=float, default=120, metavar="SECONDS", help="for the save, at most (120)")
    cancel.set_defaults(command=_cancel)

    sync = commands.add_parser("sync", help="upload to W&B what a run wrote offline, also while it trains")
    sync.add_argument("run", metavar="RUN")
    sync.add_argument("--every", type=float, metavar="SECONDS", help="again and again, until the run is done")
    sync.set_defaults(command=_sync)
    return parser


def _cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", required=True, metavar="FILE", help="a cluster profile, see slurm/")
    parser.add_argument("--nodes", type=int, default=1)
    overriding = parser.add_argument_group("instead of what the profile says")
    for name, kind in profile.flags():
        overriding.add_argument(
            f"--{name.replace('_', '-')}", type=str if kind is bool else kind, metavar=kind.__name__
        )


if __name__ == "__main__":
    sys.exit(main())
