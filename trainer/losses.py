"""The training loss of logits (n, classes) and labels int64 (n,) or probabilities (n, classes), averaged over n."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from trainer.config import Loss


def create(options: Loss) -> nn.Module:
    """Cross-entropy or binary cross-entropy, with label smoothing."""
    if options.name == "bce":
        return BinaryCrossEntropy(options)
    return nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)


class BinaryCrossEntropy(nn.Module):
    """Each class a yes-or-no question; summed over the classes (Composer) or averaged (timm), then over the images.

    With a threshold every class whose share of a mixed image is above it counts as wholly there (Wightman et al.,
    arXiv:2110.00476, section 3). Smoothing comes after it and is cross-entropy's: s of each target spread evenly.
    """

    def __init__(self, options: Loss) -> None:
        super().__init__()
        self._options = options

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        options, (n, classes) = self._options, logits.shape
        if targets.ndim == 1:
            targets = (targets[:, None] == torch.arange(classes, device=targets.device)).to(logits.dtype)
        if options.bce_threshold is not None:
            targets = (targets > options.bce_threshold).to(logits.dtype)
        targets = torch.lerp(targets, torch.full_like(targets, 1 / classes), options.label_smoothing)
        total = functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        return total / (n if options.bce_reduction == "sum" else n * classes)


def distance(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Kullback and Leibler's distance from the teacher's answer to ours, both softened; times temperature squared.

    So the gradient's size does not depend on the temperature (Hinton et al., arXiv:1503.02531, section 2).
    """
    ours, theirs = (functional.log_softmax(x / temperature, dim=1) for x in (logits, teacher))
    return functional.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2
