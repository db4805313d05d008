"""The presets of real backbones: their values, and that each makes videos and an update with small random weights."""

from __future__ import annotations

import json
import os
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rewards.reward_cases import FakeJudges
from rewards.tiny_clip import tiny_clip

from tempact.config import flatten
from tempact.errors import UserError
from tempact.executor.sampler import WINDOWS, gaussian_noise
from tempact.models.wan.random_weights import RANDOM, RandomText
from tempact.policies import build_policies, build_trainer
from tempact.presets import PRESETS, backbone_inference, get_preset
from tempact.rewards import unasked
from tempact.rewards.judges import JudgeCall
from tempact.rewards.pickscore import Aesthetics, PickScorer, real_rewards
from tempact.types import Batch, Plan, PlanBatch, Prompt, Step
from tempact.worlds import RandomWan, Wan, world_of

CPU = torch.device("cpu")
WAN = ("self-forcing", "causal-forcing", "causal-forcing-framewise", "longlive")


def small(name: str, **changes: object):
    base = get_preset(name)
    lora = replace(base.executor.lora, rank=4, alpha=4)
    settings = {"weights": "random-tiny", "video_size": (32, 48), "frames": 18, "lora": lora, "continuations": 2}
    planner = replace(base.planner, weights="random", max_new_tokens=8)
    return replace(base, device="cpu", planner=planner, executor=replace(base.executor, **settings | changes))


def test_values_of_the_method() -> None:
    """docs/algorithm.md section 3."""
    for name in WAN:
        config = get_preset(name)
        executor, planner = config.executor, config.planner
        assert (config.data.prompts_per_iteration, planner.plans_per_prompt, executor.continuations) == (16, 4, 8)
        chunk = 1 if name.endswith("framewise") else 3
        assert (executor.frames, executor.chunk_frames, executor.timesteps, executor.shift) == (
            30, chunk, (1000, 750, 500, 250), 5.0,
        )  # fmt: skip
        assert (executor.lora.rank, executor.lora.alpha, executor.optim.lr) == (256, 256, 1e-4)
        assert (planner.lora.rank, planner.lora.alpha, planner.optim.lr) == (32, 64, 1e-5)
        assert (planner.temperature, planner.top_p, planner.top_k) == (1.0, 1.0, 0)
        assert (executor.clip_velocity_rms, executor.kl_weight, executor.ema_decay) == (0.0055, 5e-4, 0.99)
        assert not any("modulation" in target for target in executor.lora.targets)
    longlive, other = get_preset("longlive").executor, get_preset("self-forcing").executor
    assert longlive.text_switch == "recache" and other.text_switch == "cross_attention"
    assert (WINDOWS[longlive.window].window, WINDOWS[longlive.window].sink) == (12, 3)
    assert (WINDOWS[other.window].window, WINDOWS[other.window].sink) == (12, 1)
    assert set(longlive.lora.targets) - set(other.lora.targets) == {f"cross_attn.{name}" for name in "qkvo"}


def test_entries_steps_and_switches_are_those_of_each_backbone() -> None:
    """docs/backbones.md sections 2 to 4."""
    executors = {name: get_preset(name).executor for name in PRESETS if not name.startswith("shapeworld")}
    first = {"causal-forcing": "generator", "longlive": "generator"}
    assert {name: e.entry for name, e in executors.items()} == {n: first.get(n, "generator_ema") for n in executors}
    assert {name for name, e in executors.items() if e.switch_rounding == "up"} == {"longlive"}
    two, one = executors["causal-forcing-2step"], executors["causal-forcing-1step"]
    assert (two.timesteps, one.timesteps) == ((1000, 500), (1000,))
    assert two.first_timesteps == one.first_timesteps == (1000, 750, 500, 250) and two.chunk_frames == 1
    assert two.train and not one.train
    assert {e.prompt_separator for e in executors.values()} == {" Next: "}


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("shapeworld")])
def test_what_the_authors_of_a_backbone_run(name: str) -> None:
    trained = get_preset(name)
    theirs = backbone_inference(trained)
    window = "longlive" if name == "longlive" else "self-forcing"
    executor, length = theirs.executor, 30 if name == "longlive" else 21
    assert (executor.window, executor.frames, executor.precision) == (window, length, "bf16")
    assert not executor.smooth_prompts and executor.entry == trained.executor.entry
    kept = {key: value for key, value in flatten(theirs).items() if value != flatten(trained)[key]}
    assert kept.keys() <= {f"executor.{key}" for key in ("smooth_prompts", "window", "frames", "precision")}


def test_what_was_asked_for_stays_in_the_authors_inference() -> None:
    base = get_preset("self-forcing")
    asked = replace(base, executor=replace(base.executor, frames=12, precision="fp32"))
    assert (backbone_inference(asked).executor.frames, backbone_inference(asked).executor.precision) == (12, "fp32")
    assert backbone_inference(small("longlive", frames=240)).executor.frames == 240
    with pytest.raises(
        UserError, match="executor.frames: found 60; accepted: whole chunks of 3, at most 21 latent frames"
    ):
        backbone_inference(replace(base, executor=replace(base.executor, frames=60)))
    with pytest.raises(
        UserError, match="--inference: found backbone with the preset shapeworld-full; accepted: a pres"
    ):
        backbone_inference(get_preset("shapeworld-full"))


@pytest.mark.slow
@pytest.mark.parametrize("name", WAN)
def test_two_updates_with_small_random_weights(name: str) -> None:
    """Beyond the window of 12 frames, with a switch; the ratio is 1 before each step, and weights move."""
    executor = build_policies(small(name)).executor
    plan = Plan("i", (Step(0, 6, "a cat sits"), Step(6, 18, "the cat jumps")))
    before = {key: p.detach().clone() for key, p in executor.parameters().items()}
    optimiser = torch.optim.SGD(executor.parameters().values(), lr=1.0)
    for step in range(2):
        rollout = executor.rollout([plan], [6], gaussian_noise(step, executor.noise_shape(1, 2), executor.device))
        assert rollout.frames.shape == (1, 2, 69, 3, 32, 48) and rollout.frames.dtype == torch.uint8
        ones = torch.ones(1, 2, dtype=torch.bool)
        advantage = torch.tensor([[1.0, -1.0]])
        batch = Batch(torch.zeros(1), ones[:, 0], advantage, ones, None, rollout.transition)
        metrics = executor.update(batch, [0])
        assert metrics["ratio_deviation"] == 0.0
        optimiser.step()
        optimiser.zero_grad()
    assert any(not torch.equal(before[key], p) for key, p in executor.parameters().items())


def test_one_seed_gives_one_set_of_random_weights() -> None:
    config = small("self-forcing")
    one, two = (build_policies(replace(config, seed=seed)).executor.model.state_dict() for seed in (0, 0))
    other = build_policies(replace(config, seed=1)).executor.model.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["patch_embedding.weight"], other["patch_embedding.weight"])


def test_random_text_is_that_of_its_words_alone() -> None:
    text = RandomText("random-tiny", torch.device("cpu"))
    rows = text.encode(["a cat", "the cat", "", "word " * 99])
    assert rows.shape == (4, 64, 16)
    assert torch.equal(rows[0, 1], rows[1, 1]) and not torch.equal(rows[0, 0], rows[1, 0])
    assert rows[0, 2:].abs().max() == 0 and rows[2, 0].abs().max() > 0 and rows[3].any(dim=-1).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": ""}, "executor.weights: found nothing, and the preset self-forcing has none of its own; accepted"),
        ({"adapters": ("lora.pt",)}, "executor.adapters: found 1; accepted: none on random weights"),
        ({"precision": "fp8"}, "precision: found 'fp8'; accepted: fp32, bf16"),
        ({"video_size": (32, 40)}, "executor.video_size: found 32x40; accepted: positive multiples of 16"),
        ({"weights": "random-small"}, "found nothing at random-small; accepted: "),
        ({"frames": 20}, "executor.frames: found 20; accepted: a positive multiple of the chunk"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(UserError) as caught:
        build_policies(small("self-forcing", **changes))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_planner_that_the_hub_does_not_give() -> None:
    config, name = small("longlive"), "tempact-tests/no-such-planner"
    config = replace(config, planner=replace(config.planner, weights=name))
    with pytest.raises(UserError, match=f"planner.weights: {name} is no folder here, and the Hugging Face hub"):
        build_policies(config)


def test_names_of_random_weights_are_those_that_can_be_made() -> None:
    assert all(RandomWan.claims(name) for name in RANDOM) and not RandomWan.claims("shapeworld")


def test_without_the_packages_of_real_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wan, "packages", ("diffusers", "no_such_package"))
    with pytest.raises(UserError, match="random-tiny needs no_such_package; accepted: after pip install -e"):
        build_policies(small("longlive"))


@pytest.mark.slow
def test_an_iteration_with_judges_of_real_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From pixels of the VAE to advantages: one continuation is not judged, and its group goes on without it."""
    base = small("self-forcing", continuations=3)
    data = replace(base.data, prompts_per_iteration=1)
    config = replace(base, data=data, planner=replace(base.planner, plans_per_prompt=2, train=False))
    policies = build_policies(config)
    steps = (Step(0, 6, "a cat sits"), Step(6, 18, "the cat jumps"))
    lost = iter(range(100))

    def says(call: JudgeCall) -> str | None:
        if call.role == "step_following" and next(lost) == 1:
            return None
        marks = {name: field for name, field in call.rubric.fields.model_fields.items()}
        value = 0.5 if call.role == "plan_quality" else len(call.images[0]) % 10
        return json.dumps({name: [value] * 6 if name == "frame_scores" else value for name in marks})

    judges = FakeJudges(says)
    rewards = real_rewards(judges, PickScorer(*tiny_clip()), config.judges)

    def sample(prompts: list[Prompt], plans_per_prompt: int, seed: int, ranks: object) -> PlanBatch:
        return PlanBatch(prompts, [Plan(prompts[0].text, steps)] * plans_per_prompt, plans_per_prompt)

    class Prompts:
        def draw(self, count: int, seed: int) -> list[Prompt]:
            return [Prompt("0", "A cat sits, then jumps.")] * count

    monkeypatch.setattr(policies.planner, "sample", sample)
    trainer = build_trainer(config, policies, Prompts(), rewards)
    iteration = trainer.iterate(lambda phase: None)
    assert iteration.rollout.frames.shape == (2, 3, 69, 3, 32, 48)
    scored, batch = iteration.scored, iteration.batch
    assert scored.plan_quality.tolist() == pytest.approx([0.4 * 0.5 + 0.25 * 0.5 + 0.25 * 0.5 - 0.3 * 0.5] * 2)
    assert torch.isnan(scored.step_following).tolist() == [[False, True, False], [False] * 3]
    assert torch.isfinite(scored.temporal_following).all() and torch.isfinite(scored.aesthetics).all()
    assert batch.execution_mask.tolist() == [[True, False, True], [True] * 3]
    assert iteration.metrics["rewards/step_following/missing"] == pytest.approx(1 / 6)
    assert iteration.metrics["judge/calls"] == 2 + 6 + 6 and "rewards/aesthetics/truncated" in iteration.metrics
    picks = {call.role: len(call.images) for call in judges.calls}
    assert picks == {"plan_quality": 0, "temporal_following": 6, "step_following": 6}


def test_rewards_of_real_video_are_judges_and_pickscore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("TEMPACT_JUDGE_", "VLLM_", "LLM_"))]:
        monkeypatch.delenv(name)
    base = small("self-forcing")
    clip, processor = tiny_clip()
    clip.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    weights = {"aesthetics_weights": str(tmp_path), "aesthetics_processor": str(tmp_path)}
    config = replace(base, judges=replace(base.judges, cache="", video_frames=4, **weights))
    with pytest.raises(UserError, match="found no address of the judge plan_quality"):
        world_of(config).rewards(CPU)
    pictures = world_of(config).rewards(CPU, only=("aesthetics",))  # what is not asked need not be there
    assert isinstance(pictures.aesthetics, Aesthetics) and pictures.step_following is unasked
    monkeypatch.setenv("TEMPACT_JUDGE_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("TEMPACT_JUDGE_MODEL", "m")
    rewards = world_of(config).rewards(CPU)
    assert rewards.temporal_following.pictures == 4 and isinstance(rewards.aesthetics, Aesthetics)
    rewards.close()
    without = replace(config, judges=replace(config.judges, aesthetics_weights="none"))
    with closing(world_of(without).rewards(CPU, only=("step_following",))) as judged:
        assert judged.aesthetics is unasked and set(judged.step_following.judges.config.roles) == {"step_following"}
    before = threading.active_count()
    with pytest.raises(UserError, match=r"judges\.aesthetics_weights: none cannot be loaded"):
        world_of(replace(config, judges=replace(config.judges, aesthetics_weights="none"))).rewards(CPU)
    assert threading.active_count() == before  # the judges' thread has ended
