"""Gradients that travel as bfloat16, in real processes."""

from __future__ import annotations

import multiprocessing
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import summary, torchrun
from nets import CPU, images, ours
from torch import nn

from trainer import checkpoint, compression
from trainer.config import Distributed
from trainer.distributed import World
from trainer.exposed import Backward
from trainer.models import parallel

U = 2.0**-8  # by which a bfloat16 may be off, relatively


def one_of(rank: int, nodes: list[list[int]], folder: Path) -> None:
    ranks = sum(map(len, nodes))
    torch.set_num_threads(1)
    patience = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=patience)
    world = World(rank=rank, local_rank=rank, size=ranks, local_size=ranks, device=CPU)
    bare = ours("resnet20").eval()
    model = parallel.data_parallel(ours("resnet20").eval(), CPU, Distributed(bucket_mb=1))
    compression.compress(model, world, 120, nodes)
    mine = images(2 * ranks, 16)[2 * rank : 2 * rank + 2]

    def loss(network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(network(batch), torch.arange(len(batch)))

    def taken(network: nn.Module) -> list[torch.Tensor]:
        return [p.grad.clone() for p in network.parameters()]

    result = {}
    loss(bare, mine).backward()
    result["own"] = taken(bare)
    backward = Backward(CPU, int)
    for name in ("first", "second"):  # DDP lays its buckets out anew in between
        model.zero_grad()
        backward(loss(model, mine), reduces=True)
        result[name] = taken(model)
    model.zero_grad()
    with model.no_sync():
        loss(model, mine[:1]).backward()
    loss(model, mine[1:]).backward()
    result["accumulated"] = taken(model)
    bare.zero_grad()
    loss(bare, mine[:1]).backward()
    loss(bare, mine[1:]).backward()
    result["own accumulated"] = taken(bare)
    result["waits"] = [wait.seconds for wait in backward.waits]
    torch.save(result, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("nodes", [[[0, 1]], [[0, 1, 2]], [[0, 2], [1, 3]]], ids=str)
def test_all_ranks_get_the_float32_mean_rounded_at_each_level(tmp_path: Path, nodes: list[list[int]]) -> None:
    ranks = sum(map(len, nodes))
    spawn = multiprocessing.get_context("spawn")
    others = [spawn.Process(target=one_of, args=(rank, nodes, tmp_path), daemon=True) for rank in range(ranks)]
    for other in others:
        other.start()
    for other in others:
        other.join(240)
    assert [other.exitcode for other in others] == [0] * ranks
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for name, own in (("first", "own"), ("second", "own"), ("accumulated", "own accumulated")):
        for index, reduced in enumerate(found[0][name]):
            assert all(torch.equal(reduced, other[name][index]) for other in found), "bitwise the same everywhere"
            assert torch.equal(reduced, reduced.bfloat16().float())
            each = torch.stack([other[own][index] for other in found]).double()
            exact, size = each.mean(0), each.abs().mean(0)
            sums = U * size if len(nodes) == 1 else U * size + U * (1 + U) * size  # what is sent between nodes too
            assert ((reduced - exact).abs() <= sums + U * (exact.abs() + sums) + 1e-7 * size).all()
        assert any(not torch.equal(a, b) for a, b in zip(found[0][own], found[1][own])), "ranks differ"
    # Buckets changed between the passes, and sums did not.
    assert all(map(torch.equal, found[0]["first"], found[0]["second"]))
    assert all(seconds > 0 for other in found for seconds in other["waits"])


def left_alone(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store, patience = f"file://{folder}/store", timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    model = parallel.data_parallel(ours("resnet20").eval(), CPU, Distributed(bucket_mb=1))
    compression.compress(model, World(rank=rank, local_rank=rank, size=2, local_size=2, device=CPU), 120)
    model(images(2, 16)).sum().backward()
    if rank == 1:
        os._exit(0)
    try:
        model(images(2, 16)).sum().backward()
    except RuntimeError as error:
        (folder / "error").write_text(str(error))
    os._exit(0)


def test_a_lost_rank_ends_the_pass_with_gloos_own_error(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    both = [spawn.Process(target=left_alone, args=(rank, tmp_path), daemon=True) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(240)
    assert [process.exitcode for process in both] == [0, 0]
    assert "gloo" in (tmp_path / "error").read_text()  # by which trainer/watchdog.py knows it


def test_the_error_does_not_grow_with_the_ranks_as_bfloat16_sums_do() -> None:
    def errors(ranks: int) -> tuple[float, float]:
        shards = torch.rand(ranks, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
        exact, in_bf16 = shards.double().mean(0), shards[0].clone()
        for shard in shards[1:]:
            in_bf16 += shard
        off = [
            ((mean - exact).abs() / exact).max().item()
            for mean in (compression.sum_of_shards(shards) / ranks, in_bf16.float() / ranks)
        ]
        return off[0], off[1]

    for ranks in (2, 8, 64, 512):
        ours, theirs = errors(ranks)
        assert ours <= 1e-6, "to float32's rounding"
        assert ranks < 64 or theirs > 2 * U


@pytest.mark.end_to_end
@pytest.mark.timeout(900)
def test_a_stopped_run_goes_on_bitwise(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "{device: cpu, global_batch_size: 12, max_batch_per_gpu: 2, data: {source: synthetic, synthetic_samples: 120, "
        "synthetic_classes: 10, image_size: 16}, model: {name: resnet20}, loop: {eval_every: 0}, schedule: {epochs: 2, "
        "warmup_epochs: 0}, checkpoint: {every_steps: 2}, report: {wandb: disabled}, "
        "distributed: {gradients: bf16, bucket_mb: 1}}"
    )

    def weights(name: str, *steps: int) -> dict[str, torch.Tensor]:
        for last in steps:
            arguments = [tmp_path / "c.yaml", f"output_dir={tmp_path / name}", f"loop.max_steps={last}"]
            done = torchrun("train", *arguments, ranks=3, timeout=400)
            assert done.status == 0, done.errors
        assert summary(tmp_path / name)["steps"] == 4
        return checkpoint.load(checkpoint.newest_whole(tmp_path / name / "checkpoints"))["model"]

    whole, resumed = weights("whole", 4), weights("resumed", 2, 4)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
