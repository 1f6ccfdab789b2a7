"""How many bytes a folder has room for, where that is a disk and where it is memory."""

from __future__ import annotations

import os
from pathlib import Path


def room(folder: Path, system: Path = Path("/")) -> int:
    """Bytes that can be written below `folder` (it must exist); OSError.

    A folder in memory (/dev/shm) has no more room than the node has memory available, nor than this process's control
    group may still take: what is written there counts as its memory, and going beyond would end the job.

    Args:
        system: where /proc and /sys are.
    """
    status = os.statvfs(folder)
    bounds = [status.f_bavail * status.f_frsize]
    if _in_memory(folder.resolve(), system):
        bounds += _available(system) + _group_left(system)
    return min(bounds)


def _in_memory(folder: Path, system: Path) -> bool:
    """Whether the innermost mount above `folder` is one that keeps its files in memory."""
    mounts = (line.split() for line in _read(system / "proc/self/mounts").splitlines())
    above = {where: kind for _, where, kind, *_ in mounts if folder.is_relative_to(where)}
    return above.get(max(above, key=len, default="")) in ("tmpfs", "ramfs")


def _available(system: Path) -> list[int]:
    lines = (line.split() for line in _read(system / "proc/meminfo").splitlines())
    return [int(kib) << 10 for name, kib, *_ in lines if name == "MemAvailable:"]


def _group_left(system: Path) -> list[int]:
    """What each memory limit of control groups above this process leaves; file cache does not count, it gives way."""
    left = []
    for line in _read(system / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, most, taken, prefix = ".", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):  # version 1
            base, most, taken, prefix = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        group = Path(path.lstrip("/"))
        for place in (group, *group.parents):
            folder = system / "sys/fs/cgroup" / base / place
            limit = _read(folder / most).strip()
            if limit.isdigit():  # not "max"
                counts = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
                cache = sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                left.append(int(limit) - int(_read(folder / taken)) + cache)
    return left


def _read(path: Path) -> str:
    """A file of the system, empty where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""
