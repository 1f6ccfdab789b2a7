"""Philox4x64-10 for many counters at once: the counter-based generator behind every draw about the data.

numpy's own Philox makes one long stream; here every sample has its own counter, and a Python loop over generators
would cost more than decoding small images. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011);
a test holds this equal to numpy.random.Philox.
"""

from __future__ import annotations

import numpy as np

# Second half of the key, so that no two uses of one seed share numbers.
ORDER, AUGMENT, AUGMENT_OPS, MIX, COLOUT = 1, 2, 3, 4, 5

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B


def _multiply(a: np.uint64, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """High and low 64 bits of a * b, by the schoolbook on 32-bit halves: numpy has no 128-bit integer."""
    a0, a1, b0, b1 = a & _LOW, a >> _HALF, b & _LOW, b >> _HALF
    middle = a1 * b0 + (a0 * b0 >> _HALF)
    cross = a0 * b1 + (middle & _LOW)
    return a1 * b1 + (middle >> _HALF) + (cross >> _HALF), a * b


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Four random words for each counter: uint64 (n, 4) to uint64 (n, 4)."""
    c0, c1, c2, c3 = (counter[:, i] for i in range(4))
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), low1, high0 ^ c3 ^ np.uint64(k1), low0
        k0, k1 = (k0 + _WEYL[0]) % 2**64, (k1 + _WEYL[1]) % 2**64
    return np.stack([c0, c1, c2, c3], axis=1)


def uniforms(
    seed: int,
    epochs: np.ndarray,
    rows: np.ndarray,
    count: int,
    repeats: int | np.ndarray = 0,
    stream: int = AUGMENT,
) -> np.ndarray:
    """`count` numbers in [0, 1) for each sample: float64 of shape (n, count), a function of (seed, epoch, row, repeat).

    Args:
        epochs, rows: integers of shape (n,).
        stream: one of the numbers above: other streams of the same sample are independent of it.
        repeats: which of a sample's repetitions within the epoch, from 0; a number or shape (n,).
    """
    blocks = -(-count // 4)
    counter = np.empty((len(rows), blocks, 4), np.uint64)
    counter[..., 0] = np.arange(blocks)
    counter[..., 1] = np.asarray(rows)[:, None]
    counter[..., 2] = np.asarray(epochs)[:, None]
    counter[..., 3] = np.broadcast_to(repeats, len(rows))[:, None]
    words = philox(counter.reshape(-1, 4), (seed, stream)).reshape(len(rows), blocks * 4)[:, :count]
    return (words >> np.uint64(11)) * 2.0**-53
