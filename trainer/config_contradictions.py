"""Options that are sound alone and impossible together: refused at the start, naming both keys."""

from __future__ import annotations

from typing import Any

from trainer.mistakes import ConfigError


def refuse_contradictions(config: Any) -> None:  # a Config, which is made of what stands right of here
    """ConfigError for the first contradiction between sections; those that need the data's size are in plan.py."""
    augment, data, schedule = config.augment, config.data, config.schedule
    if config.global_batch_size % augment.repeats:
        raise ConfigError(
            f"augment.repeats={augment.repeats} does not divide global_batch_size={config.global_batch_size}"
        )
    if data.start_size is not None and augment.crop != "resized":
        raise ConfigError(
            f"data.start_size={data.start_size} resizes crops, and augment.crop={augment.crop} takes "
            "them as they are: use augment.crop=resized"
        )
    if augment.start_strength < 1 and augment.policy in ("autoaugment", "trivialaugment"):
        raise ConfigError(
            f"augment.start_strength={augment.start_strength} has no magnitude to raise in augment.policy="
            f"{augment.policy}: use augment.policy=randaugment, or leave it out"
        )
    for key, epoch in (("mix.off_epoch", config.mix.off_epoch), ("ema.start_epoch", config.ema.start_epoch)):
        if epoch is not None and epoch >= (schedule.epochs if key == "mix.off_epoch" else schedule.length):
            raise ConfigError(f"{key}={epoch:g} lies beyond the end of schedule.epochs={schedule.epochs:g}: lower it")
    if config.mix.off_epoch is not None and not config.mix.on:
        raise ConfigError(
            f"mix.off_epoch={config.mix.off_epoch:g} switches off what mix.mixup=0 and mix.cutmix=0 never do"
        )
    if config.loop.stop_at and not config.loop.eval_every:
        raise ConfigError(f"loop.stop_at={config.loop.stop_at} is never met at loop.eval_every=0: evaluate every epoch")
    if config.model.head_prior and config.loss.name != "bce":
        raise ConfigError(
            f"model.head_prior=true is for loss.name=bce, not for loss.name={config.loss.name}: leave it out"
        )
    if config.precision.fused and config.distributed.sync_bn:
        raise ConfigError(
            "precision.fused=true norms the images of one rank, and distributed.sync_bn=true those of all: "
            "leave one out"
        )
    if config.precision.cuda_graph:
        _refuse_in_a_graph(config)


def _refuse_in_a_graph(config: Any) -> None:
    """What the host decides, draws or waits for in a step: a graph of it would do the same in every step."""
    asked, model, optim = "precision.cuda_graph=true", config.model, config.optim
    refused = [
        (optim.name not in ("sgd", "adamw"), f"optim.name={optim.name}", "use optim.name=sgd or adamw"),
        (optim.sam_rho, f"optim.sam_rho={optim.sam_rho:g}", "a step uphill is two"),
        (config.report.gradient_norms, "report.gradient_norms=true", "the host chooses its steps"),
        (model.drop_rate, f"model.drop_rate={model.drop_rate:g}", "what it draws is not the step's then"),
        (model.drop_path_rate, f"model.drop_path_rate={model.drop_path_rate:g}", "as with dropout"),
        (config.distributed.gradients == "bf16", "distributed.gradients=bf16", "the host orders its exchange"),
        (
            config.precision.amp == "fp16" and not config.precision.static_scale,
            "precision.amp=fp16",
            "its loss scale is dynamic: use bf16, or precision.static_scale=true",
        ),
    ]
    for found, option, why in refused:
        if found:
            raise ConfigError(f"{asked} cannot be had with {option} ({why}): leave one out")
