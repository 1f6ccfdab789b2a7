"""The options of learning: the sections `optim`, `schedule`, `loss` and `ema` of trainer/config.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.mistakes import ConfigError, at_least, one_of, share


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimiser, and what is done to gradients before it sees them."""

    name: str = "sgd"  # sgd | sgdw (weight decay decoupled from momentum) | lars | lamb | adamw | rmsprop
    lr: float = 0.1  # peak, at global_batch_size: nothing is scaled behind your back
    scale_lr: str = "none"  # none | linear | sqrt: optim.lr is the peak at lr_batch, and scaled to global_batch_size
    lr_batch: int = 256  # for scale_lr
    momentum: float = 0.9  # of sgd, sgdw, lars and rmsprop
    nesterov: bool = False  # of sgd and sgdw
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # of lamb and adamw; the second also of rmsprop
    eps: float = 1e-6  # of lamb, adamw and rmsprop
    trust: float = 0.001  # of lars: its eta
    weight_decay: float = 1e-4  # sgd, lars, lamb, rmsprop: added to the gradient's direction; sgdw, adamw: times lr
    decay_1d: bool = False  # True: also biases and norms, as torchvision V1 and pytorch/examples
    clip_norm: float | None = None  # clip the gradient's global 2-norm
    clip_value: float | None = None  # clip each element of the gradient
    clip_agc: float | None = None  # adaptive: at most this share of the weights' norm, unit by unit (arXiv:2102.06171)
    sam_rho: float = 0.0  # sharpness-aware (arXiv:2010.01412): how far the weights are moved uphill first; 0: off
    sam_every: int = 1  # steps from one such step to the next; the others are plain

    def __post_init__(self) -> None:
        one_of("optim.name", self.name, ("sgd", "sgdw", "lars", "lamb", "adamw", "rmsprop"))
        one_of("optim.scale_lr", self.scale_lr, ("none", "linear", "sqrt"))
        at_least("optim.lr_batch", self.lr_batch, 1)
        at_least("optim.sam_every", self.sam_every, 1)
        for key in ("weight_decay", "sam_rho"):
            at_least(f"optim.{key}", getattr(self, key), 0)
        for key in ("lr", "eps", "trust", "clip_norm", "clip_value", "clip_agc"):
            at_least(f"optim.{key}", getattr(self, key), 0, strictly=True)
        if not 0.0 <= self.momentum < 1.0:
            raise ConfigError(f"optim.momentum={self.momentum} must be at least 0 and below 1")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"optim.betas={self.betas} must be two numbers of at least 0 and below 1")
        if self.nesterov and self.momentum == 0:
            raise ConfigError("optim.nesterov=true needs optim.momentum above 0")
        if self.nesterov and self.name not in ("sgd", "sgdw"):
            raise ConfigError(f"optim.nesterov=true is for optim.name=sgd or sgdw, not for optim.name={self.name}")
        clips = [key for key in ("clip_norm", "clip_value", "clip_agc") if getattr(self, key) is not None]
        if len(clips) > 1:
            raise ConfigError(f"optim.{clips[0]} and optim.{clips[1]} both clip the gradient: leave one out")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate, step by step: linear warm-up, then the shape named."""

    name: str = "cosine"  # cosine | step | linear | polynomial | constant
    epochs: float = 90
    scale: float = 1.0  # stretches epochs, step_epochs and mix.off_epoch; the warm-up stays, as in FFCV and Composer
    warmup_epochs: float = 5
    warmup_steps: int | None = None  # instead of warmup_epochs
    warmup_samples: int | None = None  # instead of warmup_epochs
    warmup_start: float = 0.0  # share of optim.lr at the first step
    final: float = 0.0  # share of optim.lr at the end, for cosine, linear and polynomial
    power: float = 2.0  # for polynomial
    step_epochs: list[float] = field(default_factory=lambda: [30, 60, 80])  # for step
    step_factor: float = 0.1

    def __post_init__(self) -> None:
        one_of("schedule.name", self.name, ("cosine", "step", "linear", "polynomial", "constant"))
        for key in ("epochs", "scale", "power", "step_factor"):
            at_least(f"schedule.{key}", getattr(self, key), 0, strictly=True)
        for key in ("warmup_epochs", "warmup_steps", "warmup_samples"):
            at_least(f"schedule.{key}", getattr(self, key), 0)
        share("schedule.warmup_start", self.warmup_start)
        share("schedule.final", self.final)
        if self.step_epochs != sorted(self.step_epochs):
            raise ConfigError(f"schedule.step_epochs={self.step_epochs} must rise")
        if self.warmup_steps is not None and self.warmup_samples is not None:
            raise ConfigError("schedule.warmup_steps and schedule.warmup_samples both say how long: leave one out")
        by_epochs = self.warmup_steps is None and self.warmup_samples is None
        if by_epochs and self.warmup_epochs >= self.length:
            scaled = f" at schedule.scale={self.scale:g}" if self.scale != 1 else ""
            raise ConfigError(
                f"schedule.warmup_epochs={self.warmup_epochs:g} leaves nothing of schedule.epochs={self.epochs:g}"
                f"{scaled}: lower the first or raise the second"
            )

    @property
    def length(self) -> float:
        """Epochs of the whole run."""
        return self.epochs * self.scale

    @property
    def boundaries(self) -> list[float]:
        """Epochs at which the rate falls, for step."""
        return [epoch * self.scale for epoch in self.step_epochs]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The training loss. Evaluation always reports plain cross-entropy."""

    name: str = "cross_entropy"  # cross_entropy | bce (each class on its own; summed over the classes)
    label_smoothing: float = 0.0
    bce_reduction: str = "sum"  # sum | mean, over the classes, for bce
    bce_threshold: float | None = None  # soft targets above it count as 1, the others as 0, for bce
    teacher: str | None = None  # model.name of a network to distil from; None: no distillation
    teacher_weights: str | None = None  # its file of weights
    teacher_share: float = 0.5  # of the loss that is the distance to the teacher; the rest is to the labels
    temperature: float = 1.0  # by which both logits are divided for that distance (arXiv:1503.02531)

    def __post_init__(self) -> None:
        one_of("loss.name", self.name, ("cross_entropy", "bce"))
        one_of("loss.bce_reduction", self.bce_reduction, ("sum", "mean"))
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ConfigError(f"loss.label_smoothing={self.label_smoothing} must be at least 0 and below 1")
        if self.bce_threshold is not None:
            share("loss.bce_threshold", self.bce_threshold)
            if self.name != "bce":
                raise ConfigError(f"loss.bce_threshold={self.bce_threshold} needs loss.name=bce, not {self.name}")
        share("loss.teacher_share", self.teacher_share)
        at_least("loss.temperature", self.temperature, 0, strictly=True)
        if self.teacher is not None and self.name == "bce":
            raise ConfigError(
                f"loss.teacher={self.teacher} needs loss.name=cross_entropy: loss.name=bce takes no teacher"
            )
        if (self.teacher is None) != (self.teacher_weights is None):
            raise ConfigError(
                f"loss.teacher={self.teacher} and loss.teacher_weights={self.teacher_weights} "
                "need each other: give both or neither"
            )


@dataclass(frozen=True, kw_only=True)
class Ema:
    """A moving average of the weights, evaluated and saved beside them."""

    half_life: float | None = None  # samples after which a weight counts half: the same at any batch; None: no average
    every: int = 1  # steps from one update to the next
    start_epoch: float = 0.0  # until then the average is a copy of the weights
    rampup: float | None = None  # half_life is at most this share of the samples since start_epoch (arXiv:2206.00364)

    def __post_init__(self) -> None:
        at_least("ema.half_life", self.half_life, 0, strictly=True)
        at_least("ema.every", self.every, 1)
        at_least("ema.start_epoch", self.start_epoch, 0)
        at_least("ema.rampup", self.rampup, 0, strictly=True)
