"""Typed configuration. Light on purpose: importing it must not import torch.

Every field is read somewhere (a test looks), every unit is in the name or the comment. Named presets
are in `presets.py`; parsing of command lines and YAML is in `cli.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tempact.errors import UserError

LARGEST_SEED = 2**62  # generators take 64 bits, and the seeds of further videos count on from here


@dataclass(frozen=True)
class LoraConfig:
    """PEFT LoRA. `targets` are suffixes of module names."""

    rank: int
    alpha: int
    targets: tuple[str, ...]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW; `grad_clip` is the largest global gradient norm of one policy."""

    lr: float
    lr_end: float = 1.0  # share of lr left at the last iteration; it falls linearly from the first
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    eps: float = 1e-8
    grad_clip: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """Prompts. `prompts` is "shapeworld": drawn from the grammar's training split; or a CSV, JSONL, parquet
    or text file of prompts (tempact.prompt_file); "" where none are known yet."""

    prompts: str = "shapeworld"
    prompts_per_iteration: int = 2


@dataclass(frozen=True)
class PlannerConfig:
    """The planner policy and its GSPO update (ALGORITHM.md 2.4, 2.5)."""

    weights: str  # "shapeworld" (shipped), a Hugging Face folder or name, or "random" (small)
    lora: LoraConfig
    optim: OptimConfig
    adapter: str = ""  # PEFT folder to start from; the reference is a frozen copy of it. "": a fresh one
    precision: str = "fp32"  # of the frozen weights: fp32 or bf16
    thinking: bool = True  # where the chat template can switch it
    train: bool = True
    plans_per_prompt: int = 4  # M
    max_new_tokens: int = 192
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    clip_low: float = 3e-4
    clip_high: float = 4e-4
    kl_weight: float = 5e-4
    advantage_clip: float = 1.0
    loss_tokens: str = "all"  # "all" counts the whole response, "json" only what follows </think>
    sampled_together: int = 0  # plans sampled in one batch, which bounds their K and V; 0: all of an iteration
    micro_batch: int = 0  # plans a backward; 0: all of an update
    checkpoint_activations: bool = False  # layers are recomputed in the backward pass
    liger: str = "off"  # Liger kernels: off, auto (all on a GPU), model (in the layers), all (also the fused loss)


@dataclass(frozen=True)
class ExecutorConfig:
    """The executor policy, its rollout and its Flow-GRPO update (ALGORITHM.md 2.1 - 2.3, 2.5)."""

    # "shapeworld" (shipped), a folder of that kind, any published Wan checkpoint, or "random" / "random-tiny"
    weights: str
    lora: LoraConfig
    optim: OptimConfig
    adapters: tuple[str, ...] = ()  # LoRA files and PEFT folders that are merged into a Wan checkpoint, in this order
    entry: str = ""  # of a .pt file with several models: generator_ema, generator or model; "": the first of these
    decoder: str = ""  # file of a tiny decoder (TAEHV) for generated videos and previews; "": the VAE's
    precision: str = "fp32"  # of a Wan checkpoint: fp32, bf16, or bf16-fp32-gates
    wan_folder: str = ""  # Wan2.1-T2V-1.3B (its own or diffusers'), for text encoder and VAE; "": that of the weights
    text_cache: str = "runs/text"  # folder of a Wan text encoder's embeddings, for all runs
    offload_text_encoder: bool = False  # a Wan text encoder's weights wait on the host while no prompt is new
    video_size: tuple[int, int] = (480, 832)  # height and width of a Wan checkpoint's videos, pixels
    train: bool = True
    continuations: int = 8  # N
    frames: int = 24  # F, latent frames
    chunk_frames: int = 3  # c
    window: str = "full"  # a name in executor.window.WINDOWS
    text_switch: str = "cross_attention"  # or "recache"
    timesteps: tuple[int, ...] = (1000, 750, 500, 250)
    first_timesteps: tuple[int, ...] = ()  # of the first chunk, where it is sampled in other steps; (): timesteps
    shift: float = 5.0
    eta: float = 1.0
    smooth_prompts: bool = True
    prompt_separator: str = " Next: "  # between a step's prompt and the next one's, where prompts are smoothed
    switch_rounding: str = "nearest"  # of a plan file's bounds to chunk starts: nearest, or up (as LongLive switches)
    clip_velocity_rms: float = 0.0055
    kl_weight: float = 5e-4
    advantage_clip: float = 2.0
    max_rollout_gap: float = 1.0  # between log-probs of roll-out and training, in clips; the run stops beyond it
    ema_decay: float = 0.99
    micro_batch: int = 64  # (continuation, transition) pairs a backward
    checkpoint_activations: bool = False  # blocks are recomputed in the backward pass
    rollout_videos: int = 0  # videos that advance together, by whole plans, which bounds the cache; 0: all
    cuda_graphs: bool = True  # where the kernels serve; a graph for each shape of a call


@dataclass(frozen=True)
class RewardConfig:
    """Weights of ALGORITHM.md 2.5."""

    temporal_following: float = 0.85
    plan_quality: float = 0.15
    format_penalty: float = 0.5
    step_following: float = 0.6
    aesthetics: float = 0.4
    custom: tuple[str, ...] = ()  # rewards of one's own, each "module:function"
    shuffle_advantages: bool = False  # control experiment: advantages permuted over the iteration


@dataclass(frozen=True)
class JudgeSettings:
    """Rewards for real video. Addresses, models, keys, concurrency and rate limits are in the environment only
    (docs/judges.md)."""

    shapeworld: bool = False  # served judges score ShapeWorld too, in the place of its rules and its verifier
    deadline_s: float = 120.0  # for a call, with its retries and pauses
    attempt_s: float = 60.0  # for one request
    attempts: int = 4  # requests of a call
    outage_s: float = 300.0  # silence of all servers of a role after which the run saves and stops
    cache: str = "runs/judges.sqlite"  # replies, for all ranks and runs on a machine; "" for none
    video_frames: int = 6  # of a whole video that a judge sees
    step_frames: int = 6  # of a step
    aesthetics_frames: int = 8  # of a step that PickScore sees
    aesthetics_batch: int = 64  # frames that PickScore takes at a time
    aesthetics_weights: str = "yuvalkirstain/PickScore_v1"  # a CLIP folder, or a name on the Hugging Face hub
    aesthetics_processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # its tokenizer and image sizes


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation: videos per set, film strips shown, bootstrap resamples."""

    simple: int = 64
    hard: int = 64
    strips: int = 4
    bootstrap: int = 2000
    batch: int = 64
    seed: int = 1234


@dataclass(frozen=True)
class TrainerConfig:
    """The loop. `updates_per_iteration` splits the plan groups of an iteration over that many steps."""

    iterations: int = 100
    updates_per_iteration: int = 1
    checkpoint_every: int = 20
    keep_checkpoints: int = 2
    samples_every: int = 10
    max_skipped_updates: int = 5  # consecutive updates refused for non-finite gradients before the run stops


@dataclass(frozen=True)
class RunConfig:
    """One run, whole."""

    preset: str
    planner: PlannerConfig
    executor: ExecutorConfig
    data: DataConfig = field(default_factory=DataConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    judges: JudgeSettings = field(default_factory=JudgeSettings)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: str = "runs/shapeworld"
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda
    kernels: str = "auto"  # auto (Triton on a GPU), torch (the reference path), triton
    wandb_project: str = ""  # Weights & Biases project, "" for none
    threads: int = 0  # CPU threads, 0 leaves torch's choice
    deterministic: bool = False


def validate(config: RunConfig) -> None:
    """Raises UserError in one line for the first value that cannot work."""
    executor, planner, trainer, evaluation = config.executor, config.planner, config.trainer, config.evaluation
    _check_judges(config.judges)
    _check_ranges(config)
    counts = {
        "planner.lora.rank": planner.lora.rank,
        "planner.lora.alpha": planner.lora.alpha,
        "planner.max_new_tokens": planner.max_new_tokens,
        "executor.lora.rank": executor.lora.rank,
        "executor.lora.alpha": executor.lora.alpha,
        "executor.chunk_frames": executor.chunk_frames,
        "executor.micro_batch": executor.micro_batch,
        "data.prompts_per_iteration": config.data.prompts_per_iteration,
        "trainer.iterations": trainer.iterations,
        "trainer.updates_per_iteration": trainer.updates_per_iteration,
        "trainer.checkpoint_every": trainer.checkpoint_every,
        "trainer.keep_checkpoints": trainer.keep_checkpoints,
        "trainer.samples_every": trainer.samples_every,
        "evaluation.simple": evaluation.simple,
        "evaluation.hard": evaluation.hard,
        "evaluation.bootstrap": evaluation.bootstrap,
        "evaluation.batch": evaluation.batch,
    }
    for key, count in counts.items():
        if count < 1:
            raise UserError(f"{key}: found {count}; accepted: at least 1")
    checks = [
        (executor.frames > 0 and executor.frames % executor.chunk_frames == 0, "executor.frames", executor.frames,
         f"a positive multiple of executor.chunk_frames ({executor.chunk_frames})"),
        (planner.plans_per_prompt >= 2, "planner.plans_per_prompt", planner.plans_per_prompt,
         "at least 2 (a planning group compares plans)"),
        (executor.continuations >= 2, "executor.continuations", executor.continuations,
         "at least 2 (an execution group compares continuations)"),
        (planner.micro_batch >= 0, "planner.micro_batch", planner.micro_batch, "0 (all), or at least 1"),
        (planner.sampled_together >= 0, "planner.sampled_together", planner.sampled_together, "0 (all), or at least 1"),
        (executor.rollout_videos >= 0, "executor.rollout_videos", executor.rollout_videos, "0 (all), or at least 1"),
        (bool(executor.timesteps), "executor.timesteps", executor.timesteps, "at least one"),
        (bool(executor.lora.targets), "executor.lora.targets", executor.lora.targets, "at least one"),
        (bool(planner.lora.targets), "planner.lora.targets", planner.lora.targets, "at least one"),
        (0 < executor.eta <= 1, "executor.eta", executor.eta, "above 0, at most 1 (0 leaves nothing to learn from)"),
    ]  # fmt: skip
    for good, key, found, accepted in checks:
        if not good:
            raise UserError(f"{key}: found {found}; accepted: {accepted}")


def _check_ranges(config: RunConfig) -> None:
    """Numbers that would turn the learning around, or stop a run long after it began."""
    planner, executor, rewards = config.planner, config.executor, config.rewards
    above: dict[str, float] = {
        "planner.clip_low": planner.clip_low,
        "planner.clip_high": planner.clip_high,
        "planner.advantage_clip": planner.advantage_clip,
        "executor.clip_velocity_rms": executor.clip_velocity_rms,
        "executor.advantage_clip": executor.advantage_clip,
        "executor.max_rollout_gap": executor.max_rollout_gap,
    }
    least: dict[str, float] = {
        "planner.kl_weight": planner.kl_weight,
        "executor.kl_weight": executor.kl_weight,
        "trainer.max_skipped_updates": config.trainer.max_skipped_updates,
        "evaluation.strips": config.evaluation.strips,
        "threads": config.threads,
        **{f"rewards.{name}": value for name, value in vars(rewards).items() if type(value) is float},
    }
    checks: list[tuple[bool, str, object, str]] = [
        (0 <= executor.ema_decay <= 1, "executor.ema_decay", executor.ema_decay, "0 to 1"),
        (bool(config.output.strip()), "output", repr(config.output), "a folder"),
    ]
    for name, optim in (("planner", planner.optim), ("executor", executor.optim)):
        above[f"{name}.optim.grad_clip"] = optim.grad_clip
        least |= {f"{name}.optim.{key}": getattr(optim, key) for key in ("lr", "weight_decay", "eps")}
        checks += [
            (0 < optim.lr_end <= 1, f"{name}.optim.lr_end", optim.lr_end, "above 0, at most 1"),
            (all(0 <= beta < 1 for beta in optim.betas), f"{name}.optim.betas", optim.betas, "each 0 to below 1"),
        ]
    for key, seed in (("seed", config.seed), ("evaluation.seed", config.evaluation.seed)):
        checks.append((0 <= seed <= LARGEST_SEED, key, seed, f"0 to {LARGEST_SEED}"))
    checks += [(value > 0, key, value, "above 0") for key, value in above.items()]
    checks += [(value >= 0, key, value, "at least 0") for key, value in least.items()]
    for good, key, found, accepted in checks:
        if not good:
            raise UserError(f"{key}: found {found}; accepted: {accepted}")


def _check_judges(judges: JudgeSettings) -> None:
    least = {"attempts": 1, "aesthetics_batch": 1, "video_frames": 2, "step_frames": 2, "aesthetics_frames": 2}
    for key, count in least.items():  # two frames: the first and the last
        if getattr(judges, key) < count:
            raise UserError(f"judges.{key}: found {getattr(judges, key)}; accepted: at least {count}")
    for key in ("deadline_s", "attempt_s"):
        if getattr(judges, key) <= 0:
            raise UserError(f"judges.{key}: found {getattr(judges, key)}; accepted: above 0")
    if judges.outage_s <= judges.attempt_s:
        raise UserError(f"judges.outage_s: found {judges.outage_s}; accepted: above attempt_s ({judges.attempt_s})")
