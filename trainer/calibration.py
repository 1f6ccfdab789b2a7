"""Whether a network is as sure as it is right."""

from __future__ import annotations

import numpy as np

BINS = 15


def expected_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error, 0 to 1: the mean over images of |accuracy - confidence| of their bin.

    Naeini et al. 2015, as Guo et al. (arXiv:1706.04599, equations 2 and 3) define it: bin m of M holds the images whose
    confidence lies in ((m - 1) / M, m / M].

    Args:
        confidence: the probability given to the predicted class, (n,), in [0, 1].
        right: whether the prediction is, bool (n,).
    """
    which = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gap = np.bincount(which, right.astype(np.float64) - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))
