"""Window policies: the earlier frames that a chunk attends to, and their RoPE positions.

The tables of docs/backbones.md section 2 follow from three numbers. While all history and the own chunk fit into the
window, a chunk attends to everything, at absolute positions; beyond it, to the sink frames and the most recent ones.

With RoPE, attention scores depend on differences of positions alone. Where a window renumbers its frames from 0, the
positions here are shifted by a constant so that the newest frames keep their absolute ones: only the sink moves, and
only its keys are rotated.

The sampler of a few-step distilled model: settings of a roll-out, noise levels, noise, and a chunk's denoising.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from csrc_triton.flow_sde import flow_sde_step
from tempact import config
from tempact.config import TRAIN_TIMESTEPS, ExecutorConfig, Window
from tempact.executor.cuda_graphs import Context, CudaGraphRunner
from tempact.models.wan.transformer import TextKV
from tempact.rl.executor_losses import LOSSES
from tempact.seeds import derive_seed


@dataclass(frozen=True)
class WindowPolicy(Window):
    """A window's numbers, and the frames and positions that follow from them."""

    def attended(self, start: int, chunk: int) -> list[int]:
        """History frames (before `start`) that the chunk [start, start + chunk) attends to, in order."""
        if self.window is None or self._fits(start + chunk):
            return list(range(start))
        recent = self.window - chunk - self.sink
        return [*range(self.sink), *range(start - recent, start)]

    def recached(self, start: int) -> list[int]:
        """Frames whose K/V a text switch at frame `start` recomputes under the "recache" policy.

        The newest ones of a window, all of them if there are no more; else the sink keeps the old text.
        """
        if self.window is None or self._fits(start):
            return list(range(start))
        return list(range(start - self.window + self.sink, start))

    def positions_of(self, history: list[int], start: int, end: int) -> list[int]:
        """RoPE positions of the attended frames `history` in a pass over the frames [start, end), whose positions are
        absolute."""
        if self.positions == "absolute" or self._fits(end):
            return history
        return list(range(start - len(history), start))

    def _fits(self, frames: int) -> bool:
        return self.window is None or frames <= self.window


WINDOWS = {name: WindowPolicy(**vars(numbers)) for name, numbers in config.WINDOWS.items()}


@dataclass(frozen=True)
class Schedule:
    """sigmas: the noise level of each of the K denoising calls in falling order, then 0: K + 1 numbers in [0, 1].

    eta in (0, 1]: share of the noise that a transition draws anew (docs/algorithm.md 2.1); 1 is the distilled sampler.
    """

    sigmas: tuple[float, ...]
    eta: float = 1.0

    @classmethod
    def from_timesteps(cls, timesteps: Sequence[int], shift: float, eta: float = 1.0) -> Schedule:
        """Warps timesteps tau in (0, 1000]: sigma(u) = shift u / (1 + (shift - 1) u), u = tau / 1000.

        (1000, 750, 500, 250) with shift 5 give 1, 0.9375, 0.8333, 0.625 (docs/algorithm.md 2.1).
        """
        assert timesteps and all(a > b for a, b in pairwise((TRAIN_TIMESTEPS + 1, *timesteps, 0))) and shift > 0
        levels = (tau / TRAIN_TIMESTEPS for tau in timesteps)
        return cls((*(shift * u / (1.0 + (shift - 1.0) * u) for u in levels), 0.0), eta)

    @property
    def calls(self) -> int:
        """K, the denoising calls of a chunk."""
        return len(self.sigmas) - 1

    @property
    def transitions(self) -> int:
        """T, the stochastic transitions: one after every denoising call but the last."""
        return self.calls - 1


@dataclass(frozen=True)
class RolloutSettings:
    """Settings of a roll-out: F latent frames in chunks of c frames.

    text_switch: a new prompt changes its own K/V ("cross_attention"), or the history's too ("recache"). first: the
    schedule of the first chunk, `schedule` that of all others. separator joins a step's prompt and the next one's,
    where prompts are smoothed; None: prompts as given. forward: the clean chunk is recorded, noised anew, in place of
    the transitions that made it (`Transition`). siblings: branches of a row of a record, 0 for all continuations.
    """

    frames: int
    chunk: int
    window: WindowPolicy
    text_switch: str
    schedule: Schedule
    first: Schedule
    separator: str | None
    forward: bool = False
    siblings: int = 0

    @classmethod
    def of(cls, config: ExecutorConfig) -> RolloutSettings:
        """From a configuration that `validate` has accepted."""
        c = config
        schedule, first = (
            Schedule.from_timesteps(timesteps, c.shift, c.eta)
            for timesteps in (c.timesteps, c.first_timesteps or c.timesteps)
        )
        separator = c.prompt_separator if c.smooth_prompts else None
        return cls(
            c.frames,
            c.chunk_frames,
            WINDOWS[c.window],
            c.text_switch,
            schedule,
            first,
            separator,
            LOSSES[c.loss].forward,
            1 if c.forks == "none" or c.trained_chunks != "first" else math.gcd(*c.branching),
        )

    @property
    def chunks(self) -> int:
        return self.frames // self.chunk

    @property
    def trained(self) -> int:
        """Denoising calls of the recorded chunk that are trained, the first ones."""
        return self.schedule.calls if self.forward else self.schedule.transitions

    @property
    def recorded(self) -> tuple[int, int]:
        """States and noises of a continuation in a record."""
        return self.trained + (not self.forward), self.trained

    def schedule_at(self, start: int) -> Schedule:
        """The schedule of the chunk at latent frame `start`."""
        return self.schedule if start else self.first


@dataclass(frozen=True)
class NoiseSource:
    """Standard normal noise of P plans x N continuations, which is drawn where it is asked for.

    shape: of a chunk's noise, [P, N, K, C, c, H, W]. draw: plan, continuation and chunk -> fp32 [K, C, c, H, W], which
    depends on nothing else; plans are numbered as the source was made. first: number of the first plan.
    """

    shape: tuple[int, ...]
    draw: Callable[[int, int, int], Tensor]
    first: int = 0

    def __call__(self, chunk: int, videos: Sequence[tuple[int, int]]) -> Tensor:
        """The noise of these (plan, continuation) pairs, [B, K, C, c, H, W]."""
        return torch.stack([self.draw(self.first + plan, continuation, chunk) for plan, continuation in videos])

    def part(self, plans: slice) -> NoiseSource:
        """The source of consecutive plans among these."""
        own = range(self.shape[0])[plans]
        return replace(self, shape=(len(own), *self.shape[1:]), first=self.first + own.start)

    def seed_group(self, chunks: int) -> NoiseSource:
        """The source where all continuations of a plan begin the first `chunks` chunks, those of a video, from one
        noise; what transitions draw anew stays their own."""

        def draw(plan: int, continuation: int, chunk: int) -> Tensor:
            own = self.draw(plan, continuation, chunk)
            if continuation and chunk < chunks:
                own[0] = self.draw(plan, 0, chunk)[0]
            return own

        return replace(self, draw=draw)

    def following(self, chosen: Mapping[int, int]) -> NoiseSource:
        """The source of one continuation of every plan, whose chunks follow the noise of the continuations `chosen` (by
        chunk), else that of the first."""

        def draw(plan: int, _: int, chunk: int) -> Tensor:
            return self.draw(plan, chosen.get(chunk, 0), chunk)

        return replace(self, shape=(self.shape[0], 1, *self.shape[2:]), draw=draw)

    def block(self, own: range, forks: Sequence[int]) -> NoiseSource:
        """The source of consecutive continuations of every plan; until its fork each follows the noise of the plan's
        first one, whoever makes that. forks: of each plan, in chunks."""

        def draw(plan: int, continuation: int, chunk: int) -> Tensor:
            return self.draw(plan, own.start + continuation if chunk >= forks[plan] else 0, chunk)

        return replace(self, shape=(self.shape[0], len(own), *self.shape[2:]), draw=draw)


def gaussian_noise(seed: int, shape: tuple[int, ...], device: torch.device) -> NoiseSource:
    """Noise with a seed of its own for every plan, continuation and chunk; shape as `Executor.noise_shape` gives it.

    A video's noise is the same whatever the numbers of plans and continuations, and whichever are made together.
    """

    def draw(plan: int, continuation: int, chunk: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(derive_seed(seed, plan, "noise", continuation, chunk))
        return torch.randn(shape[2:], generator=generator, device=device)

    return NoiseSource(shape, draw)


def denoise_chunk(
    runner: CudaGraphRunner, noise: Tensor, text: TextKV, positions: Tensor, context: Context, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """The K denoising calls of one chunk.

    noise [B, >= K, C, c, H, W]: the chunk at sigma_0, then the noise of each transition; text, positions and context
    as in `CudaGraphRunner.velocity`. Returns the clean chunk [B, C, c, H, W] and the chunk at sigma_0 .. sigma_T
    [B, T+1, C, c, H, W].
    """
    sigmas, eta = schedule.sigmas, schedule.eta
    x = noise[:, 0]
    states = [x]
    for k in range(schedule.calls):
        sigma = torch.full((x.shape[0], x.shape[2]), sigmas[k], device=x.device)
        velocity = runner.velocity(x, sigma, text, positions, context).float()
        if sigmas[k + 1] == 0.0:
            x = x - sigmas[k] * velocity  # the last call is deterministic
        else:
            levels = sigmas[k], sigmas[k + 1]
            x = flow_sde_step(x, velocity, noise[:, k + 1], *levels, eta=eta, return_mean=False).sample
            states.append(x)
    return x, torch.stack(states, dim=1)
