"""Which noise levels an iteration trains."""

from __future__ import annotations

import torch

from tempact.rl.levels import levels_of, of_levels


def test_all_levels_are_trained_whatever_the_iteration() -> None:
    assert {levels_of("all", 3, iteration, 7 * iteration) for iteration in range(5)} == {range(3)}


def test_sliding_takes_the_next_level_every_iteration() -> None:
    found = [levels_of("sliding", 3, iteration, 99 * iteration) for iteration in range(5)]
    assert found == [range(0, 1), range(1, 2), range(2, 3), range(0, 1), range(1, 2)]


def test_a_drawn_level_follows_its_seed_alone_and_all_are_drawn() -> None:
    found = [levels_of("drawn", 4, iteration, seed) for seed in range(400) for iteration in (0, 1)]
    assert found[::2] == found[1::2] and {len(own) for own in found} == {1}
    assert all(80 < sum(own.start == level for own in found[::2]) < 120 for level in range(4))


def test_rows_have_the_values_of_their_levels() -> None:
    values = (1.0, 0.9375, 0.625)
    found = of_levels(values, torch.tensor([2, 0, 1, 1]))
    assert found.dtype == torch.float32 and torch.equal(found, torch.tensor([0.625, 1.0, 0.9375, 0.9375]))
