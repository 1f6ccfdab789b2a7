"""Going on with the run that a folder holds: whose it is, what may have changed since, and where it stood."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from trainer import checkpoint, configfile
from trainer.config import Config, ConfigError
from trainer.data.loader import DataSet
from trainer.nonfinite import Rollback
from trainer.report.folder import RunFolder
from trainer.state import RunState

# What a resumed run may change: where it runs and what it tells, nothing that it computes.
FREE = ("output_dir", "device", "max_batch_per_gpu", "data.root", "data.train", "data.val", "data.decoder")
FREE += (
    "data.threads",
    "data.prefetch",
    "data.on_error",
    "data.max_skipped",
    "data.stage_",
    "loop.",
    "distributed.",
    "checkpoint.",
    "report.",
)

ROLLBACKS = "rollbacks.json"


def enter(folder: RunFolder, config: Config, state: RunState) -> Path | None:
    """Take the run folder and return its newest whole checkpoint that fits `state`.

    ConfigError if the folder is another run's or in use, or if it has checkpoints and none of them will do.
    """
    folder.acquire()
    before = folder.path / "config.yaml"
    if before.exists():
        refuse_changed(configfile.load(before), config, folder.path)
    else:
        folder.write("config.yaml", configfile.to_yaml(config))
    return checkpoint.newest_whole(folder.checkpoints, state.demand_fit)


def refuse_changed(before: Config, now: Config, path: Path) -> None:
    old, new = configfile.flat(before), configfile.flat(now)
    changed = [key for key in new if new[key] != old[key] and not key.startswith(FREE)]
    if changed:
        differences = ", ".join(f"{key}={new[key]} (was {old[key]})" for key in changed[:4])
        raise ConfigError(f"{path} holds a run with other options: {differences}: restore them or choose another")


def restore(state: RunState, newest: Path, config: Config, data: DataSet) -> None:
    """Take up the run where the checkpoint at `newest` left it; ConfigError if its data has changed."""
    saved = checkpoint.load(newest)
    if saved.get("data") != data.digest:
        raise ConfigError(
            f"the training data of data.root={config.data.root} is not what {config.output_dir} began with: "
            "restore it, or choose another output_dir"
        )
    state.load_state_dict(saved)


def rollbacks(folder: RunFolder) -> list[Rollback]:
    """The rollbacks of the run so far, oldest first."""
    return [Rollback(**one) for one in (folder.read(ROLLBACKS) or {}).get("rollbacks", [])]


def record_rollbacks(folder: RunFolder, rollbacks: list[Rollback]) -> None:
    """Write them down before a step is taken on their account: whoever resumes leaves out the same data."""
    folder.rewind_metrics(rollbacks[-1].at)
    folder.write(ROLLBACKS, {"rollbacks": [asdict(one) for one in rollbacks]})
