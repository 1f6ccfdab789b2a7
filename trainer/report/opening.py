"""The start of a run's report: where it comes from, written down, and what it does, said once."""

from __future__ import annotations

import secrets
from dataclasses import asdict
from typing import Any

import torch

from trainer import configfile, environment
from trainer.config import Config
from trainer.data.table import Index
from trainer.distributed import World
from trainer.loop import Learner
from trainer.plan import Plan
from trainer.report.examples import Examples
from trainer.report.folder import RunFolder, provenance
from trainer.report.reporter import Reporter, Silent
from trainer.report.wandb_run import WandbRun


def open_report(
    config: Config,
    plan: Plan,
    here: World,
    folder: RunFolder,
    command: list[str],
    val: Index | None,
    reached: tuple[int, float],
) -> Reporter:
    """On the main rank: write down where the run comes from, and begin to report.

    Args:
        val: what is evaluated.
        reached: the step that the run goes on from, and the seconds it has taken so far.
    """
    step, wall_seconds = reached
    folder.rewind_metrics(step)
    origin = write_origin(config, plan, here, folder, command)
    attempt = environment.slurm_attempt()
    facts = configfile.to_dict(config) | {"run": origin, "slurm_job": attempt and attempt[0]}
    wandb_run = WandbRun(config.report, folder.path, origin["wandb_id"], facts)
    examples = Examples(folder.path / "examples.jpg", config.data)
    return Reporter(plan, folder, wandb_run, wall_seconds, examples, val)


def write_origin(config: Config, plan: Plan, here: World, folder: RunFolder, command: list[str]) -> dict[str, Any]:
    """Write run.json, where the run comes from, and return it."""
    before = folder.read("run.json") or {}
    origin = {
        **provenance(command, environment.recorded()),
        "devices": f"{here.size} x {here.device_name}",
        "seed": config.seed,
        "plan": asdict(plan),
        "wandb_id": before.get("wandb_id") or secrets.token_hex(4),
    }
    folder.write("run.json", origin)
    return origin


def introduce(
    reporter: Silent, config: Config, plan: Plan, here: World, learner: Learner, *, classes: int, after: int
) -> None:
    """Say once what is trained, where, and the arithmetic; `after` steps are taken already."""
    parameters = sum(p.numel() for p in learner.model.parameters()) / 1e6
    dtype = str(learner.dtype or torch.float32).removeprefix("torch.")
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
