"""A plan's videos and record have the same bits whatever is made beside them, and an update's cache does not grow with
the number of plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tempact.executor.executor import Executor
from tempact.executor.rollout import chunk_prompts
from tempact.executor.sampler import WINDOWS, gaussian_noise
from tempact.executor.stream import stream_latents
from tempact.policies import build_executor
from tempact.presets import get_preset
from tempact.types import Batch, Plan, Step, Transition

Make = Callable[..., Executor]
CPU = torch.device("cpu")
FRAMES = 12
SCENES = ["A red circle is at the top left.", "A blue square blinks.", "It turns green and then it moves to the right."]


def plan(*bounds: int, first: int = 0) -> Plan:
    named = (SCENES[(first + i) % len(SCENES)] for i in range(len(bounds)))
    return Plan("i", tuple(Step(a, b, name) for (a, b), name in zip(pairwise(bounds), named, strict=False)))


PLANS = [plan(0, 3, 9, 12), plan(0, 9, 12, first=1), plan(0, 3, 6, 12, first=2)]
FORKS = [3, 9, 6]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shapeworld() -> Executor:
    """The shipped weights with an adapter that says something."""
    executor = build_executor(get_preset("shapeworld"), CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in executor.parameters().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return executor


@pytest.mark.parametrize(("window", "switch"), [("full", "cross_attention"), ("infinity-rope", "recache")])
def test_a_plan_has_the_same_bits_among_any_others(
    shapeworld: Executor, monkeypatch: pytest.MonkeyPatch, window: str, switch: str
) -> None:
    """Alone, too: a CPU rounds products of few rows otherwise, and one video before its fork has the fewest."""
    settings = replace(shapeworld.settings, frames=FRAMES, window=WINDOWS[window], text_switch=switch)
    monkeypatch.setattr(shapeworld, "settings", settings)
    noise = gaussian_noise(1, shapeworld.noise_shape(len(PLANS), 3), CPU)
    whole, record = shapeworld.roll_out(PLANS, FORKS, noise)
    assert record is not None and len(whole.unique()) > 0.5 * whole[:, 0].numel()
    for count, together in ((3, 1), (3, 2), (2, 3), (1, 1)):
        fewer = gaussian_noise(1, shapeworld.noise_shape(len(PLANS), count), CPU)
        for first in range(0, len(PLANS), together):
            own = slice(first, first + together)
            latents, found = shapeworld.roll_out(PLANS[own], FORKS[own], fewer.part(own))
            assert torch.equal(latents, whole[own, :count]), (count, together, first)
            same_record(found, record.part(own), count)
    mirrored = replace(noise, draw=lambda plan, *video: noise.draw(len(PLANS) - 1 - plan, *video))
    assert torch.equal(shapeworld.roll_out(PLANS[::-1], FORKS[::-1], mirrored)[0], whole.flip(0))


def same_record(found: Transition | None, whole: Transition, count: int) -> None:
    assert found is not None and found.prompts == whole.prompts and torch.equal(found.start, whole.start)
    assert torch.equal(found.states, whole.states[:, :count]) and torch.equal(found.noises, whole.noises[:, :count])
    frames = found.prefix.shape[2]
    assert torch.equal(found.prefix, whole.prefix[:, :, :frames]) and not whole.prefix[:, :, frames:].any()


@pytest.mark.parametrize("cores", [1, 2])
def test_a_call_rounds_one_video_as_it_does_several(shapeworld: Executor, cores: int) -> None:
    texts = shapeworld.model.project_text(shapeworld.encode(SCENES[:1]))
    x = torch.randn(5, 3, 3, *shapeworld.latent_size, generator=torch.Generator().manual_seed(1))
    with threads(cores), torch.no_grad():
        found = []
        for rows in (1, 2, 3, 5):
            text = texts.select(torch.zeros(rows, dtype=torch.int64))
            found.append(shapeworld.model(x[:rows], torch.full((rows, 3), 0.9375), text, torch.arange(3)))
    assert all(torch.equal(own, found[-1][: len(own)]) for own in found)


def recorded(executor: Executor, plans: int, fork: int) -> Batch:
    """A roll-out of like plans, a plan at a time, and advantages."""
    given, noise = (
        [plan(0, 3, fork, executor.settings.frames)] * plans,
        gaussian_noise(1, executor.noise_shape(plans, 3), CPU),
    )
    transition = executor.rollout(given, [fork] * plans, noise).transition
    counted = torch.ones(plans, 3, dtype=torch.bool)
    return Batch(
        torch.zeros(plans), torch.ones(plans, dtype=torch.bool), torch.linspace(-1, 1, 3).expand(plans, 3), counted,
        None, transition,
    )  # fmt: skip


@pytest.mark.parametrize("micro_batch", [3, 20])
def test_an_updates_cache_does_not_grow_with_the_number_of_plans(make_executor: Make, micro_batch: int) -> None:
    """Within the windows of the plans of a micro-batch, which the next one finds free again."""
    frames = []
    for plans in (2, 16, 32):
        executor = make_executor(window="infinity-rope", frames=9, micro_batch=micro_batch, rollout_videos=3)
        executor.update(recorded(executor, plans, 6), list(range(plans)))
        assert not executor.cache.branches and not executor.cache.rows_used
        frames.append(executor.cache.rows_total // executor.frame_tokens)
    assert len(set(frames)) == 1 and frames[0] <= 4 * 6, frames


def test_contexts_go_back_where_an_update_is_given_up(make_executor: Make) -> None:
    executor = make_executor(micro_batch=2)
    batch = recorded(executor, 2, 6)
    next(executor._forward(batch.transition, [0, 1], grad=False))
    assert not executor.cache.branches and not executor.cache.rows_used


@pytest.fixture
def worded(make_executor: Make, monkeypatch: pytest.MonkeyPatch) -> Executor:
    """An executor whose texts have as many rows as the prompt has words, cut to whole rows."""

    def encode(prompts: list[str]) -> Tensor:
        rows = torch.zeros(len(prompts), 40, 8)
        for row, prompt in zip(rows, prompts, strict=True):
            for i, word in enumerate(prompt.split()):
                row[i] = torch.randn(8, generator=torch.Generator().manual_seed(sum(map(ord, word))))
        return rows

    executor = make_executor(smooth_prompts=False)
    executor.model.config = replace(executor.model.config, text_len=40, text_multiple=2)
    for block in executor.model.blocks:
        block.cross_attn.text_len = 40
    monkeypatch.setattr(executor.text_encoder, "encode", encode)
    return executor


def test_texts_have_the_rows_of_their_roll_out_whatever_came_before(
    worded: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = worded.encode
    monkeypatch.setattr(worded, "encode", lambda prompts: seen.append(encode(prompts).shape[1]) or encode(prompts))
    long = Plan("i", (Step(0, 6, "one two three four five six seven eight nine ten"), Step(6, 18, "eleven")))
    short = Plan("i", (Step(0, 6, "one two"), Step(6, 18, "three")))
    noise = gaussian_noise(1, worded.noise_shape(2, 2), CPU)

    def iteration(plans: list[Plan]) -> Tensor:
        seen.clear()
        transition = worded.rollout(plans, [6] * len(plans), noise).transition
        assert transition is not None
        return worded.velocities(transition, [0])

    fresh = iteration([short, short])
    assert set(seen) == {6}  # 2 rows and 4 of padding
    iteration([short, long])
    assert set(seen) == {14}  # also those of the update, whose first plan is short
    assert torch.equal(iteration([short, short]), fresh) and set(seen) == {6}
    iteration([long, short])
    seen.clear()
    alone = gaussian_noise(1, worded.noise_shape(1, 1), CPU)
    streamed = torch.cat(list(stream_latents(worded, short, alone)), dim=1)
    assert set(seen) == {6}
    assert torch.equal(streamed, worded.rollout([short], [0], alone).frames[0, 0]) or seen


def test_prompts_of_all_parts_say_how_many_rows_there_are(worded: Executor) -> None:
    """A part of short prompts beside one of long ones, in either order."""
    long, short = plan(0, 6, 18, first=2), plan(0, 6, 18, first=1)
    for plans in ([long, short], [short, long]):
        worded.config = replace(worded.config, rollout_videos=2)
        worded.read(["a b"])
        worded.rollout(plans, [6, 6], gaussian_noise(1, worded.noise_shape(2, 2), CPU))
        longest = max(len(prompt.split()) for own in plans for prompt in chunk_prompts(own, worded.settings))
        assert worded.encode(["a"]).shape[1] == longest + 4 + longest % 2
