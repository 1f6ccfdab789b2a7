"""The start of a run's report: where it comes from, written down, and what it does, said once."""

from __future__ import annotations

import secrets
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from trainer import configfile, environment
from trainer.config import Config
from trainer.data.loader import DataSet
from trainer.distributed import World
from trainer.loop import Learner
from trainer.plan import Plan
from trainer.report import events
from trainer.report.examples import Examples
from trainer.report.folder import RunFolder, provenance
from trainer.report.gauges import Gauges
from trainer.report.reporter import Parts, Reporter, Silent
from trainer.report.tensorboard import Board
from trainer.report.wandb_run import WandbRun


def open_report(
    config: Config,
    plan: Plan,
    here: World,
    data: DataSet,
    folder: RunFolder,
    command: list[str],
    reached: tuple[int, float],
) -> Silent:
    """Write down where the run comes from, and begin to report, on the main rank. Every rank calls it.

    Args:
        reached: the step that the run goes on from, and the seconds it has taken so far.
    """
    hosts = here.gather(environment.host())
    if not here.is_main:
        return Silent()
    step, wall_seconds = reached
    # What the attempt before took after its last save is lost, not unspent.
    wall_seconds = max([wall_seconds, *(event["wall_seconds"] for event in events.read(folder.path))])
    folder.rewind_metrics(step)
    origin = write_origin(config, plan, here, data, folder, command, hosts)
    attempt = environment.slurm_attempt()
    facts = configfile.to_dict(config) | {"run": origin, "slurm_job": attempt and attempt[0]}
    parts = Parts(
        examples=Examples(folder.path / "examples.jpg", config.data),
        val=data.val,
        gauges=Gauges(config, plan, here, len(data.classes)),
        board=Board(config.report, folder.path, step),
    )
    return Reporter(plan, folder, WandbRun(config.report, folder.path, origin["wandb_id"], facts), wall_seconds, parts)


def write_origin(
    config: Config, plan: Plan, here: World, data: DataSet, folder: RunFolder, command: list[str], hosts: list[str]
) -> dict[str, Any]:
    """Write run.json, where the run comes from, and return it; `hosts` are the ranks'."""
    before = folder.read("run.json") or {}
    origin = {
        **provenance(command, environment.recorded()),
        "devices": f"{here.size} x {here.device_name}",
        "hosts": hosts,
        "loader": _loader(config, here, data),
        "seed": config.seed,
        "plan": asdict(plan),
        "wandb_id": before.get("wandb_id") or secrets.token_hex(4),
    }
    folder.write("run.json", origin)
    return origin


def _loader(config: Config, here: World, data: DataSet) -> dict[str, Any] | None:
    """What decoding costs and what there is for it on the main rank; None for synthetic images."""
    if data.train is None:
        return None
    widths, heights = (np.asarray(sides, np.float64) for sides in (data.train.widths, data.train.heights))
    return {
        "threads": config.data.threads or min(here.cores, 8),  # as trainer/data/decoder.py chooses
        "cores": here.cores,
        "megapixels": round(float((widths * heights).mean()) / 1e6, 4),
        "short_side": int(np.median(np.minimum(widths, heights))),
    }


def introduce(
    reporter: Silent, config: Config, plan: Plan, here: World, learner: Learner, *, classes: int, after: int
) -> None:
    """Say once what is trained, where, and the arithmetic; `after` steps are taken already."""
    parameters = sum(p.numel() for p in learner.model.parameters()) / 1e6
    dtype = str(learner.dtype or torch.float32).removeprefix("torch.")
    reporter.begin(after)
    begun = f", going on after step {after}" if after else ""
    reporter.say(f"run       {config.output_dir}{begun}")
    reporter.say(f"model     {config.model.name}: {parameters:.2f} M parameters, {classes} classes")
    reporter.say(f"devices   {here.size} x {here.device_name}, {dtype}")
    reporter.say(f"plan      {plan}")
    reporter.say(f"optim     {config.optim.name}, peak lr {_peak_lr(config, plan)}")


def _peak_lr(config: Config, plan: Plan) -> str:
    optim, peak = config.optim, plan.peak_lr
    if optim.scale_lr == "none":
        return f"{peak:g} as given: nothing is scaled"
    ratio = f"{plan.global_batch} / {optim.lr_batch}"
    factor = ratio if optim.scale_lr == "linear" else f"sqrt({ratio})"
    return f"{peak:g} = {optim.lr:g} x {factor}, as optim.scale_lr={optim.scale_lr} asks"
