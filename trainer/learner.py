"""From the config to what a training step needs: the network on its device, optimiser, loss, scaler, schedule."""

from __future__ import annotations

import torch
from torch import nn

from trainer import compression, graphs, losses, mix, optim, precision, schedule, teacher
from trainer.colout import colout
from trainer.config import Config, ConfigError
from trainer.data.loader import DataSet
from trainer.distributed import World
from trainer.ema import Average
from trainer.loop import Learner, Mixing
from trainer.models import build, cpu_norm, folded, gpu_norm, packed_stem, parallel
from trainer.models.start import check_sizes
from trainer.nonfinite import Skipping
from trainer.plan import Plan


def create(config: Config, plan: Plan, here: World, data: DataSet) -> Learner:
    """The network on its device, its optimiser, loss, scaler and schedule; ConfigError if they do not fit the data."""
    classes = _classes(config, data)
    torch.manual_seed(config.seed)
    model = build.create(config.model, classes)
    if config.model.weights:
        build.load_weights(model, config.model.weights, new_head=config.model.new_head)
    check_sizes(config.model, model, _sizes(config))
    dtype = precision.amp_dtype(config.precision, here.device)
    _fuse(config, model, here)
    if config.precision.packed_stem and not packed_stem.pack(model):
        raise ConfigError(
            "precision.packed_stem=true packs a first convolution of 7x7 at stride 2, and "
            f"model.name={config.model.name} begins with another: leave it out"
        )
    stream = None
    if config.precision.cuda_graph:
        graphs.refuse(config, plan, here, dtype)
        stream = torch.cuda.Stream(here.device)
    with graphs.on(stream):  # DDP must be made where its steps are recorded
        model = parallel.parallelize(
            model,
            here,
            config.distributed,
            channels_last=config.precision.channels_last,
            compile=config.precision.compile,
        )
        if config.distributed.gradients == "bf16" and here.size > 1:
            compression.compress(model, here, config.distributed.timeout)
        parallel.settle_buckets(model, here, config.data.image_size)
    optimizer = optim.create(config.optim, model, here.device)
    return Learner(
        model=model,
        optimizer=optimizer,
        criterion=losses.create(config.loss),
        scaler=precision.grad_scaler(config.precision, dtype, here.device),
        lr_at=lambda step: schedule.lr_at(step, config.schedule, plan),
        device=here.device,
        dtype=dtype,
        accumulation=plan.accumulation,
        clip=optim.clipping(config.optim, model),
        average=Average(model, config.ema, plan) if config.ema.half_life is not None else None,
        teacher=teacher.create(config, classes, here.device),
        uphill=lambda step: 0.0 if step % config.optim.sam_every else config.optim.sam_rho,
        mix=_mixing(config, plan, here, classes),
        skipping=Skipping.of(build.unwrap(model)) if config.loop.on_nonfinite == "skip" else None,
        norms_at=(lambda step: (step + 1) % config.report.log_every == 0) if config.report.gradient_norms else None,
        # Ranks and seeds a long way apart; the step is added to it.
        seed=(config.seed * 1_000_003 + here.rank) % 2**38 << 24,
        graphs=graphs.Graphs(optimizer, here, stream) if stream is not None else None,
    )


def _fuse(config: Config, model: nn.Module, here: World) -> None:
    """Fuse the norms of `model` where that is asked for, or the default and possible; ConfigError where it is not."""
    options, cpu = config.precision, here.device.type == "cpu"
    # On a GPU only where it is asked for: not measured on a GPU.
    unasked = options.fused is None and (not cpu or options.compile or not options.channels_last)
    if options.fused is False or unasked or config.distributed.sync_bn:
        return
    if cpu and options.folded:
        raise ConfigError(f"precision.folded=true needs a GPU, and device={here.device}: leave it out")
    if cpu:
        fused, needs = cpu_norm.fuse(model), "a C compiler (cc, gcc or clang) that works: install one"
    else:
        fused, needs = gpu_norm.fuse(model), "the package triton, which comes with torch for CUDA: install it"
    if not fused and options.fused:
        raise ConfigError(f"precision.fused=true needs {needs}, or leave it out")
    if options.folded and not folded.fold(model):
        raise ConfigError(
            "precision.folded=true folds norms into the 1x1 convolutions of our bottlenecks, and "
            f"model.name={config.model.name} has none: leave it out"
        )


def _classes(config: Config, data: DataSet) -> int:
    """Classes of the network: as many as the data has, or as many as asked for if that is enough."""
    asked, present = config.model.num_classes, len(data.classes)
    if asked is not None and asked < present:
        raise ConfigError(
            f"model.num_classes={asked}, but the data has {present} classes: use {present}, or leave it out"
        )
    return asked or present


def _sizes(config: Config) -> dict[str, int]:
    """Sides of the images that the network will see, by the key that says so."""
    data = config.data
    sizes = {"data.image_size": data.image_size, "data.start_size": data.start_size}
    if config.loop.eval_every:
        sizes["data.eval_size"] = data.eval_size
    return {key: size for key, size in sizes.items() if size is not None}


def _mixing(config: Config, plan: Plan, here: World, classes: int) -> Mixing | None:
    """ColOut, mixup and CutMix of this rank's forward batches, None for none of them; ConfigError if a pair is cut."""
    share = config.augment.colout
    if not config.mix.on and not share:
        return None
    if config.mix.on and plan.batch % 2:
        raise ConfigError(
            f"mix.mixup or mix.cutmix pairs images, and a forward batch holds {plan.batch} of them: "
            "choose global_batch_size and max_batch_per_gpu so that it is even"
        )
    first = here.rank * plan.batch * plan.accumulation
    off = plan.total_steps if config.mix.on else 0
    if config.mix.off_epoch is not None:
        off = round(config.mix.off_epoch * config.schedule.scale * plan.steps_per_epoch)

    def mixed(images: torch.Tensor, labels: torch.Tensor, step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
        if share:
            images = colout(images, share, config.seed, step)
        if step >= off:
            return images, labels
        return mix.mix(images, labels, config.mix, classes, config.seed, step, first + micro * plan.batch)

    return mixed
