"""The part that the three pretraining courses share: data drawn in parts, and the training loop.

The loop uses AdamW with warm-up, decay and averaged weights, and resumes exactly: every step draws its data from a
generator seeded by (seed, step), so that a resumed run sees the data of an unbroken one without a saved generator.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from tempact.errors import UserError
from tempact.files import writing

log = logging.getLogger(__name__)

WARM_UP_STEPS = 200
DECAY_FROM = 0.6  # of all steps, from there the learning rate falls linearly to zero
CHECKPOINT_EVERY = 500
LOG_EVERY = 100
SEEDS = 1_000_003  # seeds from one run's seed to the next, for its parts and its steps

T = TypeVar("T")


def draw_parts(draw: Callable[..., list[T]], seed: int, count: int, parts: int, workers: int) -> list[T]:
    """`count` samples from `draw(seed, count=...)`, drawn in parts with seeds of their own.

    The samples are the same for the same seed, count and parts, whatever the number of worker processes.
    """
    seeds = [seed * SEEDS + part for part in range(parts)]
    job = partial(draw, count=-(-count // parts))
    if workers < 2:
        drawn = [job(each) for each in seeds]
    else:
        with ProcessPoolExecutor(workers) as pool:
            drawn = list(pool.map(job, seeds))
    return [sample for part in drawn for sample in part][:count]


def fit_bpe(texts: Iterable[str], pre_tokenizer: Any, vocabulary: int, special: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer (it can write any text) fitted to `texts`; `special` tokens have the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Course(ABC):
    """One model to train: `modules` holds all its parameters, `loss` draws a batch and scores it."""

    name: str
    batch: int
    learning_rate: float
    ema: float  # decay of the averaged weights that are kept, 0 keeps the raw ones
    device: str
    seed: int
    modules: nn.Module

    @abstractmethod
    def loss(self, generator: torch.Generator) -> Tensor:
        """Scalar loss of a batch drawn with `generator`."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the current weights in the form that is shipped."""

    def compile(self) -> None:  # noqa: B027
        """Compiles the blocks whose compilation pays on a GPU; none by default."""

    def figures(self, folder: Path) -> dict[str, float]:
        """Measurements of the trained weights, which `save` wrote into `folder`; none by default."""
        return {}


def train(course: Course, folder: Path, steps: int, *, resume: bool = True) -> dict[str, float]:
    """Trains for `steps` optimiser steps and saves into `folder`.

    An interrupted run goes on from `folder`/training.pt when `resume` is set; the file is gone at the end. Returns
    steps, seconds, the last batch's loss and the course's figures. Raises UserError for the checkpoint of another
    seed or length.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_file = folder / "training.pt"
    parameters = dict(course.modules.named_parameters())
    optimiser = torch.optim.AdamW(
        parameters.values(), lr=course.learning_rate, betas=(0.9, 0.98), weight_decay=0.01,
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
        generator = torch.Generator(course.device).manual_seed(course.seed * SEEDS + step)
        with torch.autocast(course.device, torch.bfloat16, enabled=course.device == "cuda"):
            loss = course.loss(generator)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimiser.step()
        decay = min(course.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - decay)
        done, seconds = step + 1, time.monotonic() - started
        if done % LOG_EVERY == 0 or done == steps:
            recent = loss.item()
            log.info("%s: step %d of %d, loss %.5f, %.0f s", course.name, done, steps, recent, seconds)
        if done % CHECKPOINT_EVERY == 0 and done < steps:
            state = {
                "modules": course.modules.state_dict(), "optimiser": optimiser.state_dict(), "average": average,
                "step": done, "course": [course.seed, steps],
            }  # fmt: skip
            with writing(state_file) as partial_file:
                torch.save(state, partial_file)
    if course.ema:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(average[name])
    course.save(folder)
    state_file.unlink(missing_ok=True)
    figures = {"steps": steps, "seconds": round(time.monotonic() - started, 1), "loss": recent}
    figures |= course.figures(folder)
    log.info("%s: %s", course.name, figures)
    return figures


def _rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / min(WARM_UP_STEPS, max(1, steps // 5)))
    decay_from = DECAY_FROM * steps
    return warm if step < decay_from else warm * (steps - step) / (steps - decay_from)


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
