"""How a run evaluates, when it stops at a target, and what it learns from: real runs, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import here, metrics, summary
from nets import ALONE, images, ours

from trainer import configfile, losses, teacher
from trainer.config import ConfigError
from trainer.data.loader import open_data
from trainer.evaluate import evaluate
from trainer.plan import Plan
from trainer.precise import precise_statistics

SMALL = ["data.image_size=32", "global_batch_size=24", "schedule.epochs=4", "schedule.warmup_epochs=1"]
SMALL += ["model.name=resnet20", "report.wandb=disabled", "precision.amp=fp32"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "empty.yaml").write_text("{}")
    return tmp_path / "empty.yaml"


def test_a_run_ends_at_its_target_and_says_when(config: Path, tiny: Path, tmp_path: Path) -> None:
    options = [*SMALL, f"data.root={tiny}", f"output_dir={tmp_path / 'run'}", "ema.half_life=30", "loop.eval_flip=true"]
    options += ["loop.precise_bn=48"]
    done = here("train", config, *options, "loop.stop_at.top1=1")  # chance is 25%
    assert done.status == 0, done.errors
    found = summary(tmp_path / "run")
    assert (found["status"], found["steps"], found["target"]) == ("done", 2, {"top1": 1})
    assert 0 < found["seconds_to_target"] <= found["wall_seconds"]
    (evaluated,) = metrics(tmp_path / "run", "eval")
    assert found["best_ema_top1"] == evaluated["ema_top1"] and found["best_top1"] == evaluated["top1"]
    again = here("train", config, *options, "loop.stop_at.top1=1")
    assert again.status == 0 and "is finished (2 steps)" in again.output
    # A higher target goes on, and one that is never met trains to the end.
    assert here("train", config, *options, "loop.stop_at.top1=100").status == 0
    found = summary(tmp_path / "run")
    met = max(found["best_top1"], found["best_ema_top1"]) >= 100
    assert (found["seconds_to_target"] is not None) == met and (met or found["steps"] == 8)
    # The command evaluates raw and averaged weights both.
    done = here("evaluate", tmp_path / "run")
    assert done.status == 0 and json.loads(done.output.splitlines()[-1]).keys() >= {"top1", "ema_top1", "ema_loss"}


def test_mirrored_logits_are_averaged() -> None:
    model, x, labels = ours("resnet20").eval(), images(4, 32), torch.arange(4)
    model.fc.weight.data.mul_(20)

    class Batches:
        left_out = 0
        common = 0

        def __iter__(self):
            return iter([(x, labels)])

        def __len__(self):
            return 4

    with torch.no_grad():
        logits = (model(x) + model(x.flip(3))) / 2
        expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert evaluate(model, Batches(), ALONE, None, flip=True).loss == pytest.approx(expected, rel=1e-5)
    assert evaluate(model, Batches(), ALONE, None).loss != pytest.approx(expected, rel=1e-4)


def test_precise_statistics_are_those_of_the_coming_images_and_go_again(tiny: Path) -> None:
    config = configfile.load(None, [*SMALL, f"data.root={tiny}", "loop.precise_bn=30"])
    data = open_data(config, ALONE)
    plan = Plan.of(config, 1, data.samples)
    model = ours("resnet20", 4)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    seen = []
    model.conv1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with precise_statistics(model, config, data, plan, ALONE, 3, None):
        assert len(seen) == 2, "30 images are two batches of 24"
        mean = torch.stack([output.mean((0, 2, 3)) for output in seen]).mean(0)
        torch.testing.assert_close(model.bn1.running_mean, mean)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert model.training


def test_a_teacher_draws_by_its_share_and_does_not_learn(tmp_path: Path) -> None:
    torch.save(ours("resnet20", 4).state_dict(), tmp_path / "teacher.pt")
    options = ["loss.teacher=resnet20", f"loss.teacher_weights={tmp_path / 'teacher.pt'}", "loss.teacher_share=0.25"]
    config = configfile.load(None, [*options, "loss.temperature=3"])
    found = teacher.create(config, 4, ALONE.device)
    x = images(4, 32)
    logits = torch.randn(4, 4, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(4))
    with torch.no_grad():
        answer = found.model(x)
    expected = 0.75 * loss + 0.25 * losses.distance(logits, answer, 3.0)
    torch.testing.assert_close(found.blended(loss, logits, x), expected)
    assert not found.model.training and not any(p.requires_grad for p in found.model.parameters())
    with pytest.raises(ConfigError, match=r"loss\.teacher_weights=.*has 4 classes"):
        teacher.create(config, 7, ALONE.device)
