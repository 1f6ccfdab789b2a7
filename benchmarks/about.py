"""Where and with what a figure was taken."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "timm", "nvidia-dali-cuda130", "pillow")


def about() -> dict:
    """Date, hardware, load, versions and commit, for the head of a file in results/."""
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": _hardware(),
        "load_average": os.getloadavg()[0],
        "versions": {**dict(filter(None, map(_version, PACKAGES))), "python": platform.python_version()},
        "commit": _git("rev-parse", "--short", "HEAD") + ("-dirty" if _git("status", "--porcelain") else ""),
    }


def _hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{cpu}, {os.cpu_count()} cores, {gpu}"


def _version(package: str) -> tuple[str, str] | None:
    try:
        return package, version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    git = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # a GPU machine may have no git
        return ""
