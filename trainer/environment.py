"""The process environment, read here and nowhere else: which rank this is, and what of it is worth recording.

torchrun's variables come first, then SLURM's (one `srun` task a rank), else this is a lone process. A half-set
environment is an error: guessing would give each node a world of its own. Imports no torch, so that a mistake in a
config is answered at once.
"""

from __future__ import annotations

import netrc
import os
import socket
import subprocess
import tempfile
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from trainer.config import ConfigError


@dataclass(frozen=True)
class Place:
    """Where this process stands. `rank` is global, `local_rank` counts within the node: never interchangeable."""

    rank: int
    local_rank: int
    size: int
    local_size: int


def place() -> Place:
    """This process's place, from torchrun's or SLURM's variables; ConfigError where they are half set."""
    torchrun = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    given = [name for name in torchrun if name in os.environ]
    if given and len(given) < len(torchrun):
        missing = ", ".join(name for name in torchrun if name not in given)
        raise ConfigError(
            f"the environment has {', '.join(given)} but not {missing}: start with torchrun, or unset them"
        )
    if given:
        rank, local_rank, size = (int(os.environ[name]) for name in torchrun)
        return Place(rank, local_rank, size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    # SLURM_PROCID alone also stands in a batch script or an interactive shell, where this is one process.
    if "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        size = int(os.environ["SLURM_STEP_NUM_TASKS"])
        nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
        return Place(int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_LOCALID"]), size, -(-size // nodes))
    return Place(0, 0, 1, 1)


def wandb_mode(wanted: str) -> str:
    """online | offline | disabled: what `report.wandb` comes to here, so that W&B never has to ask for a key.

    auto: what WANDB_MODE says, which a cluster's profile may set, else online with a key.
    """
    if wanted == "auto":
        said = os.environ.get("WANDB_MODE", "").lower()
        wanted = {"offline": "offline", "dryrun": "offline", "disabled": "disabled"}.get(said, "online")
    return "offline" if wanted == "online" and not has_wandb_key() else wanted


def host() -> str:
    """This machine's name."""
    return socket.gethostname()


def processor() -> dict[str, str]:
    """What the kernel says of the first processor, as `vendor_id` and `model name`; empty where it says nothing."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    lines = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def cache(name: str) -> Path:
    """This user's folder for what can be made anew; RuntimeError where the user has no home."""
    return Path.home() / ".cache" / "imagenet-trainer" / name


def compiled_folder(folder: str | None) -> Path:
    """Where torch.compile keeps what it compiles, if that is `folder` or, for None, this user's own."""
    return Path(folder).expanduser().absolute() if folder is not None else cache("compiled")


def keep_compiled(folder: str | None) -> None:
    """Have torch.compile and Triton keep what they compile in `folder`, from one process to the next.

    None: this user's, unless torch or Triton have been told another or it cannot be written to; torch's own is a folder
    of temporary files, which many clusters empty after each job. Before either is imported. What is kept is named by
    everything that it was made of, versions too, so that nothing in it can be out of date.

    Raises:
        ConfigError: `folder` cannot be written to.
    """
    names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    try:
        root = compiled_folder(folder)
        for inner in names.values():
            (root / inner).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root / inner):
                pass
    except (OSError, RuntimeError) as error:
        if folder is None:
            return
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"precision.compile_cache={folder} cannot be written to ({why}): choose another folder, or leave it out"
        ) from error
    for name, inner in names.items():
        if folder is not None or name not in os.environ:
            os.environ[name] = str(root / inner)


def has_wandb_key() -> bool:
    """Whether W&B could log in without asking: a key in the environment or in netrc, where it looks itself."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def slurm_attempt() -> tuple[str, int] | None:
    """(job id, how often SLURM has started it again), None outside SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    return (job, int(os.environ.get("SLURM_RESTART_COUNT") or 0)) if job else None


def make_cublas_deterministic() -> None:
    """Give cuBLAS the fixed workspace without which torch refuses its products in deterministic mode."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def cores(local_size: int) -> int:
    """CPU cores for each of `local_size` ranks on this node: a share of those the node lets this process use."""
    usable = len(os.sched_getaffinity(0))
    if "RANK" not in os.environ and "SLURM_STEP_ID" in os.environ and "SLURM_CPUS_PER_TASK" in os.environ:
        return max(1, min(usable, int(os.environ["SLURM_CPUS_PER_TASK"])))  # SLURM may have bound each rank already
    return max(1, usable // local_size)


def threads_chosen() -> bool:
    """Whether somebody chose a number of threads; torchrun sets 1 where nobody did."""
    return os.environ.get("OMP_NUM_THREADS", "1") != "1"


def set_rendezvous() -> None:
    """MASTER_ADDR and MASTER_PORT where only SLURM has said where the ranks are."""
    if "MASTER_ADDR" in os.environ:
        return
    nodes = os.environ["SLURM_STEP_NODELIST"]
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        first = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
        socket.getaddrinfo(first, None)
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise ConfigError(
            f"cannot find the first of the nodes {nodes}: {error}; set MASTER_ADDR and MASTER_PORT"
        ) from error
    os.environ["MASTER_ADDR"] = first
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000))


def recorded() -> dict[str, str]:
    """What is worth recording of the process environment: an allow-list, because the rest may hold secrets."""
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "CONDA_PREFIX")
    prefixes = (
        "SLURM_JOB_",
        "SLURM_NTASKS",
        "SLURM_NNODES",
        "SLURM_RESTART",
        "TORCHELASTIC_RE",
        "NCCL_",
        "TORCH_NCCL_",
    )
    return {k: v for k, v in sorted(os.environ.items()) if k in names or k.startswith(prefixes)}
