"""The cache's size as a dry run plans it, against roll-outs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from executor.window_policies import POLICIES

from tempact.executor.executor import Executor
from tempact.executor.kv_history import FIRST_FRAMES
from tempact.executor.rollout import cache_rows, enough_rows, update_cache_rows
from tempact.executor.sampler import RolloutSettings, gaussian_noise
from tempact.presets import get_preset
from tempact.types import Plan, Step

Make = Callable[..., Executor]
CPU = torch.device("cpu")
FRAME_TOKENS = 4  # of `make_executor`


@pytest.mark.parametrize("fork", [0, 3, 12])
@pytest.mark.parametrize(("plans", "continuations", "frames"), [(1, 3, 15), (2, 2, 27), (1, 1, 15)])
@pytest.mark.parametrize("changes", POLICIES)
def test_it_is_the_size_that_a_rollout_leaves(
    make_executor: Make, changes: dict, plans: int, continuations: int, frames: int, fork: int
) -> None:
    """A prompt a chunk, which recaches most; the last chunk's context counts, although nothing is kept of it."""
    executor = make_executor(frames=frames, smooth_prompts=False, **changes)
    plan = Plan("i", tuple(Step(start, start + 3, f"step {start}") for start in range(0, frames, 3)))
    executor.rollout([plan] * plans, [fork] * plans, gaussian_noise(0, executor.noise_shape(plans, continuations), CPU))
    cache = executor.cache
    assert cache.nbytes // cache.row_nbytes == cache.rows_total
    assert cache_rows(executor.settings, plans, continuations, fork, FRAME_TOKENS) == cache.rows_total


@pytest.mark.parametrize("changes", POLICIES)
def test_it_is_the_size_that_updates_leave(make_executor: Make, changes: dict) -> None:
    """With a switch at every frame that can have one; 2 continuations with 3 transitions are a plan's 6 pairs."""
    executor = make_executor(frames=15, smooth_prompts=False, **changes)
    plan = Plan("i", tuple(Step(start, start + 3, f"step {start}") for start in range(0, 15, 3)))
    noise = gaussian_noise(0, executor.noise_shape(3, 2), CPU)
    made = [executor.roll_out([plan] * 3, [fork] * 3, noise)[1] for fork in (3, 6, 9, 12)]
    rows = FIRST_FRAMES * FRAME_TOKENS
    for micro_batch, together in ((2, 1), (6, 1), (13, 2)):
        del executor.cache
        executor.config = replace(executor.config, micro_batch=micro_batch)
        for transition in made:
            executor.velocities(transition, [0, 1, 2])
        assert update_cache_rows(executor.settings, together, FRAME_TOKENS, rows) == executor.cache.rows_total
        assert update_cache_rows(executor.settings, together, FRAME_TOKENS, 10**4) == 10**4


@pytest.mark.parametrize("changes", POLICIES)
def test_a_cache_that_is_given_room_at_once_does_not_grow(make_executor: Make, changes: dict) -> None:
    executor = make_executor(frames=27, smooth_prompts=False, **changes)
    plan = Plan("i", tuple(Step(start, start + 3, f"step {start}") for start in range(0, 27, 3)))
    rows = enough_rows(executor.settings, 2, 3, 3, FRAME_TOKENS)
    assert rows <= cache_rows(executor.settings, 2, 3, 3, FRAME_TOKENS)
    executor.cache.grow(rows)
    executor.rollout([plan] * 2, [3] * 2, gaussian_noise(0, executor.noise_shape(2, 3), CPU))
    assert executor.cache.rows_total == rows


def test_room_for_8_windows_is_little_more_than_they_hold() -> None:
    """The sink and its turned copy are shared; beside them each holds 8 frames behind the chunk, and the chunk."""
    settings = RolloutSettings.of(get_preset("self-forcing").executor)
    assert enough_rows(settings, 1, 8, 3, 1560) == (2 + 8 * (8 + 3)) * 1560
    assert cache_rows(settings, 1, 8, 3, 1560) <= 25 / 24 * (2 + 8 * (8 + 3)) * 1560


def test_a_window_bounds_it_and_a_recache_takes_little_more() -> None:
    """A window of 12 frames is 9 behind the chunk; its sink is shared unless a switch behind the fork rewrites it."""
    settings = RolloutSettings.of(get_preset("longlive").executor)
    plain = replace(settings, text_switch="cross_attention")
    for fork in (3, 12):
        rows = [cache_rows(replace(settings, frames=frames), 1, 8, fork, 1560) for frames in (30, 60)]
        assert rows[0] == rows[1]
        assert cache_rows(plain, 1, 8, fork, 1560) <= 25 / 24 * (3 + 8 * 9) * 1560
        own = 12 if fork < 12 else 9  # frames that a branch holds for itself, those of a chunk being committed included
        assert rows[0] <= 25 / 24 * (3 + 8 * own) * 1560
