"""Peak memory of a GPU's training steps, and the largest batch that fits.

    python benchmarks/fits.py [--only NAME ...] [--size 224] [--out FILE]

The candidates of step.py, one process each. Memory grows with the batch by a constant an image, so two small batches
tell where the end is; it is then tried, and lowered by 16 until a step succeeds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from about import about
from candidates import MAKERS, Work

from trainer import precision
from trainer.config import Precision

DEFAULT = ("timm", "compiled", "ours", "ours fused", "ours folded", "ours fused graph")
STEP = 16  # images: batches between multiples of it are not tried


def peak(name: str, batch: int, size: int) -> dict[str, int]:
    """Bytes of tensors at most, and reserved for them, of 5 steps."""
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    dtype = precision.amp_dtype(Precision(), device)
    step = MAKERS[name](Work(batch=batch, size=size, device=device, dtype=dtype))
    for _ in range(5):  # the fourth of ours is recorded where it is a graph
        step()
    torch.cuda.synchronize()
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def alone(name: str, batches: tuple[int, ...], size: int, within: float) -> list[dict[str, int]] | None:
    """`peak` of each batch in a process of their own; None where one does not fit."""
    command = [sys.executable, __file__, "--only", name, "--size", str(size), "--peak", *map(str, batches)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=within)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "out of memory" in done.stderr.lower():
        return None
    raise RuntimeError(done.stderr.strip().splitlines()[-1])


def largest(name: str, size: int, within: float) -> dict:
    """Megabytes at two batches, an image's share, and the largest batch."""
    both = alone(name, (64, 128), size, within)
    assert both, f"{name} does not fit at batch 128"
    low, high = both
    an_image = (high["allocated"] - low["allocated"]) / 64
    room = torch.cuda.get_device_properties(0).total_memory - 2**30  # a context, and libraries
    batch = int((room - low["allocated"]) / an_image + 64) // STEP * STEP
    found = {"mb_an_image": round(an_image / 1e6, 1), "mb_at_128": round(high["allocated"] / 1e6)}
    for _ in range(8):
        if alone(name, (batch,), size, within):
            return found | {"largest_batch": batch}
        batch -= STEP * max(1, batch // 400)
    return found | {"largest_batch": None, "does_not_fit": batch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(MAKERS), default=list(DEFAULT), metavar="NAME")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--within", type=float, default=60, help="seconds for a process")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(0, "no GPU here: nothing to measure\n")
    if options.peak:
        print(json.dumps([peak(options.only[0], batch, options.size) for batch in options.peak]))
        return
    result = about() | {"size": options.size, "candidates": {}}
    for name in options.only:
        try:
            result["candidates"][name] = largest(name, options.size, options.within)
        except (AssertionError, RuntimeError, subprocess.TimeoutExpired) as error:
            result["candidates"][name] = {"failed": str(error)}
        print(f"  {name:18} {result['candidates'][name]}", flush=True)
        if options.out:  # after each: the time may be up before the last
            options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
