"""The launcher without a cluster: profiles, the batch script, the verdict on an attempt, states, frozen code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, here

from launch import affinity, attempt, logs, profile, script, snapshot, state, status, sweep
from launch.__main__ import main
from launch.attempt import CLAIM_S, DONE, REQUEUE, STOP, UNSURE, WAIT, Ending, Record, claimed, decide
from launch.profile import Profile
from launch.record import Launch, Submitted
from trainer.config import Config, ConfigError

PROFILES = sorted((REPOSITORY / "slurm").glob("*.yaml"))


@pytest.fixture
def submitted(tmp_path: Path) -> Submitted:
    """A run whose job 7 is in the queue."""
    launch = Launch(tmp_path / "run" / "launch" / "stamp", [str(tmp_path / "run")], nodes=2, ranks=4, max_restarts=3)
    launch.folder.mkdir(parents=True)
    launch.write(Profile(gpus_per_node=2), [Config(output_dir=launch.runs[0])])
    found = Submitted(tmp_path / "run", "7", launch, 0)
    found.write()
    return found


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
def test_every_profile_here_can_be_read(path: Path) -> None:
    assert profile.load(path).tasks_per_node >= 1 and path.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", r"p\.yaml: there is no option partitoin; did you mean partition"),
        ("minutes: soon", r"p\.yaml: .*minutes"),
        ("minutes: 0", r"p\.yaml: minutes=0 is too small"),
        ("signal_delay: 90000", r"signal_delay=90000 s is not less than minutes=1440"),
        ("{gpus_per_node: 8, ranks_per_node: 4}", r"ranks_per_node=4 is not gpus_per_node=8"),
        ("{gpus_per_node: 8, gres: 'gpu:h100:4'}", r"gres=gpu:h100:4 is not gpus_per_node=8"),
        ("container_runtime: docker", r"container_runtime=docker is not known; use one of: pyxis, apptainer"),
    ],
)
def test_a_profile_that_makes_no_sense_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        profile.load(tmp_path / "p.yaml")


def test_the_command_line_overrides_the_profile_and_a_missing_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("{gpus_per_node: 2, environment: {NCCL_DEBUG: INFO}}")
    found = profile.load(tmp_path / "p.yaml", ["gpus_per_node=4", "partition=fast"])
    assert (found.gpus_per_node, found.partition, found.environment) == (4, "fast", {"NCCL_DEBUG": "INFO"})
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file; profiles here: .*slurm/cpu\.yaml"):
        profile.load("nowhere.yaml")


def test_a_dry_run_needs_no_cluster_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("global_batch_size: 64")
    run = tmp_path / "run"
    flags = ["--cluster", str(REPOSITORY / "slurm" / "h100x8.yaml"), "--nodes", "4", "--dry-run", "--account", "me"]
    assert main(["submit", str(tmp_path / "c.yaml"), *flags, f"output_dir={run}"]) == 0
    shown = capsys.readouterr().out
    wanted = ["--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--account=me", "--signal=USR2@180", "--requeue"]
    assert all(f"#SBATCH {option}" in shown for option in wanted), shown
    assert "--kill-on-bad-exit=1" in shown and "export NCCL_IB_HCA=mlx5" in shown and "wckey" not in shown
    assert f"output_dir: {run}" in shown and "global_batch_size: 64" in shown
    assert list(tmp_path.iterdir()) == [tmp_path / "c.yaml"]
    assert main(["submit", str(tmp_path / "c.yaml"), *flags, "global_batch_size=33"]) == 2
    assert "global_batch_size=33 does not divide among 32 ranks" in capsys.readouterr().err


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_in_a_container_only_the_ranks_are(submitted: Submitted, runtime: str) -> None:
    wanted = Profile(
        gpus_per_node=2, container="image.sqsh", container_runtime=runtime, container_mounts=["/data:/data"]
    )
    text = script.text(wanted, submitted.launch, "name")
    assert "begin=$(python3 -I " in text and "verdict=$(python3 -I " in text  # scontrol is the host's alone
    ranks = next(line for line in text.splitlines() if line.startswith("srun"))
    assert "image.sqsh" in ranks and "/data:/data" in ranks and f"{submitted.run}:{submitted.run}" in ranks
    assert ("--container-image" in ranks) == (runtime == "pyxis") and "env --ignore-signal=USR2" in ranks


@pytest.mark.parametrize(
    ("ending", "verdict"),
    [
        (Ending(0), DONE),
        (Ending(0, cancelled=True), DONE),
        (Ending(75, signal="SIGUSR2"), REQUEUE),
        (Ending(75), REQUEUE),  # before the first step: no summary says which signal
        (Ending(75, signal="SIGUSR2", cancelled=True), WAIT),
        (Ending(75, signal="SIGTERM"), UNSURE),  # the queue's or a stray one
        (Ending(75, signal="SIGTERM", preempted=True), REQUEUE),
        (Ending(75, signal="SIGTERM", job_state="CANCELLED"), WAIT),  # requeued, it would rise from the dead
        (Ending(75, signal="SIGUSR2", job_state="PENDING"), WAIT),
        (Ending(1, signal="SIGUSR2"), REQUEUE),  # torchrun exits with 1 after a good save
        (Ending(2), STOP),
        (Ending(137, mistake=True), STOP),  # the rank that told of it killed the others
        (Ending(137), REQUEUE),
        (Ending(1, failed_step=40, failed_before=30), REQUEUE),
        (Ending(1, failed_step=40, failed_before=40), STOP),
        (Ending(1, idle_restarts=3, max_restarts=3), REQUEUE),
        (Ending(1, idle_restarts=4, max_restarts=3), STOP),
    ],
)
def test_the_verdict_on_an_attempt(ending: Ending, verdict: str) -> None:
    assert decide(ending)[0] == verdict


@pytest.mark.parametrize(
    ("then", "cancelled", "verdict"),
    [
        (("RUNNING", False), False, REQUEUE),
        (("RUNNING", True), False, REQUEUE),
        (("CANCELLED", False), False, WAIT),  # requeued, it would rise from the dead
        (("PENDING", False), False, WAIT),  # scontrol requeue
        (("RUNNING", False), True, WAIT),
    ],
)
def test_whose_a_signal_was_shows_within_a_minute(then: tuple[str, bool], cancelled: bool, verdict: str) -> None:
    slept: list[float] = []
    found, reason = claimed(lambda: then if len(slept) > 3 else ("RUNNING", False), lambda: cancelled, slept.append)
    assert found == verdict and reason
    assert sum(slept) == CLAIM_S or then != ("RUNNING", False) or cancelled


def test_restarts_without_progress_are_bounded_and_progress_counts_anew(
    submitted: Submitted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(attempt, "_scontrol", lambda *arguments: "")
    folder = submitted.launch.folder

    def attempts() -> list[int]:
        statuses = []
        while not statuses or (statuses[-1] == 0 and len(statuses) < 9):
            statuses.append(attempt.begin(folder, 0))
            if statuses[-1] == 0:
                attempt.end(folder, 0, 137)
        return statuses

    assert attempts() == [0, 0, 0, 0, attempt.EXHAUSTED]  # the first and three more
    assert "3 restarts brought no new saved step" in capsys.readouterr().err
    saved = submitted.run / "checkpoints" / "000000012"
    saved.mkdir(parents=True)
    (saved / "manifest.json").write_text("{}")
    assert attempts() == [0, 0, 0, 0, attempt.EXHAUSTED]
    verdicts = [line["verdict"] for line in Record(submitted.run, "7").lines() if line["event"] == "end"]
    assert verdicts == [REQUEUE] * 3 + [STOP, STOP] + [REQUEUE] * 3 + [STOP, STOP]


def test_what_failed_at_the_same_step_twice_is_not_tried_again(
    submitted: Submitted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(attempt, "_scontrol", lambda *arguments: "")
    verdicts = []
    for number, step in enumerate([30, 40, 40]):
        assert attempt.begin(submitted.launch.folder, 0) == 0
        summary = {"status": "failed", "steps": step, "number": number}
        (submitted.run / "summary.json").write_text(json.dumps(summary))
        capsys.readouterr()
        attempt.end(submitted.launch.folder, 0, 1)
        verdicts.append(capsys.readouterr().out.strip())
    assert verdicts == [REQUEUE, REQUEUE, STOP]


def test_an_array_task_is_requeued_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "41")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert attempt.job_id() == "41_3"
    shell = subprocess.run(["bash", "-c", f"echo {script.JOB}"], capture_output=True, text=True)
    assert shell.stdout.strip() == "41_3"


def test_two_jobs_on_a_node_take_two_ports() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        assert attempt.free_port(port) > port


@pytest.mark.parametrize(
    ("squeue", "sacct", "events", "name", "live"),
    [
        ("RUNNING|n[1-2]|None\n", None, [], "RUNNING", True),
        ("PENDING||BeginTime\n", "NODE_FAIL|n1\n", [], "PENDING", True),  # the same number, back in the queue
        ("", "NODE_FAIL|n1\nCOMPLETED|n2\n", [], "COMPLETED", False),
        (None, "CANCELLED by 1000|n1\n", [], "CANCELLED", False),
        (None, None, [("begin", ""), ("end", DONE)], "COMPLETED", False),
        (None, "", [("begin", ""), ("end", STOP)], "FAILED", False),
        (None, None, [("begin", ""), ("end", REQUEUE), ("begin", "")], "GONE", False),
        (None, None, [], "GONE", False),
    ],
)
def test_the_state_is_the_queues_then_accountings_then_the_folders(
    submitted: Submitted, squeue: str | None, sacct: str | None, events: list[tuple[str, str]], name: str, live: bool
) -> None:
    number = -1
    for event, verdict in events:
        number += event == "begin"
        Record(submitted.run, "7").add(event=event, attempt=number, step=0, nodes="n1", verdict=verdict, reason="")
    (submitted.run / "summary.json").write_text('{"status": "done"}')
    found = state.of(submitted, lambda command, *rest: {"squeue": squeue, "sacct": sacct}[command])
    assert (found.name, found.live) == (name, live)


def test_the_time_left_goes_by_the_recent_pace() -> None:
    records = [{"kind": "train", "step": 10 * n, "wall_seconds": 20.0 * n} for n in range(1, 31)]
    assert status.left(records, 2100) == "1:00:00" and status.left(records[:1], 2100) == ""


def test_a_log_is_followed_over_a_requeue(submitted: Submitted, monkeypatch: pytest.MonkeyPatch) -> None:
    record, moments = Record(submitted.run, "7"), iter(range(100))
    monkeypatch.setattr(logs, "ASK", 0.0)
    alive = state.State("RUNNING")
    monkeypatch.setattr(logs.state, "of", lambda _: state.State("COMPLETED") if next(moments) > 2 else alive)

    def write(number: int, text: str) -> None:
        path = submitted.launch.log(0, number, 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").write(text)

    steps = [lambda: write(0, "two "), lambda: (record.add(event="begin", attempt=1), write(1, "three")), lambda: None]
    record.add(event="begin", attempt=0)
    write(0, "one ")
    said = "".join(logs.follow(submitted.run, 0, sleep=lambda _: steps.pop(0)()))
    assert [word for word in said.split() if not word.startswith(("=", "<", "/"))] == ["one", "two", "three"]


def test_frozen_code_is_the_working_tree_and_stays(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "trainer").mkdir(parents=True)
    (tree / "trainer" / "a.py").write_text("committed")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=tree, check=True)
    (tree / "trainer" / "a.py").write_text("changed")
    (tree / "trainer" / "new.py").write_text("untracked")
    record = snapshot.take(tmp_path / "launch" / "code", tree)
    (tree / "trainer" / "a.py").write_text("later")
    assert (tmp_path / "launch" / "code" / "trainer" / "a.py").read_text() == "changed"
    assert not (tmp_path / "launch" / "code" / "trainer" / "new.py").exists()
    assert snapshot.untracked(tree) == ["trainer/new.py"]
    assert record["dirty"] and "+changed" in (tmp_path / "launch" / "diff.patch").read_text()


def test_a_rank_keeps_to_the_cores_of_its_gpu() -> None:
    # Two sockets of 4 cores with 2 threads each: core c has threads c and c + 8.
    siblings = {cpu: cpu % 8 for cpu in range(16)}
    sockets = [frozenset([0, 1, 2, 3, 8, 9, 10, 11]), frozenset([4, 5, 6, 7, 12, 13, 14, 15])]
    near = [sockets[0], sockets[0], sockets[1], sockets[1]]
    shares = [affinity.share(rank, near, set(range(16)), siblings) for rank in range(4)]
    assert shares == [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]
    assert affinity.share(0, near, {1, 9, 4}, siblings) == []  # half of one core: nothing to choose
    assert affinity.share(1, near, {1, 9, 4}, siblings) == [1, 9]


def test_a_sweep_names_what_it_varies(tmp_path: Path) -> None:
    found = sweep.variants(["optim.lr=0.1,0.2", "model.name=resnet18,timm:x"], None)
    assert [sweep.name(i, v) for i, v in enumerate(found)][:2] == ["00-lr=0.1-name=resnet18", "01-lr=0.1-name=timm_x"]
    (tmp_path / "s.yaml").write_text("- {optim.lr: 0.1, seed: 1}\n- {optim.lr: 0.2}\n")
    assert sweep.variants([], str(tmp_path / "s.yaml")) == [["optim.lr=0.1", "seed=1"], ["optim.lr=0.2"]]
    for words, file in (([], None), (["seed"], None), (["seed=1"], None), ([], str(tmp_path / "no.yaml"))):
        with pytest.raises(ConfigError, match=r"sweep|--over|--list"):
            sweep.variants(words, file)


def test_a_run_that_was_never_submitted_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("status", "logs", "cancel"):
        assert main([command, str(tmp_path)]) == 2
        assert f"{tmp_path} was not submitted from here" in capsys.readouterr().err
    assert main(["sync", str(tmp_path)]) == 2


@pytest.mark.end_to_end
def test_locally_the_same_job_runs_to_its_end_from_the_nodes_own_disk(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert here("prepare", tiny, tmp_path / "shards", "--format", "shards", "--workers", 1).status == 0
    (tmp_path / "c.yaml").write_text(
        f"{{global_batch_size: 8, data: {{root: {tmp_path}/shards, image_size: 32, eval_size: 32}},"
        " model: {name: resnet20}, schedule: {epochs: 2, warmup_epochs: 0}, report: {log_every: 1, wandb: disabled}}"
    )
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "disk"))
    (tmp_path / "disk").mkdir()
    command = [sys.executable, "-m", "launch", "submit", str(tmp_path / "c.yaml"), f"output_dir={tmp_path}/run"]
    flags = ["--local", "--cluster", "slurm/test.yaml", "--scratch", "$NODE_DISK/imagenet"]
    done = subprocess.run([*command, *flags], cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    log = next((tmp_path / "run").glob("launch/*/logs/0/attempt-0/rank-1.log")).read_text()
    steps = json.loads((tmp_path / "run" / "run.json").read_text())["plan"]["total_steps"]
    assert "rank 1 of 2" in log and json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == steps
    assert json.loads((tmp_path / "run" / "run.json").read_text())["commit"]
    assert list((tmp_path / "disk" / "imagenet").rglob("train-*.tar"))
