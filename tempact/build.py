"""From configuration to objects: the one place that knows every implementation."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from csrc_triton import runtime
from tempact.config import RunConfig
from tempact.errors import UserError
from tempact.executor.policy import Executor
from tempact.executor.rollout import gaussian_noise
from tempact.models.wan.codec import PixelCodec
from tempact.planner.policy import Planner
from tempact.shapeworld.evaluation import ShapeWorldSuite
from tempact.shapeworld.executor_training import load_executor
from tempact.shapeworld.judge import ShapeWorldJudge
from tempact.shapeworld.prompts import ShapeWorldPrompts
from tempact.shapeworld.rewards import shapeworld_rewards
from tempact.shapeworld.story import CHUNK, FRAMES, SIZE
from tempact.trainer import Trainer
from tempact.types import Plan, Prompt

log = logging.getLogger(__name__)

SHAPEWORLD = "shapeworld"
WEIGHTS = Path(__file__).parent / "shapeworld" / "weights"


@dataclass
class Policies:
    """Both policies, as trained and as they started."""

    planner: Planner
    executor: Executor

    def make_video(self, instruction: str, seed: int) -> tuple[Plan, Tensor]:
        """A plan for one instruction and its video, uint8 [F, 3, height, width]."""
        plan = self.planner.sample([Prompt("0", instruction)], 1, seed).plans[0]
        noise = gaussian_noise(seed, self.executor.noise_shape(1, 1), self.executor.device)
        return plan, self.executor.rollout([plan], [0], noise).frames[0, 0]


KERNELS = ("torch", "triton", "auto")


def device_of(config: RunConfig) -> torch.device:
    """The device a run uses; also sets threads, determinism and which kernels serve."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: found cuda, but torch sees no GPU; accepted: auto or cpu here")
    if config.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: found {config.device!r}; accepted: auto, cpu, cuda")
    name = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    choose_kernels(config.kernels, device)
    return device


def choose_kernels(name: str, device: torch.device) -> None:
    """Sets the backend of csrc_triton's ops; UserError for one that this device cannot run."""
    if name not in KERNELS:
        raise UserError(f"kernels: found {name!r}; accepted: {', '.join(KERNELS)}")
    reason = runtime.why_not_triton(device, torch.float32) if name == "triton" else None
    if reason:
        raise UserError(f"kernels: found triton, which cannot serve here ({reason}); accepted here: torch, auto")
    runtime.set_backend(name)


def build_policies(config: RunConfig) -> Policies:
    """Planner and executor with fresh adapters, drawn from the run's seed."""
    transformers_logging.disable_progress_bar()
    # PEFT reads an attribute that newer transformers have renamed; nobody here can act on it
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    device = device_of(config)
    length = (config.executor.frames, config.executor.chunk_frames)
    if length != (FRAMES, CHUNK):
        raise UserError(
            f"executor.frames, executor.chunk_frames: found {length}; accepted: {(FRAMES, CHUNK)}, as in ShapeWorld"
        )
    transformer, text_encoder = load_executor(weights_folder("executor", config.executor.weights))
    torch.manual_seed(config.seed)
    executor = Executor(transformer.to(device), text_encoder.to(device), PixelCodec(), config.executor, (SIZE, SIZE))
    folder = weights_folder("planner", config.planner.weights)
    planner = Planner.load(folder, config.planner, config.executor.frames, config.executor.chunk_frames, device=device)
    return Policies(planner, executor)


def build_trainer(config: RunConfig, policies: Policies) -> Trainer:
    """The trainer with ShapeWorld's prompts and rewards."""
    if config.data.prompts != SHAPEWORLD:
        raise UserError(f"data.prompts: found {config.data.prompts!r}; accepted: {SHAPEWORLD}")
    rewards = shapeworld_rewards()
    return Trainer(config, policies.planner, policies.executor, rewards, ShapeWorldPrompts())


def build_suite(config: RunConfig, policies: Policies) -> ShapeWorldSuite:
    """The held-out evaluation, with the learned judge."""
    judge = ShapeWorldJudge.load(weights_folder("judge", SHAPEWORLD), policies.executor.device)
    return ShapeWorldSuite(config.evaluation, policies.planner, policies.executor, judge)


def weights_folder(part: str, weights: str) -> Path:
    """The folder that holds the weights of "planner", "executor" or "judge"; UserError if there is none."""
    folder = WEIGHTS / part if weights == SHAPEWORLD else Path(weights)
    if not folder.is_dir():
        raise UserError(f"{part}.weights: {folder} is not a folder; accepted: {SHAPEWORLD} or a folder with weights")
    return folder
