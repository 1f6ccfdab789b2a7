"""Our training step against those of other trainers and of torch.compile, on the same tensors, side by side in one run.

    python benchmarks/step.py [--batch 32] [--size 224] [--blocks 5] [--steps 4] [--only NAME ...] [--out FILE]

ResNet-50 v1.5 from equal initial weights, synthetic images and labels that are there before the clock starts. Blocks of
all candidates alternate; compilation and first steps are outside the clock. The others are written from their
repositories, small, and with what they wait for in each step:

    examples        pytorch/examples imagenet/main.py: fp32, NCHW, loss and accuracies read from the device every step
    torchvision     references/classification/train.py --amp: autocast, NCHW, the same reading
    timm            train.py --amp --channels-last: its network, optimizer, loss and clip-less update; nothing is read
    convnets        NVIDIA ConvNets --amp --memory-format nhwc: autocast, channels-last, smoothing, decay not on 1-d
    compiled        convnets' step under torch.compile; compiled-max: with mode="max-autotune"

The limit is the arithmetic's: 24.30 GFLOP an image at 224 px (forward 4.089 GMAC, backward twice that without the first
layer's gradient to the image), at the rate of a large matrix product of the same dtype measured in the same run. A GPU
is nearer to the limit of its memory.
Prints a table; --out writes everything as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
import torchvision
from about import about
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import NativeScaler
from torch import nn

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from trainer import learner, precision  # noqa: E402
from trainer.config import Checkpoint, Config, Data, Loss, Optim, Precision  # noqa: E402
from trainer.data.loader import DataSet  # noqa: E402
from trainer.distributed import World  # noqa: E402
from trainer.loop import train_steps  # noqa: E402
from trainer.plan import Plan  # noqa: E402

GFLOP_AT_224 = 24.30
CLASSES = 1000
Step = Callable[[], object]


def examples(images: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype | None = None) -> Step:
    """main.py's train(): `dtype` None is its fp32."""
    model = _torchvision_model(images)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(images.device.type, enabled=dtype is torch.float16)

    def step() -> None:
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
            output = model(images)
            loss = criterion(output, labels)
        _top(output, labels)
        loss.item()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def timm_train(images: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> Step:
    """train.py's train_one_epoch() with --amp --channels-last --smoothing 0.1."""
    torch.manual_seed(0)
    model = timm.create_model("resnet50", num_classes=CLASSES).to(images.device, memory_format=torch.channels_last)
    model.train()
    images = images.contiguous(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4)
    criterion = LabelSmoothingCrossEntropy(0.1)
    scaler = NativeScaler(device=images.device.type) if dtype is torch.float16 else None

    def step() -> None:
        with torch.autocast(images.device.type, dtype=dtype):
            loss = criterion(model(images), labels)
        if scaler is not None:
            scaler(loss, optimizer)
        else:
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        if images.is_cuda:
            torch.cuda.synchronize()  # as train.py does after each update

    return step


def convnets(images: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype, compiled: str | None = None) -> Step:
    """ConvNets' training step; `compiled` is a mode of torch.compile."""
    model = _torchvision_model(images).to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 3e-5}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, 0.1, momentum=0.875)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    scaler = torch.amp.GradScaler(images.device.type, enabled=dtype is torch.float16)
    network = torch.compile(model, mode=compiled) if compiled else model

    def step() -> None:
        with torch.autocast(images.device.type, dtype=dtype):
            loss = criterion(network(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(images: torch.Tensor, labels: torch.Tensor, compile: bool = False) -> Step:
    """The trainer's own step, with its metrics, as configs/resnet50_90ep.yaml has it."""
    config = Config(
        global_batch_size=len(images),
        data=Data(source="synthetic", image_size=images.shape[-1], synthetic_classes=CLASSES),
        optim=Optim(lr=0.1, momentum=0.875, weight_decay=3e-5),
        loss=Loss(label_smoothing=0.1),
        precision=Precision(compile=compile),
        checkpoint=Checkpoint(),
    )
    here = World(0, 0, 1, 1, images.device)
    precision.set_kernels(config, images.device)
    classes = tuple(f"class{i}" for i in range(CLASSES))
    data = DataSet(None, None, config.data.synthetic_samples, classes, "synthetic")
    learned = learner.create(config, Plan.of(config, 1, data.samples), here, data)
    images = images.contiguous(memory_format=torch.channels_last)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield images, labels

    records = train_steps(learned, batches(), range(10**9))
    return lambda: next(records)


def measure(steps: dict[str, Step], blocks: int, count: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of a step in each block, for each candidate."""
    for step in steps.values():
        for _ in range(3):
            step()
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(blocks):
        for name, step in steps.items():
            step()  # its tensors are in no cache after the others' blocks
            _wait(device)
            began = time.perf_counter()
            for _ in range(count):
                step()
            _wait(device)
            found[name].append((time.perf_counter() - began) / count)
    return found


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large matrix product, the best of five."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        _wait(device)
        began = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def _torchvision_model(images: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet50(num_classes=CLASSES).to(images.device).train()


def _top(output: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """main.py's accuracy(), read from the device."""
    with torch.no_grad():
        _, best = output.topk(5, 1)
        right = best.eq(labels.view(-1, 1))
        return [right[:, :k].float().sum().mul(100.0 / len(labels)).item() for k in (1, 5)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256 if torch.cuda.is_available() else 32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30 if torch.cuda.is_available() else 2, help="a block")
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    parser.add_argument("--only", nargs="+", help="candidates")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = precision.amp_dtype(Precision(), device)
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    labels = torch.randint(CLASSES, (options.batch,), device=device)
    makers: dict[str, Callable[[], Step]] = {
        "examples": lambda: examples(images, labels),
        "torchvision": lambda: examples(images, labels, dtype),
        "timm": lambda: timm_train(images, labels, dtype),
        "convnets": lambda: convnets(images, labels, dtype),
        "compiled": lambda: convnets(images, labels, dtype, "default"),
        "compiled-max": lambda: convnets(images, labels, dtype, "max-autotune"),
        "ours": lambda: ours(images, labels),
        "ours compiled": lambda: ours(images, labels, compile=True),
    }
    if unknown := set(options.only or ()) - set(makers):
        parser.error(f"--only {' '.join(sorted(unknown))}: use {', '.join(makers)}")
    steps = {name: make() for name, make in makers.items() if name in (options.only or makers)}
    found = measure(steps, options.blocks, options.steps, device)
    rate = product_rate(dtype or torch.float32, device)
    limit = rate / (GFLOP_AT_224 * 1e9 * (options.size / 224) ** 2)
    result = about() | {
        "batch": options.batch,
        "size": options.size,
        "dtype": str(dtype),
        "images_per_second": {k: round(options.batch / statistics.median(v), 2) for k, v in found.items()},
        "spread": {k: [round(options.batch / max(v), 2), round(options.batch / min(v), 2)] for k, v in found.items()},
        "product_tflops": round(rate / 1e12, 3),
        "limit_images_per_second": round(limit, 2),
    }
    for name, value in result["images_per_second"].items():
        low, high = result["spread"][name]
        print(f"  {name:14} {value:9.2f} images/s  {low:9.2f} .. {high:<9.2f}  {value / limit:.2f} of the limit")
    print(f"  limit          {limit:9.2f} images/s: {rate / 1e12:.3f} TFLOP/s of matrix products")
    others = {k: v for k, v in found.items() if not k.startswith("ours")}
    if "ours" in found and others:
        best = min(others, key=lambda k: statistics.median(others[k]))
        for name in dict.fromkeys(["examples", best]):
            if name in others:
                ratios = sorted(theirs / mine for theirs, mine in zip(others[name], found["ours"]))
                result[f"ratio_to_{name}"] = round(statistics.median(ratios), 3)
                print(f"  ours is {statistics.median(ratios):.3f} times {name} ({ratios[0]:.3f} to {ratios[-1]:.3f})")
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
