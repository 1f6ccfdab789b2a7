"""Which rank this is."""

from __future__ import annotations

import pytest

from trainer.config import ConfigError
from trainer.environment import Place, place

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Place(0, 0, 1, 1)),
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, Place(5, 1, 8, 4)),
        (
            {
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NUM_TASKS": "8",
                "SLURM_STEP_NUM_NODES": "2",
                "SLURM_PROCID": "6",
                "SLURM_LOCALID": "2",
            },
            Place(6, 2, 8, 4),
        ),
        # In a batch script or an interactive shell there is a PROCID too, and one process.
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}, Place(0, 0, 1, 1)),
    ],
)
def test_place(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: Place) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert place() == expected


def test_a_half_set_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match=r"has WORLD_SIZE but not RANK, LOCAL_RANK: start with torchrun"):
        place()
