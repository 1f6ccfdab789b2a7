"""Evaluation in which every image counts exactly once, for any number of ranks and any batch size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from trainer.data.loader import EvaluationBatches
from trainer.distributed import World
from trainer.metrics import Averages, Pending, sums
from trainer.precision import autocast


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: EvaluationBatches,
    world: World,
    dtype: torch.dtype | None,
    stop: Callable[[], bool] = lambda: False,
) -> Averages | None:
    """Cross-entropy and accuracy of `model` over the whole set; every rank calls it and gets the same.

    None if `stop` said so.

    Args:
        model: the bare network, the same on every rank. Its mode is restored.
        dtype: to autocast to, None for fp32.
        stop: asked after a batch, equally often on every rank; it must answer the same on all.
    """
    training = model.training
    model.eval()
    total = torch.zeros(4, dtype=torch.float64, device=world.device)
    for number, (images, labels) in enumerate(batches):
        with autocast(dtype, world.device):
            logits = model(images).float()
        total += sums(functional.cross_entropy(logits, labels), logits, labels)
        if number < batches.common and stop():
            model.train(training)
            return None
    model.train(training)
    result = Pending(total, world).read()
    assert result.count == len(batches), f"evaluated {result.count} of {len(batches)} images"
    return result
