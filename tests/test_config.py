"""Options: precedence, refusal of what is unknown or impossible, and that nothing hides."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY

from trainer import configfile
from trainer.config import Config, ConfigError
from trainer.study import grid

RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))
STUDIES = sorted((REPOSITORY / "configs" / "studies").glob("*.yaml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"no option optim\.lrr; did you mean optim\.lr"),
        ("lr=1", r"no option lr; did you mean optim\.lr"),
        ("optm.lr=1", r"no option optm; did you mean optim"),
        ("nonsense", r"'nonsense' is not key=value"),
        ("optim.lr=fast", r"optim\.lr.*'fast'"),
        ("optim.lr=-1", r"optim\.lr=-1\.0 is too small"),
        ("seed=1.5", r"seed.*'1\.5'"),
        ("data=5", r"data is a section"),
        ("model.residual=maybe", r"model\.residual.*'maybe'"),
        ("model.variant=v2", r"model\.variant=v2 is not known; use one of: v1\.5, v1, d"),
        ("model.shortcut=D", r"model\.shortcut=D is not known"),
        ("model.drop_rate=1", r"model\.drop_rate=1\.0 must be at least 0 and below 1"),
        ("augment.scale=[0.5]", r"augment\.scale=\[0\.5\] is not a range"),
        ("augment.scale=[0.5,2]", r"augment\.scale=.* is more than the whole image"),
        ("augment.flip=2", r"augment\.flip=2\.0 is not a share"),
        ("augment.crop=none", r"augment\.crop=none is not known"),
        ("data.std=[0,1,1]", r"data\.std=.* must be three numbers"),
        ("data.eval_resize=100", r"data\.eval_resize=100 is smaller than the evaluation crop of 224"),
        ("data.image_size=0", r"data\.image_size=0 is too small"),
        ("data.source=webdataset", r"data\.source=webdataset is not known; use one of: dali"),
        ("schedule.warmup_epochs=90", r"schedule\.warmup_epochs=90 leaves nothing of schedule\.epochs=90"),
        ("schedule.step_epochs=[60,30]", r"schedule\.step_epochs=.* must rise"),
        ("schedule.final=2", r"schedule\.final=2\.0 is not a share"),
        ("optim.name=adam", r"optim\.name=adam is not known; use one of: sgd, sgdw, lars"),
        ("optim.momentum=1", r"optim\.momentum=1\.0 must be"),
        ("loss.label_smoothing=1", r"loss\.label_smoothing=1\.0 must be"),
        ("precision.amp=fp8", r"precision\.amp=fp8 is not known"),
        ("loop.eval_every=0.5", r"loop\.eval_every=0\.5 must be whole epochs"),
        ("checkpoint.keep=0", r"checkpoint\.keep=0 is too small"),
        ("seed=-1", r"seed=-1 must lie between 0 and"),
        ("seed=4294967296", r"seed=4294967296 must lie between 0 and"),
        ("global_batch_size=0", r"global_batch_size=0 is too small"),
        ("device=tpu", r"device=tpu is not known"),
    ],
)
def test_mistakes_are_answered_by_name(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        configfile.load(None, [override])
    assert "\n" not in str(error.value)


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ConfigError, match=r"optim\.nesterov=true needs optim\.momentum"):
        configfile.load(None, ["optim.nesterov=true", "optim.momentum=0"])


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["loss.name=bce", "loss.teacher=resnet50", "loss.teacher_weights=x.pt"], r"loss\.teacher=.*loss\.name=bce"),
        (["loss.teacher=resnet50"], r"loss\.teacher=resnet50 and loss\.teacher_weights=None"),
        (["loss.bce_threshold=0.2"], r"loss\.bce_threshold=0\.2 needs loss\.name=bce"),
        (["schedule.warmup_steps=5", "schedule.warmup_samples=9"], r"schedule\.warmup_steps and .*warmup_samples"),
        (["schedule.scale=0.05"], r"schedule\.warmup_epochs=5 .* schedule\.epochs=90 at schedule\.scale=0\.05"),
        (["optim.clip_norm=1", "optim.clip_agc=0.01"], r"optim\.clip_norm and optim\.clip_agc both clip"),
        (["optim.name=lamb", "optim.nesterov=true"], r"optim\.nesterov=true .* optim\.name=lamb"),
        (["model.new_head=true"], r"model\.new_head=true needs model\.weights"),
        (["model.head_prior=true"], r"model\.head_prior=true is for loss\.name=bce"),
        (["mix.mixup=0.2", "mix.off_epoch=90"], r"mix\.off_epoch=90 lies beyond the end of schedule\.epochs=90"),
        (["mix.off_epoch=9"], r"mix\.off_epoch=9 switches off what mix\.mixup=0"),
        (["ema.start_epoch=91"], r"ema\.start_epoch=91 lies beyond the end of schedule\.epochs=90"),
        (["loop.stop_at.top1=70", "loop.eval_every=0"], r"loop\.stop_at=.* loop\.eval_every=0"),
        (["loop.stop_at.top6=70"], r"loop\.stop_at=\{top6: 70\.0\} is not known"),
        (["augment.policy=trivialaugment", "augment.start_strength=0.5"], r"augment\.start_strength.*augment\.policy"),
        (["augment.repeats=3"], r"augment\.repeats=3 does not divide global_batch_size=256"),
        (["precision.fused=true", "distributed.sync_bn=true"], r"precision\.fused=true .* distributed\.sync_bn=true"),
        *(
            (["precision.cuda_graph=true", option], f"precision.cuda_graph=true cannot be had with {option}")
            for option in (
                "optim.name=lars",
                "optim.sam_rho=0.05",
                "report.gradient_norms=true",
                "model.drop_rate=0.1",
                "model.drop_path_rate=0.1",
                "distributed.gradients=bf16",
                "precision.amp=fp16",
            )
        ),
    ],
)
def test_contradictions_are_refused_naming_both_keys(overrides: list[str], keys: str) -> None:
    with pytest.raises(ConfigError, match=keys) as error:
        configfile.load(None, overrides)
    assert "\n" not in str(error.value)


def test_precedence_is_defaults_base_file_command_line(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("optim: {lr: 1, momentum: 0.5, weight_decay: 0.25}")
    (tmp_path / "file.yaml").write_text("base: base.yaml\noptim: {lr: 2, momentum: 0.6}")
    optim = configfile.load(tmp_path / "file.yaml", ["optim.lr=3"]).optim
    assert (optim.lr, optim.momentum, optim.weight_decay) == (3, 0.6, 0.25)
    assert optim.nesterov is Config().optim.nesterov


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: x.yaml", r"base leads back to itself"),
        ("optim: [1, 2", r"not readable as YAML"),
        ("- 1", r"must hold keys and values"),
        ("optim: {lrr: 1}", r"x\.yaml: there is no option optim\.lrr"),
        ("base: missing.yaml", r"missing\.yaml: no such config file"),
    ],
)
def test_bad_files_are_answered_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        configfile.load(tmp_path / "x.yaml")


def test_resolved_yaml_reads_back_equal(tmp_path: Path) -> None:
    config = configfile.load(None, ["optim.lr=0.3", "model.name=resnet18", "data.mean=[0.1,0.2,0.3]"])
    (tmp_path / "config.yaml").write_text(configfile.to_yaml(config))
    assert configfile.load(tmp_path / "config.yaml") == config


def test_every_option_is_annotated_frozen_and_in_a_section_named_after_a_module() -> None:
    for field in dataclasses.fields(Config):
        section = getattr(Config(), field.name)
        if not dataclasses.is_dataclass(section):
            continue
        assert list((REPOSITORY / "trainer").rglob(f"{field.name}*")), f"no module is called {field.name}"
        annotated = {name for base in type(section).__mro__ for name in getattr(base, "__annotations__", {})}
        assert set(vars(section)) == annotated
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, dataclasses.fields(section)[0].name, None)


def test_every_option_is_read_somewhere() -> None:
    sources = "".join(p.read_text() for p in (REPOSITORY / "trainer").rglob("*.py") if not p.name.startswith("config"))
    # Some are read through the properties that give them their defaults.
    by_property = {"data.eval_size": "crop_size", "data.eval_resize": "short_side"}
    by_property |= {"schedule.step_epochs": "boundaries", "schedule.epochs": "length"}
    names = {key: by_property.get(key, key.split(".")[-1]) for key in configfile.flat(Config())}
    unread = [key for key, name in names.items() if f".{name}" not in sources]
    assert not unread, "an option that nothing reads is a promise that nobody keeps"


@pytest.mark.parametrize("path", [*RECIPES, *STUDIES], ids=lambda p: p.name)
def test_a_recipe_is_a_lab_note_that_loads(path: Path) -> None:
    configfile.load(path) if path in RECIPES else grid.load(path, [])
    head = path.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines()), "a recipe begins with its lab note"
    for part in ("What:", "Source:", "Command:", "Hardware:", "Claimed:", "Measured:"):
        assert f"# {part}" in head, f"the lab note lacks '{part}'"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_a_recipe_lists_only_what_differs(path: Path) -> None:
    written = yaml.safe_load(path.read_text())
    base = written.pop("base", None)
    below = configfile.flat(configfile.load(path.parent / base) if base else Config())
    for key, value in written.items():
        for name, inner in value.items() if isinstance(value, dict) else [(None, value)]:
            dotted = f"{key}.{name}" if name else key
            assert below[dotted] != inner, f"{dotted} is the default already"


def test_help_and_config_errors_do_not_import_torch() -> None:
    script = (
        "import sys; from trainer.__main__ import main\n"
        "status = main(['train', 'configs/demo.yaml', 'optim.lrr=1'])\n"
        "assert status == 2 and 'torch' not in sys.modules, status"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("error: optim.lrr=1: there is no option optim.lrr") and done.stderr.count("\n") == 1
