"""Continuations while a video is made: that of the choice goes on, and the cache holds one video's K/V after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from executor.test_cuda_graphs import CONFIG, DEVICE, calls  # noqa: F401  a fixture
from executor.test_cuda_graphs import make_executor as graphed
from executor.window_policies import POLICIES

from tempact.executor.best_of import BestOf, Continuations
from tempact.executor.executor import Executor
from tempact.executor.sampler import NoiseSource, gaussian_noise
from tempact.executor.stream import stream_frames
from tempact.types import Plan, Step

Make = Callable[..., Executor]
CPU = torch.device("cpu")
CHUNK = 3


def plan(*bounds: int) -> Plan:
    return Plan("instruction", tuple(Step(a, b, f"step {a}") for a, b in pairwise(bounds)))


PLAN, SHORT = plan(0, 6, 15, 24), plan(0, 3, 9, 18)


def source(executor: Executor, count: int) -> NoiseSource:
    return gaussian_noise(3, executor.noise_shape(1, count), CPU)


def whole(frames: Iterator[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(frames)).int()


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Frames of the same noise, made in other batches."""
    return a.shape == b.shape and int((a - b).abs().max()) <= 1


def following(executor: Executor, chosen: dict[int, int], count: int = 4) -> torch.Tensor:
    """The video whose chunks follow the noise of these continuations, made without any other."""
    return whole(stream_frames(executor, PLAN, source(executor, count).following(chosen)))


def chunks_of(made: Continuations) -> range:
    return range(made.start // CHUNK, made.end // CHUNK)


@pytest.mark.parametrize(
    ("chunks", "together", "changes"), [(1, 0, POLICIES[0]), *((2, 3, POLICIES[n]) for n in (1, 3, 5, 6))]
)
def test_the_chosen_continuation_goes_on(make_executor: Make, chunks: int, together: int, changes: dict) -> None:
    """And what the choice was shown are the videos of the continuations; inside the window, and beyond it."""
    executor = make_executor(frames=24, **changes)
    chosen: dict[int, int] = {}
    seen: list[Continuations] = []

    def choose(made: Continuations) -> int:
        seen.append(made)
        own = len(seen) + 1  # 2, then 3
        chosen.update(dict.fromkeys(chunks_of(made), own))
        return own

    best_of = BestOf(4, choose, chunks, together=together, whole=True)
    frames = whole(stream_frames(executor, PLAN, source(executor, 4), best_of))
    ends = {1: [(6, 9), (15, 18)], 2: [(6, 12), (15, 21)]}[chunks]
    assert [(made.start, made.end) for made in seen] == ends
    assert near(frames, following(executor, chosen)) and not near(frames, following(executor, {}))
    for made in seen:
        before = {chunk: own for chunk, own in chosen.items() if chunk * CHUNK < made.start}
        assert made.shared == made.start and made.frames.shape == (4, made.end, 3, 8, 8) and not made.broken.any()
        other = 3 if chosen[made.start // CHUNK] == 2 else 0
        alone = following(executor, before | dict.fromkeys(chunks_of(made), other))
        assert near(made.frames[other].int(), alone[: made.end])
    cache = executor.cache
    assert cache.rows_used == 0 and cache.branches == ()


def test_one_continuation_is_the_video_to_the_bit_and_the_first_is_todays_noise(make_executor: Make) -> None:
    executor = make_executor(frames=24)
    today = whole(stream_frames(executor, PLAN, gaussian_noise(3, executor.noise_shape(1, 1), CPU)))
    assert torch.equal(whole(stream_frames(executor, PLAN, source(executor, 4).following({}))), today)
    first = BestOf(4, lambda made: 0, 0, first=True)
    assert near(whole(stream_frames(executor, PLAN, source(executor, 4), first)), today)
    shape = executor.noise_shape(1, 8)
    for k, c in ((0, 0), (3, 2)):  # of (seed, continuation, chunk) alone
        drawn = [gaussian_noise(3, (1, n, *shape[2:]), CPU)(c, [(0, k)]) for n in (4, 8)]
        assert torch.equal(*drawn) and not torch.equal(drawn[0], gaussian_noise(3, shape, CPU)(c, [(0, k + 1)]))


def test_where_there_are_continuations() -> None:
    def spans(own: Plan, **given: object) -> list[tuple[int, int]]:
        best_of = BestOf(2, lambda made: 0, **given)
        found = ((start, best_of.until(own, start, CHUNK)) for start in range(0, own.frames, CHUNK))
        return [(start, end) for start, end in found if end > start]

    assert spans(PLAN) == [(6, 9), (15, 18)] and spans(PLAN, first=True) == [(0, 3), (6, 9), (15, 18)]
    assert spans(PLAN, chunks=4) == [(6, 15), (15, 24)] == spans(PLAN, chunks=0)  # never over a step's end
    assert spans(plan(0, 24)) == [] and spans(plan(0, 24), first=True, chunks=0) == [(0, 24)]
    for given, ahead in (({}, 0), ({"chunks": 2}, 3 * 5), ({"chunks": 0}, 6 * 5), ({"chunks": 0, "together": 2}, 12)):
        assert BestOf(5, lambda made: 0, **given).ahead(PLAN, CHUNK) == ahead


def test_without_the_whole_video_the_chunk_before_is_shown(make_executor: Make) -> None:
    executor, seen = make_executor(frames=24), []
    best_of = BestOf(2, lambda made: seen.append(made) or 1, first=True)
    frames = whole(stream_frames(executor, PLAN, source(executor, 2), best_of))
    assert [(made.shared, len(made.frames[0])) for made in seen] == [(0, 3), (3, 6), (3, 6)]
    assert near(seen[2].frames[1].int(), frames[12:18])


def test_the_cache_holds_one_context_for_all(make_executor: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one chunk no continuation stores anything; of more, each its own chunks, and those of a group at a time."""
    tokens = 4  # of a latent frame
    for given, most in (({}, 21), ({"chunks": 2}, 21 + 3 * 5), ({"chunks": 2, "together": 2}, 21 + 3 * 2)):
        executor, rows = make_executor(frames=24), []
        forks, branches = BestOf(5, lambda made: 4, **given), []
        for _ in stream_frames(executor, PLAN, source(executor, 5), forks):
            rows.append(executor.cache.rows_used)
            branches.append(len(executor.cache.branches))
        assert set(branches[:-1]) == {1} and rows[:-1] == [3 * tokens * (n + 2) for n in range(6)] + [21 * tokens]
        assert executor.cache.rows_peak <= most * tokens


def test_broken_continuations_are_named(make_executor: Make) -> None:
    executor, seen = make_executor(frames=24), []
    noise = source(executor, 3)
    broken = NoiseSource(noise.shape, lambda p, n, c: noise.draw(p, n, c) * (float("nan") if (n, c) == (1, 2) else 1))
    list(stream_frames(executor, PLAN, broken, BestOf(3, lambda made: seen.append(made.broken.tolist()) or 0)))
    assert seen == [[False, True, False], [False] * 3]


def test_a_dropped_stream_gives_its_branches_back(make_executor: Make) -> None:
    executor = make_executor(frames=24)

    def choose(made: Continuations) -> int:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        list(stream_frames(executor, PLAN, source(executor, 3), BestOf(3, choose, chunks=2)))
    assert executor.cache.rows_used == 0 and executor.cache.branches == ()


@pytest.mark.parametrize("precision", [torch.bfloat16])
def test_choices_are_made_outside_of_autocast(make_executor: Make, precision: torch.dtype) -> None:
    executor, seen = make_executor(frames=24), []
    executor.model.to(precision)
    choose = lambda made: seen.append(torch.is_autocast_enabled("cpu")) or 0  # noqa: E731
    list(stream_frames(executor, PLAN, source(executor, 2), BestOf(2, choose)))
    assert seen == [False, False]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs an NVIDIA GPU: run `pytest -m gpu` on one")
@pytest.mark.parametrize("window", ["full", "tempact-self-forcing"])
def test_graphs_are_recorded_for_one_and_for_all(window: str) -> None:
    """The video is that without graphs."""
    plain, recorded = (graphed(replace(CONFIG, window=window)) for _ in range(2))
    plain.runner.graphs, recorded.runner.warm_calls = False, 1
    noise = gaussian_noise(3, plain.noise_shape(1, 4), DEVICE)
    for together in (0, 3):
        best_of = BestOf(4, lambda made: 2, chunks=2, together=together)
        videos = [
            [whole(stream_frames(executor, SHORT, noise, best_of)) for _ in range(3)] for executor in (plain, recorded)
        ]
        assert all(near(a, b) for a, b in zip(*videos, strict=True))
    shapes = {key[4][0][0][0] for key, graph in recorded.runner._graphs.items() if graph.forward is not None}
    assert shapes == {1, 3, 4}


@pytest.mark.usefixtures("calls")  # without a model
@pytest.mark.parametrize("window", ["full", "longlive", "tempact-self-forcing"])
@pytest.mark.parametrize(("chunks", "together"), [(1, 0), (2, 0), (0, 3)])
def test_a_cache_for_graphs_stays_where_it_is(window: str, chunks: int, together: int) -> None:
    executor, places = graphed(replace(CONFIG, window=window)), []
    executor.runner.graphs = True
    noise = gaussian_noise(3, executor.noise_shape(1, 8), DEVICE)

    def choose(made: Continuations) -> int:
        places.append(executor.cache.addresses)
        return 2

    for _ in stream_frames(executor, SHORT, noise, BestOf(8, choose, chunks, together=together)):
        places.append(executor.cache.addresses)
    assert len(set(places)) == 1 and len(places) == 8
