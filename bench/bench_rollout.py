"""Rolling out at the size of Wan2.1-T2V-1.3B with random weights, 480x832: warm chunks, decoding, and an iteration.

A warm chunk is four denoising calls and the context pass with the window full; it is 12 output frames of a branch, so a
row of t ms a branch means 12,000 / t output frames a second, summed over the branches. The reference path makes one
continuation after another: cloned and concatenated caches, SDPA's flash backend, a context pass that computes all of
the model, and stock diffusers for a whole clip's decode.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.bench_step import CHUNK_FRAMES, REFERENCE, TINY
from bench.harness import OURS, Bench, Contender, Outputs
from bench.report import Row
from csrc_triton import ForkableKVCache
from csrc_triton.runtime import backend
from tempact.executor.cuda_graphs import Context, CudaGraphRunner
from tempact.executor.executor import Executor
from tempact.executor.fp8 import round_linears
from tempact.executor.kv_history import FIRST_FRAMES, KVHistory
from tempact.executor.rollout import PromptKV, chunk_prompts
from tempact.executor.sampler import WINDOWS, RolloutSettings, Schedule, WindowPolicy, denoise_chunk, gaussian_noise
from tempact.models.wan.checkpoints.load import set_precision
from tempact.models.wan.codec import DecoderState, HostFrames, WanCodec
from tempact.models.wan.random_weights import RandomText
from tempact.models.wan.transformer import TextKV, WanConfig, WanTransformer
from tempact.models.wan.vae import TinyDecoder, TinyNetwork
from tempact.models.wan.vae_decoder import DecodeOptions, WanDecoder
from tempact.presets import get_preset
from tempact.types import Batch, Plan, Step, Transition

BRANCHES = 8
SCHEDULE = Schedule.from_timesteps((1000, 750, 500, 250), 5.0)
CLIP = 21  # latent frames: 81 frames of video
CHUNK_OUTPUT = 12  # frames of video in a warm chunk


def settings_of(window: WindowPolicy, chunks: int) -> RolloutSettings:
    return RolloutSettings(chunks * CHUNK_FRAMES, CHUNK_FRAMES, window, "cross_attention", SCHEDULE, SCHEDULE, None)


class WarmChunk:
    """Branches whose window is full, and one more chunk of each; a run leaves the history as it was.

    Every scene of one size has the same weights, words and noise. float8: the model's linears are rounded.
    """

    def __init__(self, bench: Bench, branches: int, key_frames: int, *, float8: bool = False):
        torch.manual_seed(0)
        config = WanConfig() if bench.real else TINY
        self.device, self.branches = bench.device, branches
        dtype = torch.bfloat16 if bench.real else torch.float32
        with bench.device:
            self.model = WanTransformer(config).to(dtype).requires_grad_(False)
        if float8:
            round_linears(self.model)
        self.size = (bench.size(60, 4), bench.size(104, 6))
        window = replace(WINDOWS["longlive"], window=key_frames)
        self.settings = settings_of(window, key_frames // CHUNK_FRAMES + 2)
        self.runner = CudaGraphRunner(self.model, tuple)
        self.runner.warm_calls = 1
        self.frame_tokens = config.frame_tokens(*self.size)
        self.cache = ForkableKVCache(
            config.layers, config.heads, config.head_dim, rows=FIRST_FRAMES * self.frame_tokens, dtype=dtype,
            device=bench.device, page=self.frame_tokens,
        )  # fmt: skip
        self.noise = self._draw(branches, SCHEDULE.calls, dtype=torch.float32)
        self.words = torch.randn(branches, config.text_len, config.text_dim, device=self.device, dtype=dtype)
        self.start = key_frames  # one chunk more than the window holds has been made

    def _draw(self, *leading: int, dtype: torch.dtype) -> Tensor:
        shape = (*leading, self.model.config.in_dim, CHUNK_FRAMES, *self.size)
        return torch.randn(shape, device=self.device, dtype=dtype)

    def filled(self) -> tuple[KVHistory, list[int]]:
        """The history after the window is full, each branch's of its own behind the first chunk; of one size it holds
        the same frames in every scene."""
        torch.manual_seed(1)
        history = KVHistory(self.runner, self.cache, self.settings, self.frame_tokens)
        ids = [history.new_branch()]
        text = self.model.project_text(self.words)
        for start in range(0, self.start, CHUNK_FRAMES):
            own = text.select(torch.arange(len(ids), device=self.device))
            with self._autocast():
                history.commit(ids, self._draw(len(ids), dtype=torch.float32), own)
            if start == 0 and self.branches > 1:
                ids = history.fork(ids[0], self.branches)
        return history, ids

    def ours(self, history: KVHistory, ids: list[int], text: TextKV) -> Tensor:
        with self._autocast():
            context, positions = history.context(ids, self.start), history.positions(self.start)
            clean, _ = denoise_chunk(self.runner, self.noise, text, positions, context, SCHEDULE)
            rows = CHUNK_FRAMES * history.frame_tokens
            with history.cache.reserve(ids, rows) as reservation:  # given back uncommitted
                history._write(reservation, clean, text, self.start, context)
        return clean

    def reference(self, context: list[tuple[Tensor, Tensor]], model: WanTransformer, branch: int = 0) -> Tensor:
        """One continuation."""
        own: Context = [(k.clone(), v.clone()) for k, v in context]
        runner = CudaGraphRunner(model, tuple, graphs=False)
        positions = torch.arange(self.start, self.start + CHUNK_FRAMES, device=self.device)
        half = model.dtype == torch.bfloat16
        flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if half else nullcontext()
        with backend("torch"), flash, self._autocast() if half else nullcontext():
            text = model.project_text(self.words[branch : branch + 1].to(model.dtype))
            noise = self.noise[branch : branch + 1].to(torch.promote_types(text.layers[0][0].dtype, torch.float32))
            clean, _ = denoise_chunk(runner, noise, text, positions, own, SCHEDULE)
            runner.velocity(clean, torch.zeros(1, CHUNK_FRAMES, device=self.device), text, positions, own)
        return clean

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        dtype = self.model.dtype
        with torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
            yield


def first_branch(clean: Tensor) -> Outputs:
    return {"latents": clean[:1]}


@torch.no_grad()
@pytest.mark.parametrize(("branches", "key_frames"), [(1, 12), (1, 18), (BRANCHES, 12)])
def test_warm_chunk(bench: Bench, branches: int, key_frames: int) -> None:
    scene = WarmChunk(bench, branches, key_frames)
    history, ids = scene.filled()
    text = scene.model.project_text(scene.words)
    with history:
        context = first_contexts(scene, history, ids)
        dtype = torch.float32 if bench.real else torch.float64
        model = copy.deepcopy(scene.model).to(dtype)
        exact = scene.reference([(k.to(dtype), v.to(dtype)) for k, v in context], model)
        del model
        same = scene.reference(context, scene.model)
        contenders = [Contender(OURS, lambda: scene.ours(history, ids, text), first_branch)]
        if branches == 1:
            contenders.append(Contender(REFERENCE, lambda: scene.reference(context, scene.model), first_branch))
        case = f"warm chunk (4 + 1 calls), a branch, B={branches}, {key_frames} key frames"
        outputs = {"latents": exact}, {"latents": same}
        bench.measure("rollout", case, contenders, *outputs, parts=branches, budget_s=4.0)


@torch.no_grad()
@pytest.mark.parametrize("branches", [1, BRANCHES])
def test_warm_chunk_in_float8(bench: Bench, branches: int) -> None:
    """Linears in float8 beside those in bf16, each behind a context that its own model has made."""
    full, scene = (WarmChunk(bench, branches, 12, float8=rounded) for rounded in (False, True))
    own = [(each, *each.filled(), each.model.project_text(each.words)) for each in (full, scene)]
    with own[0][1], own[1][1]:
        first = [first_contexts(each, history, ids) for each, history, ids, _ in own]
        dtype = torch.float32 if bench.real else torch.float64
        model = copy.deepcopy(full.model).to(dtype)
        exact = full.reference([(k.to(dtype), v.to(dtype)) for k, v in first[0]], model)
        del model
        same = scene.reference(first[1], scene.model)
        contenders = [
            Contender(name, lambda each=each, rest=rest: each.ours(*rest), first_branch)  # type: ignore[misc]
            for name, (each, *rest) in zip(("bf16", OURS), own, strict=True)
        ]
        case = f"warm chunk (4 + 1 calls), float8 linears, a branch, B={branches}, 12 key frames"
        outputs = {"latents": exact}, {"latents": same}
        bench.measure("rollout", case, contenders, *outputs, parts=branches, budget_s=4.0)


def first_contexts(scene: WarmChunk, history: KVHistory, ids: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the first branch, [1, L, H, D] a layer."""
    views = history.context(ids[:1], scene.start)
    assert views is not None
    return [view.gather() for view in views]


def make_vae(bench: Bench, dtype: torch.dtype) -> AutoencoderKLWan:
    torch.manual_seed(0)
    with bench.device:
        return AutoencoderKLWan(base_dim=bench.size(96, 8)).to(dtype).eval().requires_grad_(False)


def in_bytes(pixels: Tensor) -> Tensor:
    """[B, 3, T, H, W] in [-1, 1] as [B, T, 3, H, W] in [0, 255]."""
    return ((pixels.float() + 1) * 127.5).clamp(0, 255).transpose(1, 2)


def latents_of(bench: Bench, videos: int, frames: int) -> Tensor:
    return torch.randn(videos, 16, frames, bench.size(60, 4), bench.size(104, 6), device=bench.device)


@torch.no_grad()
def test_decode(bench: Bench) -> None:
    """A clip of 21 latent frames to bytes."""
    dtype = torch.bfloat16 if bench.real else torch.float32
    vae, latents = make_vae(bench, dtype), latents_of(bench, 1, bench.size(CLIP, 5))
    mean, std = (
        torch.tensor(values, device=bench.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    scaled = latents * std + mean

    def stock(model: AutoencoderKLWan) -> Tensor:
        weight = model.post_quant_conv.weight
        return in_bytes(model.decode(scaled.to(weight.dtype)).sample)

    ours = WanDecoder(vae, DecodeOptions.of(bench.device))
    exact = stock(copy.deepcopy(vae).float())
    contenders = [
        Contender(
            OURS, lambda: ours.decode_chunk([DecoderState()], latents), lambda frames: {"frames": frames.float()}
        ),
        Contender("stock diffusers", lambda: stock(vae), lambda frames: {"frames": frames}),
    ]
    same = stock(vae).round()  # ours leaves as bytes
    case = f"VAE decode, {latents.shape[2]} latent frames, {dtype}".replace("torch.", "")
    bench.measure("rollout", case, contenders, {"frames": exact}, {"frames": same}, budget_s=4.0)


@torch.no_grad()
@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize(
    ("decoder", "branches"), [("full VAE", BRANCHES), ("tiny decoder", BRANCHES), ("tiny decoder", 1)]
)
def test_warm_chunk_with_decoder(bench: Bench, decoder: str, branches: int, float8: bool) -> None:
    """The chunk, its decode and the copy to the host, without waiting in between."""
    if not bench.timed:
        pytest.skip("nothing but times; both parts are checked on their own")
    scene = WarmChunk(bench, branches, 12, float8=float8)
    dtype = torch.bfloat16 if bench.real else torch.float32
    made: WanCodec
    if decoder == "full VAE":
        made = WanDecoder(make_vae(bench, dtype), DecodeOptions.of(bench.device))
    else:
        with bench.device:
            made = TinyDecoder(TinyNetwork().to(dtype).eval(), scaled=False)
    if scene.model.config.in_dim != 16:
        pytest.skip("needs Wan's 16 latent channels")
    history, ids = scene.filled()
    text = scene.model.project_text(scene.words)
    root = DecoderState()
    made.decode_chunk([root], latents_of(bench, 1, CHUNK_FRAMES))
    states = root.fork(branches)
    made.decode_chunk(states, latents_of(bench, branches, CHUNK_FRAMES))
    shape = (branches, CHUNK_OUTPUT, 3, 8 * scene.size[0], 8 * scene.size[1])

    def run() -> Tensor:
        clean = scene.ours(history, ids, text)
        own = [state.fork(1)[0] for state in states]
        host = HostFrames(shape, bench.device)
        host.put((slice(None),), made.decode_chunk(own, clean))
        return host.wait()

    with history:
        linears = ", float8 linears" if float8 else ""
        case = f"warm chunk with {decoder}{linears}, a branch, B={branches}, 12 key frames"
        bench.measure("rollout", case, [Contender(OURS, run, None)], {}, {}, parts=branches, budget_s=4.0)


class OnePrompt:
    """One prompt of the preset self-forcing, M = 4, N = 8, 30 latent frames, forked at 6: plans given."""

    plans, frames, fork = 4, 30, 6

    def __init__(self, bench: Bench):
        torch.manual_seed(0)
        self.device = bench.device
        config = replace(get_preset("self-forcing").executor, frames=self.frames, continuations=BRANCHES)
        with bench.device:
            model = WanTransformer(WanConfig()).to(torch.bfloat16)
        set_precision(model, config.precision)
        self.vae = make_vae(bench, torch.bfloat16)
        self.codec = WanDecoder(self.vae, DecodeOptions.of(bench.device))
        self.executor = Executor(model, RandomText("random", bench.device), self.codec, config, (480, 832))
        steps = [Step(start, start + 6, f"step {start // 6}") for start in range(0, self.frames, 6)]
        self.given = [
            Plan("i", tuple(replace(step, prompt=f"{step.prompt} of plan {p}") for step in steps))
            for p in range(self.plans)
        ]
        self.noise = gaussian_noise(0, self.executor.noise_shape(self.plans, BRANCHES), bench.device)
        self.codec.decode_chunk([DecoderState()], latents_of(bench, 1, 6))  # compiles

    def batch(self, transition: Transition, plans: int) -> Batch:
        mask = torch.ones(plans, BRANCHES, dtype=torch.bool)
        return Batch(torch.zeros(plans), mask[:, 0], torch.randn(mask.shape), mask, None, transition)

    def ours(self) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds of each phase, and the update's metrics."""
        watch, forks = Stopwatch(), [self.fork] * self.plans
        latents, transition = self.executor.roll_out(self.given, forks, self.noise)
        assert transition is not None
        watch.lap("rollout")
        self.codec.decode_forked(latents, forks)
        watch.lap("decode")
        metrics = self.executor.update(self.batch(transition, self.plans), list(range(self.plans)))
        watch.lap("update")
        return watch.seconds, metrics

    def reference(self) -> dict[str, float]:
        """The same of one plan, a continuation after another, in plain PyTorch."""
        watch = Stopwatch()
        with backend("torch"):
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                latents, transition = self._one_after_another()
            watch.lap("rollout")
            for video in latents.to(torch.bfloat16):  # its attention has heads too wide for flash
                self.vae.decode(video[None])
            watch.lap("decode")
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                self.executor.update(self.batch(transition, 1), [0])
            watch.lap("update")
        return watch.seconds

    @torch.no_grad()
    def _one_after_another(self) -> tuple[Tensor, Transition]:
        """The first plan's latents [N, C, F, H, W]; the shared context is made once, its cache copied at every call."""
        executor, settings = self.executor, self.executor.settings
        runner = CudaGraphRunner(executor.model, tuple, graphs=False)
        prompts = chunk_prompts(self.given[0], settings)
        latents = torch.zeros(BRANCHES, 16, self.frames, *executor.latent_size, device=self.device)
        states, noises = [], []

        def advance(branch: int, continuation: int, first: int, last: int) -> None:
            for chunk in range(first, last):
                start, end = chunk * settings.chunk, (chunk + 1) * settings.chunk
                text, drawn = book([prompts[chunk]]), self.noise(chunk, [(0, continuation)])
                context, positions = history.context([branch], start), history.positions(start)
                clean, seen = denoise_chunk(runner, drawn, text, positions, context, settings.schedule)
                latents[continuation, :, start:end] = clean[0]
                if start == self.fork:
                    states.append(seen)
                    noises.append(drawn[:, 1:])
                if end < self.frames:
                    history.commit([branch], clean, text)

        history = KVHistory(runner, executor.cache, settings, executor.frame_tokens)
        with history, executor.precision():
            book = PromptKV(executor.model, executor.encode, prompts)
            root, shared = history.new_branch(), self.fork // settings.chunk
            advance(root, 0, 0, shared)
            for n in range(BRANCHES):
                latents[n, :, : self.fork] = latents[0, :, : self.fork]
                [branch] = history.cache.fork(root, 1)
                advance(branch, n, shared, settings.chunks)
                history.cache.release(branch)
        prefix = latents[:1, :, : self.fork].clone()
        start = torch.tensor([self.fork])
        return latents, Transition(
            torch.cat(states)[None], torch.cat(noises)[None], start, prefix, [prompts[: shared + 1]]
        )


class Stopwatch:
    """Seconds between laps; the device is waited for."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


@pytest.mark.timeout(1200)
def test_iteration(bench: Bench) -> None:
    """Seconds of each phase, of the first iteration and of one behind it, and peak memory."""
    if not bench.timed or not bench.real:
        pytest.skip("takes minutes of a GPU: run `pytest bench/bench_rollout.py --benchmark` on one")
    scene = OnePrompt(bench)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    first, metrics = scene.ours()
    assert metrics["ratio_deviation"] == 0.0
    later, metrics = scene.ours()
    peak = torch.cuda.max_memory_allocated()
    gaps = {name: gap for name, gap in metrics.items() if name.startswith("rollout_gap/")}
    bench.write(f"log-probs of roll-out and training differ by, in clips: {gaps}")
    case = f"iteration of one prompt, M={scene.plans}, N={BRANCHES}, {scene.frames} latent frames, fork at {scene.fork}"
    for name, seconds in ((case, later), (f"{case}, the first", first)):
        for phase, value in [*seconds.items(), ("whole", sum(seconds.values()))]:
            bench.record([Row("rollout", f"{name}: {phase}", OURS, value * 1e3)])
    bench.record([Row("rollout", f"{case}: peak memory", OURS, mib=peak / 2**20)])
    scene.executor.runner.forget()
    one = scene.reference()
    for phase, value in [*one.items(), ("whole", sum(one.values()))]:
        own = later.get(phase, sum(later.values()))
        note = f"ours is {value * scene.plans / own:.2f}x as fast"
        bench.record([Row("rollout", f"{case}: {phase}", REFERENCE, value * scene.plans * 1e3)], [note])
