"""Evaluation in which every image counts exactly once, for any number of ranks and any batch size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from trainer.data.loader import EvaluationBatches
from trainer.distributed import World
from trainer.metrics import Averages, Pending, averages, sums
from trainer.precision import autocast

# (logits float32 (n, classes), labels int64 (n,), rows int64 (n,))
Observe = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: EvaluationBatches,
    world: World,
    dtype: torch.dtype | None,
    stop: Callable[[], bool] = lambda: False,
    flip: bool = False,
    observe: Observe | None = None,
) -> Averages | None:
    """Cross-entropy and accuracy of `model` over the whole set; every rank calls it and gets the same.

    Images that cannot be decoded (`data.on_error=skip`) are in neither the sums nor the count. None if `stop` said so.

    Args:
        model: the bare network, the same on every rank. Its mode is restored.
        dtype: to autocast to, None for fp32.
        stop: asked after a batch, equally often on every rank; it must answer the same on all.
        flip: average each image's logits with those of its mirror image.
        observe: called with each batch's logits, labels and rows of the index; it must not wait for the device.
    """
    training = model.training
    model.eval()
    total = torch.zeros(5, dtype=torch.float64, device=world.device)
    questions, stopped = batches.common, False
    for images, labels, rows in batches.with_rows() if observe else ((*batch, None) for batch in batches):
        with autocast(dtype, world.device):
            logits = model(images).float()
            if flip:
                logits = (logits + model(images.flip(3)).float()) / 2
        total[:4] += sums(functional.cross_entropy(logits, labels), logits, labels)
        if observe:
            observe(logits, labels, rows)
        if questions:
            questions -= 1
            stopped = stop()
        if stopped:
            break
    # A batch of nothing but what cannot be decoded does not come, and the other ranks ask after theirs.
    while questions and not stopped:
        questions -= 1
        stopped = stop()
    model.train(training)
    if stopped:
        return None
    total[4] = batches.left_out
    *totals, left_out = Pending(total, world).values()
    result = averages(totals)
    assert result.count + left_out == len(batches), f"evaluated {result.count} of {len(batches)} images"
    return result
