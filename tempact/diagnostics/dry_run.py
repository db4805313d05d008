"""A training run, planned: operations, bytes by phase, what fits into which GPU, missing files and addresses."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tempact.config import RunConfig
from tempact.diagnostics import footprints as footprint
from tempact.diagnostics.machine import why_not_writable
from tempact.diagnostics.memory import (
    GIB,
    PLANNING,
    USUAL_GPUS,
    Budget,
    Item,
    Needs,
    Run,
    needs_of,
    total,
    update_cost,
)
from tempact.diagnostics.sizes import INSTRUCTION_TOKENS, Decoder, planner_sizes, scorer_bytes, text_encoder_bytes
from tempact.distributed.shards import check_processes
from tempact.models.wan.transformer import kernels_serve
from tempact.planner.decode import rows_of
from tempact.policies import missing_planner
from tempact.reporting import duration
from tempact.worlds import world_of

LEAST_CONTINUATIONS = 2  # of an execution group
MOST_BRANCHES = 256  # tried: the cache's bookkeeping takes its time
HOPELESS = 2  # times the room; a larger count cannot fit either


# operations a second of a whole iteration, and seconds of a decoding step: an H200's (docs/costs.md), two CPU cores'
GPU_RATE, GPU_TOKEN_S, CPU_RATE = 588e12, 0.0092, 75e9


def dry_run(config: RunConfig, gpu_gib: float, ranks: int = 1) -> tuple[list[str], bool]:
    """Lines, and whether the run fits into a device: operations, an estimate of the time, memory by phase, the largest
    counts that fit, and missing packages, files and addresses.

    gpu_gib: memory of the GPU to plan for, GiB; 0: the GPU at hand, else usual ones. ranks: processes of this machine.
    UserError for settings that cannot work and files that cannot be read.
    """
    world_of(config).check_settings()
    if ranks > 1:
        check_processes(config.executor.shard, ranks)
    budgets = budgets_of(config, gpu_gib, ranks)
    run = replace(run_of(config, on_gpu=budgets[0].on_gpu), ranks=ranks)
    needs = needs_of(run)
    fits = any(budget.fits(needs) for budget in budgets)
    return [*_models(run), *_work(run), *_memory(run, needs, budgets), *_missing(config)], fits


def budgets_of(config: RunConfig, gpu_gib: float, ranks: int = 1) -> list[Budget]:
    """The devices to plan for. The GPUs at hand, and a machine without one, are shared by the ranks."""
    if gpu_gib:
        return [Budget(f"a GPU of {gpu_gib:g} GiB", int(gpu_gib * GIB))]
    if config.device != "cpu" and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        return [_shared(torch.cuda.get_device_name(0), memory, math.ceil(ranks / torch.cuda.device_count()))]
    if config.device == "cpu" or (config.device == "auto" and not world_of(config).real_video):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return [_shared("this machine's memory", memory, ranks, on_gpu=False)]
    return list(USUAL_GPUS)


def _shared(name: str, memory: int, ranks: int, *, on_gpu: bool = True) -> Budget:
    """A rank's part of a device."""
    return Budget(f"{name}, 1/{ranks} of it for each rank" if ranks > 1 else name, memory // ranks, on_gpu)


def run_of(config: RunConfig, *, on_gpu: bool) -> Run:
    """A configuration with the sizes of its models."""
    told = world_of(config).sizes()
    kernels = on_gpu and config.kernels != "torch" and kernels_serve(told.transformer.head_dim)
    sizes = footprint.Sizes(told.transformer, config.executor, told.latent, kernels)
    vae = None if _left_out(config) else told.vae
    decoder = None if vae is None else Decoder(sizes, vae, on_gpu=on_gpu)
    scorer = 0 if decoder is None else scorer_bytes(config.judges.aesthetics_weights, on_gpu=on_gpu)
    text = text_encoder_bytes(told.text_encoder, sizes.dtype)
    return Run(config, sizes, planner_sizes(config.planner), decoder, text, scorer, on_gpu)


def _left_out(config: RunConfig) -> bool:
    """Are the packages missing without which the VAE cannot be traced?"""
    return any(world_of(config).missing_packages())


def _models(run: Run) -> Iterator[str]:
    model, settings = run.sizes.model, run.config.executor
    parameters = footprint.parameters_of(run.sizes)
    of = "" if world_of(run.config).at_hand else ", sizes as published"
    yield (
        f"executor: {model.layers} blocks, {model.dim} channels, {parameters.weights:,} parameters, "
        f"{settings.precision}{of}; {settings.frames} latent frames of {run.sizes.frame_tokens} tokens; "
        f"LoRA r={settings.lora.rank}, {parameters.trained:,} trained parameters"
    )
    kernels = "csrc_triton's kernels" if run.sizes.kernels else "the torch path"
    graphs = ", CUDA graphs" if run.graphs else ""
    shards = f", one of {settings.shard} processes that share the blocks' weights" if settings.shard > 1 else ""
    yield f"planned for {kernels}{graphs}{shards}; K and V of a latent frame: {size(run.sizes.frame_bytes)}"
    if run.planner is None:
        yield f"planner: {run.config.planner.weights}: its sizes are not known here and left out below"
    if _left_out(run.config):
        yield "VAE, decoding, videos and PickScore are left out below, which are not known without the missing packages"


def _work(run: Run) -> Iterator[str]:
    work = work_of(run)
    calls = ", ".join(f"{frames}: {tera(flops)}" for frames, flops in work.calls.items())
    yield f"a denoiser call by latent frames attended to, own ones included, without adapters: {calls}"
    phases = ", ".join(f"{name} {tera(flops)}" for name, flops in work.phases.items())
    yield f"an iteration{_of(run)}: {phases}"
    yield _time(run, sum(work.phases.values()))


@dataclass(frozen=True)
class Work:
    """Operations. calls: of a denoiser call without adapters, by frames attended to, own ones included. phases: of an
    iteration's."""

    calls: dict[int, int]
    phases: dict[str, int]


def work_of(run: Run) -> Work:
    """Operations of the executor, where every plan that forks does so after its first chunk."""
    s, sizes = run.settings, run.sizes
    bare = _affine(run, adapters=False)
    adapted = _affine(run, adapters=True)
    calls = len(s.schedule.sigmas)  # one for each noise level, and the context pass
    chunks = [(run.branches if start >= run.fork else run.plans) * adapted(a) for start, a in run.attended.items()]
    phases = {"rollout": calls * sum(chunks) - chunks[-1]}  # the last chunk leaves no context
    phases["rollout"] += (s.first.calls - s.schedule.calls) * chunks[0]
    if s.text_switch == "recache":
        passes = {start: footprint.denoise(sizes, 1, *run.recached(start)).flops for start in run.switches}
        phases["rollout"] += sum((run.branches if start > run.fork else run.plans) * passes[start] for start in passes)
    if run.decoder is not None:
        shared, whole = run.decoder.flops(run.fork), run.decoder.flops(s.frames)
        phases["decode"] = run.plans * shared + run.branches * (whole - shared)
    if run.config.executor.train:
        own = update_cost(run)
        phases["executor update"] = own.flops * run.plans * run.recorded * run.steps // run.update_rows
    return Work({a + s.chunk: bare(a) for a in sorted(set(run.attended.values()))}, phases)


def _affine(run: Run, *, adapters: bool) -> Callable[[int], int]:
    """Operations of one video's call as a function of its context's frames, which add the same amount each."""
    most = max(run.attended.values())
    chunk = run.settings.chunk
    none, all_ = (footprint.denoise(run.sizes, 1, a, chunk, adapters=adapters).flops for a in (0, most))
    return lambda frames: none + (all_ - none) * frames // max(1, most)


def _time(run: Run, operations: float) -> str:
    """The time of an iteration and of the run, an estimate from measured rates."""
    # ranks without GPUs share the cores
    seconds, how = run.ranks * operations / CPU_RATE, f"{tera(CPU_RATE)}/s, as two CPU cores in ShapeWorld"
    if run.on_gpu:
        config = run.config.planner
        batches = math.ceil(run.plans / rows_of(config, on_gpu=True))
        planning = GPU_TOKEN_S * config.max_new_tokens * batches if run.planner is not None else 0.0
        seconds, how = operations / GPU_RATE + planning, f"{tera(GPU_RATE)}/s and {GPU_TOKEN_S} s a token, as one H200"
    count = run.config.trainer.iterations
    left_out = "judges, waiting for other ranks" if run.ranks > 1 else "judges"
    whole = f"{seconds * count / 3600:.1f} hours for {count} iterations"
    return f"estimated time: {duration(seconds)} an iteration, {whole} ({how}; {left_out} and evaluation not counted)"


def _of(run: Run) -> str:
    return f" of rank 0 of {run.ranks}, {run.plans} plans" if run.ranks > 1 else ""


def _memory(run: Run, needs: Needs, budgets: list[Budget]) -> Iterator[str]:
    own = f" ({run.continuations} in each process)" if run.config.executor.shard > 1 else ""
    yield ""
    yield (
        f"memory of {run.config.data.prompts_per_iteration} prompts x {run.config.planner.plans_per_prompt} plans x "
        f"{run.config.executor.continuations} continuations{own}, instructions of {INSTRUCTION_TOKENS} tokens, the "
        f"earliest switch{_of(run)}:"
    )
    yield from table(needs)
    if run.ranks > 1:
        whole = replace(run.config, executor=replace(run.config.executor, shard=1))
        node = total(needs_of(replace(run, ranks=1, config=whole), planning=False).host)  # the ranks' shares add up
        if run.planner is not None and run.planner_waits:
            node += (run.ranks - 1) * run.planner.weights
        yield f"on the host, all {run.ranks} ranks: {size(node)}"
    if run.config.executor.train:
        yield from _update_choices(run)
    yield ""
    for budget in budgets:
        yield from _fit(run, needs, budget)


def _update_choices(run: Run) -> Iterator[str]:
    """The update's activations on either path, with and without `executor.checkpoint_activations`."""
    most = max(run.attended.values())
    yield f"activations of the executor's update, {run.update_rows} transitions behind {most} latent frames:"
    for kernels in (True, False):
        if kernels and not run.sizes.kernels:
            continue
        sizes = replace(run.sizes, kernels=kernels)
        kept, again = (footprint.update(sizes, run.update_rows, most, checkpointing=c).bytes for c in (False, True))
        name = "csrc_triton's kernels" if kernels else "the torch path"
        yield f"  {size(kept):>12}  {name}; {size(again)} with --executor.checkpoint_activations"


def largest(taken: Callable[[int], int], room: int, least: int, most: int, step: int = 1) -> int:
    """The largest multiple of `step` in [least, most] for which `taken(count)` bytes fit into `room`; 0 if none does.

    The last one is tried first, then all one by one: the cache grows by 24ths, so that one more may take less.
    """
    counts = range(math.ceil(least / step) * step, most + 1, step)
    if counts and taken(counts[-1]) <= room:
        return counts[-1]
    found = 0
    for count in counts[:-1]:
        needed = taken(count)
        if needed <= room:
            found = count
        elif needed > HOPELESS * room:
            break
    return found


def _fit(run: Run, needs: Needs, budget: Budget) -> Iterator[str]:
    fits = "fits" if budget.fits(needs) else "does not fit"
    yield (
        f"{budget.name}, {size(budget.usable)} of {size(budget.bytes)} for tensors: {size(needs.peak)} at the worst, "
        f"in {needs.worst.name}: {fits}"
    )
    prompts, plans = run.config.data.prompts_per_iteration, run.config.planner.plans_per_prompt
    n = run.config.executor.continuations

    def taken(own: Run) -> int:
        return budget.taken(needs_of(own, planning=False))

    least = LEAST_CONTINUATIONS * (run.multiple if run.config.executor.branching else 1)

    def most(own: Run) -> int:
        some = least, _most(own), run.multiple
        return largest(lambda n: taken(own.changed(continuations=n)), budget.usable, *some)

    found = most(run)
    if found:
        yield f"  largest N at {prompts} x {plans} plans: {_count(found, run)}"
    else:
        yield f"  largest N at {prompts} x {plans} plans: none, not even {least} continuations fit"
    if found < n:
        fewer = largest(lambda count: taken(run.changed(prompts=count)), budget.usable, 1, prompts)
        yield f"  most prompts an iteration at {plans} plans x {n} continuations: {fewer or 'none, not even 1 fits'}"
    if not found:
        single = most(run.changed(prompts=1))
        yield f"  largest N at 1 x {plans} plans: {_count(single, run.changed(prompts=1)) if single else 'none'}"
    beyond = [phase for phase in needs.phases if phase.name in PLANNING and phase.bytes > budget.usable]
    for phase in beyond:
        yield f"  with any N the {phase.name} phase does not fit: {size(phase.bytes)} for {prompts} x {plans} plans"


def _most(run: Run) -> int:
    """The largest number of continuations that is tried."""
    most = max(LEAST_CONTINUATIONS, MOST_BRANCHES // run.plans, run.config.executor.continuations)
    return most // run.multiple * run.multiple


def _count(found: int, run: Run) -> str:
    return f"{found} or more" if found == _most(run) else str(found)


def _missing(config: RunConfig) -> Iterator[str]:
    lines = missing(config)
    yield ""
    yield f"missing: {len(lines)}" if lines else "missing: nothing"
    yield from (f"  {line}" for line in lines)


def missing(config: RunConfig) -> list[str]:
    """A line (key, what was found, what is accepted) for each file, package, address and folder that training lacks."""
    world = world_of(config)
    lines = [*world.missing(), *missing_planner(config.planner.weights)]
    for key, folder in world.folders().items():
        reason = why_not_writable(Path(folder))
        if reason is not None:
            lines.append(f"{key}: cannot write to {folder} ({reason}); accepted: a writable folder")
    return lines


def table(needs: Needs) -> list[str]:
    """Lines: data kept, then each phase with its sum and the sum of both, then data on the host."""
    kept = total(needs.kept)
    lines = [f"kept all the time: {size(kept)}", *_items(needs.kept)]
    for phase in needs.phases:
        lines += [f"{phase.name}: {size(phase.bytes)}, in all {size(kept + phase.bytes)}", *_items(phase.items)]
    return [*lines, f"on the host: {size(total(needs.host))}", *_items(needs.host)]


def _items(items: Iterable[Item]) -> list[str]:
    return [f"  {size(item.bytes):>12}  {item.what} ({item.source})" for item in items]


def size(count: int) -> str:
    """Bytes to three digits: 3.45 GiB, 12.0 MiB."""
    return _rounded(count, {"GiB": GIB, "MiB": 2**20, "KiB": 2**10}) or f"{count} B"


def tera(flops: float) -> str:
    """Operations to three digits: 28.3 TF, 8.93 PF."""
    return _rounded(flops, {"PF": 10**15, "TF": 10**12, "GF": 10**9}) or f"{flops / 10**6:.2f} MF"


def _rounded(count: float, units: dict[str, int]) -> str:
    """In the first unit that is no larger than the count; "" if all are."""
    for name, unit in units.items():
        if count >= unit:
            value = count / unit
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {name}"
    return ""
