"""The launcher on a real SLURM: two nodes on this machine, two gloo ranks on each, no accounting database.

Runs are interrupted at a known place: the test stops the ranks' processes with SIGSTOP at some step, and SLURM itself
wakes them with SIGCONT before each signal that it sends.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster import PATIENCE, Cluster, Submission, same, until
from conftest import REPOSITORY, summary

from launch import snapshot

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

PROFILE = REPOSITORY / "slurm" / "test.yaml"
STEPS = 90
PLAIN = """
global_batch_size: 16
data: {root: ROOT, image_size: 16}
model: {name: resnet20}
schedule: {epochs: 30, warmup_epochs: 1}
loop: {eval_every: 10}
report: {log_every: 1, wandb: offline}
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
        reason = "no slurmctld here: apt-get install slurmctld slurmd slurm-client"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    folder, port = tmp_path_factory.mktemp("slurm"), 21000 + os.getpid() % 500 * 20
    try:
        yield Cluster.start(folder, port)
    finally:
        Cluster(folder, port, []).script("stop")


@pytest.fixture(scope="session")
def config(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(PLAIN.replace("ROOT", str(tiny)))
    return path


def submit(cluster: Cluster, config: Path, run: Path, *more: str, code: Path = REPOSITORY) -> Submission:
    flags = ["--cluster", PROFILE, "--nodes", 2, f"output_dir={run}"]
    done = cluster.launch("submit", config, *flags, *more, code=code)
    assert done.status == 0, done.errors
    return Submission(cluster, run)


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Submission:
    """From the queue to the end, watched by `status`."""
    blocker = cluster.take_nodes(60)
    run = submit(cluster, config, tmp_path_factory.mktemp("undisturbed") / "run")
    until(lambda: cluster.state(blocker) == "RUNNING", "the urgent job", 30)
    assert run.status()["state"] == "PENDING" and run.status()["note"]
    cluster.slurm("scancel", blocker)
    until(lambda: run.step() > 2, "the first steps")
    row = run.status()
    assert (row["state"], row["restarts"]) == ("RUNNING", "0") and row["step"].endswith(f"/{STEPS}") and row["nodes"]
    run.ended("COMPLETED")
    return run


def test_a_job_runs_to_its_end_and_is_not_run_again(cluster: Cluster, config: Path, undisturbed: Submission) -> None:
    row, facts = undisturbed.status(), summary(undisturbed.run)
    assert (row["state"], row["step"], row["epoch"], row["restarts"]) == ("COMPLETED", f"{STEPS}/{STEPS}", "30", "0")
    assert row["top-1"] == f"{facts['last_top1']:.2f}%" and facts["last_top1"] > 60
    logs = cluster.launch("logs", undisturbed.run, "--rank", "3").output
    assert "rank 3 of 4, local 1" in logs and cluster.nodes[1] in logs
    followed = cluster.launch("logs", undisturbed.run, "--follow").output
    assert "top-1" in followed and "attempt-0/rank-0.log" in followed
    origin = json.loads((undisturbed.run / "run.json").read_text())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()
    assert origin["commit"] == head and len(list((undisturbed.run / "wandb").glob("offline-run-*"))) == 1
    again = cluster.launch("submit", config, "--cluster", PROFILE, "--nodes", 2, f"output_dir={undisturbed.run}")
    assert (again.status, "is finished" in again.output) == (0, True), again.errors
    assert len(list((undisturbed.run / "launch").glob("2*"))) == 1


@pytest.fixture(params=["USR2", "TERM"])
def preempting(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """The signal that a preempted job gets here."""
    cluster.script("start", USER_SIGNAL=str(int(request.param == "USR2")))
    cluster.slurm("scontrol", "reconfigure")
    yield request.param
    cluster.script("start")
    cluster.slurm("scontrol", "reconfigure")


def test_preempted_it_comes_back_with_the_code_of_the_submission(
    cluster: Cluster, config: Path, undisturbed: Submission, tmp_path: Path, preempting: str
) -> None:
    code = tmp_path / "checkout"
    snapshot.take(code)
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=code, check=True)
    run = submit(cluster, config, tmp_path / "run", code=code)
    (code / "trainer" / "train.py").write_text("raise RuntimeError('edited after submission')\n")
    (code / "launch" / "job.py").write_text("raise RuntimeError('edited after submission')\n")
    run.freeze(20)
    cluster.take_nodes(5)
    ending = until(lambda: run.events("end"), "the end of the first attempt")[0]
    assert (ending["verdict"], ending["status"]) == ("requeue", 75) and 20 <= ending["step"] < STEPS, ending
    assert f"SIG{preempting}" in ending["reason"], ending
    run.ended("COMPLETED")
    same(run, undisturbed)
    begun = run.events("begin")
    assert len(begun) == 2 and begun[1]["step"] == ending["step"] and begun[0]["job"] == begun[1]["job"]
    row = run.status()
    assert (row["state"], row["restarts"]) == ("COMPLETED", "1")
    assert json.loads((run.run / "run.json").read_text())["wandb_id"]
    assert len({p.name.rsplit("-", 1)[1] for p in (run.run / "wandb").glob("offline-run-*")}) == 1


def test_before_its_time_limit_it_saves_and_comes_back(
    cluster: Cluster, config: Path, undisturbed: Submission, tmp_path: Path
) -> None:
    run = submit(cluster, config, tmp_path / "run", "--minutes", "30", "--signal-delay", "120")
    run.freeze(20)
    # What remains of the time is now less than the signal's delay: SLURM sends it at its next look, every 30 s.
    used = cluster.slurm("squeue", "-h", "-j", run.job, "-o", "%M").strip().split(":")
    cluster.slurm("scontrol", "update", f"JobId={run.job}", f"TimeLimit={int(used[-2]) + 2}")
    ending = until(lambda: run.events("end"), "the end of the first attempt")[0]
    assert ending["verdict"] == "requeue" and "SIGUSR2" in ending["reason"], ending
    cluster.slurm("scontrol", "update", f"JobId={run.job}", "TimeLimit=30")
    run.ended("COMPLETED")
    same(run, undisturbed)
    assert len(run.events("begin")) == 2


def test_requeued_from_outside_in_the_middle_of_a_save(
    cluster: Cluster, config: Path, undisturbed: Submission, tmp_path: Path
) -> None:
    run = submit(cluster, config, tmp_path / "run")
    until(lambda: run.step() >= 20, "step 20", every=0.02)
    until(lambda: list((run.run / "checkpoints").glob(".0*")), "a save under way", every=0.001)
    cluster.slurm("scontrol", "requeue", run.job)
    run.ended("COMPLETED")
    same(run, undisturbed)
    assert len(run.events("begin")) == 2 and run.events("begin")[1]["step"] >= 18


def test_a_rank_that_dies_brings_the_job_back(
    cluster: Cluster, config: Path, undisturbed: Submission, tmp_path: Path
) -> None:
    run = submit(cluster, config, tmp_path / "run")
    ranks = run.freeze(20)
    os.kill(ranks[2], signal.SIGKILL)
    run.thaw({rank: process for rank, process in ranks.items() if rank != 2})
    ending = until(lambda: run.events("end"), "the end of the first attempt", 60)[0]
    assert ending["verdict"] == "requeue" and ending["status"] not in (0, 75), ending
    assert not run.ranks(), "the other ranks live on"
    run.ended("COMPLETED")
    same(run, undisturbed)
    assert len(run.events("begin")) == 2


def test_a_node_that_dies_is_waited_for(
    cluster: Cluster, config: Path, undisturbed: Submission, tmp_path: Path
) -> None:
    run = submit(cluster, config, tmp_path / "run")
    run.thaw(run.freeze(20))
    lost = cluster.nodes[1]
    cluster.script("kill-node", lost)
    try:
        until(lambda: run.state == "PENDING", "back in the queue")
        row = until(lambda: (found := run.status())["note"] and found, "a reason")
        assert row["state"] == "PENDING", row
    finally:
        cluster.script("start-node", lost)
    run.ended("COMPLETED")
    same(run, undisturbed)
    # More where the controller tries the lost node once more, or signals the new ranks on it as if they were the old.
    assert 1 <= int(run.status()["restarts"]) <= 3


def test_cancelled_it_has_saved_and_stays_away(
    cluster: Cluster, config: Path, undisturbed: Submission, tmp_path: Path
) -> None:
    run = submit(cluster, config, tmp_path / "run")
    ranks = run.freeze(20)
    refused = cluster.launch("submit", config, "--cluster", PROFILE, "--nodes", 2, f"output_dir={run.run}")
    assert refused.status == 2 and f"is job {run.job} already (RUNNING)" in refused.errors
    with ThreadPoolExecutor() as pool:
        cancelling = pool.submit(cluster.launch, "cancel", run.run, "--wait", PATIENCE)
        run.thaw_when_signalled(ranks, signal.SIGUSR2)
        done = cancelling.result()
    assert done.status == 0 and "saved and cancelled" in done.output, done.output + done.errors
    assert run.state == "CANCELLED" and len(run.events("begin")) == 1
    saved = run.events("end")[0]["step"]
    assert 20 <= saved < STEPS and summary(run.run)["status"] == "stopped"
    assert run.status()["state"] == "CANCELLED"
    # Plain sbatch and torchrun, for those without submitit, go on from there and end with the same weights.
    command = ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", "--cpus-per-task=2", "--time=30"]
    script = [str(REPOSITORY / "slurm" / "train.sbatch"), str(config), f"output_dir={run.run}"]
    variables = cluster.environment(PYTHON=str(Path(shutil.which("python", path=_bin()))), RANKS="2")
    log = f"--output={tmp_path}/%j.out"
    done = subprocess.run(
        [*command, log, *script], cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    until(lambda: run.job == job and run.step() > saved + 10, "steps under torchrun")
    cluster.take_nodes(5)
    final = until(lambda: cluster.state(job) in ("COMPLETED", "FAILED", "CANCELLED") and cluster.state(job), "its end")
    assert final == "COMPLETED", (tmp_path / f"{job}.out").read_text()[-4000:] + run.said()
    same(run, undisturbed)
    attempts = [line for line in run.events("begin") if line["job"] == job]
    assert len(attempts) == 2 and attempts[1]["step"] > saved


def _bin() -> str:
    return str(REPOSITORY / ".venv" / "bin")


def test_an_array_of_four_never_runs_more_than_two(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    home, node = tmp_path / "sweep", cluster.nodes[1]
    flags = ["--cluster", PROFILE, "--limit", 2, "--exclude", node, f"output_dir={home}", "loop.max_steps=4"]
    done = cluster.launch("sweep", config, *flags, "--over", "seed=0,1", "optim.lr=0.1,0.05")
    assert done.status == 0, done.errors
    runs = [Submission(cluster, path) for path in sorted(home.glob("0*"))]
    assert [r.run.name for r in runs] == [
        "00-seed=0-lr=0.1",
        "01-seed=0-lr=0.05",
        "02-seed=1-lr=0.1",
        "03-seed=1-lr=0.05",
    ]
    most, array = 0, runs[0].job.split("_")[0]

    def all_done() -> bool:
        nonlocal most
        states = cluster.slurm("squeue", "-h", "-r", "-t", "all", "-j", array, "-o", "%T %N").splitlines()
        running = [line for line in states if line.startswith("RUNNING")]
        most = max(most, len(running))
        assert all(node not in line for line in running)  # all on one node, two at a time: no port may clash
        return len(states) == 4 and all(line.startswith(("COMPLETED", "FAILED")) for line in states)

    until(all_done, "the end of the array", 2 * PATIENCE, every=0.5)
    assert most == 2
    for run in runs:
        assert run.status()["state"] == "COMPLETED" and summary(run.run)["steps"] == 4, run.said()


def test_a_study_is_an_array_that_its_figure_is_drawn_of(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    axes = "{net: {plain: {model.residual: false}, ResNet: {}}}"
    study.write_text(f"config: {config}\naxes: {axes}\nset: {{loop.max_steps: 4}}\noutput_dir: {tmp_path / 'out'}\n")
    done = cluster.launch("sweep", study, "--cluster", PROFILE, "--ranks-per-node", 1)
    assert done.status == 0, done.errors
    runs = [Submission(cluster, tmp_path / "out" / name / "seed0") for name in ("plain", "ResNet")]
    for run in runs:
        run.ended("COMPLETED")
    command = [sys.executable, "-m", "trainer", "study", str(study), "--draw"]
    drawn = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE)
    assert drawn.returncode == 0, drawn.stderr
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(f"{100 - summary(run.run)['last_top1']:.2f}" in table for run in runs), table
    again = cluster.launch("sweep", study, "--cluster", PROFILE)
    assert again.status == 0 and "nothing" in again.output, again.output + again.errors


def test_a_mistake_is_not_repeated(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    run = submit(
        cluster, config, tmp_path / "run", "data.root=/nowhere/at/all", "--ranks-per-node", "1", "--nodes", "1"
    )
    run.ended("FAILED")
    assert [line["verdict"] for line in run.events("end")] == ["stop"] and len(run.events("begin")) == 1
    assert "/nowhere/at/all" in cluster.launch("logs", run.run).output
    assert "mistake" in run.status()["note"] or run.status()["note"] == "NonZeroExitCode"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--partition", "nope"], ["partition=nope", "nvalid partition", "gpu", "urgent"]),
        (["--nodes", "4"], ["4 nodes", "not available"]),
        (["--gpus-per-node", "3"], ["does not divide among 6 ranks", "global_batch_size=16"]),
        (["--gpus-per-node", "8"], ["8 ranks each", "not available"]),
        (["--cpus-per-rank", "64"], ["not available"]),
        (["--signal-delay", "4000"], ["signal_delay=4000", "minutes=30"]),
        (["optim.lrr=1"], ["optim.lrr", "optim.lr"]),
    ],
)
def test_what_cannot_run_is_refused_with_nothing_left_behind(
    cluster: Cluster, config: Path, tmp_path: Path, flags: list[str], words: list[str]
) -> None:
    queued = cluster.slurm("squeue", "-h", "-t", "all", "-o", "%i").split()
    command = ["submit", config, "--cluster", PROFILE, "--nodes", 2, f"output_dir={tmp_path}/run"]
    if "--gpus-per-node" in flags:
        command[3] = REPOSITORY / "slurm" / "gpu1.yaml"
    done = cluster.launch(*command, *flags)
    assert done.status == 2 and done.errors.count("\n") == 1, done.errors
    assert all(word in done.errors for word in words), done.errors
    assert list(tmp_path.iterdir()) == []
    assert set(cluster.slurm("squeue", "-h", "-t", "all", "-o", "%i").split()) <= set(queued)  # ended ones fade away
