"""A video chunk by chunk is the video of a roll-out, in memory that stops growing."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from executor.window_policies import POLICIES

from tempact.executor.executor import Executor
from tempact.executor.kv_history import FIRST_FRAMES
from tempact.executor.sampler import gaussian_noise
from tempact.executor.stream import stream_frames, stream_latents
from tempact.types import Plan, Step

Make = Callable[..., Executor]
CPU = torch.device("cpu")


def plan(*bounds: int) -> Plan:
    return Plan("instruction", tuple(Step(a, b, f"step {a}") for a, b in pairwise(bounds)))


@pytest.mark.parametrize("changes", POLICIES)
@pytest.mark.parametrize("bounds", [(0, 6, 9, 24), (0, 15, 21, 24)])  # switches inside the window, and beyond it
def test_a_stream_is_the_rollout_bit_for_bit(make_executor: Make, changes: dict, bounds: tuple[int, ...]) -> None:
    executor = make_executor(frames=24, **changes)
    noise = gaussian_noise(3, executor.noise_shape(1, 1), CPU)
    whole, _ = executor.roll_out([plan(*bounds)], [0], noise)
    chunks = list(stream_latents(executor, plan(*bounds), noise))
    assert [chunk.shape for chunk in chunks] == [(3, 3, 8, 8)] * 8
    assert torch.equal(torch.cat(chunks, dim=1), whole[0, 0])
    assert torch.equal(
        torch.cat(list(stream_frames(executor, plan(*bounds), noise))),
        executor.rollout([plan(*bounds)], [0], noise).frames[0, 0],
    )


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_stream_in_the_precision_of_the_weights(make_executor: Make, precision: torch.dtype) -> None:
    """Which is in force while a chunk is made, and not while the caller has it."""
    executor = make_executor(frames=12)
    executor.model.to(precision)
    noise = gaussian_noise(3, executor.noise_shape(1, 1), CPU)
    chunks = []
    for chunk in stream_latents(executor, plan(0, 6, 12), noise):
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        assert not chunk.requires_grad and chunk.dtype == torch.float32
        chunks.append(chunk)
    assert torch.equal(torch.cat(chunks, dim=1), executor.roll_out([plan(0, 6, 12)], [0], noise)[0][0, 0])


@pytest.mark.parametrize("changes", POLICIES[2:])
def test_cache_rows_stay_constant_once_the_window_is_full(make_executor: Make, changes: dict) -> None:
    """72 latent frames with a switch every 9: the rows held after a chunk are those of the window without a chunk."""
    executor = make_executor(frames=72, **changes)
    noise = gaussian_noise(0, executor.noise_shape(1, 1), CPU)
    tokens = 4  # of a latent frame
    cache = executor.cache
    held, rows = [], []
    for _ in stream_latents(executor, plan(*range(0, 73, 9)), noise):
        held.append(cache.rows_used)
        rows.append(cache.rows_total)
    window = executor.settings.window
    turned = window.sink if window.positions == "relative" else 0  # frames of the sink that moves along
    filled = window.window // 3  # chunks until the window is full
    assert held[:filled] == [min(3 * chunk, window.window - 3) * tokens for chunk in range(1, filled + 1)]
    assert set(held[filled:]) == {(window.window - 3 + turned) * tokens} and len(held) == 24
    # the pools grow with what a chunk or a recache holds for a while; never after that
    assert set(rows[8:]) == {rows[-1]} and cache.rows_used == 0
    assert rows[-1] <= max(FIRST_FRAMES * tokens, 25 / 24 * cache.rows_peak)
    assert cache.rows_peak <= (window.window + 2 * turned + 3) * tokens


def test_latents_are_kept_for_a_recache_only(make_executor: Make) -> None:
    """Tensors alive after 33 and after 69 frames of a stream are as many and as large."""
    executor = make_executor(frames=72, window="longlive", text_switch="recache")
    noise = gaussian_noise(0, executor.noise_shape(1, 1), CPU)
    held = {}
    for chunk, _ in enumerate(stream_frames(executor, plan(*range(0, 73, 9)), noise)):
        if chunk in (10, 22):
            gc.collect()
            held[chunk] = sum(thing.numel() for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    assert held[10] == held[22]


def test_a_dropped_stream_gives_its_rows_back(make_executor: Make) -> None:
    executor = make_executor()
    noise = gaussian_noise(0, executor.noise_shape(1, 1), CPU)
    stream = stream_frames(executor, plan(0, 18), noise)
    next(stream)
    cache = executor.cache
    assert cache.rows_used > 0
    del stream
    gc.collect()
    assert cache.rows_used == 0 and cache.branches == ()


def test_two_streams_at_a_time_do_not_disturb_each_other(make_executor: Make) -> None:
    executor = make_executor(window="longlive", text_switch="recache")
    noises = [gaussian_noise(seed, executor.noise_shape(1, 1), CPU) for seed in (0, 1)]
    plans = [plan(0, 6, 18), plan(0, 12, 18)]
    alone = [torch.cat(list(stream_latents(executor, *pair)), dim=1) for pair in zip(plans, noises, strict=True)]
    both = zip(*(stream_latents(executor, *pair) for pair in zip(plans, noises, strict=True)), strict=True)
    for own, together in zip(alone, zip(*both, strict=True), strict=True):
        assert torch.equal(own, torch.cat(together, dim=1))


def test_a_plan_or_noise_of_another_shape_is_a_bug(make_executor: Make) -> None:
    executor = make_executor()
    with pytest.raises(AssertionError):
        next(stream_latents(executor, plan(0, 12), gaussian_noise(0, executor.noise_shape(1, 1), CPU)))
    with pytest.raises(AssertionError):
        next(stream_latents(executor, plan(0, 18), gaussian_noise(0, executor.noise_shape(1, 2), CPU)))
