"""The CPU cores of a rank: those next to its GPU, shared fairly with the ranks whose GPUs have the same neighbours."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

PCI, CPU = Path("/sys/bus/pci/devices"), Path("/sys/devices/system/cpu")


def bind(local_rank: int, local_size: int, cores: int | None) -> list[int] | None:
    """Keep this process to its cores and return them; None where there is nothing to choose by.

    Args:
        cores: how many at most; None: its share of the GPU's neighbours.
    """
    buses = gpu_buses(local_size)
    if not buses or os.environ.get("SLURM_CPU_BIND_TYPE", "none").split(",")[0] not in ("none", "quiet", ""):
        return None
    near = [_near(bus) for bus in buses]
    chosen = share(local_rank, near, os.sched_getaffinity(0), {c: _siblings(c) for c in os.sched_getaffinity(0)})
    if not chosen:
        return None
    os.sched_setaffinity(0, chosen[:cores])
    return chosen[:cores]


def share(rank: int, near: list[frozenset[int]], allowed: set[int], siblings: dict[int, int]) -> list[int]:
    """The cores of `rank`: its part of those near its GPU, whole physical cores first.

    Args:
        near: for each local rank, the cores next to its GPU.
        allowed: the cores that this job may use.
        siblings: the first hardware thread of the physical core that each core belongs to.
    """
    peers = [r for r, cpus in enumerate(near) if cpus == near[rank]]
    mine, number = peers.index(rank), len(peers)
    free = near[rank] & allowed
    physical = sorted({siblings[c] for c in free})
    begin, end = len(physical) * mine // number, len(physical) * (mine + 1) // number
    own = set(physical[begin:end])
    return sorted((c for c in free if siblings[c] in own), key=lambda c: (c != siblings[c], c))


def gpu_buses(local_size: int) -> list[str]:
    """The PCI address of each local rank's GPU; empty where there is no GPU or no nvidia-smi."""
    visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    command = ["nvidia-smi", "--query-gpu=pci.bus_id", "--format=csv,noheader"]
    try:
        done = subprocess.run([*command, *(["-i", ",".join(visible)] if visible else [])], **_QUIET)
    except (OSError, subprocess.TimeoutExpired):
        return []
    # nvidia-smi writes 00000000:1B:00.0, the kernel 0000:1b:00.0
    buses = [line.strip().lower()[-12:] for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [buses[rank % len(buses)] for rank in range(local_size)] if buses else []


_QUIET = {"capture_output": True, "text": True, "timeout": 30}


def _near(bus: str) -> frozenset[int]:
    try:
        return frozenset(_parse((PCI / bus / "local_cpulist").read_text()))
    except OSError:
        return frozenset()


def _siblings(cpu: int) -> int:
    try:
        return min(_parse((CPU / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text()))
    except (OSError, ValueError):
        return cpu


def _parse(text: str) -> list[int]:
    """`0-3,8` as a list."""
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    return found
