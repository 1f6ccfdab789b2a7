"""What this machine has for a run, and what it lacks: devices, software, memory, disk, logins."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from trainer import environment
from trainer.config import Config
from trainer.distributed import World

COPIES = 3  # of the network in a checkpoint, about: weights, momentum, and an average or a second moment
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")


@dataclass
class Findings:
    """Lines of (what, finding), and of what is missing the remedy."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        yield from (f"{what:<12} {found}" for what, found in self.rows)
        yield from (f"missing      {what}" for what in self.missing)
        if not self.missing:
            yield "ready"


def look(config: Config, here: World, found: Findings) -> None:
    """What there is on this rank's node; every rank calls it."""
    nodes = len(set(here.gather(environment.host())))
    found.rows.append(("ranks", f"{here.size} on {nodes} node{'s' * (nodes > 1)}, each on {here.device_name}"))
    if here.device.type == "cuda":
        memory = torch.cuda.get_device_properties(here.device).total_memory / 1e9
        found.rows.append(("GPUs here", f"{torch.cuda.device_count()}, {memory:.0f} GB each"))
        found.rows.append(("driver", f"{_driver()}, CUDA {torch.version.cuda}"))
        found.rows.append(("NCCL", ".".join(map(str, torch.cuda.nccl.version()))))
    elif torch.cuda.is_available():
        found.rows.append(("GPUs here", f"{torch.cuda.device_count()}, not used: device={config.device}"))
    found.rows.append(("cores", f"{here.cores} a rank"))
    found.rows.append(("memory", _memory()))
    found.rows.append(("DALI", _dali(here)))
    found.rows.append(("W&B", _wandb(config, found)))


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown (nvidia-smi does not answer)"


def _memory() -> str:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free, whole = (int(lines[key].split()[0]) * 1024 / 1e9 for key in ("MemAvailable", "MemTotal"))
    return f"{free:.1f} of {whole:.1f} GB free"


def _dali(here: World) -> str:
    for package in DALI:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        decoders = "CPU, GPU (data.decoder=gpu)" if here.device.type == "cuda" else "CPU"
        return f"{version} ({package}), decoders: {decoders}"
    return "none"


def _wandb(config: Config, found: Findings) -> str:
    wanted, mode, key = config.report.wandb, environment.wandb_mode(config.report.wandb), environment.has_wandb_key()
    if wanted == "online" and not key:
        found.missing.append("report.wandb=online needs a key: wandb login, WANDB_API_KEY, or report.wandb=auto")
    later = " (python -m launch sync RUN)" if mode == "offline" else ""
    return f"report.wandb={wanted}: {mode}, {'a key is there' if key else 'there is no key'}{later}"


def look_at_disk(config: Config, parameters: int, found: Findings) -> None:
    """Free space where the run folder is or will be, and whether its checkpoints fit."""
    place = Path(os.path.abspath(config.output_dir))
    while not place.exists():
        place = place.parent
    free, each = shutil.disk_usage(place).free / 1e9, COPIES * 4 * parameters / 1e9
    need = (config.checkpoint.keep + 2) * each  # the best, and one that is being written
    found.rows.append(("disk", f"{free:.1f} GB free at {config.output_dir}, for checkpoints of about {each:.2f} GB"))
    if not os.access(place, os.W_OK):
        found.missing.append(f"output_dir={config.output_dir} cannot be written: choose another")
    if free < need:
        found.missing.append(
            f"output_dir={config.output_dir} has {free:.1f} GB free and checkpoints take about {need:.1f} GB: make "
            "room, or lower checkpoint.keep"
        )
