"""Named presets: each is a function that returns a full configuration; its docstring begins with the help's line.

Presets of real backbones train as TempAct's authors did (docs/algorithm.md section 3), which differs from the
inference of a backbone's own authors; `backbone_inference` gives the latter:

    prompts    smoothed, so that a step prepares its successor; authors give each prompt as it is
    length     30 latent frames, room for switches after which a window moves; Self- and Causal-Forcing's own end at 21
    window     12 frames with sink 1 and relative positions, which makes those lengths possible; LongLive's is its own
    precision  bf16 with fp32 norms and gates, for exact log-probs; authors compute in bf16 throughout
    entry      as authors: of the models in a .pt file, the one that a backbone's own inference reads
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from tempact.config import (
    WINDOWS,
    BestOfConfig,
    DataConfig,
    EvaluationConfig,
    ExecutorConfig,
    LoraConfig,
    OptimConfig,
    PlannerConfig,
    RunConfig,
    TrainerConfig,
    refuse,
    validate,
)

EXECUTOR_TARGETS = (*(f"{block}_attn.{name}" for block in ("self", "cross") for name in "qkvo"), "ffn.0", "ffn.2")
SELF_FORCING_TARGETS = tuple(name for name in EXECUTOR_TARGETS if not name.startswith("cross_attn."))
PLANNER_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QWEN3_MICRO_BATCH = {"1.7B": 8, "4B": 4, "8B": 4}  # plans of up to 2,024 new tokens a backward


def derived(base: RunConfig, name: str, planner: PlannerConfig | None = None, **executor: Any) -> RunConfig:
    """`base` under another name, with another planner and other values of the executor's keys."""
    executing = replace(base.executor, **executor)
    return replace(base, preset=name, output=f"runs/{name}", planner=planner or base.planner, executor=executing)


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
        evaluation=EvaluationConfig(simple=48, hard=48, strict=48),
        best_of=BestOfConfig(chunks=2),  # chosen on validation instructions
        output="runs/shapeworld",
    )


def shapeworld_full() -> RunConfig:
    """The same at a size for one H200: more prompts, M = 4, N = 8, forks at random chunks, a larger evaluation."""
    planner = replace(shapeworld().planner, optim=OptimConfig(lr=4e-3, lr_end=0.1))
    more = {"continuations": 8, "forks": "random_chunk", "micro_batch": 768}
    return replace(
        derived(shapeworld(), "shapeworld-full", planner, optim=OptimConfig(lr=6e-4, lr_end=0.1), **more),
        data=DataConfig(prompts_per_iteration=16),
        trainer=TrainerConfig(iterations=120, checkpoint_every=40),
        evaluation=EvaluationConfig(simple=256, hard=256, strict=256, batch=256),
    )


def shapeworld_smoke() -> RunConfig:
    """Two iterations and a tiny evaluation, to see that everything runs."""
    planner = replace(shapeworld().planner, plans_per_prompt=2)
    return replace(
        derived(shapeworld(), "shapeworld-smoke", planner, continuations=2),
        data=DataConfig(prompts_per_iteration=1),
        trainer=TrainerConfig(iterations=2, checkpoint_every=1, samples_every=1),
        evaluation=EvaluationConfig(simple=2, hard=2, strict=2, strips=1, bootstrap=50, batch=2),
    )


def qwen3_planner(size: str) -> PlannerConfig:
    """Qwen3-1.7B, -4B or -8B, which think before they plan (docs/algorithm.md section 3)."""
    return PlannerConfig(
        weights=f"Qwen/Qwen3-{size}",
        lora=LoraConfig(rank=32, alpha=64, targets=PLANNER_TARGETS),
        optim=OptimConfig(lr=1e-5),
        precision="bf16",
        max_new_tokens=2024,
        sampled_together=64,
        micro_batch=QWEN3_MICRO_BATCH[size],
        checkpoint_activations=True,
    )


def self_forcing() -> RunConfig:
    """Self-Forcing on Wan2.1-T2V-1.3B, 480x832 (weights are yours to give): window of 12 frames, raw keys.

    Prompts, length, window and precision differ from its authors' inference, as said above. TempAct's published
    adapters saw the prompts of two steps joined without a separator: use them with --executor.prompt_separator "".
    """
    return RunConfig(
        preset="self-forcing",
        planner=qwen3_planner("1.7B"),
        executor=ExecutorConfig(
            weights="",
            lora=LoraConfig(rank=256, alpha=256, targets=SELF_FORCING_TARGETS),
            optim=OptimConfig(lr=1e-4),
            entry="generator_ema",
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


def self_forcing_4b() -> RunConfig:
    """As self-forcing, planned by Qwen3-4B."""
    return derived(self_forcing(), "self-forcing-4b", qwen3_planner("4B"))


def self_forcing_8b() -> RunConfig:
    """As self-forcing, planned by Qwen3-8B."""
    return derived(self_forcing(), "self-forcing-8b", qwen3_planner("8B"))


def causal_forcing() -> RunConfig:
    """Causal-Forcing, chunk-wise, on Wan2.1-T2V-1.3B: sampled and attended as Self-Forcing.

    Prompts, length, window and precision differ from its authors' inference, as in self-forcing and all that follow.
    """
    return derived(self_forcing(), "causal-forcing", entry="generator")


def causal_forcing_framewise() -> RunConfig:
    """Causal-Forcing, frame-wise: chunks of one latent frame, otherwise as causal-forcing."""
    return derived(self_forcing(), "causal-forcing-framewise", chunk_frames=1)


def causal_forcing_2step() -> RunConfig:
    """Causal-Forcing++, frame-wise: two steps a frame, four for the first one."""
    first = ExecutorConfig.timesteps
    return derived(causal_forcing_framewise(), "causal-forcing-2step", timesteps=(1000, 500), first_timesteps=first)


def causal_forcing_1step() -> RunConfig:
    """Causal-Forcing++, frame-wise: one step a frame, four for the first one; it generates, but is not trained."""
    return derived(causal_forcing_2step(), "causal-forcing-1step", timesteps=(1000,), train=False)


def longlive() -> RunConfig:
    """LongLive on Wan2.1-T2V-1.3B (base and lora.pt): sink of 3 in a window of 12, K/V recached at switches.

    Prompts and precision differ from its authors' inference; window and switches, which come at the first chunk start
    at or after a plan file's bound (40: 42), do not.
    """
    return derived(
        self_forcing(), "longlive", lora=LoraConfig(rank=256, alpha=256, targets=EXECUTOR_TARGETS), entry="generator",
        window="longlive", text_switch="recache", switch_rounding="up",
    )  # fmt: skip


def wan_14b() -> RunConfig:
    """As self-forcing, on a causal Wan2.1-T2V-14B, whose frozen weights two processes share: 2 GPUs of 80 GB.

    There, 4 continuations a plan, an adapter of rank 64 and recomputed activations are what fits (docs/real-video.md).
    """
    planner = replace(qwen3_planner("1.7B"), sampled_together=32, offload=True)
    lora = LoraConfig(rank=64, alpha=64, targets=SELF_FORCING_TARGETS)
    return derived(
        self_forcing(), "wan-14b", planner, lora=lora, continuations=4, rollout_videos=2, micro_batch=1,
        checkpoint_activations=True, cuda_graphs=False, shard=2,
    )  # fmt: skip


DEFAULT = "shapeworld"
PRESETS: dict[str, Callable[[], RunConfig]] = {
    make.__name__.replace("_", "-"): make
    for make in (
        shapeworld, shapeworld_full, shapeworld_smoke, self_forcing, self_forcing_4b, self_forcing_8b, causal_forcing,
        causal_forcing_framewise, causal_forcing_2step, causal_forcing_1step, longlive, wan_14b,
    )
}  # fmt: skip


def get_preset(name: str) -> RunConfig:
    """The preset of that name; UserError with the nearest name if there is none."""
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, 1, cutoff=0.0)[0]
        refuse("preset", repr(name), f"{', '.join(PRESETS)} (nearest: {near})")
    return PRESETS[name]()


def backbone_inference(config: RunConfig) -> RunConfig:
    """`config` with the prompts, window, length and precision of the inference of its backbone's authors.

    Only values that are the preset's are changed: any other was asked for. LongLive's length is the one asked for.
    UserError for ShapeWorld, and for a length that the backbone's own window cannot have.
    """
    own = get_preset(config.preset).executor
    if own.weights == DEFAULT:
        refuse("--inference", f"backbone with the preset {config.preset}", "a preset of a real backbone")
    theirs: dict[str, Any] = {"smooth_prompts": False, "precision": "bf16"}
    if own.window != "longlive":
        theirs |= {"window": "self-forcing", "frames": WINDOWS["self-forcing"].max_frames}
    usual = {name: value for name, value in theirs.items() if getattr(config.executor, name) == getattr(own, name)}
    config = replace(config, executor=replace(config.executor, **usual))
    validate(config)
    return config
