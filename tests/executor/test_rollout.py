"""Rollouts: forks, windows, text switches and the rebuilt context (docs/algorithm.md 6, items 16 - 19)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from executor.window_policies import POLICIES

from tempact.executor.executor import Executor
from tempact.executor.kv_history import KVHistory
from tempact.executor.rollout import PromptKV, chunk_prompts, rebuild_context
from tempact.executor.sampler import WINDOWS, NoiseSource, WindowPolicy, gaussian_noise
from tempact.executor.stream import stream_latents
from tempact.types import Plan, Step

Make = Callable[..., Executor]
CPU = torch.device("cpu")


def plan(*bounds: int, name: str = "p") -> Plan:
    steps = tuple(Step(a, b, f"{name} step {a}") for a, b in pairwise(bounds))
    return Plan("instruction", steps)


PLANS = [plan(0, 3, 9, 18, name="a"), plan(0, 6, 12, 18, name="b")]
SMALL_WINDOW = WindowPolicy(window=9, sink=3)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=2e-5, rtol=1e-4)


def rebuilt(executor: Executor, text: PromptKV, prefix: torch.Tensor, prompts: list[list[str]]) -> KVHistory:
    history = executor.history()
    with torch.no_grad():
        rebuild_context(history, text, prefix, prompts)
    return history


@pytest.mark.parametrize("changes", POLICIES)
def test_batched_continuations_equal_serial_ones(make_executor: Make, changes: dict) -> None:
    executor = make_executor(**changes)
    noise = gaussian_noise(1, executor.noise_shape(2, 3), CPU)
    forks = [3, 12]
    latents, transition = executor.roll_out(PLANS, forks, noise)
    for p in range(2):
        for n in (2, 0):
            # before the fork everyone follows continuation 0's noise, after it its own
            def alone(plan: int, continuation: int, chunk: int, p: int = p, n: int = n) -> torch.Tensor:
                return noise.draw(p, n if chunk * 3 >= forks[p] else 0, chunk)

            source = NoiseSource((1, 1, *noise.shape[2:]), alone)
            serial, own_transition = executor.roll_out([PLANS[p]], [forks[p]], source)
            assert close(serial[0, 0], latents[p, n])
            assert close(own_transition.states[0, 0], transition.states[p, n])


@pytest.mark.parametrize("limit", [1, 3, 5, 6])
def test_plans_in_turn_give_what_they_give_together(make_executor: Make, limit: int) -> None:
    """Also where their recorded chunks start at other frames; the cache holds one plan's branches at a time."""
    changes = {"window": "longlive", "frames": 18}
    one, two = make_executor(**changes), make_executor(**changes, rollout_videos=limit)
    noise, made = gaussian_noise(1, one.noise_shape(2, 3), CPU), []
    together = one.rollout(PLANS, [3, 12], noise)
    turns = two.rollout(PLANS, [3, 12], noise, lambda unit, part: made.append(part))
    assert torch.equal(torch.cat([part.frames for part in made]), turns.frames)
    assert [len(part.frames) for part in made] == ([2] if limit >= 6 else [1, 1])
    assert (turns.frames.int() - together.frames.int()).abs().max() <= 1
    a, b = together.transition, turns.transition
    assert a.prompts == b.prompts and torch.equal(a.start, b.start) and torch.equal(a.noises, b.noises)
    assert close(a.states, b.states) and close(a.prefix, b.prefix) and a.prefix.shape == b.prefix.shape
    held = [each.cache.nbytes for each in (one, two)]
    assert held[1] == held[0] if limit >= 6 else held[1] < held[0]


def test_a_videos_noise_is_its_own_whatever_is_drawn_beside_it() -> None:
    """Numbers of plans and continuations, parts and order say which noise there is, not what it is."""
    shape = (4, 2, 3, 1, 3, 2, 2)
    noise = gaussian_noise(1, shape, CPU)
    every = [(p, n) for p in range(4) for n in range(2)]
    drawn = {(p, n, chunk): noise(chunk, [(p, n)])[0] for p, n in every for chunk in (0, 1)}
    numbers = torch.stack([*drawn.values()])
    assert len(numbers.unique()) == numbers.numel() and noise(0, every).shape == (8, *shape[2:])
    assert abs(numbers.mean()) < 0.1 and abs(numbers.std() - 1) < 0.1
    for seed, plans, continuations, same in ((1, 1, 1, True), (1, 64, 8, True), (2, 4, 2, False)):
        other = gaussian_noise(seed, (plans, continuations, *shape[2:]), CPU)
        assert torch.equal(other(1, [(0, 0)])[0], drawn[0, 0, 1]) is same
    for a, b in ((0, 1), (1, 3), (3, 4)):
        part = noise.part(slice(a, 4)).part(slice(0, b - a))
        assert part.shape == (b - a, *shape[1:])
        asked = [(p - a, n) for p, n in reversed(every) if a <= p < b]
        assert torch.equal(part(1, asked), torch.stack([drawn[p + a, n, 1] for p, n in asked]))


@pytest.mark.parametrize("limit", [0, 3])
def test_no_noise_is_drawn_that_no_video_uses(make_executor: Make, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Random numbers of an iteration: K x a chunk's for every branch of every chunk, also before the forks."""
    executor, drawn = make_executor(rollout_videos=limit), []
    randn = torch.randn

    def counted(*size, **given):
        made = randn(*size, **given)
        if "generator" in given:
            drawn.append(made.numel())
        return made

    noise = gaussian_noise(1, executor.noise_shape(2, 3), CPU)
    executor.encode([prompt for own in PLANS for prompt in chunk_prompts(own, executor.settings)])
    monkeypatch.setattr(torch, "randn", counted)
    executor.rollout(PLANS, [3, 12], noise)
    branches = (1 + 5 * 3) + (4 * 1 + 2 * 3)
    assert drawn == [4 * (3 * 3 * 2 * 2 * 16)] * branches


def test_latents_of_one_part_are_gone_while_the_next_is_made(
    make_executor: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, made, alive = make_executor(rollout_videos=3), [], []
    roll_out = executor._roll_out

    def watched(*given):
        alive.append([ref() is not None for ref in made])
        latents = roll_out(*given)
        made.append(weakref.ref(latents))
        return latents

    monkeypatch.setattr(executor, "_roll_out", watched)
    executor.rollout([*PLANS, PLANS[0]], [3, 12, 3], gaussian_noise(1, executor.noise_shape(3, 3), CPU))
    assert alive == [[], [False], [False, False]] and made[-1]() is None


def test_the_text_encoder_is_asked_once(make_executor: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    executor, asked = make_executor(rollout_videos=3), []
    encode = executor.text_encoder.encode
    monkeypatch.setattr(executor.text_encoder, "encode", lambda prompts: asked.append(prompts) or encode(prompts))
    executor.rollout(PLANS, [3, 12], gaussian_noise(1, executor.noise_shape(2, 3), CPU))
    prompts = [prompt for plan in PLANS for prompt in chunk_prompts(plan, executor.settings)]
    assert asked == [list(dict.fromkeys(prompts))]


def test_continuations_share_the_context_and_differ_after_it(make_executor: Make) -> None:
    executor = make_executor()
    latents, transition = executor.roll_out(PLANS, [3, 12], gaussian_noise(1, executor.noise_shape(2, 3), CPU))
    assert torch.equal(latents[1, 0, :, :12], latents[1, 2, :, :12])
    assert not torch.allclose(latents[1, 0, :, 12:15], latents[1, 2, :, 12:15])
    assert torch.equal(transition.prefix[1], latents[1, 0, :, :12])
    assert transition.prefix[0, :, 3:].eq(0).all()
    # the recorded states end in the recorded clean chunk's last noisy state, and follow from the noises
    sigmas = executor.settings.schedule.sigmas
    for t in range(3):
        x, after = transition.states[0, 0, t], transition.states[0, 0, t + 1]
        x0 = (after - sigmas[t + 1] * transition.noises[0, 0, t]) / (1 - sigmas[t + 1])
        velocity = executor.velocities(transition, [0])[0, 0, t]
        assert torch.allclose(x0, x - sigmas[t] * velocity, atol=1e-3)


def test_order_of_plans_and_continuations_does_not_matter(make_executor: Make) -> None:
    executor = make_executor()
    noise = gaussian_noise(1, executor.noise_shape(2, 3), CPU)
    one, _ = executor.roll_out(PLANS, [3, 12], noise)

    def mirrored(plan: int, continuation: int, chunk: int) -> torch.Tensor:
        return noise.draw(1 - plan, (0, 2, 1)[continuation], chunk)

    other, _ = executor.roll_out(PLANS[::-1], [12, 3], NoiseSource(noise.shape, mirrored))
    assert close(one[0, 1], other[1, 2])
    assert close(one[1, 2], other[0, 1])


@pytest.mark.parametrize("changes", POLICIES)
def test_a_rebuilt_context_is_the_rollouts(make_executor: Make, changes: dict) -> None:
    """v on the training path equals the rollout's: x0 from it reproduces the recorded states."""
    executor = make_executor(**changes)
    # a switch of text right at the fork, beyond the window, and an earlier one
    late = [plan(0, 6, 15, 18, name="a"), plan(0, 3, 15, 18, name="b")]
    rollout = executor.rollout(late, [15, 15], gaussian_noise(2, executor.noise_shape(2, 2), CPU))
    transition = rollout.transition
    velocity = executor.velocities(transition, [0, 1])
    sigmas = executor.settings.schedule.sigmas
    for t in range(3):
        x0 = transition.states[:, :, t] - sigmas[t] * velocity[:, :, t]
        again = (1 - sigmas[t + 1]) * x0 + sigmas[t + 1] * transition.noises[:, :, t]
        assert close(again, transition.states[:, :, t + 1])


def test_recache_rewrites_the_context_and_cross_attention_does_not(make_executor: Make) -> None:
    caches = {}
    for switch in ("cross_attention", "recache"):
        executor = make_executor(text_switch=switch)
        prompts = [["one", "one", "two"]]
        book = PromptKV(executor.model, executor.encode, ["one", "two"])
        prefix = torch.randn(1, 3, 6, 8, 8, generator=torch.Generator().manual_seed(0))
        history = rebuilt(executor, book, prefix, prompts)
        caches[switch] = [pair.gather() for pair in history.context(history.branches, 6)]
        if switch == "recache":
            same = rebuilt(executor, book, prefix, [["two", "two", "two"]])
            unswitched = [pair.gather() for pair in same.context(same.branches, 6)]
    first, second = caches["cross_attention"][1][0], caches["recache"][1][0]
    assert not torch.allclose(first, second)
    # rewritten bidirectionally under the new text: not what a causal pass under that text leaves either
    assert not torch.allclose(second[:, :12], unswitched[1][0][:, :12])


def test_memory_stays_constant_once_the_window_is_full(make_executor: Make) -> None:
    executor = make_executor(window="longlive", frames=36)
    book = PromptKV(executor.model, executor.encode, ["one"])
    used = []
    for frames in (15, 24, 33):
        with rebuilt(executor, book, torch.zeros(1, 3, frames, 8, 8), [["one"] * 12]) as history:
            used.append(history.cache.rows_used)
    tokens = 9 * 4  # sink 3 and the 6 frames before the chunk, 4 tokens each
    assert used == [tokens] * 3


def test_a_context_pass_that_fails_leaves_the_history_as_it_was(
    make_executor: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = make_executor(window="longlive")
    book = PromptKV(executor.model, executor.encode, ["one"])
    history = rebuilt(executor, book, torch.zeros(1, 3, 6, 8, 8), [["one"] * 3])
    (branch,) = history.branches
    held = history.cache.rows_used, history.frames(branch)
    monkeypatch.setattr(executor.model, "write_context", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        history.commit([branch], torch.zeros(1, 3, 3, 8, 8), book(["one"]))
    assert (history.cache.rows_used, history.frames(branch), history.cache.rows_reserved) == (*held, 0)


def test_a_recache_that_fails_ends_the_videos_and_nothing_else(
    make_executor: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = make_executor(window="longlive", text_switch="recache")
    noise = gaussian_noise(0, executor.noise_shape(2, 2), CPU)
    before = executor.roll_out(PLANS, [3, 9], noise)[0]
    own, passes = executor.model.write_context, []

    def fails(x: torch.Tensor, *rest: object) -> None:
        passes.append(x.shape[2])
        if passes.count(6) == 2:  # a switch at frame 6: the second branch's
            raise RuntimeError("out of memory")
        own(x, *rest)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(executor.model, "write_context", fails)
        executor.rollout([plan(0, 6, 18)] * 2, [3, 3], noise)
    cache = executor.cache
    assert passes[-2:] == [6, 6] and not cache.branches and not cache.rows_used and not cache.rows_reserved
    assert torch.equal(executor.roll_out(PLANS, [3, 9], noise)[0], before)


def test_each_branch_is_rewritten_under_its_own_text_from_its_own_latents(make_executor: Make) -> None:
    executor = make_executor(window="longlive", text_switch="recache")
    book = PromptKV(executor.model, executor.encode, ["one", "two", "three"])
    prefix = torch.randn(2, 3, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = [["one", "one", "two"], ["one", "one", "three"]]
    with rebuilt(executor, book, prefix, prompts) as history:
        both = [view.gather() for view in history.context(history.branches, 6)]
        for p in range(2):
            with rebuilt(executor, book, prefix[p : p + 1], [prompts[p]]) as alone:
                for pair, own in zip(both, alone.context(alone.branches, 6), strict=True):
                    assert all(torch.allclose(x[p], y[0], atol=1e-6) for x, y in zip(pair, own.gather(), strict=True))


def test_chunk_prompts_follow_spans_and_smoothing(make_executor: Make) -> None:
    settings = make_executor().settings
    assert (
        chunk_prompts(PLANS[0], replace(settings, separator=None)) == ["a step 0"] + ["a step 3"] * 2 + ["a step 9"] * 3
    )
    assert chunk_prompts(PLANS[0], settings)[0] == "a step 0 Next: a step 3"
    assert chunk_prompts(PLANS[0], settings)[-1] == "a step 9"


def test_the_separator_is_the_configurations(make_executor: Make) -> None:
    """TempAct's published adapters saw steps joined without one."""
    assert chunk_prompts(PLANS[0], make_executor(prompt_separator="").settings)[0] == "a step 0a step 3"
    assert chunk_prompts(PLANS[0], make_executor(smooth_prompts=False).settings)[0] == "a step 0"


@pytest.mark.parametrize(("later", "expected"), [((1000, 500), [2, 2]), ((1000,), [1, 1])])
def test_the_first_chunk_has_its_own_timesteps(
    make_executor: Make, monkeypatch: pytest.MonkeyPatch, later: tuple[int, ...], expected: list[int]
) -> None:
    """Causal-Forcing++: the four-step list for the first frame, one or two steps for the others."""
    first = (1000, 750, 500, 250)
    executor = make_executor(
        window="self-forcing", chunk_frames=1, frames=3, timesteps=later, first_timesteps=first, train=False
    )
    assert executor.noise_shape(1, 2) == (1, 2, 4, 3, 1, 8, 8)
    noise, called, velocity = gaussian_noise(1, executor.noise_shape(1, 1), CPU), [], executor.runner.velocity

    def noted(x, sigma, text, positions, context):
        called.append((positions.item(), round(1000 * sigma[0, 0].item(), 2)))
        return velocity(x, sigma, text, positions, context)

    monkeypatch.setattr(executor.runner, "velocity", noted)
    latents, transition = executor.roll_out([plan(0, 3)], [0], noise)
    assert transition is None  # the first chunk is not trained
    levels = [[level for frame, level in called if frame == chunk] for chunk in range(3)]
    assert levels[0] == [1000.0, 937.5, 833.33, 625.0] and [len(own) for own in levels[1:]] == expected
    assert levels[1] == levels[2] == [1000.0, 833.33][: len(later)]
    monkeypatch.undo()
    streamed = torch.cat(list(stream_latents(executor, plan(0, 3), noise)), dim=1)
    assert torch.equal(streamed, latents[0, 0])
    # all in four steps: the first frame is the same, the others are not
    whole = make_executor(window="self-forcing", chunk_frames=1, frames=3).roll_out([plan(0, 3)], [0], noise)[0]
    assert torch.equal(whole[0, 0, :, :1], latents[0, 0, :, :1]) and not close(whole[0, 0, :, 1:], latents[0, 0, :, 1:])


def test_transitions_have_as_many_steps_as_later_chunks(make_executor: Make) -> None:
    """Whatever the first chunk's timesteps; v on the training path reproduces the recorded states."""
    executor = make_executor(timesteps=(1000, 500), first_timesteps=(1000, 750, 500, 250))
    noise = gaussian_noise(1, executor.noise_shape(2, 2), CPU)
    _, transition = executor.roll_out(PLANS, [3, 12], noise)
    assert transition.states.shape[:3] == (2, 2, 2) and transition.noises.shape[:3] == (2, 2, 1)
    velocity, (sigma, after, _) = executor.velocities(transition, [0, 1]), executor.settings.schedule.sigmas
    x0 = transition.states[:, :, 0] - sigma * velocity[:, :, 0]
    assert close((1 - after) * x0 + after * transition.noises[:, :, 0], transition.states[:, :, 1])
    assert torch.equal(transition.noises[1, 1, 0], noise.draw(1, 1, 4)[1])


def test_window_names_cover_the_backbones() -> None:
    assert {"full", "self-forcing", "longlive", "tempact-self-forcing"} <= WINDOWS.keys()
