"""What torch.compile has compiled serves the next process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from trainer import environment, precision
from trainer.config import Config, ConfigError, Precision

SCRIPT = """
import json, sys
import torch
from trainer import precision
from trainer.config import Config, Precision

options = Precision(compile=True, compile_cache=sys.argv[1])
precision.set_kernels(Config(precision=options), torch.device("cpu"))
torch.manual_seed(0)
net = torch.compile(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()))
with precision.naming_what_cannot_compile(options):
    answer = net(torch.ones(2, 8)).sum()
from torch._dynamo.utils import counters
hits = {f"{part} {name}": n for part, found in counters.items() for name, n in found.items() if "cache" in name}
print(json.dumps({"answer": answer.item(), "hits": hits}))
"""
NAMES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def compiled(folder: Path) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in (*NAMES, "TRITON_INTERPRET")} | {"OMP_NUM_THREADS": "1"}
    kept["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of processes for one kernel
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, folder], cwd=REPOSITORY, env=kept, capture_output=True, text=True, timeout=600
    )


def hits(done: subprocess.CompletedProcess) -> int:
    assert done.returncode == 0, done.stderr
    return sum(n for name, n in json.loads(done.stdout)["hits"].items() if name.endswith("cache_hit"))


@pytest.mark.end_to_end
@pytest.mark.timeout(1900)
def test_the_second_start_compiles_nothing_and_a_damaged_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    first, second = compiled(folder), compiled(folder)
    assert hits(first) == 0 < hits(second), (first, second)
    for path in folder.rglob("*"):
        if path.is_file() and path.parent.parts[-2:] != ("inductor", "locks"):
            path.write_bytes(path.read_bytes()[:100])
    third = compiled(folder)
    if third.returncode:  # torch makes anew what it can tell to be damaged
        last = third.stderr.strip().splitlines()[-1]
        assert f"if {folder} has been damaged, remove it" in last, third.stderr


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what is set is undone
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_folder_of_ones_own_and_the_users(told: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told.setattr(environment, "cache", lambda name: tmp_path / "home" / name)
    told.setenv("TRITON_CACHE_DIR", "elsewhere")
    environment.keep_compiled(None)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "home" / "compiled" / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"
    environment.keep_compiled(str(tmp_path / "own"))
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "own" / "triton") and (tmp_path / "own" / "triton").is_dir()


def test_a_folder_that_cannot_be_written_to_is_refused_by_name(told: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = Config(precision=Precision(compile=True, compile_cache=str(tmp_path / "file" / "below")))
    with pytest.raises(ConfigError, match=r"precision\.compile_cache=.*below cannot be written to \(Not a directory\)"):
        precision.set_kernels(config, torch.device("cpu"))
    told.setattr(environment, "cache", lambda name: tmp_path / "file" / name)
    environment.keep_compiled(None)  # torch's own is left
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
