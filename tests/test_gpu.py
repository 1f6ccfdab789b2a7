"""What only a GPU can show: decoding there, AMP there, and that the same config runs there by itself."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import here, metrics, summary
from PIL import Image

from trainer import configfile
from trainer.data import dali
from trainer.data.loader import TrainingBatches, open_data
from trainer.distributed import world
from trainer.plan import Plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch.cuda.is_available() is false"),
]


@pytest.mark.parametrize("amp", ["auto", "bf16", "fp16", "fp16 precision.static_scale=true", "fp32"])
def test_the_same_config_trains_on_the_gpu(tiny: Path, tmp_path: Path, amp: str) -> None:
    (tmp_path / "empty.yaml").write_text("{}")
    options = [
        f"data.root={tiny}",
        f"output_dir={tmp_path / 'run'}",
        *f"precision.amp={amp}".split(),
        "model.name=resnet20",
    ]
    options += ["data.image_size=32", "global_batch_size=24", "schedule.epochs=10", "schedule.warmup_epochs=1"]
    done = here("train", tmp_path / "empty.yaml", *options, "report.wandb=disabled", "report.log_every=1")
    assert done.status == 0, done.errors
    assert torch.cuda.get_device_name() in done.output
    losses = [record["loss"] for record in metrics(tmp_path / "run", "train")]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) and summary(tmp_path / "run")["status"] == "done"


def test_a_recorded_fused_packed_step_trains_through_two_sizes_and_a_restart(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("{}")
    options = [f"data.root={tiny}", f"output_dir={tmp_path / 'run'}", "model.name=resnet18", "data.image_size=96"]
    options += ["data.start_size=64", "global_batch_size=12", "schedule.epochs=8", "schedule.warmup_epochs=1"]
    options += [f"precision.{each}=true" for each in ("fused", "cuda_graph", "packed_stem")]
    options += ["precision.amp=bf16", "report.wandb=disabled", "report.log_every=1", "loop.eval_every=4"]
    for steps in (16, 32):  # four an epoch; the second command goes on from the first one's save
        done = here("train", tmp_path / "empty.yaml", *options, f"loop.max_steps={steps}")
        assert done.status == 0, done.errors
    losses = [record["loss"] for record in metrics(tmp_path / "run", "train")]
    assert len(losses) == 32 and np.mean(losses[-4:]) < np.mean(losses[:4])


@pytest.mark.parametrize("on_gpu", [False, True])
def test_crops_on_the_gpu_equal_pil(imagenet_sample: Path, on_gpu: bool) -> None:
    files = sorted(imagenet_sample.rglob("*.JPEG"))[:32]
    sizes = np.array([Image.open(f).size for f in files])
    shapes = (sizes * 0.6).astype(np.int32)
    starts = (sizes * 0.2).astype(np.int32)
    paths = [np.frombuffer(str(file).encode(), np.uint8) for file in files]
    sides = np.full((32, 2), 224, np.float32)
    fed = paths, np.arange(32), np.zeros(32, np.int32), starts[:, ::-1].copy(), sides, shapes[:, ::-1].copy()
    feeds = iter([fed])
    graph = dali.Graph(
        mode="resized",
        max_batch=32,
        threads=4,
        prefetch=1,
        mean=(0, 0, 0),
        std=(1 / 255,) * 3,
        device_id=0,
        decode_on_gpu=on_gpu,
    )
    images, labels = dali.run(dali.build(graph, lambda: next(feeds)))
    assert images.is_cuda and images.is_contiguous(memory_format=torch.channels_last) and labels.is_cuda
    theirs = [
        Image.open(f).convert("RGB").crop((x, y, x + w, y + h)).resize((224, 224), Image.Resampling.BILINEAR)
        for f, (x, y), (w, h) in zip(files, starts, shapes)
    ]
    delta = abs(images.permute(0, 2, 3, 1).float().cpu().numpy() - np.stack([np.asarray(t, float) for t in theirs]))
    # nvJPEG's inverse transform and chroma upsampling are not libjpeg's: near, not equal.
    assert delta.mean() < (2.0 if on_gpu else 0.3)


@pytest.mark.parametrize("decoder", ["cpu", "gpu"])
def test_a_batch_that_was_let_go_is_not_filled_anew_before_it_is_read(tiny: Path, decoder: str) -> None:
    options = [f"data.root={tiny}", "data.image_size=64", "global_batch_size=24", f"data.decoder={decoder}"]
    config = configfile.load(None, options)
    with world(config) as one:
        data = open_data(config, one)
        plan = Plan.of(config, 1, data.samples)
        slow = TrainingBatches(config, data, plan, one, 0)
        sums = []
        for images, _ in islice(slow, 30):
            torch.cuda._sleep(100_000_000)  # cycles, some 50 ms: the host is far ahead by the end
            sums.append(images.double().sum())
        theirs = []
        for images, _ in islice(TrainingBatches(config, data, plan, one, 0), 30):
            theirs.append(images.double().sum())
            torch.cuda.synchronize()
    assert [each.item() for each in sums] == [each.item() for each in theirs]
