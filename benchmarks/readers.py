"""The inputs that step.py compares on files: what the trainers of candidates.py read their batches with.

Each gives normalised images (batch, 3, size, size) on `device` and their labels, for ever, from `workers` processes or
threads of its own. FOLDER holds class folders of JPEG files. It is read over and over within one epoch of theirs, for
some of them start their processes anew with each epoch, and a sample of ImageNet is read in no time.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from trainer.config import Data  # noqa: E402

MEAN, STD = Data().mean, Data().std
AN_EPOCH = 1_000_000  # images
Batch = tuple[Tensor, Tensor]


class Files(NamedTuple):
    """What to read, and into what."""

    root: str
    batch: int
    size: int
    workers: int
    device: torch.device


def torchvision_loader(files: Files) -> Iterator[Batch]:
    """pytorch/examples imagenet/main.py, and in effect torchvision's references: ImageFolder, Pillow, DataLoader."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [transforms.RandomResizedCrop(files.size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    dataset = ImageFolder(files.root, transforms.Compose([*steps, transforms.Normalize(MEAN, STD)]))
    options = {"num_workers": files.workers, "pin_memory": files.device.type == "cuda", "drop_last": True}
    loader = DataLoader(_Repeated(dataset), files.batch, shuffle=True, **options)
    for images, labels in _for_ever(loader):
        yield images.to(files.device, non_blocking=True), labels.to(files.device, non_blocking=True)


def timm_loader(files: Files) -> Iterator[Batch]:
    """timm's train.py with its defaults: Pillow, random interpolation, colour jitter 0.4, on a GPU its prefetcher."""
    from timm.data import create_dataset, create_loader

    dataset = create_dataset("", root=files.root, is_training=True)
    dataset.reader.samples = _Repeated(dataset.reader.samples)
    cuda = files.device.type == "cuda"
    loader = create_loader(
        dataset,
        (3, files.size, files.size),
        files.batch,
        is_training=True,
        interpolation="random",
        color_jitter=0.4,
        mean=MEAN,
        std=STD,
        num_workers=files.workers,
        persistent_workers=files.workers > 0,
        pin_memory=cuda,
        use_prefetcher=cuda,
        device=files.device,
    )
    return _for_ever(loader)


def convnets_dali(files: Files) -> Iterator[Batch]:
    """NVIDIA ConvNets' HybridTrainPipe: DALI, decoding on the GPU where there is one."""
    from nvidia.dali import Pipeline, fn, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    cuda = files.device.type == "cuda"
    pipeline = Pipeline(files.batch, files.workers, 0 if cuda else None, seed=12, prefetch_queue_depth=2)
    with pipeline:
        encoded, labels = fn.readers.file(file_root=files.root, random_shuffle=True)
        images = fn.decoders.image_random_crop(
            encoded,
            device="mixed" if cuda else "cpu",
            output_type=types.RGB,
            random_aspect_ratio=[0.75, 4 / 3],
            random_area=[0.08, 1.0],
            num_attempts=100,
        )
        images = fn.resize(
            images, resize_x=files.size, resize_y=files.size, interp_type=types.INTERP_LINEAR, antialias=False
        )
        images = fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(probability=0.5),
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * m for m in MEAN],
            std=[255 * s for s in STD],
        )
        pipeline.set_outputs(images, labels)
    for (found,) in DALIGenericIterator(pipeline, ["images", "labels"]):
        yield found["images"], found["labels"].squeeze(-1).long().to(files.device)


class _Repeated(Dataset):
    """`items` over and over, so that an epoch has AN_EPOCH of them."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __len__(self) -> int:
        return AN_EPOCH

    def __getitem__(self, i: int) -> Any:
        return self._items[i % len(self._items)]


def _for_ever(loader: Any) -> Iterator[Batch]:
    return itertools.chain.from_iterable(itertools.repeat(loader))
