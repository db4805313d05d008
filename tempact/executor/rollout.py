"""The autoregressive loop over a video's chunks, and the roll-outs and rebuilt contexts that go through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor

from csrc_triton import ForkableKVCache
from csrc_triton.kv_cache import Reservation
from tempact.config import ExecutorConfig
from tempact.executor.kv_history import FIRST_FRAMES, KVHistory
from tempact.executor.sampler import NoiseSource, RolloutSettings, denoise_chunk
from tempact.models.wan.transformer import TextKV, WanTransformer
from tempact.types import Fork, Forks, Plan, Siblings, Transition, tree_of


def smooth_prompts(prompts: Sequence[str], separator: str = ExecutorConfig.prompt_separator) -> list[str]:
    """Each prompt joined with the given next one, so that a step prepares its successor; the last one as it is.

    Judges read the prompts as given (docs/algorithm.md, decision 3): `prompts` is not changed.
    """
    following = prompts[1:]
    return [*(f"{prompt}{separator}{after}" for prompt, after in zip(prompts, following, strict=False)), *prompts[-1:]]


def chunk_prompts(plan: Plan, settings: RolloutSettings) -> list[str]:
    """The executor's prompt for each chunk of a plan's video."""
    prompts = [step.prompt for step in plan.steps]
    if settings.separator is not None:
        prompts = smooth_prompts(prompts, settings.separator)
    return [prompts[plan.step_at(chunk * settings.chunk)] for chunk in range(settings.chunks)]


def units_of(plans: int, continuations: int, videos: int, processes: int = 1) -> list[range]:
    """Plans that are rolled out together, one unit after the other: of about so many videos, or, where that is 0, as
    many plans as fall to each of the processes."""
    most = max(1, videos // continuations) if videos else -(-plans // processes)
    return [range(first, min(first + most, plans)) for first in range(0, plans, most)]


def cost_of(plans: range, forks: Sequence[Fork], continuations: int, settings: RolloutSettings) -> float:
    """Of a unit, in chunks of one video."""
    trees = [tree_of(forks[plan], continuations) for plan in plans]
    return sum(tree.branches_at(start) for tree in trees for start in range(0, settings.frames, settings.chunk))


class PromptKV:
    """Cross-attention K/V of a batch's prompts, projected once under the current weights."""

    def __init__(self, model: WanTransformer, encode: Callable[[list[str]], Tensor], prompts: list[str]):
        self.index = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        self.text = model.project_text(encode(list(self.index)))

    def __call__(self, prompts: list[str]) -> TextKV:
        """The K/V of one prompt a batch row."""
        device = self.text.layers[0][0].device
        return self.text.select(on_device([self.index[prompt] for prompt in prompts], device))


def on_device(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """int64 on the device; copied from pinned memory, because from other memory the host would wait for a GPU."""
    return torch.tensor(numbers, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@dataclass
class Branch:
    """A video in the making; until a fork it is the video of all continuations that branch off there."""

    plan: int
    continuations: list[int]
    cached: int  # its branch of the K/V cache


def walk_chunks(
    history: KVHistory,
    prompts: list[list[str]],
    text: Callable[[list[str]], TextKV],
    make: Callable[[int, list[Branch], TextKV], Tensor],
    past: Callable[[int, list[Branch]], Tensor],
    *,
    frames: int | None = None,
    continuations: int = 1,
    forks: Sequence[Fork] = (),
) -> Iterator[Tensor]:
    """Makes the plans' videos chunk by chunk; yields each clean chunk.

    Where a prompt changes, "recache" first rewrites the window under the new text; then a plan that forks at this
    chunk does so, `make` gives the clean chunk, and its K/V are committed. Gradients and precision
    are those in force when the iterator is advanced.

    Args:
        history: empty; its branches stay.
        prompts: prompts[p] are those of plan p's chunks. text: their cross-attention K/V, one prompt a batch row.
        make: first frame of the chunk, branches and text -> clean chunk [B, C, c, H, W], one batch row a branch.
        past: first frame of the chunk and branches -> clean latents before it [B, C, S, H, W], at least the window's.
        frames: end there, after the rewriting for the chunk at this frame; None: at the end of the videos.
        forks: of each plan, if there is more than one continuation.
    """
    settings = history.settings
    branches = [Branch(p, list(range(continuations)), history.new_branch()) for p in range(len(prompts))]
    trees = [tree_of(fork, continuations) for fork in forks]
    for chunk in range(settings.chunks):
        start, end = chunk * settings.chunk, (chunk + 1) * settings.chunk
        if settings.text_switch == "recache" and chunk:  # before the fork: continuations share what it rewrites
            switched = [b for b in branches if prompts[b.plan][chunk - 1] != prompts[b.plan][chunk]]
            if switched:
                words = text([prompts[b.plan][chunk] for b in switched])
                history.recache([b.cached for b in switched], past(start, switched), words)
        if start == frames:
            return
        if continuations > 1 and any(start in tree.frames for tree in trees):
            branches = [new for b in branches for new in _forked(b, history, trees[b.plan], start)]
        words = text([prompts[b.plan][chunk] for b in branches])
        clean = make(start, branches, words)
        if end < settings.frames:
            history.commit([b.cached for b in branches], clean, words)
        yield clean


def _forked(branch: Branch, history: KVHistory, tree: Forks, start: int) -> list[Branch]:
    if start not in tree.frames:
        return [branch]
    number, own = tree.numbers[tree.frames.index(start)], branch.continuations
    if number == 1:
        return [branch]
    each, forks = len(own) // number, history.fork(branch.cached, number)
    return [Branch(branch.plan, own[i * each : (i + 1) * each], new) for i, new in enumerate(forks)]


def denoised(
    history: KVHistory, noise: NoiseSource, start: int, branches: list[Branch], text: TextKV
) -> tuple[Tensor, Tensor, Tensor]:
    """The clean chunk of every branch, its states at sigma_0 .. sigma_T, and its noise [B, K, C, c, H, W].

    A branch follows the noise of its first continuation.
    """
    own = noise(start // history.chunk, [(b.plan, b.continuations[0]) for b in branches])
    context, positions = history.context([b.cached for b in branches], start), history.positions(start)
    schedule = history.settings.schedule_at(start)
    return *denoise_chunk(history.runner, own, text, positions, context, schedule), own


def blank_transition(
    plans: list[Plan], rows: list[Siblings], noise: NoiseSource, settings: RolloutSettings, *, pinned: bool
) -> Transition | None:
    """Room for the transitions of these rows; None where one is at frame 0: the first chunk, which may have a schedule
    of its own, is not trained.

    It is on the host: at full size 5 GiB that only the update needs, plan by plan.
    """
    starts = [row.start for row in rows]
    if not all(starts):
        return None
    count, _, channels, _, *size = noise.shape[1:]
    states, noises = (
        torch.empty(len(rows), math.gcd(settings.siblings, count), each, *noise.shape[3:], pin_memory=pinned)
        for each in settings.recorded
    )
    prefix = torch.empty(len(rows), channels, max(starts, default=0), *size, pin_memory=pinned)
    upto = [chunk_prompts(plans[row.plan], settings)[: row.start // settings.chunk + 1] for row in rows]
    return Transition(states, noises, torch.tensor(starts), prefix, upto, rows)


def places_of(rows: list[Siblings]) -> dict[tuple[int, int, int], tuple[int, int]]:
    """Plan, frame and first continuation of every recorded branch, and its place in the record."""
    branches = ((number, row, column) for number, row in enumerate(rows) for column in range(len(row.leaves)))
    return {(row.plan, row.start, row.leaves[column].start): (number, column) for number, row, column in branches}


def recorded_at(
    places: dict[tuple[int, int, int], tuple[int, int]], start: int, branches: list[Branch]
) -> Iterator[tuple[int, slice, slice]]:
    """Row and columns of the record, and which of the branches at frame `start` they hold: as many at once as lie side
    by side."""
    found = ((places.get((b.plan, start, b.continuations[0])), i) for i, b in enumerate(branches))
    held = [(*place, i) for place, i in found if place is not None]
    for _, run in groupby(held, lambda each: (each[0], each[1] - each[2])):
        (row, column, first), *more = run
        yield row, slice(column, column + 1 + len(more)), slice(first, first + 1 + len(more))


@torch.no_grad()
def roll_out(
    history: KVHistory,
    encode: Callable[[list[str]], Tensor],
    plans: list[Plan],
    forks: Sequence[Fork],
    noise: NoiseSource,
    record: Transition | None,
) -> Tensor:
    """Videos of P plans x N continuations, as many and as large as the noise says: latents [P, N, C, F, H, W].

    Plan p makes the frames before forks[p] once, then forks; all branches of all plans advance together, one batch a
    chunk. A fork at frame 0 is at once. The transitions of the chunks at the forks go to `record`, numbers that are not
    finite as 0, because a gradient of 0 through NaN is NaN.
    """
    settings, device = history.settings, history.runner.model.device
    prompts = [chunk_prompts(plan, settings) for plan in plans]
    text = PromptKV(history.runner.model, encode, [prompt for plan in prompts for prompt in plan])
    count, _, channels, chunk, *size = noise.shape[1:]
    latents = torch.zeros(len(plans), count, channels, settings.frames, *size, device=device)
    rows = record.siblings if record is not None else []
    places = places_of(rows)

    def make(start: int, branches: list[Branch], words: TextKV) -> Tensor:
        clean, seen, own = denoised(history, noise, start, branches, words)
        # one copy for all videos: a copy a video would take a host longer than a small model's chunk
        videos = [(b.plan, continuation, i) for i, b in enumerate(branches) for continuation in b.continuations]
        plan, continuation, branch = on_device([*zip(*videos, strict=True)], device).unbind()
        latents[plan, continuation, :, start : start + chunk] = clean[branch]
        for number, columns, kept in recorded_at(places, start, branches):
            states, fresh = seen[kept], own[kept, 1 : settings.schedule.calls]
            if settings.forward:
                states, fresh = noised(clean[kept], start, branches[kept])
            assert record is not None
            _record(record.states[number, columns], states)
            _record(record.noises[number, columns], fresh)
        return clean

    def noised(clean: Tensor, start: int, branches: list[Branch]) -> tuple[Tensor, Tensor]:
        sigmas = clean.new_tensor(settings.schedule.sigmas[:-1]).view(-1, 1, 1, 1, 1)
        videos = [(b.plan, b.continuations[0]) for b in branches]
        fresh = noise(settings.chunks + start // chunk, videos)[:, : settings.schedule.calls]
        return (1 - sigmas) * clean[:, None] + sigmas * fresh, fresh - clean[:, None]

    def past(start: int, branches: list[Branch]) -> Tensor:
        return torch.stack([latents[b.plan, b.continuations[0], :, :start] for b in branches])

    for _ in walk_chunks(history, prompts, text, make, past, continuations=count, forks=forks):
        pass
    if record is not None:
        frames = torch.arange(record.prefix.shape[2], device=device)[:, None, None]
        for number, row in enumerate(rows):
            own = latents[row.plan, row.context, :, : len(frames)]
            _record(record.prefix[number], torch.where(frames < row.start, own, 0.0))
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # anyone may read the record
    return latents


def _record(place: Tensor, values: Tensor) -> None:
    """Queues a copy to a place of the record, which is contiguous."""
    place.copy_(values.nan_to_num(0.0, 0.0, 0.0), non_blocking=True)


def rebuild_context(
    history: KVHistory, text: Callable[[list[str]], TextKV], prefix: Tensor, prompts: list[list[str]]
) -> None:
    """Fills an empty history with a shared context [P, C, S, H, W], under the current weights, without gradient.

    prompts[p] holds the prompt of each of plan p's chunks up to and including the one at frame S. The history's
    `branches` are the plans', in order.
    """

    def make(start: int, *_: object) -> Tensor:
        return prefix[:, :, start : start + history.chunk]

    def past(start: int, branches: list[Branch]) -> Tensor:
        return prefix[[b.plan for b in branches], :, :start]

    for _ in walk_chunks(history, prompts, text, make, past, frames=prefix.shape[2]):
        pass


def cache_rows(settings: RolloutSettings, plans: int, continuations: int, fork: int, frame_tokens: int) -> int:
    """Rows of the cache's pools after a roll-out whose plans all fork at frame `fork`, by the books of a cache that
    grows while it fills."""
    return _booked(settings, plans, continuations, fork, frame_tokens)[0]


def enough_rows(settings: RolloutSettings, plans: int, continuations: int, fork: int, frame_tokens: int) -> int:
    """Rows of pools that such a roll-out does not make grow: as many as it uses at once, and no fewer than a cache
    begins with."""
    return max(_booked(settings, plans, continuations, fork, frame_tokens)[1], FIRST_FRAMES * frame_tokens)


@lru_cache
def _booked(settings: RolloutSettings, plans: int, continuations: int, fork: int, frame_tokens: int) -> tuple[int, int]:
    """Rows of the pools in the end, and most rows used at once."""
    cache = _books(FIRST_FRAMES * frame_tokens, frame_tokens)
    # a switch at every chunk is the most there can be
    prompts = [[str(chunk) for chunk in range(settings.chunks)]] * plans
    nothing = torch.empty(plans * continuations, 0, settings.frames)
    with _Bookkeeping(cast(Any, None), cache, settings, frame_tokens) as history:

        def make(start: int, branches: list[Branch], _: TextKV) -> Tensor:
            history.context([branch.cached for branch in branches], start)
            return nothing

        def past(*_: object) -> Tensor:
            return nothing

        loop = walk_chunks(
            history, prompts, lambda _: TextKV([]), make, past,
            continuations=continuations, forks=[fork] * plans,
        )  # fmt: skip
        for _ in loop:
            pass
    return cache.rows_total, cache.rows_peak


def _books(rows: int, frame_tokens: int) -> ForkableKVCache:
    """A cache as the executor's, of which the books are used alone."""
    cpu = torch.device("cpu")
    return ForkableKVCache(1, 1, 1, rows=rows, dtype=torch.bfloat16, device=cpu, page=frame_tokens)


def update_cache_rows(settings: RolloutSettings, plans: int, frame_tokens: int, rows: int) -> int:
    """Rows of pools of `rows` after an update that makes the contexts of so many plans at a time, for a switch at any
    frame, by the books of a cache."""
    cache = _books(rows, frame_tokens)
    prompts = [[str(chunk) for chunk in range(settings.chunks)]] * plans
    for start in range(settings.chunk, settings.frames, settings.chunk):
        with _Bookkeeping(cast(Any, None), cache, settings, frame_tokens) as history:
            rebuild_context(history, lambda _: TextKV([]), torch.empty(plans, 0, start), prompts)
            history.context(history.branches, start)
    return cache.rows_total


class _Bookkeeping(KVHistory):
    """A history whose rows are reserved and dropped, and never written."""

    def _turn(self, reservation: Reservation, *_: object) -> None:
        reservation.mark_written()

    def _write(self, reservation: Reservation, *_: object) -> None:
        reservation.mark_written()
