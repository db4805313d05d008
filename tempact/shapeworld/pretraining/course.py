"""The training loop that the three pretraining courses share: AdamW, warm-up, decay, EMA, exact resume.

Every step draws its data from a generator seeded by (seed, step), so a resumed run sees what an unbroken
one would have seen and no generator state needs saving.
"""

from __future__ import annotations

import logging
import os
import time
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn

from tempact.errors import UserError

log = logging.getLogger(__name__)

WARM_UP_STEPS = 200
DECAY_FROM = 0.6  # of all steps, from there the learning rate falls linearly to zero
CHECKPOINT_EVERY = 500
LOG_EVERY = 100


class Course(ABC):
    """One model to train: `modules` holds all its parameters, `loss` draws a batch and scores it."""

    name: str
    batch: int
    learning_rate: float
    ema: float  # decay of the averaged weights that are kept, 0 keeps the raw ones
    betas = (0.9, 0.98)
    weight_decay = 0.01
    device: str
    seed: int
    modules: nn.Module

    @abstractmethod
    def loss(self, generator: torch.Generator) -> Tensor:
        """Scalar loss of a batch drawn with `generator`."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the current weights in the form that is shipped."""

    @abstractmethod
    def compile(self) -> None:
        """Compiles what pays on a GPU."""


def train(course: Course, folder: Path, steps: int, *, resume: bool = True) -> dict[str, float]:
    """Trains for `steps` steps and saves into `folder`; returns steps, seconds and the last mean loss.

    An interrupted run goes on from `folder`/training.pt when `resume` is set; the file is gone at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_file = folder / "training.pt"
    parameters = dict(course.modules.named_parameters())
    optimiser = torch.optim.AdamW(
        parameters.values(), lr=course.learning_rate, betas=course.betas, weight_decay=course.weight_decay,
        fused=course.device == "cuda",
    )  # fmt: skip
    average = {name: p.detach().clone() for name, p in parameters.items()}
    first, recent = 0, float("nan")
    if resume and state_file.exists():
        first = _restore(state_file, course, steps, optimiser, average)
        log.info("%s: resumed at step %d", course.name, first)
    if course.device == "cuda":
        course.compile()
    started = time.monotonic()
    for step in range(first, steps):
        for group in optimiser.param_groups:
            group["lr"] = course.learning_rate * _rate(step, steps)
        generator = torch.Generator(course.device).manual_seed(course.seed * 1_000_003 + step)
        with torch.autocast(course.device, torch.bfloat16, enabled=course.device == "cuda"):
            loss = course.loss(generator)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimiser.step()
        decay = min(course.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - decay)
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            recent = loss.item()
            log.info(
                "%s: step %d of %d, loss %.5f, %.0f s", course.name, step + 1, steps, recent, time.monotonic() - started
            )
        if (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < steps:
            _store(state_file, course, steps, optimiser, average, step + 1)
    if course.ema:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(average[name])
    course.save(folder)
    state_file.unlink(missing_ok=True)
    return {"steps": steps, "seconds": round(time.monotonic() - started, 1), "loss": recent}


def _rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / min(WARM_UP_STEPS, max(1, steps // 5)))
    decay_from = DECAY_FROM * steps
    return warm if step < decay_from else warm * (steps - step) / (steps - decay_from)


def _store(
    path: Path, course: Course, steps: int, optimiser: torch.optim.Optimizer, average: dict[str, Tensor], step: int
) -> None:
    state = {
        "modules": course.modules.state_dict(), "optimiser": optimiser.state_dict(), "average": average, "step": step,
        "course": [course.seed, steps],
    }  # fmt: skip
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def _restore(
    path: Path, course: Course, steps: int, optimiser: torch.optim.Optimizer, average: dict[str, Tensor]
) -> int:
    state = torch.load(path, map_location=course.device, weights_only=True)
    if state["course"] != [course.seed, steps]:
        seed, length = state["course"]
        raise UserError(
            f"{path}: of a course with seed {seed} and {length} steps; accepted: seed {course.seed} and {steps} steps,"
            " or --fresh to start over"
        )
    course.modules.load_state_dict(state["modules"])
    optimiser.load_state_dict(state["optimiser"])
    for name, value in state["average"].items():
        average[name].copy_(value)
    return state["step"]
