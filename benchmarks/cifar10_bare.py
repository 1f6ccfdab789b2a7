"""Our whole training run on CIFAR-10 JPEG files against a bare PyTorch loop on tensors decoded beforehand.

    python benchmarks/cifar10_bare.py data/cifar10 [--blocks 5] [--steps 200]

The bare loop is what one would write by hand: the same network, batch, precision and layout, random crops and flips on
tensors, SGD, one process on all cores. It reads no file, evaluates nothing, saves nothing and reports nothing. Blocks
alternate, in processes of their own; start-up and the first steps are outside both clocks. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WARM_UP = 10
REPOSITORY = Path(__file__).resolve().parents[1]
RECIPE = "configs/cifar10_resnet20.yaml"


def bare(steps: int) -> float:
    """Images a second of the bare loop, over `steps` steps after the warm-up, at the recipe's batch."""
    import torch
    from torch.nn import functional

    from trainer import configfile
    from trainer.config import Model
    from trainer.models import build

    batch = configfile.load(REPOSITORY / RECIPE).global_batch_size

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = build.create(Model(name="resnet20"), 10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-4)
    data, labels = torch.randn(5000, 3, 40, 40), torch.randint(0, 10, (5000,))
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            began = time.perf_counter()
        rows = torch.randint(0, 5000, (batch,))
        x, y = torch.randint(0, 9, (2,)).tolist()  # one offset a batch: cheaper than any honest augmentation
        images = data[rows, :, y : y + 32, x : x + 32].flip(3) if step % 2 else data[rows, :, y : y + 32, x : x + 32]
        with torch.autocast("cpu", torch.bfloat16):
            loss = functional.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return steps * batch / (time.perf_counter() - began)


def ours(steps: int, data: str) -> float:
    """Images a second of `torchrun -m trainer train configs/cifar10_resnet20.yaml`, as its summary says."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        options = [f"data.root={data}", f"output_dir={run}", f"loop.max_steps={steps}", "loop.eval_every=0"]
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*start, "-m", "trainer", "train", RECIPE, *options, "report.wandb=disabled"]
        subprocess.run(
            command, cwd=REPOSITORY, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        return json.loads((run / "summary.json").read_text())["images_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="ImageFolder of CIFAR-10 with train/")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--bare-block", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare_block:
        print(bare(options.steps))
        return
    rates: dict[str, list[float]] = {"bare": [], "ours": []}
    for _ in range(options.blocks):
        block = [sys.executable, __file__, options.data, "--bare-block", "--steps", str(options.steps)]
        rates["bare"].append(float(subprocess.run(block, check=True, capture_output=True, text=True).stdout))
        rates["ours"].append(ours(options.steps, str(Path(options.data).resolve())))
    ratios = [ours / bare for ours, bare in zip(rates["ours"], rates["bare"])]
    medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    spread = {name: [round(min(values), 1), round(max(values), 1)] for name, values in rates.items()}
    print(json.dumps({"images_per_second": medians, "spread": spread, "ratio": round(statistics.median(ratios), 3)}))


if __name__ == "__main__":
    main()
