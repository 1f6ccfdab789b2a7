"""ColOut: a step's images lose the same few rows and columns, which makes them smaller and the step cheaper.

Source: MosaicML's Composer, composer/algorithms/colout, as it works on batches by default (`batch=True`). There each
rank draws for itself; here the draw belongs to the global step, so that ranks and accumulation change nothing.
"""

from __future__ import annotations

import numpy as np
import torch

from trainer.data.philox import COLOUT, uniforms


def colout(images: torch.Tensor, share: float, seed: int, step: int) -> torch.Tensor:
    """`images` without `share` of their rows and columns, drawn from (seed, step); draws on the host, never waits.

    Args:
        images: (n, channels, height, width) of any memory format, which is kept; not changed.

    Returns:
        (n, channels, int((1 - share) * height), int((1 - share) * width)); at least a row and a column are left.
    """
    memory_format = torch.channels_last if images.stride(1) == 1 else torch.contiguous_format
    for axis in (2, 3):
        kept = _kept(images.shape[axis], share, seed, step, axis)
        if images.is_cuda:
            kept = kept.pin_memory().to(images.device, non_blocking=True)  # else the copy would wait
        images = images.index_select(axis, kept)
    return images.contiguous(memory_format=memory_format)


def _kept(size: int, share: float, seed: int, step: int, axis: int) -> torch.Tensor:
    """The indices that stay, in order: int64."""
    drawn = uniforms(seed, np.array([step]), np.array([axis]), size, stream=COLOUT)[0]
    return torch.from_numpy(np.sort(np.argsort(drawn)[: max(1, int((1 - share) * size))]))
