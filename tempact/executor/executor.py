"""The executor policy: a causal diffusion transformer with a trainable adapter and its frozen start.

`rollout` makes videos; `update` is one step of the loss `executor.loss` on the recorded chunks. Velocities, old ones
included, come from one path (docs/algorithm.md, decision 4), through the context rebuilt from stored clean latents. The
roll-out's own K/V are not kept for the update: a plan's context of six frames is 1.6 GiB at full size, 100 GiB for an
iteration of 64 plans, and making it anew takes a few percent of the update. It is made for the plans of a micro-batch
and given back before the next, so that the cache holds no more of an update than of a roll-out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig as PeftLoraConfig
from torch import Tensor, nn

from csrc_triton import ForkableKVCache
from tempact.config import ExecutorConfig
from tempact.distributed.reduction import Gradient, UpdateSum
from tempact.distributed.watch import moved
from tempact.executor.cuda_graphs import CudaGraphRunner
from tempact.executor.kv_history import FIRST_FRAMES, KVHistory
from tempact.executor.lora import LoraLinear, merged
from tempact.executor.rollout import (
    PromptKV,
    blank_transition,
    chunk_prompts,
    enough_rows,
    on_device,
    rebuild_context,
    roll_out,
    units_of,
)
from tempact.executor.sampler import NoiseSource, RolloutSettings
from tempact.models.adapters import adapted, load_adapter, reference_active, save_adapter
from tempact.models.wan.codec import Codec
from tempact.models.wan.text import PromptEncoder
from tempact.models.wan.text_padding import cut_length
from tempact.models.wan.transformer import WanTransformer
from tempact.rl.executor_losses import executor_loss
from tempact.rl.flow_grpo import clip_epsilon, rollout_gap
from tempact.types import Batch, Fork, Plan, Rollout, Siblings, Transition, first_frame, siblings_of

TEXTS_KEPT = 1024  # prompts whose text rows stay at hand: under a GB at full size


@dataclass(frozen=True)
class _Entries:
    """Training rows of one micro-batch: indices of plans, their continuations and transitions, row-major.

    Here and in updates a plan that forks several times is several, one for each row of its record: a plan is its
    `Siblings`, its continuations are their branches.
    """

    plans: list[int]
    continuations: slice
    transitions: slice

    def of(self, values: Tensor, device: torch.device, plans: list[int] | None = None) -> Tensor:
        """These rows of values [P, N, T, ...], flat; plans: their indices in `values`, if they are others there.

        Indexing by a list would make the host wait for the device.
        """
        own = (values[plan, self.continuations, self.transitions] for plan in plans or self.plans)
        return torch.stack([rows.to(device, non_blocking=True) for rows in own]).flatten(0, 2)

    def levels(self, numbers: Tensor, rows: int) -> Tensor:
        """Of the values [T] of levels those of these rows, flat."""
        own = numbers[self.transitions]
        return own.repeat(rows // len(own))


class Executor:
    """A `WanTransformer` with LoRA ("default" is trained, "ref" frozen), text encoder, codec and roll-out settings.

    size: height and width of its videos, pixels.
    """

    def __init__(
        self, model: WanTransformer, text_encoder: PromptEncoder, codec: Codec, config: ExecutorConfig,
        size: tuple[int, int],
    ):  # fmt: skip
        self.settings = RolloutSettings.of(config)
        self.loss = executor_loss(config, self.settings.schedule.sigmas)
        self.config, self.codec, self.text_encoder = config, codec, text_encoder.requires_grad_(False)
        self.latent_size = codec.latent_size(*size)
        self.frame_tokens = model.config.frame_tokens(*self.latent_size)  # of a latent frame
        lora = PeftLoraConfig(
            r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=list(config.lora.targets),
            init_lora_weights="gaussian",
        )  # fmt: skip
        lora._register_custom_module({nn.Linear: LoraLinear})  # PEFT's documented way to layers of one's own
        self.peft = adapted(model, lora, "executor")
        self.model = model  # the same module, its linears now carrying adapters
        model.checkpoint_activations = config.checkpoint_activations
        self.runner = CudaGraphRunner(model, lambda: self.parameters().values(), graphs=config.cuda_graphs)
        self._text: dict[str, Tensor] = {}  # rows of the latest prompts, without padding
        self._text_rows = 0

    @property
    def device(self) -> torch.device:
        return self.model.device

    @cached_property
    def cache(self) -> ForkableKVCache:
        """The K/V of all histories; it grows, and keeps its size."""
        config, page = self.model.config, self.frame_tokens
        return ForkableKVCache(
            config.layers, config.heads, config.head_dim, rows=FIRST_FRAMES * page, dtype=self.model.dtype,
            device=self.device, page=page,
        )  # fmt: skip

    def history(self, plans: int = 0, continuations: int = 1, more: int = 0) -> KVHistory:
        """An empty history; for CUDA graphs, which read the cache where it lies, the cache grows at once to what the
        videos of so many plans x continuations need at most, and `more` latent frames."""
        if plans and self.runner.graphs:
            earliest = self.settings.chunk  # of the forks, which takes most
            rows = enough_rows(self.settings, plans, continuations, earliest, self.frame_tokens)
            self.cache.grow(rows + more * self.frame_tokens)
        return KVHistory(self.runner, self.cache, self.settings, self.frame_tokens)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {name: p for name, p in self.peft.named_parameters() if p.requires_grad}

    def save_adapter(self, folder: Path) -> None:
        save_adapter(self.peft, folder)

    def load_adapter(self, folder: Path) -> None:
        load_adapter(self.peft, folder)

    def prompts(self, plans: list[Plan]) -> list[str]:
        """The text encoder's prompts of the plans' chunks."""
        return [prompt for plan in plans for prompt in chunk_prompts(plan, self.settings)]

    def read(self, prompts: list[str]) -> None:
        """Encodes the prompts of the videos to come: the longest says how many rows `encode` gives from here on."""
        self._text_rows = 0
        with self.precision():
            self.encode(prompts)

    def encode(self, prompts: list[str]) -> Tensor:
        """Text rows [n, rows, text_dim], zero past each prompt's end.

        All rows, or as many as the longest prompt since `read` needs: a multiple of WanConfig.text_multiple, because
        every number of rows has CUDA graphs of its own. The rows of the latest TEXTS_KEPT prompts are kept; other
        prompts are encoded again.
        """
        asked, config = list(dict.fromkeys(prompts)), self.model.config
        new = [prompt for prompt in asked if prompt not in self._text]
        if new:
            encoded = self.text_encoder.encode(new).to(self.device, self.model.dtype)
            for prompt, rows in zip(new, encoded, strict=True):
                self._text[prompt] = rows[: 1 + int(rows.any(dim=-1).nonzero().amax())].clone()
        for prompt in asked:  # the latest come last
            self._text[prompt] = self._text.pop(prompt)
        longest = max(len(self._text[prompt]) for prompt in asked)
        rows = cut_length(longest, config.text_len, config.text_multiple) if config.text_multiple else config.text_len
        self._text_rows = max(self._text_rows, rows)
        for prompt in list(self._text)[: max(0, len(self._text) - max(TEXTS_KEPT, len(asked)))]:
            del self._text[prompt]
        texts = (self._text[prompt] for prompt in prompts)
        return torch.stack([F.pad(text, (0, 0, 0, self._text_rows - len(text))) for text in texts])

    def noise_shape(self, plans: int, continuations: int) -> tuple[int, ...]:
        """Shape of one chunk's noise: [P, N, K, C, c, H, W], K that of the chunk with the most denoising calls."""
        calls = max(self.settings.schedule.calls, self.settings.first.calls)
        return (plans, continuations, calls, self.codec.latent_channels, self.settings.chunk, *self.latent_size)

    def rollout_units(self, plans: int, continuations: int, processes: int = 1) -> list[range]:
        """`units_of` the settings."""
        return units_of(plans, continuations, self.config.rollout_videos, processes)

    def rollout(
        self,
        plans: list[Plan],
        forks: Sequence[Fork],
        noise: NoiseSource,
        made: Callable[[range, Rollout], None] = lambda unit, part: None,
        units: Iterable[range] | None = None,
    ) -> Rollout:
        """Videos of P plans x N continuations, N being the noise's; plan p forks at forks[p].

        units: those of `rollout_units` that are rolled out here, one after the other; None: all of them. `made` is
        given the videos of a unit as soon as they are decoded, before the next ones are begun. The transition is None
        where a fork is at frame 0 (`roll_out`), and where units are given: `made` gets those of each unit. States and
        context of a broken video are 0.
        """
        self.read(self.prompts(plans))  # the text encoder is asked once, also where its weights must come first
        frames, broken = torch.empty(0), torch.zeros(noise.shape[:2], dtype=torch.bool)
        record = self.blank(plans, self.rows(forks, noise), noise) if units is None else None
        for unit in self.rollout_units(*noise.shape[:2]) if units is None else units:
            own = slice(unit.start, unit.stop)
            mine, at, drawn = plans[own], forks[own], noise.part(own)
            of_own = self.blank(mine, self.rows(at, drawn), drawn) if record is None else record.part(own)
            latents = self._roll_out(mine, at, drawn, of_own)
            broken[own] = not_finite(latents).cpu()
            part = Rollout(self.codec.decode_forked(latents, [*map(first_frame, at)]), of_own, broken[own])
            del latents  # nothing of these videos but frames and transition stays while the next ones are made
            made(unit, part)
            if len(unit) == len(plans):
                return part
            if not frames.numel():  # the videos of all plans can be most of a host's memory: no second copy
                frames = part.frames.new_empty(len(plans), *part.frames.shape[1:])
            frames[own] = part.frames
            del part
        return Rollout(frames, record, broken)

    def roll_out(
        self, plans: list[Plan], forks: Sequence[Fork], noise: NoiseSource
    ) -> tuple[Tensor, Transition | None]:
        """Latents [P, N, C, F, H, W] of the videos of all plans together, and their transitions, as `rollout`."""
        record = self.blank(plans, self.rows(forks, noise), noise)
        return self._roll_out(plans, forks, noise, record), record

    def rows(self, forks: Sequence[Fork], noise: NoiseSource) -> list[Siblings]:
        """Those of the record of plans that fork there."""
        return siblings_of(forks, noise.shape[1], self.settings.siblings)

    def blank(self, plans: list[Plan], rows: list[Siblings], noise: NoiseSource) -> Transition | None:
        """Room for the record of these rows of the plans, whatever is in it; None where a fork is at frame 0."""
        pinned = self.device.type == "cuda"
        return blank_transition(plans, rows, noise, self.settings, pinned=pinned)

    def _roll_out(
        self, plans: list[Plan], forks: Sequence[Fork], noise: NoiseSource, record: Transition | None
    ) -> Tensor:
        with self.merged(), self.precision(), self.history(*noise.shape[:2]) as history:
            return roll_out(history, self.encode, plans, forks, noise, record)

    @torch.no_grad()
    def canary(self, plan: Plan, noise: NoiseSource) -> tuple[Tensor, Tensor]:
        """Velocity [C, c, H, W] of the first call of a plan's video, as videos are made: of the trained adapter and of
        its start, fp32 on the host. They differ where the trained adapter is in effect.

        noise: of an iteration whose prompts have been read; the video is its first one.
        """
        found = [self._first_velocity(plan, noise)]
        with self.reference():
            graphs, self.runner.graphs = self.runner.graphs, False  # a recording for one call would only take memory
            try:
                found.append(self._first_velocity(plan, noise))
            finally:
                self.runner.graphs = graphs
        return found[0], found[1]

    def _first_velocity(self, plan: Plan, noise: NoiseSource) -> Tensor:
        prompts = chunk_prompts(plan, self.settings)[:1]
        with self.merged(), self.precision(), self.history() as history:
            text = PromptKV(self.model, self.encode, prompts)
            x, branches = noise(0, [(0, 0)])[:, 0], [history.new_branch()]
            sigma = torch.full((1, x.shape[2]), self.settings.first.sigmas[0], device=x.device)
            context, positions = history.context(branches, 0), history.positions(0)
            return self.runner.velocity(x, sigma, text(prompts), positions, context)[0].float().cpu()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model is the frozen starting policy."""
        with reference_active(self.peft):
            yield

    def merged(self) -> AbstractContextManager[None]:
        """Inside, videos are made with the adapter merged into the weights, where they allow it (`lora.merged`)."""
        return merged(self.model)

    def precision(self) -> AbstractContextManager[Any]:
        """Inside, latents and adapters, which are fp32, are used in the precision of the model's weights."""
        dtype = self.model.dtype
        low = dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, dtype, enabled=low, cache_enabled=False)

    def velocities(self, transition: Transition, plans: list[int]) -> Tensor:
        """Velocities of recorded transitions of the plans with these indices [plans, N, T, C, c, H, W], no gradient."""
        out = torch.zeros(len(plans), *transition.noises.shape[1:], device=self.device)
        for entries, velocity in self._forward(transition, plans, grad=False):
            for plan, value in zip(entries.plans, velocity.unflatten(0, (len(entries.plans), -1)), strict=True):
                target = out[plans.index(plan), entries.continuations, entries.transitions]
                target.copy_(value.view_as(target))
        return out

    def units(self, plans: list[int], starts: Sequence[int], mask: Tensor, steps: int) -> list[list[int]]:
        """What an update of these plans works on, one after the other: plans with something to learn from that share a
        switch frame and fit into a micro-batch, alike for all that share weights. starts, mask: of all plans, as
        `Transition.start` and `Batch.execution_mask`. steps: levels that are trained."""
        continuations = mask.shape[1] // self.config.shard
        counted = [plan for plan in plans if bool(mask[plan].any())]
        size, found = max(1, self.config.micro_batch // (continuations * steps)), []
        for start in dict.fromkeys(starts[plan] for plan in counted):
            group = [plan for plan in counted if starts[plan] == start]
            found += [group[i : i + size] for i in range(0, len(group), size)]
        return found

    def terms(self, plans: list[int], mask: Tensor, steps: int) -> int:
        """(plan, continuation, level) terms that an update of these plans counts, of `steps` levels."""
        return int(mask[plans].sum()) * steps if plans else 0

    def update(
        self, batch: Batch, plans: list[int], v_old: Tensor | None = None, total: UpdateSum | None = None,
        units: list[list[int]] | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Accumulates the gradient of the loss over the recorded chunks of the plans with these indices.

        v_old: as `velocities` returned it before the iteration's first optimiser step; None in that first step, where
        v_old is the velocity itself without gradient. total: sum of the update of which these plans are the `units` of
        this process; None: they are all. units: the same of these plans, where what others hold of them has decided
        what is worked on. The gradient is the mean over the counted (plan, continuation, level) terms. Returns
        metrics, of transitions without v_old also the mean `rollout_gap` of every sigma in units of the clip; {} if no
        term counts.
        """
        transition = batch.transition
        assert transition is not None
        steps = len(transition.levels)
        if units is None:
            units = self.units(plans, transition.start.tolist(), batch.execution_mask, steps)
        counted = [plan for unit in units for plan in unit]
        rows = {plan: plans.index(plan) for plan in counted}
        terms = self.terms(plans, batch.execution_mask, steps) if total is None else total.terms
        if not terms:
            return {}
        total = total or UpdateSum(Gradient(self.parameters().values()), len(units), terms)
        with self.reference():
            v_ref = self.velocities(transition, counted)
        numbers = torch.arange(transition.first, transition.first + steps, device=self.device)
        advantage, mask = (
            values.to(self.device)[..., None].expand(-1, -1, steps)
            for values in (batch.execution_advantage, batch.execution_mask)
        )
        for unit in units:
            # on the device: a micro-batch is prepared while the one before is computed
            shares: dict[str, Tensor] = {}
            for entries, velocity in self._forward(transition, unit, grad=True):
                moved()
                own = [rows[plan] for plan in entries.plans]
                gradient, metrics = self.loss(
                    velocity,
                    velocity.detach() if v_old is None else entries.of(v_old, self.device, own),
                    entries.of(v_ref, self.device, [counted.index(plan) for plan in entries.plans]),
                    entries.of(transition.noises, self.device),
                    entries.levels(numbers, len(velocity)),
                    entries.of(advantage, self.device),
                    entries.of(mask, self.device),
                    terms=terms,
                )
                velocity.backward(gradient)
                if v_old is None and not self.loss.forward:
                    metrics |= self._gaps(velocity.detach(), transition, entries, mask, terms // steps)
                for name, value in metrics.items():
                    shares[name] = shares[name] + value if name in shares else value
            total.add(shares)
        return total.finish()

    def _gaps(
        self, velocity: Tensor, transition: Transition, entries: _Entries, mask: Tensor, videos: int
    ) -> dict[str, Tensor]:
        """This micro-batch's share in the mean `rollout_gap` of every sigma over `videos`, in units of the clip."""
        clip = clip_epsilon(self.config.clip_velocity_rms, velocity[0].numel())
        chosen = transition.levels[entries.transitions]
        recorded = (transition.states[:, :, :-1], transition.states[:, :, 1:], transition.noises)
        rows = velocity, *(entries.of(values, self.device) for values in (*recorded, mask))
        own, states, following, noise, kept = (values.unflatten(0, (-1, len(chosen))).unbind(1) for values in rows)
        schedule, found = self.settings.schedule, {}
        for i, t in enumerate(chosen):
            sigma, after = schedule.sigmas[t : t + 2]
            gap = rollout_gap(own[i], states[i], following[i], noise[i], sigma, after, schedule.eta)
            found[f"rollout_gap/{sigma:.3f}"] = torch.where(kept[i], gap.double(), 0.0).sum() / (videos * clip)
        return found

    def _forward(self, transition: Transition, plans: list[int], *, grad: bool) -> Iterator[tuple[_Entries, Tensor]]:
        """Micro-batches of the plans with their velocities; plans that share a switch frame may share a batch."""
        _, continuations, steps = transition.noises.shape[:3]
        for start in dict.fromkeys(transition.start[plans].tolist()):
            group = [plan for plan in plans if transition.start[plan] == start]
            entries = micro_batches(group, continuations, steps, self.config.micro_batch)
            for own, some in groupby(entries, lambda each: each.plans):
                yield from self._forward_unit(transition, own, start, some, grad)

    def _forward_unit(
        self, transition: Transition, plans: list[int], start: int, some: Iterable[_Entries], grad: bool
    ) -> Iterator[tuple[_Entries, Tensor]]:
        """Micro-batches of these plans; their contexts are made before the first and given back after the last."""
        prompts = [transition.prompts[plan] for plan in plans]
        shared = [transition.siblings[plan].shared if transition.siblings else (plan, start, 0) for plan in plans]
        contexts = [*dict.fromkeys(shared)]  # one for rows that share theirs
        firsts = [shared.index(own) for own in contexts]
        texts = list(dict.fromkeys(own[-1] for own in prompts))
        levels = transition.levels
        sigmas = torch.tensor(self.settings.schedule.sigmas[levels.start : levels.stop], device=self.device)
        with self.history() as history:
            with torch.no_grad(), self.precision():
                self._rebuild(history, transition, [plans[i] for i in firsts], [prompts[i] for i in firsts], start)
                words = self.encode(texts)
            for entries in some:
                states = entries.of(transition.states, self.device)
                each = states.shape[0] // len(plans)
                index = on_device([texts.index(own[-1]) for own in prompts for _ in range(each)], self.device)
                context = history.context([history.branches[contexts.index(own)] for own in shared], start)
                sigma = entries.levels(sigmas, len(states))[:, None].expand(-1, self.settings.chunk)
                with torch.set_grad_enabled(grad), self.precision():
                    velocity = self.runner.policy_velocity(
                        states, sigma, words, index, history.positions(start), context
                    )
                yield entries, velocity.float()

    def _rebuild(
        self, history: KVHistory, transition: Transition, plans: list[int], prompts: list[list[str]], start: int
    ) -> None:
        text = PromptKV(self.model, self.encode, [prompt for own in prompts for prompt in own])
        known = [transition.prefix[plan, :, :start].to(self.device, non_blocking=True) for plan in plans]
        rebuild_context(history, text, torch.stack(known), prompts)


def not_finite(latents: Tensor) -> Tensor:
    """Which videos [P, N] of latents [P, N, ...] hold a NaN or an infinity."""
    low, high = torch.aminmax(latents.flatten(2), dim=-1)
    return ~(low.isfinite() & high.isfinite())


def micro_batches(group: list[int], continuations: int, transitions: int, size: int) -> Iterator[_Entries]:
    """Pieces of at most `size` (continuation, transition) pairs: whole plans where they fit, else parts of one."""
    plans = max(1, size // (continuations * transitions))
    some = min(continuations, max(1, size // transitions))
    each = min(transitions, size)
    for i in range(0, len(group), plans):
        for n in range(0, continuations, some):
            for t in range(0, transitions, each):
                own = slice(n, min(n + some, continuations)), slice(t, min(t + each, transitions))
                yield _Entries(group[i : i + plans], *own)
