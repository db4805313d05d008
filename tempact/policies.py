"""Planner and executor of a configuration, and the device they run on."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from csrc_triton import runtime
from tempact.config import RunConfig, check_exact
from tempact.distributed import Ranks
from tempact.distributed.shards import group_of, shard
from tempact.errors import UserError
from tempact.executor.executor import Executor
from tempact.planner.planner import Planner
from tempact.rewards import RewardSet
from tempact.trainer import PromptSource, Trainer
from tempact.worlds import HUB_NAME, RANDOM_PLANNER, SHAPEWORLD, local_folder, no_weights, shipped, world_of

log = logging.getLogger(__name__)

HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt")


@dataclass
class PolicyPair:
    """Both policies, as trained and as they started, and the configuration that they were built by."""

    planner: Planner
    executor: Executor
    config: RunConfig


def build_policies(config: RunConfig) -> PolicyPair:
    """Planner and executor with fresh adapters, drawn from the run's seed, to be trained or evaluated."""
    check_exact(config)
    device = device_of(config)
    executor = build_executor(config, device)
    return PolicyPair(build_planner(config, device), executor, config)


def build_executor(config: RunConfig, device: torch.device, preview: bool = False) -> Executor:
    """The executor with a fresh adapter, drawn from the run's seed; preview as in `World.executor_parts`."""
    world = world_of(config)
    world.check()
    transformers_logging.disable_progress_bar()
    # PEFT reads an attribute that newer transformers have renamed; nobody here can act on it
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    log.info("loading the executor: %s, on %s", config.executor.weights, device)
    group = group_of(config.executor.shard, device)
    parts = world.executor_parts(device, preview)
    if group is not None:
        shard(parts.transformer, group)
    torch.manual_seed(config.seed)
    return Executor(parts.transformer, parts.text_encoder, parts.codec, config.executor, parts.size)


def build_planner(config: RunConfig, device: torch.device) -> Planner:
    """The planner with the adapter it starts from."""
    lengths = config.executor.frames, config.executor.chunk_frames
    log.info("loading the planner: %s, on %s", config.planner.weights, device)
    folder = planner_folder(config.planner.weights)
    if config.planner.weights != RANDOM_PLANNER:
        return Planner.load(folder, config.planner, *lengths, device=device)
    log.warning("planner.weights: random: its plans mean nothing")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    adapter = Path(config.planner.adapter) if config.planner.adapter else None
    return Planner(model.to(device), tokenizer, config.planner, *lengths, adapter)


def build_trainer(
    config: RunConfig, policies: PolicyPair, prompts: PromptSource | None = None, rewards: RewardSet | None = None,
    ranks: Ranks | None = None,
) -> Trainer:  # fmt: skip
    """The trainer of a run, with its world's prompts and rewards unless others are given."""
    world = world_of(config)
    prompts, rewards = prompts or world.prompts(), rewards or world.rewards(policies.executor.device)
    return Trainer(config, policies.planner, policies.executor, rewards, prompts, ranks)


def device_of(config: RunConfig) -> torch.device:
    """The device of a run; also sets threads, determinism and the backend of csrc_triton's ops.

    UserError for a GPU that is not there and kernels that cannot serve on the device.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        # videos of other processes are room that nobody touches
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    there = torch.cuda.is_available()
    if config.device == "cuda" and not there:
        raise UserError("device: found cuda, but torch sees no GPU; accepted: auto or cpu here")
    device = torch.device("cuda" if there and config.device != "cpu" else "cpu")
    reason = runtime.why_not_triton(device, torch.float32) if config.kernels == "triton" else None
    if reason:
        raise UserError(f"kernels: found triton, which cannot serve here ({reason}); accepted here: torch, auto")
    runtime.set_backend(config.kernels)
    return device


def planner_folder(weights: str) -> Path:
    """The folder of `planner.weights`, fetched from the Hugging Face hub if need be; UserError if there is none."""
    folder = shipped("planner", weights)
    if not folder.exists() and HUB_NAME.fullmatch(weights):
        log.info("planner.weights: asking the Hugging Face hub for %s", weights)
        try:
            return Path(snapshot_download(weights, allow_patterns=list(HUB_FILES)))
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0][:150]
            raise UserError(
                f"planner.weights: {weights} is no folder here, and the Hugging Face hub gave none "
                f"({type(error).__name__}: {reason}); accepted: {SHAPEWORLD}, a folder with weights, a name on the hub"
            ) from error
    if not weights or not folder.is_dir():
        raise UserError(no_weights("planner", weights, ", a name on the Hugging Face hub"))
    return folder


def missing_planner(weights: str) -> Iterator[str]:
    """A line for each of the planner's files that is not on this machine."""
    folder = local_folder(weights)
    if folder is None:
        found = f"{weights}, which is no folder with a config.json and not in the Hugging Face hub's cache"
        yield f"planner.weights: found {found}; accepted: {SHAPEWORLD}, random, a folder, a name that the hub serves"
        return
    if weights != RANDOM_PLANNER and not [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]:
        yield f"planner.weights: {folder}: found no weights; accepted: a Hugging Face folder with safetensors"
    if not (folder / "tokenizer_config.json").is_file():
        yield f"planner.weights: {folder}: found no tokenizer; accepted: a chat model with its tokenizer"
