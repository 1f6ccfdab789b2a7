"""The training loss."""

from __future__ import annotations

from torch import nn

from trainer.config import Loss


def create(options: Loss) -> nn.Module:
    """Cross-entropy of logits (n, classes) and labels int64 (n,), averaged over the n, with label smoothing."""
    return nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
