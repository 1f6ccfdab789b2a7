"""Batches, through real DALI: which samples, on which rank, and the same pixels from wherever one begins."""

from __future__ import annotations

import io
import os
import weakref
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainer import configfile
from trainer.config import Config, ConfigError
from trainer.data import dali
from trainer.data.decoder import Decoder, InUse
from trainer.data.feeds import TrainingFeed
from trainer.data.index import DataError
from trainer.data.loader import EvaluationBatches, TrainingBatches, open_data
from trainer.data.order import Order
from trainer.data.prepare.run import Options, prepare
from trainer.data.prepare.transcode import Encoding
from trainer.data.salvage import Salvage
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
    batches = TrainingBatches(config, data, plan, world, first)
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
        ["augment.repeats=3", "augment.policy=trivialaugment"],
    ],
    ids=["resized", "padded", "policy", "repeats"],
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
    kept = ~gone[:, None].expand(-1, 3, -1, -1)
    assert gone.flatten(1).any(1).all()
    # What is erased is normalised by DALI, and the other by torch: the same to a rounding.
    torch.testing.assert_close(erased[0][kept], first[0][kept], rtol=0, atol=1e-6)
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


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Path, Path]:
    """A set of noise, 8 images a split, and its training file of row 5, cut short after the scan."""
    for split in ("train", "val"):
        for number in range(8):
            (tmp_path / split / "cat").mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / split / "cat" / f"{number}.JPEG")
    open_data(configure(tmp_path, "global_batch_size=2"), rank(0, 1))
    victims = [tmp_path / split / "cat" / "5.JPEG" for split in ("train", "val")]
    for victim in victims:
        with open(victim, "r+b") as file:  # in place, as a failing disk would: no folder changes
            file.truncate(len(victim.read_bytes()) // 3)
    return tmp_path, victims[0]


def test_an_image_damaged_after_the_scan_is_named(damaged: tuple[Path, Path]) -> None:
    config = configure(damaged[0], "global_batch_size=2")
    with pytest.raises(DataError, match=r"train/cat/5\.JPEG \(row 5, class cat\) cannot be decoded") as error:
        steps(config, rank(0, 1), 0, 5)
    assert not error.value.everywhere and "\n" not in str(error.value)


@pytest.mark.parametrize("size", [1, 2])
def test_a_skipped_image_leaves_its_place_to_the_next_sound_one(damaged: tuple[Path, Path], size: int) -> None:
    root, victim = damaged
    config = configure(root, "global_batch_size=2", "data.on_error=skip", "data.max_skipped=0.2")
    skipping = [steps(config, rank(r, size), 0, 4) for r in range(size)]
    images = torch.cat([part[step][0] for step in range(4) for part in skipping])
    rows = Order(config.seed, 8).at(0, 8)[1].tolist()
    assert torch.equal(images[rows.index(5)], images[rows.index(6)])
    victim.write_bytes((root / "val" / "cat" / "0.JPEG").read_bytes())  # sound again: all others are as they were
    plain = torch.cat([images for images, _ in steps(config, rank(0, 1), 0, 4)])
    assert (plain != images).flatten(1).any(1).nonzero().flatten().tolist() == [rows.index(5)]


def test_evaluation_goes_without_a_skipped_image_and_says_so(damaged: tuple[Path, Path]) -> None:
    config = configure(damaged[0], "data.on_error=skip", "data.max_skipped=0.2")
    batches = EvaluationBatches(config, open_data(config, rank(0, 1)).val, rank(0, 1), 3)
    for _ in range(2):
        assert sum(len(labels) for _, labels in batches) == 7
        assert batches.left_out == 1 and len(batches) == 8


def test_too_many_skipped_images_stop_the_run(damaged: tuple[Path, Path]) -> None:
    config = configure(damaged[0], "global_batch_size=2", "data.on_error=skip", "data.max_skipped=0.1")
    with pytest.raises(DataError, match=r"1 of 8 images of .*data\.max_skipped=0\.1.*5\.JPEG"):
        steps(config, rank(0, 1), 0, 5)


@pytest.mark.parametrize("encoded", [False, True])
def test_what_only_pillow_can_decode_goes_on_and_is_counted(tmp_path: Path, encoded: bool) -> None:
    for split in ("train", "val"):
        for number in range(4):
            (tmp_path / split / "cat").mkdir(parents=True, exist_ok=True)
            image = Image.new("RGB", (40, 40), (number * 60, 10, 200))
            image.save(tmp_path / split / "cat" / f"{number}.png")
    if encoded:
        prepare(tmp_path, tmp_path / "shards", Options("shards", Encoding(None, None, None), 256, 1, False))
    root = tmp_path / "shards" if encoded else tmp_path
    config = configure(root, "global_batch_size=4", "augment.flip=0")
    data = open_data(config, rank(0, 1))
    (expected, labels), *_ = steps(config, rank(0, 1), 0, 1)
    # A GIF in a file that says PNG: its header says as much as the index knows, and DALI reads no GIF.
    gif = io.BytesIO()
    Image.new("RGB", (40, 40), (120, 10, 200)).save(gif, "GIF")
    if encoded:
        row = 2
        index = data.train
        place, size = int(index.positions[row]), int(index.sizes[row])
        content = gif.getvalue().ljust(size, b"\0")
        assert len(content) == size
        shard = root / index.shard_files[0]
        before = shard.stat()
        with open(shard, "r+b") as file:
            file.seek(place)
            file.write(content)
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        with open(tmp_path / "train" / "cat" / "2.png", "r+b") as file:
            file.truncate()
            file.write(gif.getvalue())
    batches = TrainingBatches(config, open_data(config, rank(0, 1)), Plan.of(config, 1, 4), rank(0, 1), 0)
    images, again = next(batches)
    assert torch.equal(again, labels) and torch.equal(images, expected)
    assert list(batches.salvage.converted) == [2] and not batches.salvage.bad


def test_an_image_overwritten_by_one_of_another_size_is_named(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / split / "a" / "0.png")
    config = configure(tmp_path, "global_batch_size=1", "augment.scale=[1,1]", "augment.ratio=[1,1]")
    open_data(config, rank(0, 1))
    with open(tmp_path / "train" / "a" / "0.png", "r+b") as file:
        file.truncate()
        Image.new("RGB", (20, 20)).save(file, "PNG")
    with pytest.raises(DataError, match=r"a/0\.png is 20 x 20 pixels, but 64 x 64 in the index .* run again"):
        steps(config, rank(0, 1), 0, 1)


def test_the_image_size_rises_between_epochs_and_not_within(tiny: Path) -> None:
    options = ["data.start_size=16", "data.image_size=48", "data.size_step=8", "data.ramp=[0.25,0.75]"]
    config = configure(tiny, *options, "augment.policy=randaugment", "schedule.epochs=8", "schedule.warmup_epochs=0")
    sizes = [images.shape[-1] for images, _ in steps(config, rank(0, 1), 0, 16)]
    assert sizes == [16] * 4 + [24] * 2 + [32] * 2 + [40] * 2 + [48] * 6
    late = steps(config, rank(0, 1), 9, 1)[0][0]
    assert torch.equal(late, steps(config, rank(0, 1), 8, 2)[1][0])


def test_a_gpu_decoder_needs_a_gpu(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.decoder=gpu needs a GPU"):
        steps(configure(tiny, "data.decoder=gpu"), rank(0, 1), 0, 1)


@pytest.mark.parametrize("alone", [True, False])
def test_an_image_is_blamed_for_want_of_memory_only_if_others_can_be_decoded(
    damaged: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    root, _ = damaged
    config = configure(root, "global_batch_size=8", "data.on_error=skip", "data.max_skipped=0.2")
    data = open_data(config, rank(0, 1))
    plan, salvage = Plan.of(config, 1, data.samples), Salvage(config.data, data.train)
    feed = TrainingFeed(config, data.train, plan, salvage, 0, lambda step: step)
    decoder, refused = Decoder(config, rank(0, 1), feed, plan.batch, salvage), dali.refused

    def exhausted(decoding: dali.Decoding) -> None:
        decoder._source()  # what is in flight
        raise RuntimeError("Can't allocate 12884508675 bytes on host.")

    with monkeypatch.context() as patch:
        patch.setattr(dali, "run", exhausted)
        if not alone:  # so little is left that not even one can be decoded
            patch.setattr(dali, "refused", lambda files, graph: list(range(len(files))))
            with pytest.raises(RuntimeError, match="Can't allocate"):
                next(decoder.batches())
            assert not salvage.bad
            return

        def one(files: list[np.ndarray], graph: dali.Graph) -> list[int]:
            patch.undo()
            return refused(files, graph)

        patch.setattr(dali, "refused", one)
        images, _ = next(decoder.batches())
    assert len(images) == plan.batch and list(salvage.bad) == [5]


class Step:
    """A moment of a GPU that has come to it when its test says so."""

    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


def test_a_batch_is_held_until_the_gpu_has_come_to_what_was_queued_with_it(tiny: Path) -> None:
    """Without a GPU: the moments are the test's. tests/test_gpu.py has a slow kernel read a batch that was let go."""
    config = configure(tiny)
    data = open_data(config, rank(0, 1))
    plan = Plan.of(config, 1, data.samples)
    feed = TrainingFeed(config, data.train, plan, Salvage(config.data, data.train), 0, lambda step: step)
    decoder = Decoder(config, rank(0, 1), feed, plan.batch, Salvage(config.data, data.train))
    moments: list[Step] = []
    decoder._in_use = InUse(lambda: moments.append(Step()) or moments[-1])
    batches, alive = decoder.batches(), []

    def take(count: int) -> list[bool]:
        """Which of the batches that have come so far are still there, after `count` more."""
        for _ in range(count):
            images, _ = next(batches)
            alive.append(weakref.ref(images))
            del images
        return [each() is not None for each in alive]

    assert take(4) == [True] * 4 and len(moments) == 3  # the last one has not been let go
    moments[0].done = moments[2].done = True  # the third as well, but a queue is done in its order
    assert take(1) == [False, True, True, True, True]
    moments[1].done = True
    assert take(1) == [False, False, False, True, True, True]
    assert take(2) == [False] * 3 + [True] * 5 and not moments[3].done
    assert take(1) == [False] * 4 + [True] * 5 and moments[3].done  # waited for: four are held, and one is out


def test_synthetic_needs_no_files() -> None:
    config = configure(Path("nowhere"), "data.source=synthetic", "data.synthetic_classes=7")
    data = open_data(config, rank(0, 1))
    assert len(data.classes) == 7 and data.samples == 1_281_167 and data.val is None
    (images, labels), again = steps(config, rank(0, 1), 0, 2)
    assert images.shape == (24, 3, 32, 32) and images.is_contiguous(memory_format=torch.channels_last)
    assert labels.max() < 7 and torch.equal(images, again[0])
