"""Every option of the trainer, its default, and what makes a value impossible.

A section is named after the module that reads it: `optim.lr` is used in trainer/optim.py. trainer/configfile.py reads
YAML and `key=value` into these classes, trainer/plan.py derives the arithmetic of a run from them.

This module imports neither torch nor the rest of the trainer, so `--help` and a config error cost no start-up time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.config_augment import Augment as Augment
from trainer.config_augment import Mix as Mix
from trainer.config_data import Data as Data
from trainer.mistakes import ConfigError as ConfigError
from trainer.mistakes import RunError as RunError
from trainer.mistakes import at_least, one_of, share


@dataclass(frozen=True, kw_only=True)
class Model:
    """The network. `timm:NAME` and `torchvision:NAME` build theirs."""

    name: str = "resnet50"
    num_classes: int | None = None  # None: as many as the data set has
    variant: str = "v1.5"  # v1.5 (stride on the 3x3) | v1 (on the first 1x1) | d (deep stem, average-pooled shortcut)
    residual: bool = True  # False: the plain network of the ResNet paper
    shortcut: str | None = None  # A | B | C of the paper; None: B for the ImageNet nets, A for the CIFAR nets
    zero_init_residual: bool = False  # last gamma of each block starts at 0
    conv_init: str = "fan_out"  # fan_out (torchvision) | fan_in (NVIDIA ConvNets)
    drop_rate: float = 0.0  # dropout before the head
    drop_path_rate: float = 0.0  # stochastic depth of the last block, linear in depth
    weights: str | None = None  # start from this file: a state dict or a checkpoint

    def __post_init__(self) -> None:
        at_least("model.num_classes", self.num_classes, 1)
        one_of("model.variant", self.variant, ("v1.5", "v1", "d"))
        one_of("model.shortcut", self.shortcut, (None, "A", "B", "C"))
        one_of("model.conv_init", self.conv_init, ("fan_out", "fan_in"))
        for key in ("drop_rate", "drop_path_rate"):
            value = getattr(self, key)
            if not 0.0 <= value < 1.0:
                raise ConfigError(f"model.{key}={value} must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimiser."""

    name: str = "sgd"
    lr: float = 0.1  # peak, at global_batch_size: nothing is scaled behind your back
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay_1d: bool = False  # True: also biases and norms, as torchvision V1 and pytorch/examples
    clip_norm: float | None = None  # clip the gradient's global 2-norm

    def __post_init__(self) -> None:
        one_of("optim.name", self.name, ("sgd",))
        at_least("optim.lr", self.lr, 0, strictly=True)
        at_least("optim.weight_decay", self.weight_decay, 0)
        at_least("optim.clip_norm", self.clip_norm, 0, strictly=True)
        if not 0.0 <= self.momentum < 1.0:
            raise ConfigError(f"optim.momentum={self.momentum} must be at least 0 and below 1")
        if self.nesterov and self.momentum == 0:
            raise ConfigError("optim.nesterov=true needs optim.momentum above 0")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate, step by step: linear warm-up, then the shape named."""

    name: str = "cosine"  # cosine | step | linear | constant
    epochs: float = 90
    warmup_epochs: float = 5
    warmup_start: float = 0.0  # share of optim.lr at the first step
    final: float = 0.0  # share of optim.lr at the end, for cosine and linear
    step_epochs: list[float] = field(default_factory=lambda: [30, 60, 80])  # for step
    step_factor: float = 0.1

    def __post_init__(self) -> None:
        one_of("schedule.name", self.name, ("cosine", "step", "linear", "constant"))
        at_least("schedule.epochs", self.epochs, 0, strictly=True)
        at_least("schedule.warmup_epochs", self.warmup_epochs, 0)
        share("schedule.warmup_start", self.warmup_start)
        share("schedule.final", self.final)
        at_least("schedule.step_factor", self.step_factor, 0, strictly=True)
        if self.step_epochs != sorted(self.step_epochs):
            raise ConfigError(f"schedule.step_epochs={self.step_epochs} must rise")
        if self.warmup_epochs >= self.epochs:
            raise ConfigError(
                f"schedule.warmup_epochs={self.warmup_epochs:g} leaves nothing of schedule.epochs={self.epochs:g}: "
                "lower the first or raise the second"
            )


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The training loss. Evaluation always reports plain cross-entropy."""

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ConfigError(f"loss.label_smoothing={self.label_smoothing} must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Number formats and layout."""

    amp: str = "auto"  # auto (bf16 where the hardware computes it, else fp32) | bf16 | fp16 (GradScaler) | fp32
    channels_last: bool = True
    compile: bool = False  # torch.compile
    tf32: bool = True  # fp32 matrix products of a GPU on its tensor cores
    loss_scale: float = 65536.0  # start of the dynamic scale, for fp16

    def __post_init__(self) -> None:
        one_of("precision.amp", self.amp, ("auto", "bf16", "fp16", "fp32"))
        at_least("precision.loss_scale", self.loss_scale, 1)


@dataclass(frozen=True, kw_only=True)
class Loop:
    """When to evaluate and when to end early."""

    eval_every: float = 1  # epochs between evaluations; 0: never
    max_steps: int | None = None  # end after this many steps; the schedule stays that of schedule.epochs
    # A loss or gradient that is not finite: stop | skip (no rank takes that step) | rollback (to the last save, leaving
    # out the data since).
    on_nonfinite: str = "stop"
    nonfinite_limit: int = 5  # skip: steps in a row, rollback: times in a run, after which it stops all the same

    def __post_init__(self) -> None:
        one_of("loop.on_nonfinite", self.on_nonfinite, ("stop", "skip", "rollback"))
        at_least("loop.nonfinite_limit", self.nonfinite_limit, 1)
        at_least("loop.eval_every", self.eval_every, 0)
        at_least("loop.max_steps", self.max_steps, 1)
        if self.eval_every != int(self.eval_every):
            raise ConfigError(f"loop.eval_every={self.eval_every} must be whole epochs")


@dataclass(frozen=True, kw_only=True)
class Distributed:
    """How ranks talk to each other."""

    timeout: float = 600.0  # seconds after which a rank that waits for another gives up
    bucket_mb: int = 25  # gradients that are reduced together, DDP's default
    sync_bn: bool = False  # BatchNorm over all ranks
    hang_after: float = 300.0  # seconds without progress after which the run names the rank that holds it up, and ends
    check_every: int = 100  # steps between comparisons of the ranks' weights; 0: never

    def __post_init__(self) -> None:
        at_least("distributed.timeout", self.timeout, 1)
        at_least("distributed.hang_after", self.hang_after, 1)
        at_least("distributed.check_every", self.check_every, 0)
        at_least("distributed.bucket_mb", self.bucket_mb, 1)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When to save. The end of every evaluated epoch always saves."""

    every_steps: int | None = None
    every_minutes: float | None = None
    keep: int = 2  # the newest ones; the best is kept besides
    keep_every: int | None = None  # epochs: those saved at the end of every so many are kept for ever

    def __post_init__(self) -> None:
        at_least("checkpoint.every_steps", self.every_steps, 1)
        at_least("checkpoint.every_minutes", self.every_minutes, 0, strictly=True)
        at_least("checkpoint.keep", self.keep, 1)
        at_least("checkpoint.keep_every", self.keep_every, 1)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is written down, and how often."""

    log_every: int = 50  # steps
    wandb: str = "auto"  # auto (online with a key, offline without) | online | offline | disabled
    project: str = "imagenet-trainer"
    name: str | None = None  # of the W&B run; None: the run folder's

    def __post_init__(self) -> None:
        at_least("report.log_every", self.log_every, 1)
        one_of("report.wandb", self.wandb, ("auto", "online", "offline", "disabled"))


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run. `global_batch_size` is the optimiser's batch whatever the number of GPUs."""

    output_dir: str = "runs/default"
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    deterministic: bool = False  # bitwise reproducible on a GPU too, and slower
    global_batch_size: int = 256
    max_batch_per_gpu: int | None = None  # more images than this a rank are accumulated; None: no limit
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    mix: Mix = field(default_factory=Mix)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    loss: Loss = field(default_factory=Loss)
    precision: Precision = field(default_factory=Precision)
    loop: Loop = field(default_factory=Loop)
    distributed: Distributed = field(default_factory=Distributed)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    report: Report = field(default_factory=Report)

    def __post_init__(self) -> None:
        one_of("device", self.device, ("auto", "cpu", "cuda"))
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} must lie between 0 and 2**32 - 1")
        at_least("global_batch_size", self.global_batch_size, 1)
        at_least("max_batch_per_gpu", self.max_batch_per_gpu, 1)
        if self.global_batch_size % self.augment.repeats:
            raise ConfigError(
                f"augment.repeats={self.augment.repeats} does not divide global_batch_size={self.global_batch_size}"
            )
        if self.data.start_size is not None and self.augment.crop != "resized":
            raise ConfigError(
                f"data.start_size={self.data.start_size} resizes crops, and augment.crop={self.augment.crop} takes "
                "them as they are: use augment.crop=resized"
            )
