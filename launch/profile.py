"""A cluster profile: all that differs between sites, in a YAML file of slurm/ that the command line may override."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from trainer import configfile
from trainer.mistakes import ConfigError, at_least, one_of


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What to ask SLURM for, and what a node of that cluster needs before Python starts.

    None leaves an option to the site's own default.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None  # features of a node, as `sinfo -o %f` shows them
    exclude: str | None = None  # nodes that are known to be bad: node[3,17]
    reservation: str | None = None
    exclusive: bool = False  # no other job on our nodes

    gpus_per_node: int = 8  # a rank each; 0: a CPU job
    gres: str | None = None  # instead of --gpus-per-node, where a site wants the type named: gpu:h100:8
    ranks_per_node: int | None = None  # CPU jobs only; None: one
    cpus_per_rank: int | None = None  # the data threads and the rank itself
    memory_gb: float | None = None  # of a node; 0: all it has
    minutes: int = 1440  # time limit; the job saves and requeues itself before it
    signal_delay: int = 180  # seconds before the limit at which it does: two steps and a save, doubled
    max_restarts: int = 3  # restarts in a row that brought no new saved step, after which the job stops

    setup: list[str] = field(default_factory=list)  # shell lines before Python: module load, source, ulimit
    environment: dict[str, str] = field(default_factory=dict)  # exported to every rank: NCCL's and W&B's variables
    python: str | None = None  # interpreter on the nodes; None: the one that submits
    scratch: str | None = (
        None  # folder on the node's own disk that the data set is copied to first; may name $VARIABLES
    )
    container: str | None = None  # image that the ranks run in
    container_runtime: str = "pyxis"  # pyxis | apptainer
    container_mounts: list[str] = field(default_factory=list)  # HOST:CONTAINER, besides the run folder
    numa: bool = True  # a rank keeps to the cores next to its GPU where SLURM has not bound it already
    mail_user: str | None = None
    mail_type: str | None = None  # END,FAIL,REQUEUE
    srun: list[str] = field(default_factory=list)  # further arguments of srun
    sbatch: dict[str, str] = field(default_factory=dict)  # further options of sbatch: {switches: "1"}

    def __post_init__(self) -> None:
        for key in ("gpus_per_node", "max_restarts", "memory_gb"):
            at_least(key, getattr(self, key), 0)
        for key in ("ranks_per_node", "cpus_per_rank", "minutes", "signal_delay"):
            at_least(key, getattr(self, key), 1)
        one_of("container_runtime", self.container_runtime, ("pyxis", "apptainer"))
        if self.gpus_per_node and self.ranks_per_node not in (None, self.gpus_per_node):
            raise ConfigError(
                f"ranks_per_node={self.ranks_per_node} is not gpus_per_node={self.gpus_per_node}: a GPU has one rank, "
                "so leave ranks_per_node out, or set gpus_per_node=0"
            )
        if self.gres and self.gpus_per_node != _gpus_of(self.gres):
            raise ConfigError(
                f"gres={self.gres} is not gpus_per_node={self.gpus_per_node}: "
                f"write gres as gpu[:TYPE]:{self.gpus_per_node}"
            )
        if self.signal_delay >= self.minutes * 60:
            raise ConfigError(
                f"signal_delay={self.signal_delay} s is not less than minutes={self.minutes}: the job would be told to "
                "save before it begins"
            )

    @property
    def tasks_per_node(self) -> int:
        """Ranks on a node."""
        return self.gpus_per_node or self.ranks_per_node or 1


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Profile:
    """Read a profile, then `key=value` on top; ConfigError names the file and whatever is wrong."""
    if not Path(path).is_file():
        known = sorted(str(p) for p in Path("slurm").glob("*.yaml"))
        raise ConfigError(f"--cluster {path}: no such file; profiles here: {', '.join(known) or 'none'}")
    try:
        return configfile.load_as(Profile, path, overrides)
    except ConfigError as error:
        raise ConfigError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def flags() -> list[tuple[str, type]]:
    """(key, type) of what a command-line flag can override: everything but lists and mappings."""
    kinds = {"str": str, "int": int, "float": float, "bool": bool}
    fields = [(f.name, str(f.type).removesuffix(" | None")) for f in dataclasses.fields(Profile)]
    return [(name, kinds[kind]) for name, kind in fields if kind in kinds]


def _gpus_of(gres: str) -> int | None:
    """GPUs that `gpu:8`, `gpu:h100:8` or `gpu` names; None where it cannot be said."""
    first, *rest = gres.split("(")[0].split(":")
    if first != "gpu":
        return None
    return int(rest[-1]) if rest and rest[-1].isdigit() else 1
