"""The main job, in real processes: torchrun, gloo, DALI, DDP, evaluation, checkpoints, the run folder."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, Finished, draw, here, metrics, summary, torchrun

from trainer import checkpoint

pytestmark = pytest.mark.end_to_end

# 48 images, 24 a step: 2 steps an epoch. LayerNorm instead of BatchNorm, so that the split over ranks changes nothing.
NO_BATCHNORM = ["model.name=timm:test_convnext", "precision.amp=fp32", "optim.lr=0.05"]
SMALL = ["data.image_size=32", "global_batch_size=24", "schedule.epochs=4", "schedule.warmup_epochs=1"]
EVERY_STEP = ["report.log_every=1", "report.wandb=disabled"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "empty.yaml"
    path.write_text("{}")
    return path


def train(config: Path, data: Path, run: Path, *overrides: str, ranks: int = 1) -> Finished:
    options = [f"data.root={data}", f"output_dir={run}", *SMALL, *EVERY_STEP, *overrides]
    return here("train", config, *options) if ranks == 1 else torchrun("train", config, *options, ranks=ranks)


def curve(run: Path, kind: str = "train", *keys: str) -> torch.Tensor:
    records = metrics(run, kind)
    return torch.tensor([[r[k] for k in keys or ("loss", "top1", "lr")] for r in records], dtype=torch.float64)


def weights(run: Path, kind: str = "model") -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.newest_whole(run / "checkpoints"))[kind]


@pytest.fixture(scope="module")
def reference(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, one batch a step, no interruption."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "empty.yaml").write_text("{}")
    done = train(folder / "empty.yaml", tiny, folder / "run", *NO_BATCHNORM)
    assert done.status == 0, done.errors
    return folder / "run"


def test_a_run_leaves_what_the_contract_says(reference: Path) -> None:
    steps = metrics(reference, "train")
    assert [r["step"] for r in steps] == list(range(1, 9))
    assert [r["samples"] for r in steps] == [24 * s for s in range(1, 9)]
    assert steps[-1]["epoch"] == 4 and steps[0]["lr"] == 0
    assert {"loss", "top1", "top5", "lr", "grad_norm", "images_per_second", "data_wait_fraction"} <= steps[0].keys()
    evaluations = metrics(reference, "eval")
    assert [r["step"] for r in evaluations] == [2, 4, 6, 8] and {r["count"] for r in evaluations} == {23}
    found = summary(reference)
    assert (found["status"], found["steps"], found["epochs"]) == ("done", 8, 4)
    assert found["last_top1"] == evaluations[-1]["top1"]
    assert found["best_top1"] == max(r["top1"] for r in evaluations)
    origin = json.loads((reference / "run.json").read_text())
    assert {"commit", "dirty", "versions", "devices", "command", "seed", "environment"} <= origin.keys()
    assert origin["versions"]["torch"] and "PATH" not in origin["environment"]
    kept = [c.step for c in checkpoint.listing(reference / "checkpoints")]
    assert kept[-2:] == [6, 8] and len(kept) <= 3
    assert (reference / "config.yaml").read_text().count("lr:") >= 1


@pytest.mark.parametrize(("ranks", "overrides"), [(2, []), (3, ["max_batch_per_gpu=4"]), (1, ["max_batch_per_gpu=6"])])
def test_ranks_and_accumulation_do_not_change_the_arithmetic(
    config: Path, tiny: Path, tmp_path: Path, reference: Path, ranks: int, overrides: list[str]
) -> None:
    done = train(config, tiny, tmp_path / "run", *NO_BATCHNORM, *overrides, ranks=ranks)
    assert done.status == 0, done.errors
    ours, theirs = curve(tmp_path / "run"), curve(reference)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5), (ours - theirs).abs().max(0)
    evaluated = curve(tmp_path / "run", "eval", "loss", "top1", "top5", "count")
    expected = curve(reference, "eval", "loss", "top1", "top5", "count")
    assert torch.equal(evaluated[:, 3], expected[:, 3]) and (evaluated[:, 3] == 23).all()
    assert torch.allclose(evaluated, expected, rtol=1e-4)
    learnt = weights(tmp_path / "run")
    for name, tensor in weights(reference).items():
        assert torch.allclose(learnt[name], tensor, atol=1e-4), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_stopped_in_mid_epoch_and_run_again_is_bitwise_never_stopped(
    config: Path, tiny: Path, tmp_path: Path, ranks: int
) -> None:
    # BatchNorm, dropout and batches that span epochs: whatever could depend on more than the step.
    options = ["model.name=resnet20", "model.drop_path_rate=0.2", "global_batch_size=20", "report.log_every=2"]
    options += ["augment.policy=trivialaugment", "augment.erase=0.3", "mix.mixup=0.2", "mix.cutmix=1.0"]
    options += ["mix.off_epoch=3", "ema.half_life=60", "ema.every=2", "optim.sam_rho=0.05", "optim.sam_every=3"]
    assert train(config, tiny, tmp_path / "whole", *options, ranks=ranks).status == 0
    part = train(config, tiny, tmp_path / "parts", *options, "loop.max_steps=5", ranks=ranks)
    assert part.status == 0 and summary(tmp_path / "parts")["steps"] == 5
    again = train(config, tiny, tmp_path / "parts", *options, ranks=ranks)
    assert again.status == 0 and "going on after step 5" in again.output, again.errors
    for kind in ("model", "ema"):
        resumed = weights(tmp_path / "parts", kind)
        for name, tensor in weights(tmp_path / "whole", kind).items():
            assert torch.equal(resumed[name], tensor), (kind, name)
    assert not torch.equal(resumed["fc.weight"], weights(tmp_path / "parts")["fc.weight"])
    later = {r["step"]: r["loss"] for r in metrics(tmp_path / "parts", "train") if r["step"] > 6}
    assert later and later == {r["step"]: r["loss"] for r in metrics(tmp_path / "whole", "train") if r["step"] > 6}
    assert curve(tmp_path / "whole", "eval", "loss", "top1", "ema_loss")[-1].equal(
        curve(tmp_path / "parts", "eval", "loss", "top1", "ema_loss")[-1]
    )


def test_mixing_does_not_depend_on_the_number_of_ranks(config: Path, tiny: Path, tmp_path: Path) -> None:
    options = [*NO_BATCHNORM, "mix.mixup=0.4", "mix.cutmix=1.0", "augment.policy=randaugment", "loop.eval_every=0"]
    assert train(config, tiny, tmp_path / "one", *options).status == 0
    assert train(config, tiny, tmp_path / "three", *options, "max_batch_per_gpu=4", ranks=3).status == 0
    assert torch.allclose(curve(tmp_path / "one"), curve(tmp_path / "three"), rtol=1e-4, atol=1e-5)
    refused = train(config, tiny, tmp_path / "odd", *options, "max_batch_per_gpu=3")
    assert refused.status == 2 and "holds 3 of them" in refused.errors and not (tmp_path / "odd").exists()


def test_a_finished_run_says_so_and_does_nothing(config: Path, tiny: Path, reference: Path) -> None:
    before = {
        p: p.stat().st_mtime_ns for p in reference.rglob("*") if p.is_file() and p.name not in (".lock", "lease.json")
    }
    done = train(config, tiny, reference, *NO_BATCHNORM)
    assert done.status == 0 and "is finished (8 steps)" in done.output
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_other_options_or_other_data_are_refused(config: Path, tiny: Path, reference: Path, tmp_path: Path) -> None:
    done = train(config, tiny, reference, *NO_BATCHNORM[:-1], "optim.lr=0.06")
    assert done.status == 2 and re.search(r"other options: optim\.lr=0\.06 \(was 0\.05\)", done.errors)
    draw(tmp_path / "train", 4, [12] * 4, seed=9)
    draw(tmp_path / "val", 4, [2] * 4, seed=9)
    done = train(config, tmp_path, reference, *NO_BATCHNORM)
    assert done.status == 2 and "is not what" in done.errors
    assert done.errors.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_one_rank_stops_all_after_one_good_save(
    config: Path, tiny: Path, tmp_path: Path, number: signal.Signals
) -> None:
    options = [f"data.root={tiny}", f"output_dir={tmp_path / 'run'}", *SMALL, *EVERY_STEP, "model.name=resnet20"]
    options += ["schedule.epochs=4000", "loop.eval_every=1000"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*start, "-m", "trainer", "train", str(config), *options],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        log = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 90
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(ranks[-1]), number)
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
    found = summary(tmp_path / "run")
    assert found["status"] == "stopped" and f"stopped by {number.name}" in output
    (saved,) = checkpoint.listing(tmp_path / "run" / "checkpoints")[-1:]
    assert saved.step == found["steps"] == metrics(tmp_path / "run", "train")[-1]["step"]
    # torchrun turns any failure into 1; that both ranks left with 75 is in its report.
    assert "exitcode  : 75" in output.replace("exitcode: 75", "exitcode  : 75"), output


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_steps(config: Path, tiny: Path, tmp_path: Path) -> None:
    done = train(config, tiny, tmp_path / "run", *NO_BATCHNORM[:2], "optim.lr=1e18", "schedule.warmup_epochs=0")
    assert done.status == 1 and re.search(r"^error: the loss or the gradient is (nan|inf) .*steps \d", done.errors)
    found = summary(tmp_path / "run")
    assert found["status"] == "failed" and "steps" in found["error"]
    for saved in checkpoint.listing(tmp_path / "run" / "checkpoints"):
        assert all(t.isfinite().all() for t in checkpoint.load(saved.path)["model"].values() if t.is_floating_point())


def test_a_second_process_on_a_live_run_is_refused(config: Path, tiny: Path, tmp_path: Path) -> None:
    from trainer.report.folder import RunFolder

    holder = RunFolder(tmp_path / "run")
    holder.acquire()
    done = train(config, tiny, tmp_path / "run", *NO_BATCHNORM)
    assert done.status == 2 and f"in use by process {os.getpid()} on" in done.errors
    holder.release()
    assert {p.name for p in (tmp_path / "run").iterdir()} == {".lock", "lease.json"}


def test_two_ranks_answer_a_mistake_once(config: Path, tiny: Path, tmp_path: Path) -> None:
    done = train(config, tiny, tmp_path / "run", "global_batch_size=25", ranks=2)
    assert done.errors.count("error: ") == 1
    assert "error: global_batch_size=25 does not divide among 2 ranks: use 24 or 26" in done.errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.root=/nowhere"], r"/nowhere"),
        (["data.train=training"], r"training"),
        (["model.name=resnet51"], r"resnet51.*resnet5"),
        (["model.num_classes=3"], r"model\.num_classes=3, but the data has 4 classes"),
        (["device=cuda"], r"device=cuda, but torch sees no GPU"),
        (["precision.amp=fp16"], r"precision\.amp=fp16 needs a GPU"),
        (["model.weights=/nowhere.pt"], r"model\.weights=/nowhere\.pt does not exist"),
        (["output_dir=/proc/run"], r"output_dir=/proc/run cannot be written"),
    ],
)
def test_mistakes_are_answered_in_one_line_and_leave_nothing(
    config: Path, tiny: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    done = train(config, tiny, tmp_path / "run", "model.name=resnet20", *overrides)
    assert done.status == 2, done.errors
    assert re.search(message, done.errors) and done.errors.count("\n") == 1 and done.errors.startswith("error: ")
    assert not (tmp_path / "run").exists()


def damaged(root: Path, kind: str) -> None:
    draw(root / "train", 3, [8] * 3, seed=1)
    draw(root / "val", 3, [3] * 3, seed=2)
    victim = root / "train" / "class1" / "003.JPEG"
    if kind == "empty class":
        (root / "train" / "class9").mkdir()
    elif kind == "other classes":
        (root / "val" / "class2").rename(root / "val" / "class7")
    elif kind == "zero bytes":
        victim.write_bytes(b"")
    elif kind == "text":
        victim.write_text("not an image\n" * 20)
    else:
        victim.write_bytes(victim.read_bytes()[:400])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty class", r"class9"),
        ("other classes", r"class7|class2"),
        ("zero bytes", r"class1/003\.JPEG"),
        ("text", r"class1/003\.JPEG"),
        ("truncated", r"class1/003\.JPEG"),
    ],
)
def test_unsound_data_is_answered_before_anything_is_written(
    config: Path, tmp_path: Path, kind: str, message: str
) -> None:
    damaged(tmp_path, kind)
    done = train(config, tmp_path, tmp_path / "run", "model.name=resnet20", "global_batch_size=8")
    assert done.status == 2, done.errors
    assert re.search(message, done.errors) and done.errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


SKIPPING = ("data.on_error=skip", "data.max_skipped=0.2")


def test_a_file_damaged_in_mid_run_is_named_by_the_rank_that_met_it(config: Path, tmp_path: Path) -> None:
    damaged(tmp_path, "none")
    from trainer.data.index import open_index

    draw(tmp_path / "sound" / "train", 3, [8] * 3, seed=1)
    draw(tmp_path / "sound" / "val", 3, [3] * 3, seed=2)
    open_index(tmp_path / "sound" / "train")
    victim = tmp_path / "sound" / "train" / "class1" / "003.JPEG"
    os.truncate(victim, 300)
    options = ["model.name=resnet20", "global_batch_size=8", "augment.scale=[1,1]"]
    done = train(config, tmp_path / "sound", tmp_path / "run", *options, ranks=2)
    assert done.status == 1  # torchrun's, for any rank that failed
    assert re.search(r"error: .*class1/003\.JPEG \(row 11, class class1\) cannot be decoded", done.errors)
    # The other rank names this one, in one line and without a traceback.
    assert re.search(
        r"error: rank \d of 2, in step \d, .* lost rank \d \(process \d+ on .*; UndecodableError: ", done.errors
    )
    assert summary(tmp_path / "run")["status"] == "failed"
    os.truncate(tmp_path / "sound" / "val" / "class2" / "001.JPEG", 300)
    done = train(config, tmp_path / "sound", tmp_path / "run", *options, *SKIPPING, ranks=2)
    assert done.status == 0, done.errors
    assert re.search(r"warning: 1 training images are skipped so far: \S*class1/003\.JPEG", done.output)
    assert re.search(r"warning: 1 evaluation images are skipped so far: \S*class2/001\.JPEG", done.output)
    assert {record["count"] for record in metrics(tmp_path / "run", "eval")} == {8}
    assert "class1/003.JPEG" in json.loads((tmp_path / "run" / "skipped_training.json").read_text())["skipped"][0]


def test_evaluate_finds_what_the_run_found(config: Path, tiny: Path, reference: Path, tmp_path: Path) -> None:
    newest = checkpoint.newest_whole(reference / "checkpoints")
    for done in (here("evaluate", reference), torchrun("evaluate", newest, ranks=2)):
        assert done.status == 0, done.errors
        found = json.loads(done.output.splitlines()[-1])
        assert found["count"] == 23 and found["top1"] == pytest.approx(summary(reference)["last_top1"])
    torch.save(weights(reference), tmp_path / "bare.pt")
    done = here(
        "evaluate",
        config,
        f"data.root={tiny}",
        "data.image_size=32",
        *NO_BATCHNORM,
        "model.weights=" + str(tmp_path / "bare.pt"),
    )
    assert done.status == 0 and json.loads(done.output.splitlines()[-1])["top1"] == found["top1"]
    done = here("evaluate", config)
    assert done.status == 2 and "names no weights: add model.weights=FILE" in done.errors


def test_a_checkpoint_of_more_classes_than_the_model_is_refused(config: Path, tiny: Path, tmp_path: Path) -> None:
    from trainer.config import Model
    from trainer.models import build

    torch.save(build.create(Model(name="resnet20"), 10).state_dict(), tmp_path / "ten.pt")
    done = train(config, tiny, tmp_path / "run", "model.name=resnet20", f"model.weights={tmp_path / 'ten.pt'}")
    assert done.status == 2 and "has 10 classes" in done.errors and "model.num_classes=10" in done.errors
    assert not (tmp_path / "run").exists()


def test_the_90_epoch_recipe_learns_on_real_imagenet_files(imagenet_sample: Path, tmp_path: Path) -> None:
    # ResNet-50 v1.5 at 224 px, 32 images a step. With one image a class nothing can be learnt of images not seen yet,
    # so each step takes the same 32 files, cropped anew; the schedule is shortened to reach a useful rate.
    (tmp_path / "train").mkdir()
    for folder in sorted(path for path in imagenet_sample.iterdir() if path.is_dir())[:32]:
        (tmp_path / "train" / folder.name).symlink_to(folder)
    options = [f"data.root={tmp_path}", f"output_dir={tmp_path / 'run'}", "global_batch_size=32", "optim.lr=0.005"]
    options += ["schedule.warmup_epochs=0", "loop.max_steps=8", "loop.eval_every=0"]
    done = here("train", REPOSITORY / "configs" / "resnet50_90ep.yaml", *options, *EVERY_STEP)
    assert done.status == 0, done.errors
    losses = curve(tmp_path / "run", "train", "loss")[:, 0]
    assert losses.isfinite().all() and losses[-2:].mean() < losses[:2].mean(), losses
