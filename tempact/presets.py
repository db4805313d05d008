"""Named presets: each is a function that returns a full configuration."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace

from tempact.config import (
    DataConfig,
    EvaluationConfig,
    ExecutorConfig,
    LoraConfig,
    OptimConfig,
    PlannerConfig,
    RunConfig,
    TrainerConfig,
)
from tempact.errors import UserError

ATTENTION = ("q", "k", "v", "o")
EXECUTOR_TARGETS = (
    *(f"self_attn.{name}" for name in ATTENTION),
    *(f"cross_attn.{name}" for name in ATTENTION),
    "ffn.0",
    "ffn.2",
)
SELF_FORCING_TARGETS = tuple(name for name in EXECUTOR_TARGETS if not name.startswith("cross_attn."))
PLANNER_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QWEN3_MICRO_BATCH = {"1.7B": 8, "4B": 4, "8B": 4}  # plans of up to 2,024 new tokens a backward


def shapeworld() -> RunConfig:
    """The method in the embedded world: 2 CPU cores, under 10 minutes (default)."""
    return RunConfig(
        preset="shapeworld",
        planner=PlannerConfig(
            weights="shapeworld",
            lora=LoraConfig(rank=16, alpha=32, targets=PLANNER_TARGETS),
            optim=OptimConfig(lr=1.5e-3, lr_end=0.2),
            max_new_tokens=112,
        ),
        executor=ExecutorConfig(
            weights="shapeworld",
            lora=LoraConfig(rank=16, alpha=16, targets=EXECUTOR_TARGETS),
            optim=OptimConfig(lr=6e-4, lr_end=0.2),
            continuations=4,
            ema_decay=0.9,
            micro_batch=96,
        ),
        data=DataConfig(prompts_per_iteration=3),
        trainer=TrainerConfig(iterations=84),
        evaluation=EvaluationConfig(simple=48, hard=48),
        output="runs/shapeworld",
    )


def shapeworld_full() -> RunConfig:
    """The same at a size for one H200: more prompts, M = 4, N = 8, a larger evaluation."""
    base = shapeworld()
    return replace(
        base,
        preset="shapeworld-full",
        planner=replace(base.planner, optim=OptimConfig(lr=1e-3, lr_end=0.1)),
        executor=replace(base.executor, optim=OptimConfig(lr=2.5e-4, lr_end=0.1), continuations=8, micro_batch=768),
        data=DataConfig(prompts_per_iteration=8),
        trainer=TrainerConfig(iterations=120, checkpoint_every=40),
        evaluation=EvaluationConfig(simple=256, hard=256, batch=256),
        output="runs/shapeworld-full",
    )


def shapeworld_smoke() -> RunConfig:
    """Two iterations and a tiny evaluation, to see that everything runs."""
    base = shapeworld()
    return replace(
        base,
        preset="shapeworld-smoke",
        planner=replace(base.planner, plans_per_prompt=2),
        executor=replace(base.executor, continuations=2),
        data=DataConfig(prompts_per_iteration=1),
        trainer=TrainerConfig(iterations=2, checkpoint_every=1, samples_every=1),
        evaluation=EvaluationConfig(simple=2, hard=2, strips=1, bootstrap=50, batch=2),
        output="runs/shapeworld-smoke",
    )


def qwen3_planner(size: str) -> PlannerConfig:
    """Qwen3-1.7B, -4B or -8B, which think before they plan (ALGORITHM.md section 3)."""
    return PlannerConfig(
        weights=f"Qwen/Qwen3-{size}",
        lora=LoraConfig(rank=32, alpha=64, targets=PLANNER_TARGETS),
        optim=OptimConfig(lr=1e-5),
        precision="bf16",
        max_new_tokens=2024,
        sampled_together=32,
        micro_batch=QWEN3_MICRO_BATCH[size],
        checkpoint_activations=True,
    )


def self_forcing() -> RunConfig:
    """Self-Forcing on Wan2.1-T2V-1.3B, 480x832 (weights are yours to give): window of 12 frames, raw keys."""
    # ALGORITHM.md section 3; window and positions of BACKBONES.md section 2, "TA on SF"
    return RunConfig(
        preset="self-forcing",
        planner=qwen3_planner("1.7B"),
        executor=ExecutorConfig(
            weights="",
            lora=LoraConfig(rank=256, alpha=256, targets=SELF_FORCING_TARGETS),
            optim=OptimConfig(lr=1e-4),
            precision="bf16-fp32-gates",
            offload_text_encoder=True,  # 10.6 GiB
            frames=30,
            window="tempact-self-forcing",
            rollout_videos=8,  # 8 windows of 12 frames are 26 GiB of K and V
            micro_batch=4,
        ),
        data=DataConfig(prompts="", prompts_per_iteration=16),
        evaluation=EvaluationConfig(batch=8),  # 8 videos of 60 latent frames are 2.1 GiB of pixels
        output="runs/self-forcing",
    )


def causal_forcing() -> RunConfig:
    """Causal-Forcing, chunk-wise, on Wan2.1-T2V-1.3B: sampled and attended as Self-Forcing."""
    return replace(self_forcing(), preset="causal-forcing", output="runs/causal-forcing")


def causal_forcing_framewise() -> RunConfig:
    """Causal-Forcing, frame-wise: chunks of one latent frame, otherwise as causal-forcing."""
    # published with a buffer of 21 frames: --executor.window self-forcing --executor.frames 21
    base = causal_forcing()
    executor = replace(base.executor, chunk_frames=1)
    name = "causal-forcing-framewise"
    return replace(base, preset=name, executor=executor, output=f"runs/{name}")


def longlive() -> RunConfig:
    """LongLive on Wan2.1-T2V-1.3B (base and lora.pt): sink of 3 in a window of 12, K/V recached at switches."""
    base = self_forcing()
    executor = replace(
        base.executor,
        lora=LoraConfig(rank=256, alpha=256, targets=EXECUTOR_TARGETS),
        window="longlive",
        text_switch="recache",
    )
    return replace(base, preset="longlive", executor=executor, output="runs/longlive")


def self_forcing_4b() -> RunConfig:
    """As self-forcing, planned by Qwen3-4B."""
    planner = qwen3_planner("4B")
    return replace(self_forcing(), preset="self-forcing-4b", planner=planner, output="runs/self-forcing-4b")


def self_forcing_8b() -> RunConfig:
    """As self-forcing, planned by Qwen3-8B."""
    planner = qwen3_planner("8B")
    return replace(self_forcing(), preset="self-forcing-8b", planner=planner, output="runs/self-forcing-8b")


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "shapeworld": shapeworld,
    "shapeworld-full": shapeworld_full,
    "shapeworld-smoke": shapeworld_smoke,
    "self-forcing": self_forcing,
    "self-forcing-4b": self_forcing_4b,
    "self-forcing-8b": self_forcing_8b,
    "causal-forcing": causal_forcing,
    "causal-forcing-framewise": causal_forcing_framewise,
    "longlive": longlive,
}
DEFAULT = "shapeworld"


def get_preset(name: str) -> RunConfig:
    """The preset of that name; UserError with the nearest name if there is none."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1, cutoff=0.0)[0]
        raise UserError(f"preset: found {name!r}; accepted: {', '.join(PRESETS)} (nearest: {near})")
    return PRESETS[name]()
