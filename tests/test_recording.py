"""When buckets of gradients are ready: measured in real backward passes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from nets import ALONE, CPU, images, ours

from launch.__main__ import main
from trainer import recording
from trainer.config import Augment, Config, ConfigError, Data, Distributed, Model, Optim
from trainer.models import parallel

SMALL = Config(
    device="cpu",
    model=Model(name="resnet20", num_classes=10),
    data=Data(image_size=16),
    distributed=Distributed(bucket_mb=1),
)
PARAMETERS = sum(p.numel() for p in ours("resnet20").parameters())


def test_a_timeline_is_of_ddps_own_buckets_in_a_real_step() -> None:
    found = recording.measure(SMALL, 4, 2)
    assert found.images == 4 and found.passes == 1 and "CPU" in found.device
    assert sum(bucket.bytes for bucket in found.buckets) == found.bytes == 4 * PARAMETERS
    assert len(found.buckets) == 2  # of 1.09 MB
    ready = [bucket.ready for bucket in found.buckets]
    assert 0 < ready[0] < ready[1] <= found.backward < found.step
    assert not dist.is_initialized()
    # An accumulated step reduces in its last pass alone; a sharpness-aware one in both.
    halves = recording.measure(replace(SMALL, max_batch_per_gpu=2), 4, 2)
    assert halves.passes == 1 and halves.images == 4 and halves.backward < halves.step / 2
    uphill = recording.measure(replace(SMALL, optim=Optim(sam_rho=0.05)), 4, 2)
    assert uphill.passes == 2


def test_recording_leaves_gradients_as_they_are_and_sees_the_buckets_that_ddp_settles_on() -> None:
    bare, wrapped = ours("resnet20").eval(), ours("resnet20").eval()
    came: list[torch.Tensor] = []
    for parameter in bare.parameters():
        parameter.register_post_accumulate_grad_hook(came.append)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = parallel.data_parallel(wrapped, CPU, Distributed(bucket_mb=1))
        recorder = recording.Recorder(ALONE)
        recorder.watch(model)
        for _ in range(2):
            bare.zero_grad()
            model.zero_grad()
            bare(images(2, 16)).sum().backward()
            recorder.enter("backward", 0)
            model(images(2, 16)).sum().backward()
            recorder.enter("update", 0)
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(bare.parameters(), wrapped.parameters()))
    order = came[: len(came) // 2]
    settled, _ = dist._compute_bucket_assignment_by_size(order, [2**20])  # as the reducer does after its first pass
    assert recorder.passes[1].bytes == [sum(order[i].nbytes for i in bucket) for bucket in settled]


@pytest.mark.skipif(not parallel.LISTS_BUCKETS, reason="this PyTorch's DDP takes no list of buckets")
def test_the_last_bucket_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    def reduced(options: Distributed) -> list[float]:
        """MiB of each bucket of a ResNet-18, in the order of their reduction."""
        recorder = recording.Recorder(ALONE)
        model = parallel.data_parallel(ours("resnet18").eval(), CPU, options)
        recorder.watch(model)
        for _ in range(2):
            recorder.enter("backward", 0)
            model(images(1, 32)).sum().backward()
            recorder.enter("update", 0)
        return [size / 2**20 for size in recorder.passes[1].bytes]

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        doubling, equal = reduced(Distributed()), reduced(Distributed(last_bucket_mb=25))
        monkeypatch.setattr(parallel, "LISTS_BUCKETS", False)  # an older PyTorch
        older = reduced(Distributed())
    finally:
        dist.destroy_process_group()
    assert sum(doubling) == pytest.approx(sum(equal)) and len(equal) == 2 and older == equal
    assert len(doubling) == 4 and 4 <= doubling[-1] < 8 <= doubling[-2]


def test_what_does_not_fit_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:  # as a GPU does
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(recording, "_timed", full)
    with pytest.raises(ConfigError, match=r"4 images a step do not fit .*CPU.*: set max_batch_per_gpu=N"):
        recording.measure(replace(SMALL, global_batch_size=6, augment=Augment(repeats=3)), 4)
    assert not dist.is_initialized()


@pytest.mark.timeout(600)
def test_the_plan_command_measures_here_or_stretches_what_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(
        "{device: cpu, global_batch_size: 32, data: {root: nowhere, image_size: 16}, model: {name: resnet20}}"
    )
    flags = ["plan", str(tmp_path / "c.yaml"), "--gpus-per-node", "2", "--nodes", "1,2", "--images", "6400", "--json"]
    saved = tmp_path / "one.json"
    assert main([*flags, "--steps", "1", "--save", str(saved)]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert "8 images a step are timed on the CPU" in captured.err
    (timeline,) = found["timelines"]
    assert timeline["images"] == 8 and found["points"][0]["step"] >= 2 * timeline["step"]
    assert main([*flags, "--measured", str(saved)]) == 0
    assert json.loads(capsys.readouterr().out)["points"] == found["points"]
    assert main([*flags, "--step-ms", "60", "--backward-ms", "40"]) == 0
    (given,) = json.loads(capsys.readouterr().out)["timelines"]
    assert (given["step"], given["backward"], given["images"]) == pytest.approx((0.060, 0.040, 16))
    assert 0 < given["buckets"][0]["ready"] <= 0.040
