"""Our input pipeline against three others and against bare decoding, in CPU time per image, side by side in one run.

    python benchmarks/loader.py ORIGINALS [COPIES ...] [--blocks 5] [--images 600] [--out FILE]

Each argument is a folder of class folders of JPEG files, the first the originals; for example
`python -m trainer prepare SOURCE COPIES --short-side 256` and then COPIES/train. One thread each, page cache warm,
224 px, flips, batches of 64; blocks of all candidates alternate, and set-up and first batches are outside the clock.
Goals: from the originals at least 1.25x the best other one, from the copies at least 3x the best from the originals.
Prints a table; --out writes everything as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from about import about
from nvidia.dali import Pipeline, fn, types
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from trainer import memory  # noqa: E402
from trainer.config import Config, Data  # noqa: E402
from trainer.data.augment import training_windows  # noqa: E402
from trainer.data.index import open_split  # noqa: E402
from trainer.data.loader import DataSet, TrainingBatches  # noqa: E402
from trainer.distributed import World  # noqa: E402
from trainer.plan import Plan  # noqa: E402

BATCH, SIZE = 64, 224
MEAN, STD = Data().mean, Data().std
OTHERS = ("torchvision PIL", "torchvision decode_jpeg", "torchvision decode_jpeg, uint8 out", "DALI as documented")
LIMIT = "limit: bare libjpeg-turbo"


def _torchvision(root: str, kind: str) -> Callable[[], object]:
    """A DataLoader without worker processes: their tensors' way between processes would count against it."""
    augment = [v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()]
    finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    if kind == "pil":
        dataset = ImageFolder(root, v2.Compose([*augment, v2.ToImage(), *finish]))
    else:
        steps = augment if kind == "uint8" else [*augment, *finish]
        dataset = ImageFolder(root, v2.Compose(steps), loader=lambda f: decode_jpeg(read_file(f), ImageReadMode.RGB))
    loader = DataLoader(dataset, BATCH, shuffle=True, drop_last=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    return lambda: next(batches)


def _documented_dali(root: str) -> Callable[[], object]:
    """The training pipeline of DALI's PyTorch ResNet-50 example, on the CPU."""
    pipeline = Pipeline(batch_size=BATCH, num_threads=1, device_id=None, prefetch_queue_depth=2, seed=0)
    with pipeline:
        encoded, labels = fn.readers.file(file_root=root, random_shuffle=True)
        images = fn.decoders.image_random_crop(
            encoded, output_type=types.RGB, random_aspect_ratio=[0.75, 4 / 3], random_area=[0.08, 1.0]
        )
        images = fn.resize(images, resize_x=SIZE, resize_y=SIZE, interp_type=types.INTERP_TRIANGULAR)
        images = fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(),
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * m for m in MEAN],
            std=[255 * s for s in STD],
        )
        pipeline.set_outputs(images, labels)
    pipeline.build()
    return pipeline.run


def _ours(root: str) -> Callable[[], object]:
    """The trainer's own batches, float32 and normalised, as a rank on a CPU gets them."""
    config = Config(global_batch_size=BATCH, data=Data(root=root, train=".", image_size=SIZE, threads=1))
    index = open_split(root, (".",))
    data = DataSet(index, None, len(index), index.classes, index.digest)
    world = World(0, 0, 1, 1, torch.device("cpu"))
    batches = TrainingBatches(config, data, Plan.of(config, 1, len(index)), world, 0)
    return lambda: next(batches)


def _windows(root: str) -> str:
    """`bare_decode`'s input: the windows that our first epochs draw."""
    index = open_split(root, (".",))
    rows = np.arange(len(index))
    lines = []
    for epoch in range(4):
        keys = np.full(len(rows), epoch), rows, np.zeros_like(rows)
        windows = training_windows(Config().augment, SIZE, 0, keys, (index.widths, index.heights))
        boxes = np.stack([windows.x, windows.y, windows.width, windows.height], 1)
        lines += [f"{path} {' '.join(map(str, box))}" for path, box in zip(index.paths(rows), boxes)]
    return "\n".join(lines) + "\n"


def _limit(root: str, program: Path) -> Callable[[], float]:
    """Microseconds per image of one round over the windows."""
    lines = _windows(root)
    run = [str(program), "1"]
    return lambda: float(subprocess.run(run, input=lines, check=True, capture_output=True, text=True).stdout)


def _block(next_batch: Callable[[], object], images: int) -> float:
    """CPU microseconds per image, of all threads of this process."""
    count = -(-images // BATCH)
    began = _settled()
    for _ in range(count):
        next_batch()
    return (_settled() - began) / (count * BATCH) * 1e6


def _settled() -> float:
    """CPU seconds of this process once its threads have filled their queues: each pays for its own batches ahead."""
    before = -1.0
    while (now := time.process_time()) - before > 0.002:
        before = now
        time.sleep(0.25)
    return now


def measure(root: str, program: Path | None, blocks: int, images: int) -> dict[str, list[float]]:
    """CPU microseconds per image of each candidate in each block."""
    sources = {
        OTHERS[0]: _torchvision(root, "pil"),
        OTHERS[1]: _torchvision(root, "float"),
        OTHERS[2]: _torchvision(root, "uint8"),
        OTHERS[3]: _documented_dali(root),
        "ours": _ours(root),
    }
    limit = _limit(root, program) if program else None
    for next_batch in sources.values():
        _block(next_batch, 4 * BATCH)
    found: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(blocks):
        for name, next_batch in sources.items():
            found[name].append(_block(next_batch, images))
        if limit:
            found.setdefault(LIMIT, []).append(limit())
    return found


def _compiled(folder: str) -> Path | None:
    """The limit's program, None without a compiler or libjpeg's header."""
    program = Path(folder) / "bare_decode"
    source = REPOSITORY / "benchmarks" / "bare_decode.c"
    command = ["gcc", "-O2", "-o", str(program), str(source), "-ljpeg"]
    if not shutil.which("gcc") or subprocess.run(command, capture_output=True).returncode:
        print("the limit is left out: it needs gcc and libjpeg's header (Debian: libjpeg62-turbo-dev)")
        return None
    return program


def _summary(found: dict[str, list[float]], originals: dict[str, list[float]]) -> dict:
    """Medians, spreads, and ratios of images per CPU second, block by block, to the best float32 peer of originals."""
    median = {name: statistics.median(values) for name, values in found.items()}
    floats = [name for name in OTHERS if "uint8" not in name]
    best = min(floats, key=lambda name: statistics.median(originals[name]))
    ratios = [theirs / ours for theirs, ours in zip(originals[best], found["ours"])]
    uint8 = [theirs / ours for theirs, ours in zip(originals[OTHERS[2]], found["ours"])]
    return {
        "microseconds": {name: round(value) for name, value in median.items()},
        "spread": {name: [round(min(values)), round(max(values))] for name, values in found.items()},
        "images_per_cpu_second": {name: round(1e6 / value) for name, value in median.items()},
        "best_other_from_originals": best,
        "ratio": round(statistics.median(ratios), 3),
        "ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "ratio_to_uint8_out": round(statistics.median(uint8), 3),
        "share_of_limit": round(median[LIMIT] / median["ours"], 3) if LIMIT in median else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", nargs="+", help="folders of class folders of JPEG files, the originals first")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--images", type=int, default=600, help="an image block and candidate")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    memory.keep_freed()  # as training does; the others gain by it too
    with tempfile.TemporaryDirectory() as folder:
        program = _compiled(folder)
        found = {root: measure(root, program, options.blocks, options.images) for root in options.roots}
    originals = found[options.roots[0]]
    result = about() | {"folders": {root: _summary(each, originals) for root, each in found.items()}}
    for root, summary in result["folders"].items():
        print(f"{root}: ours {summary['ratio']}x {summary['best_other_from_originals']} from {options.roots[0]}")
        for name, value in summary["microseconds"].items():
            low, high = summary["spread"][name]
            print(f"  {name:36} {value:6} us  {low:6} .. {high:<6} {summary['images_per_cpu_second'][name]:6} images/s")
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
