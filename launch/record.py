"""What a launch leaves on disk.

    RUN/launch/job.json             {"job", "launch", "index"}: the newest job of this run
    RUN/launch/attempts.jsonl       a line where an attempt begins and one where it ends (launch/attempt.py)
    RUN/launch/cancel               somebody asked it to end
    RUN/launch/STAMP/               a launch: launch.json, code/, diff.patch, profile.yaml, config-N.yaml, submitit/,
                                    logs/N/attempt-A/rank-R.log

A sweep has one launch for all its runs, in the sweep's own folder.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from launch.profile import Profile, load
from trainer import configfile
from trainer.config import Config, ConfigError


@dataclass(frozen=True)
class Launch:
    """One submission: frozen code, frozen configs, and the runs they are for."""

    folder: Path
    runs: list[str]  # absolute run folders; an array's task by its index
    nodes: int
    ranks: int
    max_restarts: int
    commit: str | None = None
    dirty: bool = False

    @classmethod
    def read(cls, folder: Path) -> Launch:
        facts = json.loads((folder / "launch.json").read_text())
        return cls(folder, **{f.name: facts[f.name] for f in dataclasses.fields(cls) if f.name != "folder"})

    def write(self, profile: Profile, configs: list[Config]) -> None:
        facts = {k: v for k, v in dataclasses.asdict(self).items() if k != "folder"}
        (self.folder / "launch.json").write_text(json.dumps(facts, indent=2) + "\n")
        (self.folder / "profile.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(profile))))
        for index, config in enumerate(configs):
            self.config(index).write_text(configfile.to_yaml(config))

    @property
    def code(self) -> Path:
        return self.folder / "code"

    @property
    def submitit(self) -> Path:
        return self.folder / "submitit"

    def config(self, index: int) -> Path:
        return self.folder / f"config-{index}.yaml"

    def profile(self) -> Profile:
        return load(self.folder / "profile.yaml")

    def log(self, index: int, attempt: int, rank: int) -> Path:
        return self.folder / "logs" / str(index) / f"attempt-{attempt}" / f"rank-{rank}.log"

    def job_log(self, job: str) -> Path:
        """What the batch script said."""
        return self.submitit / f"{job}_0_log.out"


@dataclass(frozen=True)
class Submitted:
    """The newest job of a run."""

    run: Path
    job: str
    launch: Launch
    index: int

    @classmethod
    def of(cls, run: Path) -> Submitted:
        """Read RUN/launch/job.json; ConfigError where RUN was not submitted."""
        try:
            facts = json.loads((run / "launch" / "job.json").read_text())
        except FileNotFoundError:
            raise ConfigError(f"{run} was not submitted from here: there is no {run}/launch/job.json") from None
        return cls(run, facts["job"], Launch.read(Path(facts["launch"])), facts["index"])

    def write(self) -> None:
        (self.run / "launch").mkdir(parents=True, exist_ok=True)
        facts = {"job": self.job, "launch": str(self.launch.folder), "index": self.index}
        (self.run / "launch" / "job.json").write_text(json.dumps(facts) + "\n")


def runs_of(path: Path) -> list[Path]:
    """The run at `path`, or the runs of the newest sweep there."""
    launches = sorted((path / "launch").glob("*/launch.json"))
    if (path / "launch" / "job.json").exists() or not launches:
        return [path]
    return [Path(run) for run in Launch.read(launches[-1].parent).runs]


def fresh_folder(home: Path) -> Path:
    """Where a new launch of the run or sweep at `home` goes: never a folder of before, whose results would be taken for
    its own where a cluster has begun its job numbers anew."""
    return home.absolute() / "launch" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
