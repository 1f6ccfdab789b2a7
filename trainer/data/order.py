"""Which sample stands at which position: pure functions of (seed, epoch).

Nothing about the order is ever saved: a run resumed at any step, on any number of ranks, asks the same functions.
"""

from __future__ import annotations

import numpy as np

from trainer.data.philox import ORDER


def epoch_order(seed: int, epoch: int, samples: int) -> np.ndarray:
    """The permutation of `samples` rows in epoch `epoch` (from 0), int64 of shape (samples,).

    Sorts raw Philox numbers instead of calling numpy's `permutation`: the raw stream is fixed by the algorithm, the
    shuffling built on it may change between numpy releases (NEP 19), and with it the order of a resumed run.
    """
    generator = np.random.Philox(key=[seed, ORDER], counter=[0, 0, epoch, 0])
    return np.argsort(generator.random_raw(samples), kind="stable")


class Order:
    """The endless row of samples: the order of epoch 0, then of epoch 1, and so on.

    With repeated augmentation (Hoffer et al., arXiv:1901.09335) a step of G positions holds G / repeats samples, each
    `repeats` times: first all of them once, then all again, so that neighbours, which mixup pairs, are different images
    and ranks share the repetitions as in torchvision's RASampler. A permutation then lasts `repeats` epochs, in which
    every sample comes exactly `repeats` times; RASampler takes a fresh one each epoch and leaves most of it unseen.
    """

    def __init__(self, seed: int, samples: int, repeats: int = 1, global_batch: int = 1) -> None:
        assert repeats == 1 or global_batch % repeats == 0, f"{repeats} repeats of a batch of {global_batch}"
        self.seed, self.samples = seed, samples
        self._repeats, self._global_batch = repeats, global_batch
        self._cached: tuple[int, np.ndarray] | None = None

    def at(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(permutations, rows, repeats) of positions [first, first + count), each int64 of shape (count,).

        Without repetition the number of the permutation is that of the epoch.
        """
        positions = np.arange(first, first + count)
        repeats = np.zeros(count, np.int64)
        if self._repeats > 1:
            steps, within = positions // self._global_batch, positions % self._global_batch
            distinct = self._global_batch // self._repeats
            repeats, positions = within // distinct, steps * distinct + within % distinct
        epochs, places = positions // self.samples, positions % self.samples
        rows = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self._epoch(int(epoch))[places[here]]
        return epochs, rows, repeats

    def _epoch(self, epoch: int) -> np.ndarray:
        # One epoch is kept: sorting 1.28 million numbers takes 0.1 s, too much for every batch and nothing an epoch.
        if self._cached is None or self._cached[0] != epoch:
            self._cached = epoch, epoch_order(self.seed, epoch, self.samples)
        return self._cached[1]
