"""The batch script: from a profile to what submitit writes into it."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import _make_sbatch_string

from launch.profile import Profile
from launch.record import Launch

# An array's task by ARRAY_TASK: its own number alone may stand for the whole array.
JOB = '"${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"'
STAY = 300  # seconds that the batch script waits to be killed, where the queue decides what follows


def parameters(profile: Profile, launch: Launch, name: str) -> dict[str, Any]:
    """The parameters of submitit's SlurmExecutor."""
    asked = {
        "job_name": name,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": profile.exclude,
        "exclusive": profile.exclusive or None,
        "gres": profile.gres,
        "gpus_per_node": profile.gpus_per_node if profile.gpus_per_node and not profile.gres else None,
        "cpus_per_task": profile.cpus_per_rank,
        "time": profile.minutes,
        "mail_user": profile.mail_user,
        "mail_type": profile.mail_type,
    }
    more: dict[str, Any] = {"requeue": True}
    if profile.memory_gb is not None:
        more["mem"] = f"{round(profile.memory_gb * 1024)}M"
    if profile.reservation:
        more["reservation"] = profile.reservation
    return {k: v for k, v in asked.items() if v is not None} | {
        "nodes": launch.nodes,
        "ntasks_per_node": profile.tasks_per_node,
        "signal_delay_s": profile.signal_delay,
        "wckey": None,  # submitit's own default is refused where the site tracks wckeys
        "stderr_to_stdout": True,
        "additional_parameters": more | profile.sbatch,
        "srun_args": _srun(profile, launch),
        "setup": _setup(profile, launch),
        "teardown": _teardown(profile, launch),
    }


def text(profile: Profile, launch: Launch, name: str, array_limit: int | None = None) -> str:
    """The whole batch script, as submitit writes it."""
    more = {"map_count": len(launch.runs), "array_parallelism": array_limit} if array_limit else {}
    command = f"{python(profile, launch)} -u -m submitit.core._submit {shlex.quote(str(launch.submitit))}"
    return _make_sbatch_string(command=command, folder=launch.submitit, **parameters(profile, launch, name), **more)


def python(profile: Profile, launch: Launch) -> str:
    """The command that a rank's Python starts with.

    USR2 is ignored until there is a handler for it: in the first second of a restarted job it would kill it. The
    working directory comes first on Python's path, so it must be the frozen code.
    """
    code = shlex.quote(str(launch.code))
    begin = f"env --ignore-signal=USR2 --chdir={code} PYTHONPATH={code} "
    if profile.container is None:
        return begin + shlex.quote(profile.python or sys.executable)
    inside = begin + shlex.quote(profile.python or "python")
    if profile.container_runtime == "pyxis":
        return inside  # srun enters the container
    binds = " ".join(f"--bind {shlex.quote(mount)}" for mount in _mounts(profile, launch))
    return f"apptainer exec --nv {binds} {shlex.quote(profile.container)} {inside}"


def _setup(profile: Profile, launch: Launch) -> list[str]:
    exports = [f"export {name}={shlex.quote(str(value))}" for name, value in profile.environment.items()]
    return [
        "trap '' USR2  # it is for the ranks; here it would end the job",
        *profile.setup,
        *exports,
        f"begin=$({_attempt(profile, launch, 'begin')}) || exit $?",
        'eval "$begin"',
    ]


def _teardown(profile: Profile, launch: Launch) -> list[str]:
    # The script's exit status is the job's, so it must be that of srun.
    return [
        "rc=$?",
        f"verdict=$({_attempt(profile, launch, 'end')} $rc)",
        f'if [ "$verdict" = requeue ]; then scontrol requeue {JOB} && sleep {STAY}; fi',
        f'if [ "$verdict" = wait ]; then sleep {STAY}; fi',
        "exit $rc",
    ]


def _attempt(profile: Profile, launch: Launch, what: str) -> str:
    interpreter = "python3" if profile.container else profile.python or sys.executable
    script = launch.code / "launch" / "attempt.py"
    return " ".join(shlex.quote(str(part)) for part in (interpreter, "-I", script, what, launch.folder))


def _srun(profile: Profile, launch: Launch) -> list[str]:
    # A rank that fails ends the step at once; one that is done leaves rank 0 the time for the last save (--wait=0).
    arguments = ["--kill-on-bad-exit=1", "--wait=0"]
    if profile.cpus_per_rank:
        arguments.append(f"--cpus-per-task={profile.cpus_per_rank}")  # SLURM 22.05 and later: not inherited from sbatch
    if profile.container and profile.container_runtime == "pyxis":
        arguments += [f"--container-image={profile.container}", f"--container-workdir={launch.code}"]
        arguments.append("--container-mounts=" + ",".join(_mounts(profile, launch)))
    return arguments + profile.srun


def _mounts(profile: Profile, launch: Launch) -> list[str]:
    homes = dict.fromkeys([str(launch.folder), *launch.runs])
    return [f"{home}:{home}" for home in homes] + profile.container_mounts


def job_name(run: Path) -> str:
    """A name that squeue shows well."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", run.name)
