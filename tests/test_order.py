"""Order and draws: pure functions of (seed, epoch, sample, repeat)."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.order import Order, epoch_order
from trainer.data.philox import AUGMENT, philox, uniforms


@pytest.mark.parametrize("counter", [(0, 0, 0, 0), (5, 3, 7, 9), (2**64 - 2, 2**63, 1, 2**64 - 1)])
@pytest.mark.parametrize("seed", [0, 77, 2**63 + 11])
def test_philox_is_numpys(counter: tuple[int, ...], seed: int) -> None:
    start = np.array(counter, np.uint64)
    theirs = np.random.Philox(key=np.array([seed, AUGMENT], np.uint64), counter=start).random_raw(4)
    start[0] += np.uint64(1)  # numpy advances the counter before it draws
    assert (philox(start[None], (seed, AUGMENT))[0] == theirs).all()


def test_draws_depend_on_each_argument_and_on_no_neighbour() -> None:
    epochs, rows = np.zeros(6, int), np.arange(6)
    draws = uniforms(1, epochs, rows, 23)
    assert draws.shape == (6, 23) and (draws >= 0).all() and (draws < 1).all()
    assert (uniforms(1, epochs[3:5], rows[3:5], 23) == draws[3:5]).all()
    assert (uniforms(1, epochs, rows, 9) == draws[:, :9]).all()
    others = [uniforms(2, epochs, rows, 23), uniforms(1, epochs + 1, rows, 23), uniforms(1, epochs, rows, 23, 1)]
    others.append(uniforms(1, epochs, rows + 6, 23))
    for other in others:
        assert not np.isclose(other, draws).any()


def test_draws_are_uniform() -> None:
    draws = uniforms(3, np.zeros(20_000, int), np.arange(20_000), 23)
    share = np.histogram(draws, bins=20, range=(0, 1))[0] / draws.size
    assert abs(share - 0.05).max() < 0.001
    assert abs(np.corrcoef(draws.T) - np.eye(23)).max() < 0.04


def test_an_epoch_is_a_permutation_and_no_two_are_alike() -> None:
    orders = [epoch_order(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1, 2)]
    for i, order in enumerate(orders):
        assert (np.sort(order) == np.arange(1000)).all()
        for other in orders[:i]:
            assert (order == other).mean() < 0.02


def test_the_order_of_an_epoch_is_fixed_for_ever() -> None:
    # A run that resumes under a newer numpy must see the same samples.
    assert epoch_order(0, 0, 10).tolist() == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]


@pytest.mark.parametrize("batch", [1, 7, 16, 50])
def test_positions_run_through_the_epochs_without_a_gap(batch: int) -> None:
    samples, order = 50, Order(5, 50)
    epochs, rows, _ = map(np.concatenate, zip(*(order.at(s * batch, batch) for s in range(3 * samples // batch + 1))))
    for epoch in range(3):
        assert (rows[epochs == epoch] == epoch_order(5, epoch, samples)[: (epochs == epoch).sum()]).all()
        assert (np.sort(rows[epoch * samples : (epoch + 1) * samples]) == np.arange(samples)).all()


@pytest.mark.parametrize(("repeats", "batch"), [(2, 8), (3, 12), (4, 20)])
def test_repeats_stand_apart_in_a_step_and_even_out_over_the_epochs(repeats: int, batch: int) -> None:
    samples, order = 60, Order(5, 60, repeats, batch)
    steps = [order.at(s * batch, batch) for s in range(repeats * samples // batch)]
    for _, rows, numbers in steps:
        assert (np.bincount(rows)[np.unique(rows)] == repeats).all()
        assert sorted(zip(rows, numbers)) == [(row, r) for row in np.unique(rows) for r in range(repeats)]
        assert (rows[0::2] != rows[1::2]).all()  # mixup pairs these
    rows = np.concatenate([rows for _, rows, _ in steps])
    assert (np.bincount(rows, minlength=samples) == repeats).all()
    halves = [
        np.concatenate(parts) for parts in zip(order.at(batch, batch // 2), order.at(batch + batch // 2, batch // 2))
    ]
    assert all((half == whole).all() for half, whole in zip(halves, steps[1]))
