"""A chunk forward and an executor update of Wan2.1-T2V-1.3B with random weights: kernels against the torch path."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.harness import OURS, Bench, Contender, Outputs
from bench.report import Row
from bench.timing import memory_of
from csrc_triton import ForkableKVCache, LayerViews
from csrc_triton.runtime import backend
from tempact.config import ExecutorConfig, LoraConfig, OptimConfig
from tempact.executor.cuda_graphs import Context, CudaGraphRunner
from tempact.executor.executor import Executor
from tempact.models.wan.transformer import ChunkAttention, WanConfig, WanTransformer
from tempact.rl.flow_grpo import clip_epsilon, flow_grpo_gradient

CHUNK_FRAMES = 3
SIGMA = 0.9375
BRANCHES = 8
REFERENCE = "torch path"
LORA_TARGETS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "ffn.0", "ffn.2")
TINY = WanConfig(
    dim=64, ffn_dim=96, freq_dim=16, text_dim=24, text_len=8, heads=2, layers=2, in_dim=4, out_dim=4
)  # fmt: skip


class Scene:
    """A model and the inputs of one chunk of `branches` videos that share `frames` context frames."""

    def __init__(self, bench: Bench, branches: int, frames: int):
        config = WanConfig() if bench.real else TINY
        self.device = bench.device
        dtype = torch.bfloat16 if bench.real else torch.float32
        with bench.device:
            self.model = WanTransformer(config).to(dtype).requires_grad_(False)
        self.branches, self.frames = branches, frames
        self.size = (bench.size(60, 4), bench.size(104, 6))
        self.latents = self._draw(branches, config.in_dim, CHUNK_FRAMES, *self.size)
        self.text = self._draw(branches, config.text_len, config.text_dim)
        tokens = frames * config.frame_tokens(*self.size)
        past = self._draw(config.layers, 2, tokens, config.heads, config.head_dim)
        self.past: list[tuple[Tensor, Tensor]] = [(k[None], v[None]) for k, v in past]

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.model.dtype)

    def views(self) -> LayerViews:
        """The context in a cache, forked into the branches."""
        k = self.past[0][0]
        cache = ForkableKVCache(len(self.past), *k.shape[2:], rows=k.shape[1], dtype=k.dtype, device=self.device)
        root = cache.new_branch()
        reservation = cache.reserve([root], k.shape[1])
        for layer, (past_k, past_v) in enumerate(self.past):
            cache.write(reservation, layer, past_k, past_v)
        cache.commit(reservation)
        return cache.views(cache.fork(root, self.branches), [(0, k.shape[1])])

    def exact_context(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        return [(k.to(dtype), v.to(dtype)) for k, v in self.past]

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, their noise levels, and the temporal positions of a chunk after the context."""
        sigma = torch.full((self.branches, CHUNK_FRAMES), SIGMA, device=self.device)
        return self.latents, sigma, torch.arange(self.frames, self.frames + CHUNK_FRAMES, device=self.device)


def on_both(run: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """The same run on kernels (where they serve) and on the reference path."""

    def reference() -> Any:
        with backend("torch"):
            return run()

    return {OURS: run, REFERENCE: reference}


class NoAttention(ChunkAttention):
    """Stands in for self-attention where the rest is measured."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q


@torch.no_grad()
@pytest.mark.parametrize("branches", [1, BRANCHES])
def test_chunk_forward(bench: Bench, branches: int) -> None:
    """One denoiser call with nine context frames."""
    scene = Scene(bench, branches, 9)
    runner, text, views = CudaGraphRunner(scene.model, tuple), scene.model.project_text(scene.text), scene.views()
    runner.warm_calls = 1
    latents, sigma, positions = scene.inputs()
    dtype = torch.float32 if bench.real else torch.float64
    model = copy.deepcopy(scene.model).to(dtype)
    with backend("torch"):
        own = model.project_text(scene.text[:1].to(dtype))
        context = scene.exact_context(dtype)
        exact = CudaGraphRunner(model, tuple).velocity(latents[:1].to(dtype), sigma[:1], own, positions, context)
    del model
    runs = on_both(lambda: runner.velocity(latents, sigma, text, positions, views))
    _measure_chunk(bench, scene, runs, exact, "a branch")


@torch.no_grad()
def test_chunk_forward_without_attention(bench: Bench) -> None:
    """The same with a self-attention that does nothing."""
    scene = Scene(bench, BRANCHES, 9)
    text, (latents, sigma, positions) = scene.model.project_text(scene.text), scene.inputs()
    dtype = torch.float32 if bench.real else torch.float64
    model = copy.deepcopy(scene.model).to(dtype)
    with backend("torch"):
        own = model.project_text(scene.text[:1].to(dtype))
        exact = model(latents[:1].to(dtype), sigma[:1], own, positions, NoAttention())
    del model
    runs = on_both(lambda: scene.model(latents, sigma, text, positions, NoAttention()))
    _measure_chunk(bench, scene, runs, exact, "a branch, all but self-attention")


def _measure_chunk(bench: Bench, scene: Scene, runs: dict[str, Callable[[], Any]], exact: Tensor, what: str) -> None:
    same = first_branch(runs[REFERENCE]())
    contenders = [Contender(impl, run, first_branch) for impl, run in runs.items()]
    case = f"chunk forward, {what}, B={scene.branches}, {scene.frames} context frames"
    bench.measure("step", case, contenders, {"velocity": exact}, same, parts=scene.branches)


def first_branch(out: Tensor) -> Outputs:
    return {"velocity": out[:1]}


class Texts(torch.nn.Module):
    """A text encoder is not part of what is measured."""

    def encode(self, prompts: list[str]) -> Tensor:
        raise NotImplementedError


class Latents:
    """Nor is a codec; it says how large the latents are."""

    def __init__(self, size: tuple[int, int], channels: int):
        self.size, self.latent_channels = size, channels

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        return self.size


class Update:
    """Forward, reference and backward of one continuation and one transition, as `Executor.update` makes them."""

    def __init__(self, bench: Bench, scene: Scene):
        rank = bench.size(256, 4)
        config = ExecutorConfig(weights="", lora=LoraConfig(rank, rank, LORA_TARGETS), optim=OptimConfig(1e-5))
        codec = Latents(scene.size, scene.model.config.in_dim)
        self.executor = Executor(scene.model, Texts(), codec, config, (480, 832))  # type: ignore[arg-type]
        for name, parameter in self.executor.peft.named_parameters():
            if ".lora_B." in name:  # zero at first, and with it every gradient of the other half
                torch.nn.init.normal_(parameter, std=0.01)
        self.executor.runner.warm_calls = 1
        self.text, (self.latents, self.sigma, self.positions) = scene.text, scene.inputs()
        self.index = torch.zeros(1, dtype=torch.int64, device=scene.device)
        self.noise = torch.randn_like(scene.latents, dtype=torch.float32)

    def run(self, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy's velocity, and the gradient of every trained parameter."""
        executor = self.executor
        trained = executor.parameters()
        for parameter in trained.values():
            parameter.grad = None
        with torch.no_grad(), executor.reference():
            old = self._velocity(context)
        new = self._velocity(context)
        gradient, _ = flow_grpo_gradient(
            new, new.detach(), old, self.noise.to(new.dtype), torch.ones(1, device=new.device),
            torch.ones(1, device=new.device, dtype=torch.bool),
            clip=clip_epsilon(executor.config.clip_velocity_rms, new.numel()), kl_weight=executor.config.kl_weight,
            terms=1,
        )  # fmt: skip
        new.backward(gradient)
        return new.detach(), {name: p.grad for name, p in trained.items() if p.grad is not None}

    def _velocity(self, context: Context) -> Tensor:
        with self.executor.precision():
            out = self.executor.runner.policy_velocity(
                self.latents, self.sigma, self.text, self.index, self.positions, context
            )
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def in_precision(self, dtype: torch.dtype) -> Update:
        """A copy that computes in `dtype`."""
        other = copy.deepcopy(self)
        other.executor.runner = CudaGraphRunner(other.executor.model, lambda: other.executor.parameters().values())
        other.executor.peft.to(dtype)
        other.latents, other.text = self.latents.to(dtype), self.text.to(dtype)
        return other


@torch.no_grad()
def test_chunk_forward_with_adapter(bench: Bench) -> None:
    """One denoiser call of a roll-out, 12 key frames with its own: the adapter merged, beside the weights, and none."""
    scene = Scene(bench, BRANCHES, 9)
    update, (latents, sigma, positions) = Update(bench, scene), scene.inputs()
    executor, views, text = update.executor, scene.views(), scene.model.project_text(scene.text)

    def run(weights: Callable[[], AbstractContextManager[Any]]) -> Tensor:
        with weights(), executor.precision():
            return executor.runner.velocity(latents, sigma, text, positions, views)

    dtype = torch.float32 if bench.real else torch.float64
    with backend("torch"):
        other = update.in_precision(dtype).executor
        own = other.model.project_text(scene.text[:1].to(dtype))
        exact = other.runner.velocity(
            latents[:1].to(dtype), sigma[:1], own, positions, scene.exact_context(dtype)
        )  # fmt: skip
        del other, own
        same = first_branch(run(nullcontext))
    beside, none = "adapter beside the weights", "no adapter"
    contenders = [
        Contender(OURS, lambda: run(executor.merged), first_branch),
        Contender(beside, lambda: run(nullcontext), first_branch),
        Contender(none, lambda: run(executor.peft.disable_adapter), None),
    ]
    rank = executor.config.lora.rank
    case = f"chunk forward, a branch, B={BRANCHES}, 12 key frames, LoRA r={rank} merged"
    bench.measure("step", case, contenders, {"velocity": exact}, same, parts=BRANCHES)


def update_outputs(found: tuple[Tensor, dict[str, Tensor]]) -> Outputs:
    """The velocity and two gradients that much of the model stands behind."""
    grads = {name: grad for name, grad in found[1].items() if ".lora_B." in name}
    first, last = min(grads), max(grads)
    # copies: the next run adds to the same gradients
    return {"velocity": found[0], first: grads[first].clone(), last: grads[last].clone()}


def test_executor_update(bench: Bench) -> None:
    scene = Scene(bench, 1, 6)
    update = Update(bench, scene)
    views = scene.views()
    dtype = torch.float32 if bench.real else torch.float64
    with backend("torch"):
        exact = update_outputs(update.in_precision(dtype).run(scene.exact_context(dtype)))
        same = update_outputs(update.run(views))
    runs = on_both(lambda: update.run(views))
    case = (
        f"executor update, 1 continuation x 1 transition, LoRA r={update.executor.config.lora.rank}, 6 context frames"
    )
    contenders = [Contender(name, run, update_outputs) for name, run in runs.items()]
    bench.measure("step", case, contenders, exact, same)
    if bench.timed and bench.real:
        scene.past.clear()  # the cache has its own copy
        memory = {}
        for name, run in runs.items():
            update.executor.runner.forget()  # each with its own recordings alone
            memory[name] = memory_of(run, bench.device)[1] / 2**20
        bench.record([Row("step", f"{case}: peak memory", name, mib=mib) for name, mib in memory.items()])
