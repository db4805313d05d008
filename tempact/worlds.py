"""From configuration to objects: the one place that knows every implementation."""

from __future__ import annotations

import importlib.util
import logging
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from csrc_triton import runtime
from tempact.config import RunConfig, validate
from tempact.errors import UserError
from tempact.executor.executor import Executor
from tempact.models.wan.checkpoints.load import load_transformer
from tempact.models.wan.codec import Codec, PixelCodec
from tempact.models.wan.text import PromptEncoder
from tempact.models.wan.transformer import WanTransformer
from tempact.planner.planner import Planner
from tempact.prompt_file import FilePrompts
from tempact.rewards.base import RewardSet, load_rewards
from tempact.shapeworld.pretraining.executor import load_executor
from tempact.shapeworld.story import CHUNK, FRAMES, SIZE
from tempact.shapeworld.world import ShapeWorldPrompts, shapeworld_rewards
from tempact.trainer import PromptSource, Trainer

log = logging.getLogger(__name__)

SHAPEWORLD = "shapeworld"
WEIGHTS = Path(__file__).parent / "shapeworld" / "weights"


@dataclass
class PolicyPair:
    """Both policies, as trained and as they started."""

    planner: Planner
    executor: Executor


HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt")
WAN_PACKAGES = ("diffusers", "ftfy")  # of the extra "wan"


def device_of(config: RunConfig) -> torch.device:
    """The device a run uses; also sets threads, determinism and which kernels serve."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: found cuda, but torch sees no GPU; accepted: auto or cpu here")
    name = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    choose_kernels(config.kernels, device)
    return device


def choose_kernels(name: str, device: torch.device) -> None:
    """Sets the backend of csrc_triton's ops; UserError for one that this device cannot run."""
    reason = runtime.why_not_triton(device, torch.float32) if name == "triton" else None
    if reason:
        raise UserError(f"kernels: found triton, which cannot serve here ({reason}); accepted here: torch, auto")
    runtime.set_backend(name)


def check_executor(config: RunConfig) -> None:
    """UserError for what can be seen to be wrong with the executor before anything is loaded."""
    if not config.executor.weights:
        raise UserError(
            f"executor.weights: found nothing, and the preset {config.preset} has none of its own; accepted: the "
            "backbone's checkpoint, or random or random-tiny to see everything but the pictures"
        )
    if is_shapeworld(config.executor.weights):  # or nothing at all: said before its prompts and rewards are blamed
        weights_folder("executor", config.executor.weights)
    validate(config)


def build_policies(config: RunConfig) -> PolicyPair:
    """Planner and executor with fresh adapters, drawn from the run's seed."""
    device = device_of(config)
    executor = build_executor(config, device)
    return PolicyPair(build_planner(config, device), executor)


def build_executor(config: RunConfig, device: torch.device) -> Executor:
    """The executor with a fresh adapter, drawn from the run's seed."""
    check_executor(config)
    transformers_logging.disable_progress_bar()
    # PEFT reads an attribute that newer transformers have renamed; nobody here can act on it
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    parts = executor_parts(config, device)
    torch.manual_seed(config.seed)
    return Executor(parts.transformer, parts.text_encoder, parts.codec, config.executor, parts.size)


def build_planner(config: RunConfig, device: torch.device) -> Planner:
    """The planner with the adapter it starts from."""
    lengths = config.executor.frames, config.executor.chunk_frames
    if config.planner.weights != "random":
        folder = weights_folder("planner", config.planner.weights)
        return Planner.load(folder, config.planner, *lengths, device=device)
    log.warning("planner.weights: random: its plans mean nothing")
    small = weights_folder("planner", SHAPEWORLD)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(small, local_files_only=True))
    tokenizer = AutoTokenizer.from_pretrained(small, local_files_only=True)
    adapter = Path(config.planner.adapter) if config.planner.adapter else None
    return Planner(model.to(device), tokenizer, config.planner, *lengths, adapter)


class ExecutorParts(NamedTuple):
    """What an executor is made of; size is the height and width of its videos, pixels."""

    transformer: WanTransformer
    text_encoder: PromptEncoder
    codec: Codec
    size: tuple[int, int]


def executor_parts(config: RunConfig, device: torch.device) -> ExecutorParts:
    """By what `executor.weights` names."""
    weights = config.executor.weights
    if is_shapeworld(weights):
        return shapeworld_parts(config, device)
    require_wan_packages(weights)
    return random_parts(config, device) if is_random(weights) else wan_parts(config, device)


def require_wan_packages(weights: str) -> None:
    """UserError if a package that real backbones need is not installed; weights: what was asked for."""
    absent = [name for name in WAN_PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        found = f"executor.weights: {weights or 'a backbone'} needs {', '.join(absent)}"
        raise UserError(f"{found}; accepted: after pip install -e '.[wan]'")


def is_random(weights: str) -> bool:
    """Does this ask for random weights in the place of a checkpoint?"""
    return weights in ("random", "random-tiny")


def is_shapeworld(weights: str) -> bool:
    """Are these ShapeWorld's weights, or of its kind?"""
    return not (is_random(weights) or is_wan(weights))


def is_wan(weights: str) -> bool:
    """Is this a Wan checkpoint, rather than ShapeWorld's own kind of folder or one that holds nothing?"""
    path = Path(weights)
    if weights == SHAPEWORLD:
        return False
    return path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / "transformer.json").is_file())


def shapeworld_parts(config: RunConfig, device: torch.device) -> ExecutorParts:
    """The shipped executor, or another that ShapeWorld's pretraining has made."""
    settings = config.executor
    folder = weights_folder("executor", settings.weights)
    length = (settings.frames, settings.chunk_frames)
    if length != (FRAMES, CHUNK):
        raise UserError(
            f"executor.frames, executor.chunk_frames: found {length}; accepted: {(FRAMES, CHUNK)}, as in ShapeWorld"
        )
    if settings.adapters or settings.precision != "fp32":
        found = f"{len(settings.adapters)}, {settings.precision}"
        raise UserError(f"executor.adapters, executor.precision: found {found}; accepted: none and fp32 in ShapeWorld")
    transformer, text_encoder = load_executor(folder)
    return ExecutorParts(transformer.to(device), text_encoder.to(device), PixelCodec(), (SIZE, SIZE))


def wan_parts(config: RunConfig, device: torch.device) -> ExecutorParts:
    """A published checkpoint with its adapters merged, and the text encoder and VAE of Wan's release."""
    from tempact.models.wan.text import load_cached_text_encoder
    from tempact.models.wan.vae import load_codec

    settings = config.executor
    folder = Path(settings.wan_folder or settings.weights)
    if not folder.is_dir():
        raise UserError(f"executor.wan_folder: {folder} is not a folder; accepted: Wan2.1-T2V-1.3B or its -Diffusers")
    adapters = [Path(adapter) for adapter in settings.adapters]
    weights = Path(settings.weights)
    transformer = load_transformer(
        weights, device=device, precision=settings.precision, adapters=adapters, entry=settings.entry
    )
    dtype = transformer.dtype
    codec = load_codec(folder, dtype, device)
    sizes = transformer.config
    if sizes.in_dim != codec.latent_channels:
        raise UserError(
            f"{weights}: found {sizes.in_dim} latent channels; accepted: {codec.latent_channels}, as the VAE"
        )
    text_encoder = load_cached_text_encoder(
        folder, Path(settings.text_cache), dtype, device, sizes.text_len, offload=settings.offload_text_encoder
    )
    return ExecutorParts(transformer, text_encoder, codec, settings.video_size)


def random_parts(config: RunConfig, device: torch.device) -> ExecutorParts:
    """Random weights of Wan's sizes or small ones, drawn from the run's seed."""
    from tempact.models.wan.random_weights import RandomText, random_codec, random_transformer

    settings = config.executor
    if settings.adapters:
        raise UserError(f"executor.adapters: found {len(settings.adapters)}; accepted: none on random weights")
    log.warning("executor.weights: %s: videos are noise", settings.weights)
    torch.manual_seed(config.seed)
    transformer = random_transformer(settings.weights, settings.precision, device)
    codec = random_codec(settings.weights, transformer.dtype, device)
    return ExecutorParts(transformer, RandomText(settings.weights, device), codec, settings.video_size)


def build_prompts(config: RunConfig) -> PromptSource:
    """Where training prompts come from: ShapeWorld's grammar for its executor, a file for every other one."""
    source = config.data.prompts
    if is_shapeworld(config.executor.weights):
        if source != SHAPEWORLD:
            raise UserError(f"data.prompts: found {source!r}; accepted: {SHAPEWORLD}, as the executor knows no others")
        return ShapeWorldPrompts()
    if source in ("", SHAPEWORLD):
        found = repr(source) if source else "nothing"
        raise UserError(
            f"data.prompts: found {found}, which does not serve executor.weights "
            f"{config.executor.weights}; accepted: a CSV, JSONL, parquet or text file of prompts"
        )
    return FilePrompts(Path(source), config.data.prompts_per_iteration)


def build_rewards(config: RunConfig) -> RewardSet:
    """The rewards of a run's videos: ShapeWorld's own, judges and PickScore for everything else, and the user's own.

    With `judges.shapeworld` judges score ShapeWorld, too, all but its picture quality. Whoever builds them closes them.
    UserError for own rewards that are none, for judges that the environment lacks and for PickScore's weights.
    """
    custom = load_rewards(config.rewards.custom)
    own = is_shapeworld(config.executor.weights)
    if own and not config.judges.shapeworld:
        return shapeworld_rewards().extended(custom)
    # late: ShapeWorld needs no CLIP
    from tempact.rewards.judged import judged_rewards
    from tempact.rewards.judges.client import JudgeClient
    from tempact.rewards.judges.config import JudgeConfig
    from tempact.rewards.pickscore import PickScorer, real_rewards

    judges = JudgeClient(JudgeConfig.from_environment(settings=config.judges))
    try:
        if own:
            return judged_rewards(judges, shapeworld_rewards().aesthetics, config.judges).extended(custom)
        scorer = PickScorer.load(config.judges, device_of(config))
        return real_rewards(judges, scorer, config.judges).extended(custom)
    except UserError:
        judges.close()
        raise


def build_trainer(
    config: RunConfig, policies: PolicyPair, prompts: PromptSource | None = None, rewards: RewardSet | None = None
) -> Trainer:
    """The trainer; prompts and rewards are those of the configuration unless others are given."""
    prompts = prompts or build_prompts(config)
    rewards = rewards or build_rewards(config)
    return Trainer(config, policies.planner, policies.executor, rewards, prompts)


def weights_folder(part: str, weights: str) -> Path:
    """The folder that holds the weights of "planner" or "executor"; UserError if there is none."""
    folder = WEIGHTS / part if weights == SHAPEWORLD else Path(weights)
    more = {"executor": ", a Wan checkpoint", "planner": ", a name on the Hugging Face hub"}.get(part, "")
    if part == "planner" and not folder.exists() and HUB_NAME.fullmatch(weights):
        return _fetched(weights)
    if not weights or not folder.is_dir():
        found = "a file" if folder.is_file() else "nothing"
        raise UserError(
            f"{part}.weights: found {found} at {weights or repr(weights)}; accepted: {SHAPEWORLD}, a folder with "
            f"weights{more}"
        )
    return folder


def _fetched(name: str) -> Path:
    """The folder of a language model of the Hugging Face hub, from its cache if it is there."""
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (OSError, HFValidationError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:150]
        raise UserError(
            f"planner.weights: {name} is no folder here, and the Hugging Face hub gave none ({type(error).__name__}: "
            f"{reason}); accepted: {SHAPEWORLD}, a folder with weights, a name on the hub"
        ) from error
