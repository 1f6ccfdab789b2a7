"""A state that does not fit is named and leaves the run as it was."""

from __future__ import annotations

import pytest
import torch
from nets import ALONE, CPU
from torch import nn

from trainer.config import ConfigError
from trainer.loop import Learner
from trainer.snapshot import owned
from trainer.state import RunState


def trained(seed: int, width: int = 6, momentum: float = 0.9) -> RunState:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    learner = Learner(
        model=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        lr_at=lambda step: 0.1,
        device=CPU,
    )
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = RunState(learner, ALONE)
    state.window.fill_(seed)
    return state


def saved(state: RunState) -> dict:
    return owned(state.state_dict(state.gather()))


def equal(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


def test_what_fits_is_loaded_whole_into_memory_of_its_own() -> None:
    ours, theirs = trained(1), saved(trained(2))
    ours.load_state_dict(theirs)
    assert equal(saved(ours), theirs)
    buffer = ours.learner.optimizer.state_dict()["state"][0]["momentum_buffer"]
    assert buffer.data_ptr() != theirs["optimizer"]["state"][0]["momentum_buffer"].data_ptr()


def without(key: str):
    return lambda state: state.pop(key)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("scaler"), r"it has no scaler"),
        (lambda s: s["model"].pop("0.bias"), r"model\.0\.bias is missing"),
        (lambda s: s["model"].update(fc=torch.ones(1)), r"model\.fc is not in this run's network"),
        (lambda s: s["model"].update({"2.bias": torch.ones(5)}), r"model\.2\.bias is \(5,\), and \(2,\) in this run"),
        (lambda s: s["optimizer"]["param_groups"].append({"params": []}), r"optimizer has 2 groups"),
        (lambda s: s["optimizer"]["param_groups"][0]["params"].pop(), r"param_groups\.0 has 5 parameters, this run 6"),
        (
            lambda s: s["optimizer"]["state"][5].update(momentum_buffer=torch.ones(9)),
            r"optimizer\.state\.5\.momentum_buffer is \(9,\), and \(2,\) in this run",
        ),
        (lambda s: s["progress"].update(colour=1), r"progress\.colour is not known to this version"),
        (lambda s: s["scaler"].update(scale=1.0), r"scaler is of another precision\.amp"),
        (lambda s: s["ranks"].clear(), r"ranks is empty"),
        (lambda s: s["ranks"][0].update(window=torch.ones(3)), r"ranks\.0\.window is \(3,\), and \(7,\) in this run"),
        (lambda s: s["ranks"][0]["buffers"].clear(), r"ranks\.0\.1\.running_mean is missing"),
        (lambda s: s.update(model=[1]), r"it is not laid out as a run's state is"),
        (lambda s: s.update(ranks=None), r"it is not laid out as a run's state is"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(spoil, message: str) -> None:
    ours, theirs = trained(1), saved(trained(2))
    before = saved(ours)
    spoil(theirs)
    with pytest.raises(ConfigError, match=message):
        ours.load_state_dict(theirs)
    assert equal(saved(ours), before)


def test_another_models_is_named_by_its_first_key() -> None:
    with pytest.raises(ConfigError, match=r"^model\.0\.weight is \(7, 3\), and \(6, 3\) in this run$"):
        trained(1).load_state_dict(saved(trained(2, width=7)))
