"""A step on tensors that stay where they are is the step of the loop, bit for bit; its recording, on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import torchrun_script
from nets import ALONE
from torch import Tensor

from trainer import graphs, learner, optim
from trainer.config import Config, ConfigError, Data, Ema, Loop, Mix, Model, Optim, Precision, Schedule
from trainer.data.loader import DataSet
from trainer.distributed import World
from trainer.loop import Learner, StepRecord, train_steps
from trainer.plan import Plan
from trainer.precision import StaticScale

CLASSES = 5


def config(**options: object) -> Config:
    given = {
        "global_batch_size": 8,
        "data": Data(source="synthetic", image_size=32, synthetic_samples=64, synthetic_classes=CLASSES),
        "model": Model(name="resnet20"),
        "optim": Optim(lr=0.1, clip_norm=1.0),
        "schedule": Schedule(epochs=4, warmup_epochs=2),  # another learning rate in each step
        "ema": Ema(half_life=16),
    }
    return Config(**given | options)


def learned(options: Config, here: World = ALONE, accumulation: int = 1) -> Learner:
    data = DataSet(None, None, 64, tuple(map(str, range(CLASSES))), "synthetic")
    plan = replace(Plan.of(options, here.size, 64), accumulation=accumulation)
    return learner.create(options, plan, here, data)


def batches(
    sizes: list[int], device: torch.device, bad: int | None = None, rank: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(rank)
    for step, size in enumerate(sizes):
        images = torch.randn(8, 3, size, size, generator=random)
        if step == bad:
            images[0] = torch.nan
        labels = torch.randint(CLASSES, (8,), generator=random)
        yield images.to(device).contiguous(memory_format=torch.channels_last), labels.to(device)


def everything(mine: Learner) -> list[Tensor]:
    moments = [value for state in mine.optimizer.state.values() for value in state.values()]
    average = mine.average.model.state_dict().values() if mine.average else []
    return [*mine.model.state_dict().values(), *(m for m in moments if isinstance(m, Tensor)), *average]


def run(mine: Learner, sizes: list[int], bad: int | None = None, rank: int = 0) -> list[StepRecord]:
    return list(train_steps(mine, batches(sizes, mine.device, bad, rank), range(len(sizes))))


def static(mine: Learner) -> Learner:
    return replace(mine, graphs=graphs.Static(mine.optimizer, mine.device))


@pytest.mark.parametrize("case", ["sgd", "fused sgd", "adamw", "mixed", "skipping", "scaled"])
def test_a_static_step_is_the_loops_bit_for_bit(case: str) -> None:
    options, sizes, bad = config(), [32, 32, 24, 32, 24], None
    if case == "adamw":
        options = config(optim=Optim(name="adamw", lr=0.01))
    elif case == "mixed":
        options = config(mix=Mix(mixup=0.2, cutmix=1.0, off_epoch=0.375))  # in 3 of the 5 steps
    elif case == "skipping":
        options, bad = config(loop=Loop(on_nonfinite="skip")), 2
    plain, other = learned(options), learned(options)
    if case == "scaled":  # a power of two, which fp32 multiplies by without rounding
        other = replace(other, scaler=StaticScale(1024.0))
    if case == "fused sgd":  # as on a GPU; its kernels exist for the CPU too
        plain, other = (
            replace(each, optimizer=optim.create(options.optim, each.model, torch.device("cuda")))
            for each in (plain, other)
        )
    other = static(other)
    theirs, ours = run(plain, sizes, bad), run(other, sizes, bad)
    assert len({record.lr for record in ours}) == 5
    for a, b in zip(theirs, ours):
        assert a.lr == b.lr and torch.equal(a.totals, b.totals) and torch.equal(a.bad, b.bad)
    assert all(map(torch.equal, everything(plain), everything(other)))
    assert [int(record.totals[6]) for record in ours] == [int(step == bad) for step in range(5)]


RANKS = """
import sys
sys.path.insert(0, "tests")
import torch
from test_graphs import config, everything, learned, run, static
from trainer.distributed import world

with world(config()) as here:
    plain, other = learned(config(), here), static(learned(config(), here))
    assert type(other.model).__name__ == "DistributedDataParallel"
    theirs, ours = (run(mine, [32, 32, 24], rank=here.rank) for mine in (plain, other))
    totals = here.gather([record.totals.tolist() for record in ours])
    assert totals[0] != totals[1] and [record.totals.tolist() for record in theirs] == totals[here.rank]
    # BatchNorm's statistics are each rank's own; weights and moments are everyone's.
    assert all(map(torch.equal, everything(plain), everything(other)))
    weights = here.gather([float(p.double().sum()) for p in other.model.parameters()])
    assert weights[0] == weights[1]
    if here.is_main:
        print("the same")
"""


@pytest.mark.end_to_end
def test_two_ranks_take_static_steps_together(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    done = torchrun_script(tmp_path / "ranks.py", ranks=2)
    assert done.status == 0 and "the same" in done.output, done.errors


def test_what_a_step_reads_stays_where_it_is() -> None:
    mine = static(learned(config()))
    rates = [group["lr"] for group in mine.optimizer.param_groups]
    run(mine, [32, 32, 24])
    assert len(mine.graphs.steps) == 2
    places = [[t.data_ptr() for t in step.batch] for step in mine.graphs.steps.values()]
    weights = [p.data_ptr() for p in mine.model.parameters()]
    run(mine, [24, 32, 32])
    assert places == [[t.data_ptr() for t in step.batch] for step in mine.graphs.steps.values()]
    assert weights == [p.data_ptr() for p in mine.model.parameters()]
    assert all(group["lr"] is rate for group, rate in zip(mine.optimizer.param_groups, rates))
    assert rates[0].item() == pytest.approx(mine.lr_at(2))


def test_an_optimiser_that_was_restored_has_other_tensors_and_so_other_graphs() -> None:
    plain, mine = learned(config()), static(learned(config()))
    run(plain, [32, 32])
    saved = copy.deepcopy(plain.optimizer.state_dict())
    run(mine, [32])
    mine.model.load_state_dict(plain.model.state_dict())
    mine.optimizer.load_state_dict(saved)
    assert not mine.graphs.steps and isinstance(mine.optimizer.param_groups[0]["lr"], Tensor)
    run(plain, [32, 32])
    run(mine, [32, 32])
    assert all(map(torch.equal, plain.model.state_dict().values(), mine.model.state_dict().values()))


def test_a_save_is_one_that_a_run_without_graphs_goes_on_from() -> None:
    options = config(optim=Optim(name="adamw", lr=0.01))
    plain, mine = learned(options), static(learned(options))
    run(mine, [32])
    mine.optimizer.param_groups[0]["capturable"] = True  # as on a GPU; no optimiser of a CPU takes it
    plain.model.load_state_dict(mine.model.state_dict())
    plain.optimizer.load_state_dict(copy.deepcopy(mine.optimizer.state_dict()))
    mine.optimizer.param_groups[0]["capturable"] = False
    run(plain, [32, 32])
    run(mine, [32, 32])
    assert all(map(torch.equal, plain.model.state_dict().values(), mine.model.state_dict().values()))


def test_what_cannot_be_recorded_is_refused() -> None:
    asked = config(precision=Precision(cuda_graph=True))
    with pytest.raises(ConfigError, match=r"precision\.cuda_graph=true needs a GPU, and device=cpu: leave it out"):
        learned(asked)
    gpu = World(0, 0, 1, 1, torch.device("cuda"))
    plan = Plan.of(asked, 1, 64)
    with pytest.raises(ConfigError, match=r"precision\.cuda_graph=true has no dynamic loss scale"):
        graphs.refuse(asked, plan, gpu, torch.float16)
    graphs.refuse(replace(asked, precision=Precision(cuda_graph=True, static_scale=True)), plan, gpu, torch.float16)
    with pytest.raises(ConfigError, match=r"accumulates 2: raise max_batch_per_gpu"):
        graphs.refuse(asked, replace(plan, accumulation=2), gpu, torch.bfloat16)
    graphs.refuse(asked, plan, gpu, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch.cuda.is_available() is false")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("amp", ["bf16", "fp32"])
def test_a_recorded_step_is_the_loops(amp: str, fused: bool) -> None:
    here, sizes = World(0, 0, 1, 1, torch.device("cuda", torch.cuda.current_device())), [32] * 8 + [24] * 8 + [32] * 4
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    try:
        plain = learned(config(precision=Precision(amp=amp, fused=fused)), here)
        recorded = learned(config(precision=Precision(amp=amp, fused=fused, cuda_graph=True)), here)
        theirs, ours = run(plain, sizes), run(recorded, sizes)
    finally:
        torch.backends.cudnn.deterministic = False
    assert all(step.graph is not None for step in recorded.graphs.steps.values())
    for a, b in zip(theirs, ours):
        torch.testing.assert_close(a.totals, b.totals, rtol=1e-3, atol=1e-3)
    for a, b in zip(plain.model.state_dict().values(), recorded.model.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch.cuda.is_available() is false")
def test_a_recorded_step_waits_for_nothing() -> None:
    here = World(0, 0, 1, 1, torch.device("cuda", torch.cuda.current_device()))
    mine = learned(config(precision=Precision(amp="bf16", cuda_graph=True)), here)
    given = list(batches([32] * 8, here.device))
    steps = train_steps(mine, iter(given), range(8))
    for _ in range(5):
        next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        records = [next(steps) for _ in range(3)]  # raises at the first wait
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [record.step for record in records] == [5, 6, 7]
    assert all(step.graph is not None for step in mine.graphs.steps.values()), "these were not recorded steps"
