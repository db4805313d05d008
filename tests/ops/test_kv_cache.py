"""The forkable cache: rows are shared, never copied, never leaked, never seen by the wrong branch."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csrc_triton import ForkableKVCache

HEADS, DIM = 2, 4


def cache(rows: int = 8, layers: int = 2) -> ForkableKVCache:
    return ForkableKVCache(layers, HEADS, DIM, rows=rows, dtype=torch.float32, device=torch.device("cpu"))


def fill(own: ForkableKVCache, branches: list[int], length: int, value: float) -> None:
    reservation = own.reserve(branches, length)
    block = torch.full((len(branches), length, HEADS, DIM), value)
    for layer in range(2):
        own.write(reservation, layer, block + layer, -block - layer)
    own.commit(reservation)


def test_a_fork_shares_rows_and_diverges_afterwards() -> None:
    own = cache()
    branch = own.new_branch()
    fill(own, [branch], 3, 1.0)
    used = own.rows_used
    left, right = own.fork(branch, 2)
    assert own.rows_used == used == 3
    fill(own, [left], 1, 5.0)
    fill(own, [right], 1, 7.0)
    views = own.views([left, right], [(0, 4)])
    k, v = views[1].gather()
    assert k[:, :3].eq(2.0).all() and k[0, 3].eq(6.0).all() and k[1, 3].eq(8.0).all()
    assert v[0, 3].eq(-6.0).all()
    assert own.length(branch) == 3


def test_the_table_lists_the_segments_that_the_rows_spell_out() -> None:
    own = cache()
    branch = own.new_branch()
    for value in (1.0, 2.0, 3.0):
        fill(own, [branch], 2, value)
    view = own.views([branch], [(0, 1), (3, 6)])[0]
    spelled = [row + i for row, n in view.table[0].tolist() for i in range(n)]
    assert spelled == view.rows[0].tolist()
    assert view.gather()[0][0, :, 0, 0].tolist() == [1.0, 2.0, 3.0, 3.0]


def test_replace_rewrites_the_past_of_one_branch_only() -> None:
    own = cache(rows=32)
    branch = own.new_branch()
    fill(own, [branch], 4, 1.0)
    other = own.fork(branch, 1)[0]
    reservation = own.reserve([branch], 2)
    block = torch.full((1, 2, HEADS, DIM), 9.0)
    for layer in range(2):
        own.write(reservation, layer, block, block)
    own.replace(reservation, 1)
    assert own.views([branch], [(0, 4)])[0].gather()[0][0, :, 0, 0].tolist() == [1.0, 9.0, 9.0, 1.0]
    assert own.views([other], [(0, 4)])[0].gather()[0].eq(1.0).all()


def test_errors_name_the_branch() -> None:
    own = cache()
    branch = own.new_branch()
    fill(own, [branch], 2, 1.0)
    with pytest.raises(ValueError, match=f"branch {branch}: token 2 of range"):
        own.views([branch], [(0, 3)])
    own.release(branch)
    with pytest.raises(ValueError, match=f"branch {branch}: not in the cache"):
        own.length(branch)
    with pytest.raises(ValueError, match="accepted: at least 1"):
        own.fork(own.new_branch(), 0)
    reservation = own.reserve([own.new_branch()], 1)
    with pytest.raises(ValueError, match="k, v: found"):
        own.write(reservation, 0, torch.zeros(1, 2, HEADS, DIM), torch.zeros(1, 2, HEADS, DIM))
    own.commit(reservation)
    with pytest.raises(ValueError, match="already committed"):
        own.commit(reservation)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_random_histories_never_mix_and_never_leak(seed: int) -> None:
    """A list of token values per branch is the model; the cache must agree after every step."""
    rng = random.Random(seed)
    own = cache(rows=4, layers=2)
    truth: dict[int, list[float | None]] = {own.new_branch(): []}
    value = 0.0
    for _ in range(25):
        branch = rng.choice(list(truth))
        action = rng.random()
        if action < 0.45:
            value += 1.0
            length = rng.randint(1, 3)
            fill(own, [branch], length, value)
            truth[branch] += [value] * length
        elif action < 0.65 and len(truth) < 6:
            for new in own.fork(branch, rng.randint(1, 2)):
                truth[new] = list(truth[branch])
        elif action < 0.85 and truth[branch]:
            start = rng.randrange(len(truth[branch]))
            stop = rng.randint(start, len(truth[branch]))
            if stop < len(truth[branch]):  # the last token stays: positions count from it
                own.drop(branch, start, stop)
                truth[branch][start:stop] = [None] * (stop - start)
        elif len(truth) > 1:
            own.release(branch)
            del truth[branch]
        for one, tokens in truth.items():
            kept = [i for i, token in enumerate(tokens) if token is not None]
            if kept:
                got = own.views([one], [(i, i + 1) for i in kept])[0].gather()[0][0, :, 0, 0].tolist()
                assert got == [tokens[i] for i in kept]
    for branch in list(truth):
        own.release(branch)
    assert own.rows_used == 0
