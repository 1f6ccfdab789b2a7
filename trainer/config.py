"""Every option of the trainer, its default, and what makes a value impossible.

A section is named after the module that reads it: `optim.lr` is used in trainer/optim.py. trainer/configfile.py reads
YAML and `key=value` into these classes, trainer/plan.py derives the arithmetic of a run from them.

This module imports neither torch nor the rest of the trainer, so `--help` and a config error cost no start-up time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.config_augment import Augment as Augment
from trainer.config_augment import Mix as Mix
from trainer.config_contradictions import refuse_contradictions
from trainer.config_data import Data as Data
from trainer.config_model import Model as Model
from trainer.config_optim import Ema as Ema
from trainer.config_optim import Loss as Loss
from trainer.config_optim import Optim as Optim
from trainer.config_optim import Schedule as Schedule
from trainer.mistakes import ConfigError as ConfigError
from trainer.mistakes import RunError as RunError
from trainer.mistakes import at_least, one_of


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Number formats and layout."""

    amp: str = "auto"  # auto (bf16 where the hardware is faster at it, else fp32) | bf16 | fp16 (GradScaler) | fp32
    channels_last: bool = True
    compile: bool = False  # torch.compile
    # BatchNorm, addition and ReLU in one pass; None: on a CPU that has a C compiler, unless `compile` fuses (on a GPU
    # only true does, by Triton's kernels: not measured there)
    fused: bool | None = None
    # with `fused`, norms of a GPU folded into the 1x1 convolutions of our bottlenecks; not measured on a GPU
    folded: bool = False
    cuda_graph: bool = False  # a GPU's whole step as one CUDA graph; not measured on a GPU
    packed_stem: bool = False  # the 7x7 convolution of images as a 4x4 one of 2x2 blocks; not measured on a GPU
    compile_cache: str | None = (
        None  # a folder for what is compiled, kept between runs; None: ~/.cache/imagenet-trainer
    )
    tf32: bool = True  # fp32 matrix products of a GPU on its tensor cores
    loss_scale: float = 65536.0  # of fp16: where its dynamic scale starts
    static_scale: bool = False  # leave fp16's scale where it starts: no step is left out, and none waits to be judged

    def __post_init__(self) -> None:
        one_of("precision.amp", self.amp, ("auto", "bf16", "fp16", "fp32"))
        at_least("precision.loss_scale", self.loss_scale, 1)
        if self.static_scale and self.amp in ("bf16", "fp32"):
            raise ConfigError(f"precision.static_scale=true is fp16's, and precision.amp={self.amp}: leave one out")
        if self.fused and self.compile:
            raise ConfigError("precision.fused=true and precision.compile=true both fuse: leave one out")
        if self.fused and not self.channels_last:
            raise ConfigError("precision.fused=true needs precision.channels_last=true: its kernels read no other")
        if self.folded and not self.fused:
            raise ConfigError("precision.folded=true needs precision.fused=true, whose norms it folds: set both")


@dataclass(frozen=True, kw_only=True)
class Loop:
    """When and how to evaluate, and when to end early."""

    eval_every: float = 1  # epochs between evaluations; 0: never
    eval_flip: bool = False  # average each image's logits with those of its mirror image
    precise_bn: int = 0  # training images of which BatchNorm's statistics are taken anew, for evaluation alone; 0: off
    stop_at: dict[str, float] = field(default_factory=dict)  # {top1: 75.9}: end the run at the first evaluation there
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
        at_least("loop.precise_bn", self.precise_bn, 0)
        for key, target in self.stop_at.items():
            if key != "top1" or not 0 < target <= 100:
                raise ConfigError(f"loop.stop_at={{{key}: {target}}} is not known: write {{top1: PERCENT}}")
        if self.eval_every != int(self.eval_every):
            raise ConfigError(f"loop.eval_every={self.eval_every} must be whole epochs")


@dataclass(frozen=True, kw_only=True)
class Distributed:
    """How ranks talk to each other."""

    timeout: float = 600.0  # seconds after which a rank that waits for another gives up
    bucket_mb: int = 25  # gradients that are reduced together, DDP's default
    # The bucket of the first layers, which are the last to have gradients: nothing hides its reduction. Those before it
    # double, up to bucket_mb. Of PyTorch's that know no list of buckets, all are of bucket_mb.
    last_bucket_mb: int = 4
    # As what gradients travel between ranks: fp32 | bf16 (half the bytes; summed in fp32, trainer/compression.py)
    gradients: str = "fp32"
    sync_bn: bool = False  # BatchNorm over all ranks
    hang_after: float = 300.0  # seconds without progress after which the run names the rank that holds it up, and ends
    check_every: int = 100  # steps between comparisons of the ranks' weights; 0: never

    def __post_init__(self) -> None:
        one_of("distributed.gradients", self.gradients, ("fp32", "bf16"))
        at_least("distributed.timeout", self.timeout, 1)
        at_least("distributed.hang_after", self.hang_after, 1)
        at_least("distributed.check_every", self.check_every, 0)
        at_least("distributed.bucket_mb", self.bucket_mb, 1)
        at_least("distributed.last_bucket_mb", self.last_bucket_mb, 1)


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
    mistakes: int = 16  # the most confident wrong answers kept of an evaluation, with their pictures; 0: none
    gradient_norms: bool = False  # every parameter's at each record, in gradients.jsonl
    tensorboard: bool = False  # write RUN/tensorboard as well; needs the package tensorboard
    wandb: str = "auto"  # auto (online with a key, offline without) | online | offline | disabled
    # Of the W&B run:
    project: str = "imagenet-trainer"
    entity: str | None = None  # None: the key's own
    name: str | None = None  # None: the run folder's
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str | None = None
    artifact: str | None = None  # best: the best checkpoint is uploaded when the run is done

    def __post_init__(self) -> None:
        at_least("report.log_every", self.log_every, 1)
        at_least("report.mistakes", self.mistakes, 0)
        one_of("report.artifact", self.artifact, (None, "best"))
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
    ema: Ema = field(default_factory=Ema)
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
        refuse_contradictions(self)
