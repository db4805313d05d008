"""The executor policy: a causal diffusion transformer with a trainable adapter and its frozen start.

`rollout` makes videos; `update` is one Flow-GRPO step on the recorded transition chunks. Velocities,
old ones included, come from one path (ALGORITHM.md decision 4), through the context rebuilt from stored
clean latents. The roll-out's own K/V are not kept for it: a plan's context of six frames is 1.6 GiB at full size,
100 GiB for an iteration of 64 plans, and making it anew takes a few percent of the update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn

from tempact.config import ExecutorConfig
from tempact.errors import UserError
from tempact.executor.cuda_graphs import CudaGraphRunner
from tempact.executor.lora import LoraLinear
from tempact.executor.rollout import (
    NoiseSource,
    PromptKV,
    RolloutSettings,
    chunk_prompts,
    joined,
    on_device,
    rebuild_context,
    roll_out,
)
from tempact.models.adapters import freeze_reference, load_adapter, reference_active, save_adapter
from tempact.models.wan.codec import Codec
from tempact.models.wan.text import PromptEncoder
from tempact.models.wan.text_padding import cut_length
from tempact.models.wan.transformer import WanTransformer
from tempact.rl.flow_grpo import clip_epsilon, flow_grpo_gradient, rollout_gap
from tempact.types import Batch, Plan, Rollout, Transition

TEXTS_KEPT = 1024  # prompts whose text rows stay at hand: under a GB at full size


@dataclass(frozen=True)
class _Entries:
    """Training rows of one micro-batch: plans (indices), their continuations and transitions, row-major."""

    plans: list[int]
    continuations: slice
    transitions: slice


class Executor:
    """WanTransformer + LoRA ("default" trainable, "ref" frozen), text encoder, codec, sampler settings."""

    def __init__(
        self,
        model: WanTransformer,
        text_encoder: PromptEncoder,
        codec: Codec,
        config: ExecutorConfig,
        size: tuple[int, int],
    ):
        self.settings = RolloutSettings.of(config)
        self.config, self.codec, self.text_encoder = config, codec, text_encoder.requires_grad_(False)
        self.latent_size = codec.latent_size(*size)
        lora = PeftLoraConfig(
            r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=list(config.lora.targets),
            init_lora_weights="gaussian",
        )  # fmt: skip
        lora._register_custom_module({nn.Linear: LoraLinear})  # PEFT's documented way to layers of one's own
        try:
            self.peft = get_peft_model(model.requires_grad_(False), lora)
        except ValueError as error:
            targets = list(config.lora.targets)
            raise UserError(
                f"executor.lora.targets: found {targets}; accepted: module names of the executor"
            ) from error
        self.model = model  # the same module, its linears now carrying adapters
        model.checkpoint_activations = config.checkpoint_activations
        freeze_reference(self.peft, lora)
        self.calls = CudaGraphRunner(model, lambda: self.parameters().values(), graphs=config.cuda_graphs)
        self._text: dict[str, Tensor] = {}  # rows of the prompts asked for last, without padding
        self._text_rows = 0

    @property
    def device(self) -> torch.device:
        return self.model.patch_embedding.weight.device

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable ones by name."""
        return {name: p for name, p in self.peft.named_parameters() if p.requires_grad}

    def save_adapter(self, folder: Path) -> None:
        save_adapter(self.peft, folder)

    def load_adapter(self, folder: Path) -> None:
        load_adapter(self.peft, folder)

    def encode(self, prompts: list[str]) -> Tensor:
        """Text rows [n, rows, text_dim], zero past each prompt's end.

        All rows, or as many as the longest prompt so far needs (WanConfig.text_multiple). Prompts that have not been
        asked for in a long time are encoded again.
        """
        asked = list(dict.fromkeys(prompts))
        new = [prompt for prompt in asked if prompt not in self._text]
        if new:
            weight = self.model.patch_embedding.weight
            for prompt, rows in zip(new, self.text_encoder.encode(new).to(weight.device, weight.dtype), strict=True):
                length = 1 + int(rows.any(dim=-1).nonzero().amax())
                self._text[prompt] = rows[:length].clone()
                self._text_rows = max(self._text_rows, self._rows_for(length))
        for prompt in asked:  # those asked for last come last
            self._text[prompt] = self._text.pop(prompt)
        for prompt in list(self._text)[: max(0, len(self._text) - max(TEXTS_KEPT, len(asked)))]:
            del self._text[prompt]
        texts = (self._text[prompt] for prompt in prompts)
        return torch.stack([F.pad(text, (0, 0, 0, self._text_rows - len(text))) for text in texts])

    def _rows_for(self, length: int) -> int:
        config = self.model.config
        return cut_length(length, config.text_len, config.text_multiple) if config.text_multiple else config.text_len

    def noise_shape(self, plans: int, continuations: int) -> tuple[int, ...]:
        """Shape of one chunk's noise: [P, N, K, C, c, H, W]."""
        steps = len(self.settings.schedule.sigmas) - 1
        return (plans, continuations, steps, self.codec.latent_channels, self.settings.chunk, *self.latent_size)

    def rollout(
        self,
        plans: list[Plan],
        fork_frames: list[int],
        noise: NoiseSource,
        made: Callable[[Rollout], None] = lambda part: None,
    ) -> Rollout:
        """Videos of P plans x N continuations (N is the noise's); plan p forks at fork_frames[p].

        `made` is given the videos of a few plans as soon as they are there, before the next ones are begun.
        """
        frames = torch.empty(0)
        parts: list[tuple[Tensor, Transition]] = []
        for own, latents, transition in self._in_turn(plans, fork_frames, noise):
            part = Rollout(latents, self.codec.decode_forked(latents, fork_frames[own]), transition)
            made(part)
            if len(part.frames) == len(plans):
                return part
            if not parts:  # the videos of all plans can be most of a host's memory: no second copy
                frames = part.frames.new_empty(len(plans), *part.frames.shape[1:])
            frames[own] = part.frames
            parts.append((latents, transition))
        return Rollout(torch.cat([latents for latents, _ in parts]), frames, joined([own for _, own in parts]))

    def latents(self, plans: list[Plan], fork_frames: list[int], noise: NoiseSource) -> tuple[Tensor, Transition]:
        """The same without decoding: [P, N, C, F, H, W] and the recorded transitions."""
        parts = [(latents, transition) for _, latents, transition in self._in_turn(plans, fork_frames, noise)]
        return torch.cat([latents for latents, _ in parts]), joined([transition for _, transition in parts])

    def _in_turn(
        self, plans: list[Plan], fork_frames: list[int], noise: NoiseSource
    ) -> Iterator[tuple[slice, Tensor, Transition]]:
        """Whole plans, as many as `rollout_videos` lets advance together, with their latents and transitions."""
        count = len(plans)
        if self.config.rollout_videos:
            count = max(1, self.config.rollout_videos // noise(0).shape[1])
        if count < len(plans):  # the text encoder is asked once, also where its weights must come first
            with self.precision():
                self.encode([prompt for plan in plans for prompt in chunk_prompts(plan, self.settings)])
        for first in range(0, len(plans), count):
            own = slice(first, min(first + count, len(plans)))

            def draw(chunk: int, own: slice = own) -> Tensor:
                drawn = noise(chunk)
                return drawn if count >= len(plans) else drawn[own].clone()  # that of the others is not kept

            with self.precision():
                made = roll_out(self.calls, self.encode, plans[own], fork_frames[own], draw, self.settings)
            yield own, *made

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model is the frozen starting policy."""
        with reference_active(self.peft):
            yield

    def precision(self) -> AbstractContextManager[Any]:
        """Inside, latents and adapters, which are fp32, are used in the precision of the model's weights."""
        dtype = self.model.patch_embedding.weight.dtype
        low = dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, dtype, enabled=low, cache_enabled=False)

    def velocities(self, transition: Transition, plans: list[int]) -> Tensor:
        """Velocities of the given plans' recorded transitions [plans, N, T, C, c, H, W], without gradient."""
        out = torch.zeros_like(transition.noises[plans])
        for group in groups_by_start(transition, plans):
            for entries, velocity in self._forward(transition, group, grad=False):
                rows = [plans.index(plan) for plan in entries.plans]
                for row, value in zip(rows, velocity.unflatten(0, (len(rows), -1)), strict=True):
                    target = out[row, entries.continuations, entries.transitions]
                    target.copy_(value.view_as(target))
        return out

    def update(self, batch: Batch, plans: list[int], v_old: Tensor | None = None) -> dict[str, float]:
        """Accumulates the gradient of the Flow-GRPO loss over the transitions of `plans`.

        v_old as `velocities` returned it before the first step of the iteration; None means that this is
        that first step, and v_old is the velocity itself without gradient. Returns metrics,
        with the mean `rollout_gap` of every sigma in units of the clip (only without v_old); the gradient
        is the mean over the counted (plan, continuation, transition) terms.
        """
        transition = batch.transition
        assert transition is not None
        counted = [i for i, p in enumerate(plans) if bool(batch.execution_mask[p].any())]
        plans = [plans[i] for i in counted]
        v_old = None if v_old is None else v_old[counted]
        terms = int(batch.execution_mask[plans].sum()) * transition.noises.shape[2] if plans else 0
        if not terms:
            return {}
        with self.reference():
            v_ref = self.velocities(transition, plans)
        clip = clip_epsilon(self.config.clip_velocity_rms, transition.noises[0, 0, 0].numel())
        steps = transition.noises.shape[2]
        advantage, mask = (
            values.to(self.device)[..., None].expand(-1, -1, steps)
            for values in (batch.execution_advantage, batch.execution_mask)
        )
        totals: dict[str, Tensor] = {}  # on the device: a micro-batch is prepared while the one before is computed
        for group in groups_by_start(transition, plans):
            for entries, velocity in self._forward(transition, group, grad=True):
                rows = [plans.index(plan) for plan in entries.plans]

                def pick(values: Tensor, index: list[int], entries: _Entries = entries) -> Tensor:
                    return rows_of(values, index)[:, entries.continuations, entries.transitions].flatten(0, 2)

                gradient, metrics = flow_grpo_gradient(
                    velocity,
                    velocity.detach() if v_old is None else pick(v_old, rows),
                    pick(v_ref, rows),
                    pick(transition.noises, entries.plans),
                    pick(advantage, entries.plans),
                    pick(mask, entries.plans),
                    clip=clip,
                    kl_weight=self.config.kl_weight,
                    terms=terms,
                )
                velocity.backward(gradient)
                if v_old is None:
                    metrics |= self._gaps(velocity.detach(), transition, entries, mask[..., 0], terms // steps, clip)
                for name, value in metrics.items():
                    totals[name] = totals[name] + value if name in totals else value
        return dict(zip(totals, torch.stack([*totals.values()]).tolist(), strict=True))

    def _gaps(
        self, velocity: Tensor, transition: Transition, entries: _Entries, mask: Tensor, videos: int, clip: float
    ) -> dict[str, Tensor]:
        """This micro-batch's share in the mean `rollout_gap` of every sigma over `videos`, in units of the clip."""
        plans, count = len(entries.plans), transition.noises.shape[2]
        chosen = range(count)[entries.transitions]
        own = velocity.unflatten(0, (plans, -1, len(chosen)))
        kept = rows_of(mask, entries.plans)[:, entries.continuations].flatten()
        sigmas, found = self.settings.schedule.sigmas, {}
        for i, t in enumerate(chosen):
            before, after, noise = (
                rows_of(values, entries.plans)[:, entries.continuations, step].flatten(0, 1).to(velocity.device)
                for values, step in ((transition.states, t), (transition.states, t + 1), (transition.noises, t))
            )
            levels = sigmas[t], sigmas[t + 1]
            gap = rollout_gap(own[:, :, i].flatten(0, 1), before, after, noise, *levels, self.settings.eta)
            found[f"rollout_gap/{sigmas[t]:.3f}"] = torch.where(kept, gap.double(), 0.0).sum() / (videos * clip)
        return found

    def _forward(self, transition: Transition, group: list[int], *, grad: bool) -> Iterator[tuple[_Entries, Tensor]]:
        """Micro-batches of one group of plans that share the switch frame, with their velocities."""
        start = int(transition.start[group[0]])
        prompts = [transition.prompts[plan] for plan in group]
        with torch.no_grad(), self.precision():
            everything = PromptKV(self.model, self.encode, [text for texts in prompts for text in texts])
            prefix = transition.prefix[group, :, :start].to(self.device)
            history = rebuild_context(self.calls, everything, prefix, prompts, self.settings)
        with history:
            sigmas = torch.tensor(self.settings.schedule.sigmas[:-2], device=self.device)
            for entries in micro_batches(group, transition.noises.shape[1], len(sigmas), self.config.micro_batch):
                states = rows_of(transition.states, entries.plans)
                states = states[:, entries.continuations, entries.transitions].flatten(0, 2)
                own = [transition.prompts[plan][-1] for plan in entries.plans]
                texts = list(dict.fromkeys(own))
                each = states.shape[0] // len(own)
                index = on_device([texts.index(prompt) for prompt in own for _ in range(each)], self.device)
                context = history.context([history.branches[group.index(plan)] for plan in entries.plans], start)
                chosen = sigmas[entries.transitions]
                sigma = chosen.repeat(states.shape[0] // len(chosen))[:, None].expand(-1, self.settings.chunk)
                with torch.set_grad_enabled(grad), self.precision():
                    velocity = self.calls.policy_velocity(
                        states.to(self.device), sigma, self.encode(texts), index, history.positions(start), context
                    )
                yield entries, velocity.float()


def rows_of(values: Tensor, plans: list[int]) -> Tensor:
    """values[plans]; a list as an index would make the host wait for the device."""
    return torch.stack([values[plan] for plan in plans])


def groups_by_start(transition: Transition, plans: list[int]) -> list[list[int]]:
    """`plans` split by switch frame; each group shares the length of its context."""
    groups: dict[int, list[int]] = {}
    for plan in plans:
        groups.setdefault(int(transition.start[plan]), []).append(plan)
    return list(groups.values())


def micro_batches(group: list[int], continuations: int, transitions: int, size: int) -> Iterator[_Entries]:
    """Pieces of at most `size` (continuation, transition) pairs: whole plans where they fit, else parts of one."""
    each = continuations * transitions
    if size >= each:
        step = size // each
        for i in range(0, len(group), step):
            yield _Entries(group[i : i + step], slice(0, continuations), slice(0, transitions))
        return
    for plan in group:
        if size >= transitions:
            step = size // transitions
            for n in range(0, continuations, step):
                yield _Entries([plan], slice(n, min(n + step, continuations)), slice(0, transitions))
        else:
            for n in range(continuations):
                for t in range(0, transitions, size):
                    yield _Entries([plan], slice(n, n + 1), slice(t, min(t + size, transitions)))
