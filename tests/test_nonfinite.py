"""Skipping without asking the host, and what is said of a bad step."""

from __future__ import annotations

import math

import pytest
import torch
from test_metrics import ALONE

from trainer import optim
from trainer.config import Config, Ema, Optim
from trainer.ema import Average
from trainer.loop import Learner, train_steps
from trainer.nonfinite import Rollback, Skipping, Trouble, data_step
from trainer.plan import Plan


def test_a_fused_optimiser_skips_by_the_flag_alone_even_in_its_first_step() -> None:
    def train(*gradients: float) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(300, 300)
        # Its kernels exist for the CPU too.
        optimizer = optim.create(Optim(lr=0.1, momentum=0.9), model, torch.device("cuda"))
        assert optimizer.defaults["fused"]
        for gradient in gradients:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, gradient)
            Skipping.step(optimizer, torch.tensor(math.isfinite(gradient)))
        return model.weight.detach().clone()

    assert torch.equal(train(math.nan, 1.0, math.inf, 2.0), train(1.0, 2.0))
    assert not torch.equal(train(1.0, 2.0), train(1.0))


def test_statistics_of_a_bad_step_are_put_back() -> None:
    norm = torch.nn.BatchNorm1d(4)
    skipping = Skipping.of(norm)
    before = skipping.snapshot()
    norm(torch.full((3, 4), torch.nan))
    skipping.restore(before, torch.tensor(False))
    assert torch.equal(norm.running_mean, torch.zeros(4)) and torch.equal(norm.running_var, torch.ones(4))
    norm(torch.ones(3, 4))
    skipping.restore(before, torch.tensor(True))
    assert torch.equal(norm.running_mean, torch.full((4,), 0.1))


@pytest.mark.parametrize("rho", [0.0, 0.1], ids=["plain", "uphill"])
def test_a_skipped_step_leaves_nothing_behind_it_in_the_average_either(rho: float) -> None:
    def state_after(*images: torch.Tensor) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        # 0 until its start: a copy of the network as the step left it.
        average = Average(model, Ema(half_life=8, start_epoch=99), Plan.of(Config(global_batch_size=2), 1, 2))
        learner = Learner(
            model=model,
            optimizer=optimizer,
            criterion=torch.nn.CrossEntropyLoss(),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            lr_at=lambda step: 0.1,
            device=torch.device("cpu"),
            average=average,
            uphill=lambda step: rho,
            skipping=Skipping.of(model),
        )
        batches = ((batch, torch.tensor([0, 1])) for batch in images)
        skipped = [int(record.totals[6]) for record in train_steps(learner, batches, range(len(images)))]
        assert skipped == [int(not batch.isfinite().all()) for batch in images]
        found = [*model.state_dict().items(), *average.model.state_dict().items()]
        momenta = [entry["momentum_buffer"] for entry in optimizer.state.values()]
        return [tensor.clone() for name, tensor in found if "num_batches" not in name] + momenta

    good = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    bad = torch.full((2, 3, 4, 4), math.nan)
    for mine, theirs in zip(state_after(good[0], bad, good[1]), state_after(good[0], good[1]), strict=True):
        assert torch.equal(mine, theirs)


def test_rows_of_bad_steps_and_the_first_of_them() -> None:
    trouble = Trouble(torch.device("cpu"))
    good, loss, gradient = (torch.tensor(bad) for bad in ([False, False], [True, True], [False, True]))
    for step, bad in enumerate([good, gradient, good, loss, gradient]):
        trouble.add(step, bad)
    cut = trouble.cut()
    assert cut.longest == 2 and cut.blame(ALONE) == "first in step 3, in the loss of rank 0"
    trouble.add(5, gradient)  # the row goes on over a record
    assert trouble.longest == 3 and "gradient of step 5" in trouble.blame(ALONE)
    assert not Trouble(torch.device("cpu")).blame(ALONE)


def test_what_a_rollback_left_out_stays_out() -> None:
    taken = data_step([Rollback(4, 3, ""), Rollback(6, 1, "")])
    assert [taken(step) for step in range(9)] == [0, 1, 2, 3, 7, 8, 10, 11, 12]
    assert [data_step([])(step) for step in range(3)] == [0, 1, 2]
