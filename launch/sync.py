"""W&B from the login node: uploads what the nodes, which reach no network, wrote to the run folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from trainer.config import ConfigError
from trainer.report.folder import RunFolder


def sync(run: Path) -> int:
    """Upload the offline segments of a run, oldest first, as the one W&B run they are; returns wandb's exit status."""
    segments = sorted(str(path) for path in (run / "wandb").glob("offline-run-*"))
    if not segments:
        raise ConfigError(f"{run}/wandb holds no offline run: it was logged online, or with report.wandb=disabled")
    identity = (RunFolder(run).read("run.json") or {}).get("wandb_id")
    command = [sys.executable, "-m", "wandb", "beta", "sync", *(["--id", identity] if identity else []), *segments]
    return subprocess.run(command).returncode
