"""Where the time of the ranks goes: the wait for gradients, and who makes the others wait."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import metrics, torchrun_script
from nets import ALONE

from trainer.balance import COLUMNS, WARM_UP_STEPS, Balance, figures
from trainer.distributed import World
from trainer.exposed import Backward, Wait
from trainer.report.gauges import peak

SLOW = """
import sys, time
from trainer import loop, train
from trainer.__main__ import main
from trainer.data.loader import TrainingBatches
what, seconds = sys.argv[1], 0.05
rank = int(__import__("os").environ["RANK"])
if rank == 1 and what == "compute":
    autocast = loop.autocast
    loop.autocast = lambda *a: (time.sleep(seconds), autocast(*a))[1]
if rank == 1 and what == "data":
    fetch = TrainingBatches.__next__
    TrainingBatches.__next__ = lambda self: (time.sleep(seconds), fetch(self))[1]
sys.exit(main(["train", *sys.argv[2:]]))
"""


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_rank_counts_its_steps_and_nothing_else() -> None:
    clock = Clock()
    balance = Balance(World(1, 0, 3, 1, torch.device("cpu")), clock)

    def step(seconds: float, data: float = 0.0, waited: float = 0.0) -> None:
        clock.now += seconds
        wait = Wait(torch.device("cpu"))
        wait._begin, wait._end = 0.0, waited
        balance.add(data, [wait])

    for _ in range(WARM_UP_STEPS):
        step(100, 100, 100)
    step(2.0, 0.5, 0.25)
    balance.pause()  # an evaluation
    step(50)
    step(1.0, 0.25, 0.25)
    table = balance.cut().reshape(3, COLUMNS)
    assert table.tolist() == [[0, 0, 0], [3.0, 0.75, 0.5], [0, 0, 0]]
    assert not balance.cut().any()


@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_slow_rank_is_named_and_the_networks_part_told_from_the_ranks(size: int) -> None:
    # All steps take 1.2 s. The last rank works 1.1 s, all others 0.9; the network takes 0.1.
    others, data = [1.2, 0.1, 0.3], [1.2, 0.3, 0.1]
    found = figures(others * (size - 1) + data)
    assert found["slowest_rank"] == size - 1 and found["slowest_rank_by"] == "data"
    assert found["slowest_rank_excess"] == pytest.approx(1.1 / 0.9 - 1, abs=1e-4)
    assert found["allreduce_fraction"] == pytest.approx(0.1 / 1.2, abs=1e-4)
    assert found["rank_wait_fraction"] == pytest.approx(0.2 / 1.2 * (size - 1) / size, abs=1e-4)
    assert figures([1.2, 0.1, 0.1, *others * (size - 1)])["slowest_rank_by"] == "compute"
    assert figures(others) == figures([0.0] * COLUMNS * size) == {}


def test_backward_gives_the_same_gradients_and_times_only_what_reduces() -> None:
    weight = torch.randn(3, requires_grad=True)
    begun = []
    backward = Backward(ALONE.device, lambda: begun.append(1))
    (weight**2).sum().backward()
    expected, weight.grad = weight.grad, None
    backward((weight**2).sum(), reduces=True)
    assert torch.equal(weight.grad, expected)
    backward((weight**2).sum(), reduces=False)
    (wait,) = backward.waits
    assert len(begun) == 2 and wait.over and 0 < wait.seconds < 1


@pytest.mark.end_to_end
@pytest.mark.parametrize("what", ["compute", "data"])
def test_a_rank_that_dawdles_is_found_in_a_real_run(tiny: Path, tmp_path: Path, what: str) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "empty.yaml").write_text("{}")
    options = [f"data.root={tiny}", f"output_dir={tmp_path / 'run'}", "data.image_size=32", "global_batch_size=8"]
    options += ["model.name=resnet20", "schedule.epochs=5", "schedule.warmup_epochs=1", "loop.eval_every=0"]
    options += ["report.wandb=disabled", "report.log_every=10"]
    done = torchrun_script(tmp_path / "slow.py", what, tmp_path / "empty.yaml", *options, ranks=2)
    assert done.status == 0, done.errors
    told = [r for r in metrics(tmp_path / "run", "train") if "slowest_rank" in r]
    assert len(told) >= 2 and {(r["slowest_rank"], r["slowest_rank_by"]) for r in told} == {(1, what)}
    for record in told:  # the other waits 0.05 s more a step: half of it is the mean of both
        assert record["rank_wait_fraction"] * record["step_seconds"] > 0.01
    assert "Straggler: rank 1 on" in done.output


def test_peaks_are_those_of_the_named_device() -> None:
    bf16 = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12}
    assert {name: peak(name, torch.bfloat16, True) for name in bf16} == bf16
    assert peak("NVIDIA A100-PCIE-40GB", None, True) == 156e12 and peak("NVIDIA A100-PCIE-40GB", None, False) == 19.5e12
    assert peak("CPU (2 threads)", None, True) is None and peak("NVIDIA A1000", torch.bfloat16, True) is None
