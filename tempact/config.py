"""The configuration of a run: every key with its type, default, description, accepted values, and what it sets.

The last three are metadata of a field, which `validate`, the command line's help and docs/config.md read, and a resumed
run and an evaluation for the keys that may differ. Nothing here imports torch. Presets are in `presets.py`; command
lines and YAML files are read in `cli.py`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from operator import attrgetter
from typing import Any, NoReturn, TypeVar, get_type_hints

from tempact.errors import UserError

T = TypeVar("T")
LARGEST_SEED = 2**62  # generators take 64 bits, and the seeds of further videos count on from here
TRAIN_TIMESTEPS = 1000  # of the noise schedule that Wan's models were trained with
ROPE_POSITIONS = 1024  # temporal positions of Wan's models; a reference implementation's table ends there
TOKEN_PIXELS = 16  # of a token's side: 8 by the VAE, 2 by the transformer's patches
EXECUTOR_PRECISIONS = ("fp32", "bf16", "bf16-fp32-gates")  # docs/backbones.md section 1
ENTRIES = ("generator_ema", "ema", "generator", "model", "module", "state_dict")  # models of a .pt file, best first
# what trainers put before module names, and the parts that FSDP, activation checkpointing and torch.compile put between
NAME_PREFIXES = ("module.", "model.", "diffusion_model.")
NAME_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")

SERVER_URL = re.compile(r"https?://[^\s/@?#]+(/[^\s?#]*)?")

# what a key sets; a video's identity is in the keys of the first kind alone
VIDEO = "video"  # videos of given weights, and the training
TRAINING = "training"  # the training, but no video of given weights
SPEED = "speed"  # time and memory: results are the same up to rounding
RUN = "run"  # what is recorded and evaluated, how long a run goes on, when it gives up
RESUME_MAY_CHANGE = (SPEED, RUN)
REPLACED = {"wandb_project": "trackers, with wandb among them, and tracker_project"}  # keys of old, and those of now

# histograms of metrics.jsonl: equal bins, an odd number so that 0 has one of its own, from -reach to reach; what lies
# beyond is in the outermost. Units are clips, and those of ratios end at an edge.
HISTOGRAM_BINS = 21
HISTOGRAM_REACH = {"advantage_histogram": 1.0, "ratio_histogram": 3.0}


@dataclass(frozen=True)
class Rule:
    """Accepted values of a key in words, the test of a value, and how a refused one is shown."""

    accepted: str
    good: Callable[[Any], bool]
    shown: Callable[[Any], str] = repr


@dataclass(frozen=True)
class Key:
    """A key. kind: type of its values. default: dataclasses.MISSING where presets alone have a value."""

    kind: Any
    default: Any
    sets: str
    about: str
    rules: tuple[Rule, ...]


def described(sets: str, about: str, *rules: Rule) -> dict[str, Any]:
    """Metadata of a field."""
    return {"sets": sets, "about": about, "rules": rules}


def key(default: T, sets: str, about: str, *rules: Rule) -> T:
    """A field with a default and its metadata; of type `T` for type checkers, as `dataclasses.field` is."""
    return field(default=default, metadata=described(sets, about, *rules))


def at_least(low: int, accepted: str = "") -> Rule:
    return Rule(accepted or f"at least {low}", lambda value: low <= value < inf)


def choice(*names: str) -> Rule:
    return Rule(", ".join(name or "nothing" for name in names), lambda value: value in names)


WHOLE_CHUNKS = at_least(1, "a positive multiple of executor.chunk_frames")
COUNT, NOT_NEGATIVE, OR_ALL = at_least(1), at_least(0), at_least(0, "0 (all), or at least 1")
POSITIVE = Rule("above 0", lambda value: 0 < value < inf)
SHARE = Rule("above 0, at most 1", lambda value: 0 < value <= 1)
# a trained policy is that of the full distribution, and its last denoising step, being deterministic, is not trained
TEMPERATURE = Rule("1, or above 0 where the planner is not trained", POSITIVE.good)
TOP_P = Rule("1, or above 0 and at most 1 where the planner is not trained", SHARE.good)
TOP_K = at_least(0, "0 (off), or more where the planner is not trained")
SOME_STEPS = Rule("two or more, or one where the executor is not trained", bool)
OUTAGE = Rule("above judges.attempt_s", POSITIVE.good)
DECAY = Rule("0 to 1", lambda value: 0 <= value <= 1)
SEED = Rule(f"0 to {LARGEST_SEED}", lambda value: 0 <= value <= LARGEST_SEED)
GROUP = at_least(2, "at least 2 (a group's members are compared)")
FORKS = choice("one", "tree", "random_chunk", "none")
TRAINED = choice("first", "step", "video")
COMPARED = choice("siblings", "depth")
BRANCHES = Rule("each at least 2", lambda numbers: all(number >= 2 for number in numbers))
SOME = Rule("at least one", bool)
SWITCHES = choice("cross_attention", "recache")
HELD_OUT = choice("test", "validation")
SUITES = choice("shapeworld", "shapeworld-strict")
SAMPLERS = choice("inside", "served")
DEVIATIONS = choice("global", "group", "none")
SEQUENCES = choice("gspo", "grpo", "rloo")
CHUNKS = choice("flow_grpo", "diffusion_nft")
LEVELS = choice("all", "drawn", "sliding")
SPANS = choice("planned", "uniform")
LIGER = choice("auto", "off", "model", "all")
SERVER = Rule(
    "an address http(s)://host[:port], or nothing", lambda url: not url or SERVER_URL.fullmatch(url) is not None
)
SILENCE = Rule("at least planner.server_attempt_s", POSITIVE.good)
IMPORTANCE = at_least(1)
PROJECT = Rule("a project", lambda name: bool(name.strip()))
FOLDER = Rule("a folder", lambda name: bool(name.strip()))
BETAS = Rule("each 0 to below 1", lambda betas: all(0 <= beta < 1 for beta in betas))
FALLING = Rule(
    f"falling numbers in (0, {TRAIN_TIMESTEPS}]",
    lambda steps: all(a > b for a, b in pairwise((TRAIN_TIMESTEPS + 1, *steps, 0))),
)
SIZE = Rule(
    f"positive multiples of {TOKEN_PIXELS}",
    lambda size: all(side > 0 and side % TOKEN_PIXELS == 0 for side in size),
    lambda size: "x".join(map(str, size)),
)
REQUEST_FIELD = Rule("a name, or nothing", lambda name: re.fullmatch(r"\w*", name) is not None)
NAME = r"[^\W\d]\w*"
TRACKERS = ("tensorboard", "wandb", "trackio")
TRACKED = Rule(f"each {', '.join(TRACKERS[:-1])} or {TRACKERS[-1]}", lambda names: set(names) <= set(TRACKERS))
FUNCTIONS = Rule(
    "each module:function", lambda names: all(re.fullmatch(rf"({NAME}\.)*{NAME}:{NAME}", name) for name in names)
)


@dataclass(frozen=True)
class Window:
    """Numbers of a window policy, in latent frames: the earlier frames that a chunk attends to.

    window: attended frames, sink and own chunk included; None for all. sink: first frames that are always attended.
    positions: "absolute", or "relative": beyond the window the attended frames are numbered without the gap behind the
    sink. max_frames: longest video; None where only the RoPE positions end.
    """

    window: int | None = None
    sink: int = 0
    positions: str = "absolute"
    max_frames: int | None = None

    def check(self, frames: int, chunk: int) -> None:
        """UserError if a video of `frames` latent frames cannot be made in chunks of `chunk`."""
        if self.window is not None and not 1 <= chunk <= self.window - self.sink:
            fitting = ", ".join(str(n) for n in range(1, self.window - self.sink + 1) if frames % n == 0)
            room = f"{fitting} with this window ({self.window} frames, {self.sink} of them sink) and {frames} frames"
            refuse("executor.chunk_frames", chunk, room)
        if frames < 1 or frames % chunk:
            whole = f"a positive multiple of the chunk, executor.chunk_frames ({chunk}), in latent frames"
            refuse("executor.frames", frames, whole)
        if self.max_frames is not None and frames > self.max_frames:
            longest = self.max_frames // chunk * chunk
            refuse(
                "executor.frames", frames, f"whole chunks of {chunk}, at most {longest} latent frames, with this window"
            )
        if self.positions == "absolute" and frames > ROPE_POSITIONS:
            longest = ROPE_POSITIONS // chunk * chunk
            end = f"whole chunks of {chunk}, at most {longest} latent frames (RoPE positions)"
            refuse("executor.frames", frames, f"{end}, with this window, or one of relative positions")


WINDOWS = {  # docs/backbones.md section 2
    "full": Window(),
    "self-forcing": Window(max_frames=21),  # Causal-Forcing's too
    "longlive": Window(window=12, sink=3),
    "longlive-infinite": Window(window=12, sink=3, positions="relative"),
    "tempact-self-forcing": Window(window=12, sink=1, positions="relative"),
    "infinity-rope": Window(window=6, sink=1, positions="relative"),
}


@dataclass(frozen=True)
class LoraConfig:
    """The trained adapter, a LoRA of PEFT."""

    rank: int = field(metadata=described(VIDEO, "rank of the two factors", COUNT))
    alpha: int = field(metadata=described(VIDEO, "scale of the adapter times its rank", COUNT))
    targets: tuple[str, ...] = field(metadata=described(VIDEO, "ends of the names of adapted linear layers", SOME))


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the gradient clip of one policy."""

    lr: float = field(metadata=described(TRAINING, "learning rate of the first iteration", NOT_NEGATIVE))
    lr_end: float = key(1.0, TRAINING, "share of lr left at the last iteration; it falls linearly", SHARE)
    betas: tuple[float, float] = key((0.9, 0.999), TRAINING, "decay of the two moments", BETAS)
    weight_decay: float = key(1e-4, TRAINING, "decoupled weight decay", NOT_NEGATIVE)
    eps: float = key(1e-8, TRAINING, "added to the root of the second moment", NOT_NEGATIVE)
    grad_clip: float = key(1.0, TRAINING, "largest global norm of the gradient", POSITIVE)


@dataclass(frozen=True)
class DataConfig:
    """Training prompts."""

    prompts: str = key("shapeworld", TRAINING, "shapeworld (its grammar), or a CSV, JSONL, parquet, text file")
    prompts_per_iteration: int = key(2, TRAINING, "prompts of an iteration", COUNT)


@dataclass(frozen=True)
class PlannerConfig:
    """The planner policy and its update (docs/algorithm.md 2.4, 2.5)."""

    weights: str = field(metadata=described(VIDEO, "shapeworld (shipped), a Hugging Face folder or name, or random"))
    lora: LoraConfig
    optim: OptimConfig
    adapter: str = key("", VIDEO, "PEFT folder to start from, and the frozen reference; nothing: a fresh adapter")
    precision: str = key("fp32", VIDEO, "precision of the frozen weights", choice("fp32", "bf16"))
    thinking: bool = key(True, VIDEO, "the model thinks before it answers, where its chat template can switch that")
    train: bool = key(True, TRAINING, "the planner is trained")
    plans_per_prompt: int = key(4, TRAINING, "plans sampled for a prompt, M: a planning group", GROUP)
    max_new_tokens: int = key(192, VIDEO, "longest response, tokens", COUNT)
    spans: str = key("planned", VIDEO, "a plan's spans: the planner's, or, as an ablation, equal ones (uniform)", SPANS)
    temperature: float = key(1.0, VIDEO, "temperature of sampling", TEMPERATURE)
    top_p: float = key(1.0, VIDEO, "probability mass that is sampled from", TOP_P)
    top_k: int = key(0, VIDEO, "tokens that are sampled from", TOP_K)
    clip_low: float = key(3e-4, TRAINING, "clip of the ratio below 1; of tokens (grpo) about 0.2", POSITIVE)
    clip_high: float = key(4e-4, TRAINING, "clip of the ratio above 1; of tokens (grpo) about 0.2", POSITIVE)
    kl_weight: float = key(5e-4, TRAINING, "weight of the divergence from the reference", NOT_NEGATIVE)
    advantage_clip: float = key(1.0, TRAINING, "largest size of an advantage", POSITIVE)
    advantage_std: str = key("global", TRAINING, "rewards whose deviation divides an advantage", DEVIATIONS)
    loss: str = key("gspo", TRAINING, "ratios of sequences (gspo) or tokens (grpo), or leave-one-out (rloo)", SEQUENCES)
    loss_tokens: str = key("all", TRAINING, "tokens in the loss: all, or those after </think>", choice("all", "json"))
    max_sampling_gap: float = key(
        0.2, RUN, "log-probs of sampling and training, mean nats a token apart, that stop a run", POSITIVE
    )
    sampler: str = key("inside", TRAINING, "plans of the training come from this process, or a server", SAMPLERS)
    server: str = key("", RUN, "address of the server (docs/planner-server.md), as http://localhost:8000", SERVER)
    server_folder: str = key("", RUN, "folder of adapters that the server sees under the same path; nothing: the run's")
    server_attempt_s: float = key(120.0, RUN, "seconds for one request to the server, a whole plan", POSITIVE)
    server_outage_s: float = key(300.0, RUN, "silence of the server after which a run stops, seconds", SILENCE)
    server_ahead: bool = key(True, SPEED, "the server samples the next plans while the executor is updated")
    server_sleep: bool = key(False, SPEED, "the server sleeps but for its plans, on one GPU with the trainer")
    max_importance: float = key(
        2.0, TRAINING, "largest weight of a served plan, of its probability when it was trained and drawn", IMPORTANCE
    )
    sampled_together: int = key(
        0, SPEED, "plans decoded together on a GPU, which bounds their K and V", at_least(0, "0 (32), or at least 1")
    )
    micro_batch: int = key(0, SPEED, "plans of a backward pass", OR_ALL)
    offload: bool = key(False, SPEED, "the frozen weights wait on the host while videos are made")
    checkpoint_activations: bool = key(False, SPEED, "layers are recomputed in the backward pass")
    liger: str = key("off", SPEED, "Liger's kernels in layers (model), and the loss (all); auto: all on a GPU", LIGER)


@dataclass(frozen=True)
class ExecutorConfig:
    """The executor policy, its roll-out and its update (docs/algorithm.md 2.1 - 2.3, 2.5)."""

    weights: str = field(metadata=described(VIDEO, "shapeworld or such a folder, Wan checkpoint, random(-tiny, -14b)"))
    lora: LoraConfig
    optim: OptimConfig
    adapters: tuple[str, ...] = key((), VIDEO, "LoRA files and PEFT folders merged into a Wan checkpoint, in order")
    entry: str = key("", VIDEO, f"model of a .pt file of several; nothing: the first of {', '.join(ENTRIES)}")
    decoder: str = key("", VIDEO, "tiny decoder (a TAEHV file) of generated videos and previews; nothing: the VAE")
    precision: str = key("fp32", VIDEO, "precision of a Wan checkpoint", choice(*EXECUTOR_PRECISIONS))
    fp8_linears: bool = key(False, VIDEO, "of generate alone: the blocks' linears in float8 (docs/real-video.md)")
    wan_folder: str = key("", VIDEO, "Wan2.1-T2V-1.3B(-Diffusers) for text encoder and VAE; nothing: that of weights")
    text_cache: str = key("runs/text", SPEED, "folder of a Wan text encoder's embeddings, shared by runs")
    offload_text_encoder: bool = key(False, SPEED, "the text encoder waits on the host while no prompt is new")
    video_size: tuple[int, int] = key((480, 832), VIDEO, "height and width of a Wan checkpoint's videos, pixels", SIZE)
    train: bool = key(True, TRAINING, "the executor is trained")
    continuations: int = key(8, TRAINING, "continuations of a plan, N: an execution group", GROUP)
    frames: int = key(24, VIDEO, "length of a video, latent frames", WHOLE_CHUNKS)
    chunk_frames: int = key(3, VIDEO, "length of a chunk, latent frames", COUNT)
    window: str = key("full", VIDEO, "frames that a chunk attends to (docs/backbones.md section 2)", choice(*WINDOWS))
    text_switch: str = key("cross_attention", VIDEO, "a new prompt changes its own K/V, or the history's too", SWITCHES)
    timesteps: tuple[int, ...] = key((1000, 750, 500, 250), VIDEO, "noise levels before the shift", SOME_STEPS, FALLING)
    first_timesteps: tuple[int, ...] = key((), VIDEO, "timesteps of the first chunk; nothing: the same", FALLING)
    shift: float = key(5.0, VIDEO, "shift of the noise levels", POSITIVE)
    eta: float = key(1.0, VIDEO, "noise of a transition; 0 would leave nothing to learn from", SHARE)
    smooth_prompts: bool = key(True, VIDEO, "a step's prompt is followed by that of the next step")
    prompt_separator: str = key(" Next: ", VIDEO, "text between these two prompts")
    switch_rounding: str = key("nearest", VIDEO, "of a plan file's bounds to chunk starts", choice("nearest", "up"))
    clip_velocity_rms: float = key(0.0055, TRAINING, "clip of the ratio, as an RMS of velocities", POSITIVE)
    kl_weight: float = key(5e-4, TRAINING, "weight of the velocity's divergence from the reference", NOT_NEGATIVE)
    advantage_clip: float = key(2.0, TRAINING, "largest size of an advantage", POSITIVE)
    advantage_std: str = key("global", TRAINING, "rewards whose deviation divides an advantage", DEVIATIONS)
    loss: str = key("flow_grpo", TRAINING, "on transitions (flow_grpo) or the forward process (diffusion_nft)", CHUNKS)
    ratio_norm: bool = key(True, TRAINING, "flow_grpo's log-ratios are without drift, of one scale at all noise levels")
    reweight: bool = key(False, TRAINING, "without ratio_norm: transitions are weighted to gradients of one scale")
    levels: str = key(
        "all", TRAINING, "denoising calls that an iteration trains: all, or one, drawn or in turn", LEVELS
    )
    forks: str = key(
        "one", TRAINING, "where a plan forks: at one switch, several (tree), a random_chunk, not at all", FORKS
    )
    trained_chunks: str = key(
        "first", TRAINING, "from the fork on: the first chunk, those of its step, or all of the video", TRAINED
    )
    branching: tuple[int, ...] = key(
        (), TRAINING, "of a tree: branches of each at its first fork, its second, ...", BRANCHES
    )
    compared: str = key(
        "siblings", TRAINING, "of a tree: a branch with its siblings, or with all of its depth", COMPARED
    )
    seed_group: bool = key(False, TRAINING, "continuations of a plan share the noise that their chunks begin with")
    nft_beta: float = key(1.0, TRAINING, "distance of diffusion_nft's two policies from the old one", POSITIVE)
    max_rollout_gap: float = key(1.0, RUN, "log-probs of roll-out and training, clips apart, that stop a run", POSITIVE)
    ema_decay: float = key(0.99, TRAINING, "decay of the averaged weights", DECAY)
    micro_batch: int = key(64, SPEED, "(continuation, transition) pairs of a backward pass", COUNT)
    checkpoint_activations: bool = key(False, SPEED, "blocks are recomputed in the backward pass")
    rollout_videos: int = key(0, SPEED, "videos that advance together, by whole plans: bounds the KV cache", OR_ALL)
    cuda_graphs: bool = key(True, SPEED, "a CUDA graph for each shape of a call, where the kernels serve")
    shard: int = key(1, SPEED, "processes of a machine that share the frozen weights, a part each", COUNT)


@dataclass(frozen=True)
class RewardConfig:
    """Weights of the rewards (docs/algorithm.md 2.5)."""

    temporal_following: float = key(0.85, TRAINING, "weight in a plan's reward", NOT_NEGATIVE)
    plan_quality: float = key(0.15, TRAINING, "weight in a plan's reward", NOT_NEGATIVE)
    format_penalty: float = key(0.5, TRAINING, "taken from a plan's reward where its format is all wrong", NOT_NEGATIVE)
    step_following: float = key(0.6, TRAINING, "weight in a continuation's reward", NOT_NEGATIVE)
    aesthetics: float = key(0.4, TRAINING, "weight in a continuation's reward", NOT_NEGATIVE)
    custom: tuple[str, ...] = key((), TRAINING, "further rewards, functions that are imported", FUNCTIONS)
    shuffle_advantages: bool = key(False, TRAINING, "control experiment: advantages permuted over the iteration")


@dataclass(frozen=True)
class JudgeSettings:
    """Rewards of real video. The environment holds addresses, models, keys and rate limits (docs/judges.md)."""

    shapeworld: bool = key(False, TRAINING, "judges score ShapeWorld too, in place of its rules and its verifier")
    deadline_s: float = key(120.0, RUN, "seconds for a call, with its retries and pauses", POSITIVE)
    attempt_s: float = key(60.0, RUN, "seconds for one request", POSITIVE)
    attempts: int = key(4, RUN, "requests of a call", COUNT)
    outage_s: float = key(300.0, RUN, "silence of all servers of a role after which a run stops, seconds", OUTAGE)
    max_calls: int = key(0, RUN, "requests to judges after which a run stops, resumed or not; 0: any", NOT_NEGATIVE)
    max_tokens: int = key(2048, RUN, "length of a reply, thinking included", COUNT)
    max_tokens_name: str = key("max_tokens", RUN, "its field in a request; nothing: left out", REQUEST_FIELD)
    temperature: float = key(0.0, TRAINING, "of a judge's replies", NOT_NEGATIVE)
    temperature_name: str = key("temperature", RUN, "its field in a request; nothing: left out", REQUEST_FIELD)
    schemas: bool = key(True, RUN, "replies are asked for by JSON schema, where a server takes one")
    cache: str = key("runs/judges.sqlite", RUN, "replies, for all runs and ranks of a machine; nothing: no cache")
    video_frames: int = key(6, TRAINING, "frames of a whole video that a judge sees", at_least(2))
    step_frames: int = key(6, TRAINING, "frames of a step that a judge sees", at_least(2))
    aesthetics_frames: int = key(8, TRAINING, "frames of a step that PickScore sees", at_least(2))
    aesthetics_batch: int = key(64, SPEED, "frames that PickScore takes at a time", COUNT)
    aesthetics_weights: str = key("yuvalkirstain/PickScore_v1", TRAINING, "CLIP folder or Hugging Face name")
    aesthetics_processor: str = key("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", TRAINING, "its tokenizer and image sizes")


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation."""

    simple: int = key(64, RUN, "videos of the simple set", COUNT)
    hard: int = key(64, RUN, "videos of the hard set", COUNT)
    strips: int = key(4, RUN, "film strips shown", NOT_NEGATIVE)
    bootstrap: int = key(2000, RUN, "resamples of the bootstrap", COUNT)
    batch: int = key(64, RUN, "videos that are made together", COUNT)
    seed: int = key(1234, RUN, "seed of prompts, plans and noise", SEED)
    split: str = key("test", RUN, "ShapeWorld's instructions: settings are chosen on validation", HELD_OUT)
    suite: str = key("shapeworld", RUN, "ShapeWorld's sets: simple and hard, or the stricter ones", SUITES)
    strict: int = key(64, RUN, "videos of each of ShapeWorld's stricter sets", COUNT)


@dataclass(frozen=True)
class AlarmConfig:
    """Alarms of reward hacking: what training never sees, of videos that it has made (docs/metrics.md)."""

    every: int = key(4, RUN, "iterations between looks; 0: none", NOT_NEGATIVE)
    continuations: int = key(1, RUN, "videos of every plan that are looked at", COUNT)
    window: int = key(5, RUN, "looks at the start, and the latest, whose means are compared", at_least(2))
    deviations: float = key(3.0, RUN, "standard errors that a change exceeds too where it is an alarm", NOT_NEGATIVE)
    gap: float = key(0.1, RUN, "rise of the reward for temporal order above the held-out judge's score", POSITIVE)
    held_out: float = key(0.1, RUN, "fall of the held-out judge's score", POSITIVE)
    quality: float = key(0.05, RUN, "fall of the clearness of pictures", POSITIVE)
    duplicates: float = key(0.1, RUN, "rise of the share of frames with an extra or a misplaced shape", POSITIVE)


@dataclass(frozen=True)
class BestOfConfig:
    """Continuations at a video's switches, of which one goes on: `--best-of N` of generate and evaluate."""

    rewards: tuple[str, ...] = key((), RUN, "rewards that choose; nothing: those of a continuation in training")
    chunks: int = key(1, RUN, "chunks that they are made before one is chosen; 0: to the step's end", NOT_NEGATIVE)
    first: bool = key(False, RUN, "the first chunk has continuations too")
    together: int = key(0, SPEED, "continuations made together, which bounds memory", OR_ALL)


@dataclass(frozen=True)
class TrainerConfig:
    """The loop."""

    iterations: int = key(100, RUN, "iterations of the run, over which the learning rates fall", COUNT)
    updates_per_iteration: int = key(1, TRAINING, "optimiser steps, each on its own part of the plan groups", COUNT)
    alternate: int = key(
        0, TRAINING, "iterations of a policy's turn, the planner first; 0: both in every one", NOT_NEGATIVE
    )
    checkpoint_every: int = key(20, RUN, "iterations between checkpoints", COUNT)
    keep_checkpoints: int = key(2, RUN, "newest checkpoints that are kept", COUNT)
    samples_every: int = key(10, RUN, "iterations between sample tables and film strips", COUNT)
    max_skipped_updates: int = key(5, RUN, "updates in a row refused for non-finite gradients, then stop", NOT_NEGATIVE)
    max_idle_iterations: int = key(
        5, RUN, "iterations in a row in which a trained policy has no group of unequal rewards, then stop", COUNT
    )
    stall_s: float = key(600.0, RUN, "seconds without any progress of one of several processes, then stop", POSITIVE)


@dataclass(frozen=True)
class RunConfig:
    """The run as a whole."""

    preset: str = field(metadata=described(RUN, "name of the preset that the configuration began with"))
    planner: PlannerConfig
    executor: ExecutorConfig
    data: DataConfig = field(default_factory=DataConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    judges: JudgeSettings = field(default_factory=JudgeSettings)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    best_of: BestOfConfig = field(default_factory=BestOfConfig)
    output: str = key("runs/shapeworld", RUN, "folder of the run", FOLDER)
    seed: int = key(0, VIDEO, "seed of every random draw", SEED)
    device: str = key("auto", SPEED, "a GPU if there is one (auto), or as named", choice("auto", "cpu", "cuda"))
    kernels: str = key("auto", SPEED, "Triton's on a GPU (auto), or as named", choice("torch", "triton", "auto"))
    trackers: tuple[str, ...] = key((), RUN, "programs that show metrics and videos (docs/metrics.md)", TRACKED)
    tracker_project: str = key("tempact", RUN, "project that wandb and trackio put the run into", PROJECT)
    threads: int = key(0, SPEED, "CPU threads; 0 leaves torch's choice", NOT_NEGATIVE)
    deterministic: bool = key(False, SPEED, "deterministic algorithms and a plan a batch: a GPU's bits repeat")


def sections_of(kind: type, prefix: str = "") -> dict[str, type]:
    """Dotted names and classes of a configuration class's sections; it is the first, named `prefix`."""
    sections = {prefix: kind}
    for name, inner in get_type_hints(kind).items():
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            sections |= sections_of(inner, f"{prefix}.{name}".lstrip("."))
    return sections


_KEYS: dict[type, dict[str, Key]] = {}


def keys_of(kind: type) -> dict[str, Key]:
    """Dotted keys of a configuration class, by section; found once, so the dictionary is not to be changed."""
    if kind not in _KEYS:
        keys = {}
        for section, inner in sections_of(kind).items():
            hints = get_type_hints(inner)
            for own in filter(lambda own: own.metadata, dataclasses.fields(inner)):
                keys[f"{section}.{own.name}".lstrip(".")] = Key(hints[own.name], own.default, **own.metadata)
        _KEYS[kind] = keys
    return _KEYS[kind]


def flatten(config: Any) -> dict[str, Any]:
    """Dotted keys and values of a configuration."""
    return {name: attrgetter(name)(config) for name in keys_of(type(config))}


def refuse(name: str, found: object, accepted: str) -> NoReturn:
    raise UserError(f"{name}: found {found}; accepted: {accepted}")


def check_keys(config: Any, prefix: str = "") -> None:
    """UserError for the first value that its key does not accept; `prefix` goes before the key in the message."""
    values = flatten(config)
    for name, own in keys_of(type(config)).items():
        for rule in own.rules:
            if not rule.good(values[name]):
                refuse(f"{prefix}{name}", rule.shown(values[name]), rule.accepted)


def validate(config: RunConfig) -> None:
    """UserError in one line for the first value that cannot work, as far as the configuration alone tells."""
    check_keys(config)
    planner, executor, judges = config.planner, config.executor, config.judges
    WINDOWS[executor.window].check(executor.frames, executor.chunk_frames)
    for name, full in {"temperature": 1.0, "top_p": 1.0, "top_k": 0}.items():
        if planner.train and getattr(planner, name) != full:
            why = "where the planner is trained, because log-probs are those of the full distribution"
            refuse(f"planner.{name}", getattr(planner, name), f"{full} {why}")
    if planner.sampler == "served" and not planner.server:
        refuse("planner.server", "nothing", "the server's address with planner.sampler served")
    if planner.server_sleep and planner.sampler != "served":
        refuse("planner.server_sleep", True, "False with planner.sampler inside, which has no server")
    if planner.server_sleep and planner.server_ahead:
        accepted = "False with planner.server_ahead, for which the server is awake while the executor is updated"
        refuse("planner.server_sleep", True, accepted)
    if planner.server_outage_s < planner.server_attempt_s:
        accepted = f"at least planner.server_attempt_s ({planner.server_attempt_s:g}), or one slow plan is an outage"
        refuse("planner.server_outage_s", planner.server_outage_s, accepted)
    if config.trainer.alternate and not (planner.train and executor.train):
        refuse("trainer.alternate", config.trainer.alternate, "0 where one policy alone is trained")
    if config.trainer.alternate >= config.trainer.iterations > 1:
        accepted = f"fewer than trainer.iterations ({config.trainer.iterations}), or the executor has no turn"
        refuse("trainer.alternate", config.trainer.alternate, accepted)
    if planner.liger == "all" and planner.loss != "gspo":
        refuse("planner.liger", "all", f"auto, off, model with planner.loss {planner.loss}: Liger's is GSPO")
    if executor.train and len(executor.timesteps) < 2:
        why = "two or more where the executor is trained, because the last step is deterministic"
        refuse("executor.timesteps", executor.timesteps, why)
    if not executor.ratio_norm and executor.loss != "flow_grpo":
        refuse("executor.ratio_norm", False, f"True with executor.loss {executor.loss}, which has no ratio")
    if executor.reweight and executor.ratio_norm:
        refuse("executor.reweight", True, "False with executor.ratio_norm, whose gradients have one scale")
    _check_forks(executor)
    if executor.continuations % executor.shard:
        refuse("executor.continuations", executor.continuations, f"a multiple of executor.shard ({executor.shard})")
    if executor.shard > 1 and executor.cuda_graphs:
        refuse("executor.cuda_graphs", True, f"False with executor.shard {executor.shard}, as weights then move")
    if judges.outage_s <= judges.attempt_s:
        accepted = f"above judges.attempt_s ({judges.attempt_s}), or one slow reply is an outage"
        refuse("judges.outage_s", judges.outage_s, accepted)


def check_exact(config: RunConfig) -> RunConfig:
    """`config`; UserError where it asks for rounded linears in a command other than tempact.generate."""
    if config.executor.fp8_linears:
        why = "training needs the probabilities of the weights themselves, and an evaluation switches adapters"
        refuse("executor.fp8_linears", True, f"False but in tempact.generate: {why}")
    return config


def _check_forks(executor: ExecutorConfig) -> None:
    chunks, numbers = executor.frames // executor.chunk_frames, executor.branching
    if executor.forks != "tree":
        if numbers:
            refuse("executor.branching", numbers, f"nothing with executor.forks {executor.forks}")
        if executor.compared != "siblings":
            refuse("executor.compared", executor.compared, f"siblings with executor.forks {executor.forks}")
        if executor.forks in ("random_chunk", "none") and chunks < 2:
            refuse("executor.frames", executor.frames, f"two chunks or more with executor.forks {executor.forks}")
        if executor.shard > 1 and executor.forks == "none":
            refuse("executor.shard", executor.shard, "1 with executor.forks none, whose videos one process makes")
        if executor.shard > 1 and executor.trained_chunks != "first":
            refuse("executor.shard", executor.shard, f"1 with executor.trained_chunks {executor.trained_chunks}")
        return
    if executor.trained_chunks != "first":
        refuse("executor.trained_chunks", executor.trained_chunks, "first with executor.forks tree")
    if chunks < 2:
        refuse("executor.frames", executor.frames, "two chunks or more with executor.forks tree")
    if math.prod(numbers) != executor.continuations or len(numbers) >= chunks:
        product = f"whose product is executor.continuations ({executor.continuations})"
        refuse("executor.branching", numbers, f"at most {chunks - 1} numbers {product} with executor.forks tree")
    if executor.shard > 1:
        refuse("executor.shard", executor.shard, "1 with executor.forks tree, whose branches one process makes")
