"""From a plan's raw step prompts to what the executor reads.

Rolling out videos: shared context, fork, continuations in one batch, the transition chunk recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from csrc_triton.flow_sde import flow_sde_step
from tempact.config import ExecutorConfig
from tempact.executor.attention import Context
from tempact.executor.cuda_graphs import CudaGraphRunner
from tempact.executor.kv_history import KVHistory
from tempact.executor.sampler import Schedule
from tempact.executor.window import WINDOWS, WindowPolicy
from tempact.models.wan.transformer import TextKV, WanTransformer
from tempact.types import Plan, Transition

SEPARATOR = " Next: "


def smooth_prompts(prompts: Sequence[str], separator: str = SEPARATOR) -> list[str]:
    """Each prompt with the raw next one appended, so that a step prepares its successor; the last as it is.

    Judges keep the raw prompts (ALGORITHM.md decision 3): the given sequence is not changed.
    """
    following = prompts[1:]
    return [*(f"{prompt}{separator}{after}" for prompt, after in zip(prompts, following, strict=False)), *prompts[-1:]]


NoiseSource = Callable[[int], Tensor]  # chunk index -> [P, N, K, C, c, H, W] fp32 standard normal


@dataclass(frozen=True)
class RolloutSettings:
    """How videos are made: F latent frames in chunks of c, the window, what a text switch does."""

    frames: int
    chunk: int
    window: WindowPolicy
    text_switch: str
    schedule: Schedule
    eta: float
    smooth: bool

    @classmethod
    def of(cls, config: ExecutorConfig) -> RolloutSettings:
        """From a configuration that `validate` has accepted."""
        return cls(
            frames=config.frames,
            chunk=config.chunk_frames,
            window=WINDOWS[config.window],
            text_switch=config.text_switch,
            schedule=Schedule.from_timesteps(config.timesteps, config.shift),
            eta=config.eta,
            smooth=config.smooth_prompts,
        )

    @property
    def chunks(self) -> int:
        return self.frames // self.chunk


class PromptKV:
    """Cross-attention K/V of the prompts of a batch, projected once under the current weights."""

    def __init__(self, model: WanTransformer, encode: Callable[[list[str]], Tensor], prompts: list[str]):
        self.index = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        self.text = model.project_text(encode(list(self.index)))

    def __call__(self, prompts: list[str]) -> TextKV:
        """One prompt a batch row."""
        device = self.text.layers[0][0].device
        return self.text.select(on_device([self.index[prompt] for prompt in prompts], device))


def on_device(numbers: list[int], device: torch.device) -> Tensor:
    """int64 there; from pinned memory, or the host would wait for a GPU here."""
    return torch.tensor(numbers, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def chunk_prompts(plan: Plan, settings: RolloutSettings) -> list[str]:
    """The prompt the executor sees on every chunk of a plan."""
    raw = [step.prompt for step in plan.steps]
    seen = smooth_prompts(raw) if settings.smooth else raw
    return [seen[plan.step_at(chunk * settings.chunk)] for chunk in range(settings.chunks)]


def gaussian_noise(seed: int, shape: tuple[int, ...], device: torch.device) -> NoiseSource:
    """Noise of `shape` that depends on the seed and the chunk alone."""

    def draw(chunk: int) -> Tensor:
        # splitmix-like spread, so that neighbouring seeds and chunks start far apart
        mixed = (seed * 0x9E3779B97F4A7C15 + (chunk + 1) * 0xBF58476D1CE4E5B9) % 2**63
        generator = torch.Generator(device).manual_seed(mixed)
        return torch.randn(shape, generator=generator, device=device)

    return draw


def denoise_chunk(
    calls: CudaGraphRunner, noise: Tensor, text: TextKV, positions: Tensor, context: Context, settings: RolloutSettings
) -> tuple[Tensor, Tensor]:
    """K denoising steps of one chunk; noise [B, K, C, c, H, W], the first is where it starts.

    Returns the clean chunk [B, C, c, H, W] and the states x at sigma_0 .. sigma_T [B, T+1, C, c, H, W].
    """
    sigmas = settings.schedule.sigmas
    x = noise[:, 0]
    states = [x]
    for k in range(len(sigmas) - 1):
        sigma = torch.full((x.shape[0], x.shape[2]), sigmas[k], device=x.device)
        velocity = calls.velocity(x, sigma, text, positions, context).float()
        if sigmas[k + 1] == 0.0:
            x = x - sigmas[k] * velocity  # the last step is deterministic
        else:
            levels = sigmas[k], sigmas[k + 1]
            x = flow_sde_step(x, velocity, noise[:, k + 1], *levels, eta=settings.eta, return_mean=False).sample
            states.append(x)
    return x, torch.stack(states, dim=1)


@dataclass
class _Branch:
    plan: int
    continuations: list[int]  # more than one before the fork
    branch: int


@dataclass
class _Record:
    states: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    noises: dict[tuple[int, int], Tensor] = field(default_factory=dict)


@torch.no_grad()
def roll_out(
    calls: CudaGraphRunner,
    encode: Callable[[list[str]], Tensor],
    plans: list[Plan],
    fork_frames: list[int],
    noise: NoiseSource,
    settings: RolloutSettings,
) -> tuple[Tensor, Transition]:
    """Videos of P plans x N continuations.

    Plan p makes frames [0, fork_frames[p]) once, then forks; all branches of all plans advance together,
    one batch a chunk. N and the latent shape are those of the noise. A fork frame of 0 forks at once.
    Returns latents [P, N, C, F, H, W] and the recorded transition chunk (the first one after the fork).
    """
    prompts = [chunk_prompts(plan, settings) for plan in plans]
    book = PromptKV(calls.model, encode, [prompt for plan in prompts for prompt in plan])
    first = noise(0)
    count, size = first.shape[1], (first.shape[-2], first.shape[-1])
    latents = first.new_zeros(len(plans), count, first.shape[3], settings.frames, *size)
    with KVHistory(calls, settings.window, settings.chunk, size) as history:
        branches = [_Branch(p, list(range(count)), history.new_branch()) for p in range(len(plans))]
        record = _Record()
        for chunk in range(settings.chunks):
            start, end = chunk * settings.chunk, (chunk + 1) * settings.chunk
            if settings.text_switch == "recache" and chunk:  # before the fork: continuations share what it rewrites
                switched = [b for b in branches if prompts[b.plan][chunk - 1] != prompts[b.plan][chunk]]
                if switched:
                    past = torch.stack([latents[b.plan, b.continuations[0], :, :start] for b in switched])
                    history.recache(
                        [b.branch for b in switched], past, book([prompts[b.plan][chunk] for b in switched])
                    )
            branches = _fork(branches, history, [p for p, frame in enumerate(fork_frames) if frame == start])
            ids = [b.branch for b in branches]
            text = book([prompts[b.plan][chunk] for b in branches])
            drawn = first if chunk == 0 else noise(chunk)
            batch = torch.stack([drawn[b.plan, b.continuations[0]] for b in branches])
            context = history.context(ids, start)
            clean, states = denoise_chunk(calls, batch, text, history.positions(start), context, settings)
            for i, b in enumerate(branches):
                latents[b.plan, b.continuations, :, start:end] = clean[i]
                if start == fork_frames[b.plan]:
                    record.states[b.plan, b.continuations[0]] = states[i]
                    record.noises[b.plan, b.continuations[0]] = batch[i, 1:]
            if end < settings.frames:
                history.commit(ids, clean, text)
    return latents, _transition(record, latents, fork_frames, prompts, settings)


def _fork(branches: list[_Branch], history: KVHistory, plans: list[int]) -> list[_Branch]:
    """The branches with those of `plans` forked into one a continuation."""
    grown: list[_Branch] = []
    for b in branches:
        if b.plan in plans and len(b.continuations) > 1:
            forks = history.fork(b.branch, len(b.continuations))
            grown += [_Branch(b.plan, [n], new) for n, new in zip(b.continuations, forks, strict=True)]
        else:
            grown.append(b)
    return grown


def _transition(
    record: _Record, latents: Tensor, fork_frames: list[int], prompts: list[list[str]], settings: RolloutSettings
) -> Transition:
    plans, count = latents.shape[:2]
    keys = [(p, n) for p in range(plans) for n in range(count)]
    states = torch.stack([record.states[key] for key in keys]).unflatten(0, (plans, count))
    noises = torch.stack([record.noises[key] for key in keys]).unflatten(0, (plans, count))
    start = torch.tensor(fork_frames)
    prefix = latents[:, 0, :, : max(fork_frames)].clone()
    for p, frame in enumerate(fork_frames):
        prefix[p, :, frame:] = 0.0
    seen = [prompts[p][: frame // settings.chunk + 1] for p, frame in enumerate(fork_frames)]
    return Transition(states, noises, start, prefix, seen)


def joined(parts: list[Transition]) -> Transition:
    """The recorded chunks of all plans of several roll-outs."""
    longest = max(part.prefix.shape[2] for part in parts)
    prefixes = [F.pad(part.prefix, (0, 0, 0, 0, 0, longest - part.prefix.shape[2])) for part in parts]
    return Transition(
        torch.cat([part.states for part in parts]),
        torch.cat([part.noises for part in parts]),
        torch.cat([part.start for part in parts]),
        torch.cat(prefixes),
        [prompts for part in parts for prompts in part.prompts],
    )


def rebuild_context(
    calls: CudaGraphRunner, book: PromptKV, prefix: Tensor, prompts: list[list[str]], settings: RolloutSettings
) -> KVHistory:
    """The history after a shared context [P, C, S, H, W], under the current weights, without gradient.

    prompts[p] holds the prompt of each of plan p's chunks up to and including the one at S. `branches` of the
    returned history are the plans', in order; whoever asked for it ends it.
    """
    history = KVHistory(calls, settings.window, settings.chunk, (prefix.shape[-2], prefix.shape[-1]))
    branches = [history.new_branch() for _ in prompts]
    try:
        for chunk in range(prefix.shape[2] // settings.chunk + 1):
            start, end = chunk * settings.chunk, (chunk + 1) * settings.chunk
            if settings.text_switch == "recache" and chunk:
                switched = [p for p, texts in enumerate(prompts) if texts[chunk] != texts[chunk - 1]]
                if switched:
                    text = book([prompts[p][chunk] for p in switched])
                    history.recache([branches[p] for p in switched], prefix[switched, :, :start], text)
            if end <= prefix.shape[2]:
                history.commit(branches, prefix[:, :, start:end], book([texts[chunk] for texts in prompts]))
    except BaseException:
        history.close()
        raise
    return history
