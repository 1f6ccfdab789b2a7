"""The input under training load: real JPEG files against the same steps on synthetic batches, for several settings.

    python benchmarks/input.py [--batch 256] [--threads 6] [--precision fused=true ...] [--out FILE]

Draws JPEG files of ImageNet's mean size (about 500 x 400 px, 110 kB) once, where --root does not name a dataset; trains
ResNet-50 on them by DALI with each setting and on a batch that is there already, blocks in turn in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from about import about
from drawn import draw

from trainer import configfile, learner, precision
from trainer.benchmark import ahead
from trainer.data.loader import TrainingBatches, open_data
from trainer.distributed import world
from trainer.loop import train_steps
from trainer.plan import Plan

# By name: overrides of section data, beside --threads.
SETTINGS: dict[str, dict[str, object]] = {
    "default": {},
    "hardware 0.9": {"hw_decoder_load": 0.9},
    "hardware 0.5": {"hw_decoder_load": 0.5},
    "prefetch 4": {"prefetch": 4},
    "buffers": {"decode_pixels": 500 * 400 * 4},
    "threads 3": {"threads": 3},
}


def measure(options: argparse.Namespace, root: str) -> dict:
    """Images/s of each setting and of synthetic batches, and the ratio of each to the synthetic block before it."""
    overrides = [f"data.root={root}", f"global_batch_size={options.batch}", f"data.image_size={options.size}"]
    overrides += [f"data.threads={options.threads}", "loop.eval_every=0", f"model.name={options.model}"]
    overrides += [f"precision.{word}" for word in options.precision]
    config, ends = configfile.load(None, overrides), time.monotonic() + options.within
    with world(config) as here:
        precision.set_kernels(config, here.device)
        data = open_data(config, here)
        plan = Plan.of(config, here.size, data.samples)
        learned = learner.create(config, plan, here, data)
        synthetic = TrainingBatches(config, replace(data, train=None), plan, here, 0)
        rates: dict[str, list[float]] = {"synthetic": []}
        ratios: dict[str, list[float]] = {}
        for name, words in SETTINGS.items():
            if (options.only and name not in options.only) or time.monotonic() > ends:
                continue
            chosen = replace(config, data=replace(config.data, **words))
            try:
                batches = TrainingBatches(chosen, data, plan, here, 0)
                for _ in range(options.blocks):
                    base = rate(learned, synthetic, 2, options.steps, plan)
                    real = rate(learned, batches, ahead(chosen) + 1, options.steps, plan)
                    rates["synthetic"].append(base)
                    rates.setdefault(name, []).append(real)
                    ratios.setdefault(name, []).append(real / base)
                del batches  # one DALI pipeline at a time
            except RuntimeError as error:
                print(f"  {name} is left out: {str(error).splitlines()[0]}", file=sys.stderr)
    return {
        "images_per_second": {name: round(statistics.median(found), 1) for name, found in rates.items()},
        "ratio": {name: [round(f(found), 3) for f in (statistics.median, min, max)] for name, found in ratios.items()},
    }


def rate(learned: learner.Learner, batches: TrainingBatches, uncounted: int, counted: int, plan: Plan) -> float:
    began = 0.0
    for record in train_steps(learned, batches, range(uncounted + counted)):
        if record.step in (uncounted - 1, uncounted + counted - 1):
            record.totals.tolist()  # waits for the device
            if record.step == uncounted - 1:
                began = time.perf_counter()
    return counted * plan.global_batch / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--root", help="a dataset; none: drawn here")
    parser.add_argument("--files", type=int, default=512 if on_gpu else 20)
    parser.add_argument("--batch", type=int, default=256 if on_gpu else 4)
    parser.add_argument("--size", type=int, default=224 if on_gpu else 64)
    parser.add_argument("--model", default="resnet50" if on_gpu else "resnet18")
    parser.add_argument("--threads", type=int, default=6 if on_gpu else 1)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=15 if on_gpu else 1)
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--precision", nargs="*", default=[], metavar="KEY=VALUE", help="of section precision")
    parser.add_argument("--within", type=float, default=3600, help="seconds after which no other setting is begun")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.root is None:
            draw(Path(folder), options.files)
        result = about() | {"batch": options.batch, "size": options.size, "threads": options.threads}
        result |= {"precision": options.precision} | measure(options, options.root or folder)
    for name, value in result["images_per_second"].items():
        middle, low, high = result["ratio"].get(name, (1, 1, 1))
        print(f"  {name:14} {value:9.1f} images/s  {middle} of synthetic ({low} to {high})")
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
