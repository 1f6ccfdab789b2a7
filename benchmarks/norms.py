"""The fused BatchNorm of a GPU (trainer/models/gpu_norm.py) against torch's, and the bytes it moves against a copy's.

    python benchmarks/norms.py [--batch 256] [--out FILE]

Shapes of ResNet-50 at 224 px, bf16, channels-last: 49 of its 53 norms, those before a ReLU, with an addition between or
without. A pass's bytes are what it cannot do without: forward x twice and y once, backward dy and x twice and dx once,
with an addition the shortcut and its gradient once, and one bit of each ReLU. GB/s of them, and as a share of a copy's
in the same run. Without a GPU the kernels run in Triton's interpreter, on tiny shapes, and the times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.nn.functional as F  # noqa: E402
from about import about  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from trainer.models import gpu_norm  # noqa: E402

# Channels, side, with an addition; how many such norms ResNet-50 has.
SHAPES = {
    (64, 112, False): 1,
    (64, 56, False): 6,
    (256, 56, True): 3,
    (128, 56, False): 1,
    (128, 28, False): 7,
    (512, 28, True): 4,
    (256, 28, False): 1,
    (256, 14, False): 11,
    (1024, 14, True): 6,
    (512, 14, False): 1,
    (512, 7, False): 5,
    (2048, 7, True): 3,
}
SMALL = {(64, 4, False): 1, (256, 4, True): 1}


def compare(channels: int, side: int, added: bool, batch: int) -> dict[str, float]:
    """Microseconds and GB/s of one shape, forward and backward."""
    device = torch.device("cuda" if ON_GPU else "cpu")
    plain = nn.BatchNorm2d(channels, device=device)
    fused = nn.Sequential(nn.BatchNorm2d(channels, device=device))
    assert gpu_norm.fuse(fused)
    given = [
        torch.randn(batch, channels, side, side, device=device, dtype=torch.bfloat16)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for _ in range(1 + added)
    ]
    coming = torch.randn_like(given[0])
    elements = given[0].numel()
    forward, backward = (3 + added) * 2 * elements + elements / 8, (5 + added) * 2 * elements + elements / 4

    def theirs() -> Tensor:
        y = plain(given[0])
        return F.relu(y if not added else y.add_(given[1]), inplace=True)

    found: dict[str, float] = {}
    for name, pass_ in (("torch", theirs), ("fused", lambda: fused[0].add_relu(*given))):
        y = pass_()
        found[f"{name}_forward_us"] = microseconds(pass_)
        found[f"{name}_backward_us"] = microseconds(
            lambda y=y: torch.autograd.grad(y, given, coming, retain_graph=True)
        )
    for which, moved in (("forward", forward), ("backward", backward)):
        found[f"{which}_gb_per_second"] = moved / found[f"fused_{which}_us"] / 1e3
        found[f"{which}_times_torch"] = found[f"torch_{which}_us"] / found[f"fused_{which}_us"]
    return {key: round(value, 2) for key, value in found.items()}


def microseconds(work: Callable[[], object]) -> float:
    """The median of 20, each after others that have filled the cache with something else."""
    if not ON_GPU:
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) * 1e6
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(23):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # while the host queues what is timed
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end))
    return statistics.median(times[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256 if ON_GPU else 2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from step import copy_rate

    copy = copy_rate(torch.device("cuda" if ON_GPU else "cpu")) / 1e9
    result = about() | {"batch": options.batch, "interpreted": not ON_GPU, "copy_gb_per_second": round(copy, 1)}
    table, total = {}, dict.fromkeys(("torch", "fused"), 0.0)
    for (channels, side, added), count in (SHAPES if ON_GPU else SMALL).items():
        found = compare(channels, side, added, options.batch)
        table[f"{channels}x{side}x{side}{' added' if added else ''}"] = found
        for name in total:
            total[name] += count * (found[f"{name}_forward_us"] + found[f"{name}_backward_us"]) / 1e3
        shares = [found[f"{which}_gb_per_second"] / copy for which in ("forward", "backward")]
        print(
            f"  {channels:5} x {side:3} {'added' if added else '     '}"
            + "".join(
                f"  {which} {found[f'fused_{which}_us']:9.1f} us, {share:.2f} of a copy, "
                f"{found[f'{which}_times_torch']:.2f} times torch"
                for which, share in zip(("forward", "backward"), shares)
            )
        )
    result |= {"shapes": table, "milliseconds_a_step": {name: round(value, 2) for name, value in total.items()}}
    print(f"  a step of those norms: {total['torch']:.2f} ms of torch, {total['fused']:.2f} ms fused")
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
