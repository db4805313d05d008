"""The presets of real backbones: their values, and that each makes videos and an update with small random weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tempact.build import build_policies, is_random
from tempact.errors import UserError
from tempact.executor.rollout import gaussian_noise
from tempact.executor.window import WINDOWS
from tempact.models.wan.random_weights import RANDOM, RandomText
from tempact.presets import get_preset
from tempact.types import Batch, Plan, Step

WAN = ("self-forcing", "causal-forcing", "causal-forcing-framewise", "longlive")


def small(name: str, **changes: object):
    base = get_preset(name)
    lora = replace(base.executor.lora, rank=4, alpha=4)
    settings = {"weights": "random-tiny", "video_size": (32, 48), "frames": 18, "lora": lora, "continuations": 2}
    planner = replace(base.planner, weights="random", max_new_tokens=8)
    return replace(base, device="cpu", planner=planner, executor=replace(base.executor, **settings | changes))


def test_values_of_the_method() -> None:
    """ALGORITHM.md section 3."""
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
        ({"video_size": (32, 40)}, "executor.video_size: found 32x40; accepted: multiples of 16x16"),
        ({"weights": "random-small"}, "random-small is not a folder"),
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
    assert all(is_random(name) for name in RANDOM) and not is_random("shapeworld")


def test_without_the_packages_of_real_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempact.build.WAN_PACKAGES", ("diffusers", "no_such_package"))
    with pytest.raises(UserError, match="random-tiny needs no_such_package; accepted: after pip install -e"):
        build_policies(small("longlive"))
