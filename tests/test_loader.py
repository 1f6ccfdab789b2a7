"""Batches, through real DALI: which samples, on which rank, and the same pixels from wherever one begins."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainer import configfile
from trainer.config import Config, ConfigError
from trainer.data.index import DataError
from trainer.data.loader import EvaluationBatches, open_data, training_batches
from trainer.distributed import World
from trainer.plan import Plan


def rank(number: int, size: int) -> World:
    """A rank's view, without the others: what it loads does not depend on talking to them."""
    return World(number, number, size, size, torch.device("cpu"))


def configure(root: Path, *overrides: str) -> Config:
    options = [f"data.root={root}", "data.image_size=32", "data.threads=1", "global_batch_size=24", *overrides]
    return configfile.load(None, options)


def steps(config: Config, world: World, first: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(images, labels) of this rank for `count` steps, its accumulated batches put together."""
    data = open_data(config, rank(0, 1))
    plan = Plan.of(config, world.size, data.samples)
    batches = training_batches(config, data, plan, world, first)
    found = []
    for _ in range(count):
        images, labels = zip(*islice(batches, plan.accumulation))
        found.append((torch.cat(images), torch.cat(labels)))
    return found


@pytest.mark.parametrize(
    "options",
    [
        ["augment.crop=resized"],
        ["augment.crop=padded"],
        ["augment.policy=randaugment", "augment.brightness=0.4", "augment.erase=0.5"],
    ],
    ids=["resized", "padded", "policy"],
)
@pytest.mark.parametrize("size", [2, 3, 8])
def test_ranks_together_see_what_one_rank_sees(tiny: Path, size: int, options: list[str]) -> None:
    config = configure(tiny, *options)
    alone = steps(config, rank(0, 1), 0, 3)
    together = [steps(config, rank(r, size), 0, 3) for r in range(size)]
    for step in range(3):
        assert torch.equal(torch.cat([t[step][0] for t in together]), alone[step][0])
        assert torch.equal(torch.cat([t[step][1] for t in together]), alone[step][1])


def test_accumulated_batches_are_the_big_batch_in_pieces(tiny: Path) -> None:
    whole = steps(configure(tiny), rank(0, 1), 0, 2)
    pieces = steps(configure(tiny, "max_batch_per_gpu=5"), rank(0, 1), 0, 2)
    assert all(torch.equal(a, b) for w, p in zip(whole, pieces) for a, b in zip(w, p))


@pytest.mark.parametrize("first", [1, 2, 5])
def test_beginning_at_a_step_is_the_same_as_running_to_it(tiny: Path, first: int) -> None:
    config = configure(tiny, "global_batch_size=20")  # does not divide 48: batches span epochs
    through = steps(config, rank(0, 1), 0, first + 2)[first:]
    for size in (1, 2):
        begun = [steps(config, rank(r, size), first, 2) for r in range(size)]
        for step in range(2):
            assert torch.equal(torch.cat([b[step][0] for b in begun]), through[step][0])
            assert torch.equal(torch.cat([b[step][1] for b in begun]), through[step][1])


def test_epochs_and_seeds_differ(tiny: Path) -> None:
    config = configure(tiny)
    first, second, third = steps(config, rank(0, 1), 0, 3)
    assert not torch.equal(first[0], third[0])  # step 2 begins epoch 1: 48 samples, 24 a step
    (other,) = steps(configure(tiny, "seed=1"), rank(0, 1), 0, 1)
    assert not torch.equal(first[0], other[0])
    (erased,) = steps(configure(tiny, "augment.erase=1"), rank(0, 1), 0, 1)
    gone = (erased[0] == 0).all(1)  # a rectangle of each image, and the rest of it as it was
    assert gone.flatten(1).any(1).all() and torch.equal(
        erased[0][~gone[:, None].expand(-1, 3, -1, -1)], first[0][~gone[:, None].expand(-1, 3, -1, -1)]
    )
    assert torch.cat([first[1], second[1]]).bincount().tolist() == [12] * 4  # an epoch is every sample once


@pytest.mark.parametrize("size", [1, 2, 3, 8, 40])
def test_evaluation_sees_every_image_once_and_always_the_same(tiny: Path, size: int) -> None:
    config = configure(tiny)
    index = open_data(config, rank(0, 1)).val
    reference = list(EvaluationBatches(config, index, rank(0, 1), 23))
    loaders = [EvaluationBatches(config, index, rank(r, size), 4) for r in range(size)]
    for _ in range(2):  # a second evaluation reuses the pipelines
        batches = [batch for loader in loaders for batch in loader]
        assert all(0 < len(labels) <= 4 for _, labels in batches)
        assert torch.equal(torch.cat([images for images, _ in batches]), reference[0][0])
        assert torch.equal(torch.cat([labels for _, labels in batches]), reference[0][1])


def test_normalised_and_channels_last(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(np.full((40, 40, 3), (255, 0, 51), np.uint8)).save(tmp_path / split / "a" / "0.png")
    config = configure(tmp_path, "global_batch_size=1", "data.mean=[0.5,0.5,0.2]", "data.std=[0.5,0.25,0.1]")
    ((images, _),) = steps(config, rank(0, 1), 0, 1)
    assert images.shape == (1, 3, 32, 32) and images.dtype == torch.float32
    assert torch.allclose(images.mean((0, 2, 3)), torch.tensor([1.0, -2.0, 0.0]), atol=1e-5)


def test_an_image_damaged_after_the_scan_is_named(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for number in range(8):
            (tmp_path / split / "cat").mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / split / "cat" / f"{number}.JPEG")
    config = configure(tmp_path, "global_batch_size=2", "augment.scale=[1,1]", "augment.ratio=[1,1]")
    open_data(config, rank(0, 1))
    victim = tmp_path / "train" / "cat" / "5.JPEG"
    content = victim.read_bytes()
    with open(victim, "r+b") as file:  # in place, as a failing disk would: no folder changes
        file.truncate(len(content) // 3)
    with pytest.raises(DataError, match=r"train/cat/5\.JPEG \(row 5, class cat\) cannot be decoded") as error:
        steps(config, rank(0, 1), 0, 5)
    assert not error.value.everywhere and "\n" not in str(error.value)


def test_a_gpu_decoder_needs_a_gpu(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.decoder=gpu needs a GPU"):
        steps(configure(tiny, "data.decoder=gpu"), rank(0, 1), 0, 1)


def test_synthetic_needs_no_files() -> None:
    config = configure(Path("nowhere"), "data.source=synthetic", "data.synthetic_classes=7")
    data = open_data(config, rank(0, 1))
    assert len(data.classes) == 7 and data.samples == 1_281_167 and data.val is None
    (images, labels), again = steps(config, rank(0, 1), 0, 2)
    assert images.shape == (24, 3, 32, 32) and images.is_contiguous(memory_format=torch.channels_last)
    assert labels.max() < 7 and torch.equal(images, again[0])
