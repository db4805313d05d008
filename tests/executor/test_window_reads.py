"""What the executor really reads: source frame and RoPE position of every key, told from the keys in the cache
(docs/backbones.md section 2, first the tables, then "LL re-cache")."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tempact.executor.cuda_graphs import CachedAttention, Context
from tempact.executor.executor import Executor
from tempact.executor.sampler import gaussian_noise
from tempact.models.wan.transformer import ChunkAttention
from tempact.types import Plan, Step

Make = Callable[..., Executor]
Slots = list[tuple[int, int]]  # source frame and position of every key frame, in order
TOKENS = 4  # a latent frame, of 8 x 8 with patches of 4 x 4


@dataclass
class Call:
    """One forward of the transformer during a roll-out."""

    positions: list[int]  # of its own frames
    keys: list[Tensor]  # attended history, by layer [B, rows, heads, head_dim]
    values: list[Tensor]
    writes: bool  # a context pass


@dataclass
class Recorder:
    calls: list[Call] = field(default_factory=list)

    def note(self, positions: Tensor, context: Context, *, writes: bool) -> None:
        pairs = [pair if isinstance(pair, tuple) else pair.gather() for pair in context or []]
        self.calls.append(
            Call(positions.tolist(), [k.clone() for k, _ in pairs], [v.clone() for _, v in pairs], writes)
        )


class Keys(ChunkAttention):
    """Attention to the own frames, and to a context if there is one, that keeps the keys it is given."""

    def __init__(self, context: Context = None):
        self.past, self.seen = CachedAttention(context), []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen.append(k)
        return self.past(layer, q, k, v)


def record(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder, runner = Recorder(), executor.runner
    velocity, write = runner.velocity, runner.write_context

    def noted_velocity(x, sigma, text, positions, context):
        recorder.note(positions, context, writes=False)
        return velocity(x, sigma, text, positions, context)

    def noted_write(x, sigma, text, positions, context, *places):
        recorder.note(positions, context, writes=True)
        return write(x, sigma, text, positions, context, *places)

    monkeypatch.setattr(runner, "velocity", noted_velocity)
    monkeypatch.setattr(runner, "write_context", noted_write)
    return recorder


def roll_out(executor: Executor, switches: Sequence[int] = ()) -> Tensor:
    """Latents [F, C, H, W] of one video whose prompt changes at these frames."""
    bounds = [0, *switches, executor.settings.frames]
    steps = tuple(Step(a, b, f"prompt {i}") for i, (a, b) in enumerate(itertools.pairwise(bounds)))
    noise = gaussian_noise(3, executor.noise_shape(1, 1), executor.device)
    return executor.roll_out([Plan("i", steps)], [0], noise)[0][0, 0].transpose(0, 1)


@torch.no_grad()
def keys_of_frames(executor: Executor, frames: Tensor, positions: Sequence[int]) -> Tensor:
    """First layer's keys of clean frames [F, C, H, W] at every position: [positions, F, TOKENS, heads, head_dim].

    There they depend on nothing but the frame itself.
    """
    text = executor.model.project_text(executor.encode(["any"])).select(torch.zeros(len(frames), dtype=torch.int64))
    found = []
    for position in positions:
        attend = Keys()
        executor.model(frames[:, :, None], torch.zeros(len(frames), 1), text, torch.tensor([position]), attend)
        found.append(attend.seen[0])
    return torch.stack(found)


def recognised(keys: Tensor, table: Tensor) -> Slots:
    """Which frame at which position each group of TOKENS keys is; fails unless exactly one is that near."""
    slots: Slots = []
    for own in keys.unflatten(0, (-1, TOKENS)):
        distance = (table - own).flatten(2).abs().amax(dim=2)  # [positions, F]
        near = (distance < 1e-4).nonzero().tolist()
        assert len(near) == 1, f"{len(near)} candidates, the nearest {distance.min():.1e} away"
        slots.append((near[0][1], near[0][0]))
    return slots


def span(*parts: int | tuple[int, int]) -> list[int]:
    """(0, (4, 6)) -> [0, 4, 5, 6]"""
    return [frame for part in parts for frame in ([part] if isinstance(part, int) else range(part[0], part[1] + 1))]


# key frames of every chunk, its own included; of the chunks that are not here, all of them
LONGLIVE = {4: span((0, 2), (6, 14)), 5: span((0, 2), (9, 17)), 6: span((0, 2), (12, 20)), 7: span((0, 2), (15, 23)),
            19: span((0, 2), (51, 59))}  # fmt: skip
TEMPACT = {4: span(0, (4, 14)), 5: span(0, (7, 17)), 6: span(0, (10, 20)), 7: span(0, (13, 23)), 19: span(0, (49, 59))}
INFINITY_ROPE = {2: span(0, (4, 8)), 3: span(0, (7, 11)), 4: span(0, (10, 14)), 5: span(0, (13, 17)),
                 6: span(0, (16, 20)), 7: span(0, (19, 23)), 19: span(0, (55, 59))}  # fmt: skip
ROWS = {  # name -> window, frames a chunk, latent frames, key frames by chunk, positions where they are not absolute
    "Self-Forcing, Causal-Forcing": ("self-forcing", 3, 21, {}, None),
    "Causal-Forcing, frame-wise": ("self-forcing", 1, 21, {}, None),
    "everything": ("full", 3, 24, {}, None),
    "LongLive": ("longlive", 3, 60, LONGLIVE, None),
    "LongLive, infinite attention": ("longlive-infinite", 3, 60, LONGLIVE, span((0, 11))),
    "TempAct on Self-Forcing": ("tempact-self-forcing", 3, 60, TEMPACT, span((0, 11))),
    "Infinity-RoPE": ("infinity-rope", 3, 60, INFINITY_ROPE, span((0, 5))),
}


@pytest.mark.parametrize("row", ROWS)
def test_attended_frames_and_positions(make_executor: Make, monkeypatch: pytest.MonkeyPatch, row: str) -> None:
    """All five forwards of a chunk: at the first one, while the window fills, beyond it, and at 60 latent frames."""
    window, chunk, frames, beyond, renumbered = ROWS[row]
    executor = make_executor(window=window, chunk_frames=chunk, frames=frames)
    recorder = record(executor, monkeypatch)
    latents = roll_out(executor)
    table = keys_of_frames(executor, latents, range(frames))
    chunks = frames // chunk
    assert len(recorder.calls) == 5 * chunks - 1  # nothing is written after the last chunk
    shown = range(chunks) if chunks <= 21 and not beyond else [*range(8), 19]
    for c in shown:
        own = list(range(c * chunk, (c + 1) * chunk))
        keys = beyond.get(c, list(range(own[-1] + 1)))
        positions = keys
        if renumbered is not None and c in beyond:  # the same numbers, counted so that the own frames keep theirs
            positions = [number + own[-1] - renumbered[-1] for number in renumbered]
        expected = list(zip(keys, positions, strict=True))
        calls = recorder.calls[5 * c : 5 * c + 5]
        assert [call.writes for call in calls] == [False] * 4 + [True] * (len(calls) - 4)
        for call in calls:
            history = recognised(call.keys[0][0], table) if call.keys else []
            assert history + list(zip(own, call.positions, strict=True)) == expected, f"chunk {c}"


@pytest.mark.parametrize("window", ["longlive", "longlive-infinite"])
@pytest.mark.parametrize("switch", [3, 6, 12, 15, 42])
def test_longlive_rewrites_the_window_at_a_switch(
    make_executor: Make, monkeypatch: pytest.MonkeyPatch, switch: int, window: str
) -> None:
    """One bidirectional pass at sigma 0 over the last 12 frames or all there are; beyond the window the sink keeps the
    keys of the old prompt, and they are attended to; where positions are relative, right before the other frames."""
    executor = make_executor(window=window, text_switch="recache", frames=switch + 6)
    recorder = record(executor, monkeypatch)
    latents = roll_out(executor, [switch])
    first = 5 * switch // 3  # five forwards a chunk
    before, recache, after = recorder.calls[first - 1 : first + 2]
    own = list(range(switch - 9, switch)) if switch > 12 else list(range(switch))
    assert recache.writes and not after.writes and recache.positions == own
    sink = [] if switch <= 12 else [0, 1, 2]
    table = keys_of_frames(executor, latents, range(switch + 6))
    moved = switch - 12 if sink and window == "longlive-infinite" else 0  # places by which the sink follows
    expected = [(frame, frame + moved) for frame in sink]
    assert (recognised(recache.keys[0][0], table) if sink else recache.keys) == expected
    attend = Keys(list(zip(recache.keys, recache.values, strict=True)) if sink else None)
    with torch.no_grad():
        text = executor.model.project_text(executor.encode(["prompt 1"]))
        executor.model(latents[own].transpose(0, 1)[None], torch.zeros(1, len(own)), text, torch.tensor(own), attend)
    rewritten = attend.seen[1][0].unflatten(0, (-1, TOKENS))  # deeper keys depend on the prompt
    reads = after.keys[1][0].unflatten(0, (-1, TOKENS))
    read_slots = recognised(after.keys[0][0], table)
    frames = [frame for frame, _ in read_slots]
    if window == "longlive-infinite" and switch > 9:
        assert [position for _, position in read_slots] == list(range(switch - 9, switch))
    assert frames == [frame for frame in range(switch) if switch <= 9 or frame < 3 or frame >= switch - 6]
    for (frame, position), read in zip(read_slots, reads, strict=True):
        if frame in own and frame == position:
            assert torch.allclose(read, rewritten[own.index(frame)], atol=1e-5)
    if switch > 3:  # the sink, as it was read before
        values = [call.values[1][0][: 3 * TOKENS] for call in (before, after)]
        same = torch.allclose(*values, atol=1e-4)
        assert same == bool(sink)


def test_a_change_of_text_alone_touches_no_key(make_executor: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """TempAct on Self-Forcing: cross-attention only."""
    executor = make_executor(window="tempact-self-forcing", frames=9)
    recorder = record(executor, monkeypatch)
    roll_out(executor, [3])
    assert len(recorder.calls) == 5 * 3 - 1
    assert torch.equal(recorder.calls[5].keys[1], recorder.calls[9].keys[1])
