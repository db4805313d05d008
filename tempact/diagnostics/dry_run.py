"""Every path that a configuration names and that is not what a run needs there.

The lines of a dry run: operations, bytes by phase, what fits into which GPU, missing paths.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
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
    Needs,
    Run,
    largest,
    needs_of,
    size,
    table,
    tera,
    work_of,
)
from tempact.diagnostics.sizes import (
    INSTRUCTION_TOKENS,
    executor_sizes,
    hub_folder,
    planner_folder,
    planner_sizes,
    shapeworld_folder,
)
from tempact.errors import UserError
from tempact.models.wan.checkpoints.files import find_weights
from tempact.models.wan.checkpoints.lora import open_adapter
from tempact.models.wan.transformer import WanConfig
from tempact.prompt_file import FilePrompts
from tempact.rewards.base import load_rewards
from tempact.rewards.judges.config import ROLES, JudgeConfig
from tempact.worlds import SHAPEWORLD, is_random, is_wan


def missing_paths(config: RunConfig, sizes: WanConfig) -> list[str]:
    """One line each: the key, what was found, what is accepted. Large files are not read through."""
    return [
        *_executor(config, sizes),
        *_planner(config.planner.weights),
        *_data(config),
        *_rewards(config),
        *_folders(config),
    ]


def _executor(config: RunConfig, sizes: WanConfig) -> Iterator[str]:
    settings = config.executor
    weights = settings.weights
    if is_random(weights):
        return
    own = shapeworld_folder("executor", weights)
    if own is not None:
        for name in ("transformer.safetensors", "text_encoder/model.safetensors"):
            if not (own / name).is_file():
                yield f"executor.weights: {own / name} not found; accepted: a folder with an executor's weights"
        return
    from tempact.models.wan.text import source_of
    from tempact.models.wan.vae import DIFFUSERS_FILE, ORIGINAL_FILE

    if not weights:
        yield "executor.weights: found nothing; accepted: the backbone's checkpoint, or random or random-tiny"
    else:
        yield from _tried("executor.weights", lambda: [file.stat() for file in find_weights(Path(weights))])
    for adapter in settings.adapters:
        yield from _tried("executor.adapters", partial(open_adapter, Path(adapter), sizes))
    release = settings.wan_folder or weights
    if not Path(release or "-").is_dir():
        found = release or "nothing"
        yield f"executor.wan_folder: found {found}; accepted: the folder of Wan2.1-T2V-1.3B or its -Diffusers"
        return
    yield from _tried("executor.wan_folder", lambda: source_of(Path(release), torch.bfloat16))
    folder = Path(release)
    vae = folder / "vae" if (folder / "vae").is_dir() else folder
    if not (folder / ORIGINAL_FILE).is_file() and not all(
        (vae / name).is_file() for name in ("config.json", DIFFUSERS_FILE)
    ):
        accepted = f"vae/ with config.json and {DIFFUSERS_FILE}, or {ORIGINAL_FILE}"
        yield f"executor.wan_folder: {folder}: found no VAE; accepted: {accepted}"


def _planner(weights: str) -> Iterator[str]:
    folder = planner_folder(weights)
    if folder is None:
        found = f"{weights}, which is no folder with a config.json and not in the Hugging Face hub's cache"
        yield f"planner.weights: found {found}; accepted: {SHAPEWORLD}, random, a folder, a name that the hub serves"
        return
    if weights != "random" and not [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]:
        yield f"planner.weights: {folder}: found no weights; accepted: a Hugging Face folder with safetensors"
    if not (folder / "tokenizer_config.json").is_file():
        yield f"planner.weights: {folder}: found no tokenizer; accepted: a chat model with its tokenizer"


def _data(config: RunConfig) -> Iterator[str]:
    prompts = config.data.prompts
    if _real_video(config) and prompts not in ("", SHAPEWORLD):
        yield from _tried("data.prompts", partial(FilePrompts, Path(prompts), config.data.prompts_per_iteration))
    elif _real_video(config) or prompts != SHAPEWORLD:
        accepted = "a CSV, JSONL, parquet or text file of prompts" if _real_video(config) else SHAPEWORLD
        yield f"data.prompts: found {prompts or 'nothing'}; accepted: {accepted}"


def _rewards(config: RunConfig) -> Iterator[str]:
    """Own rewards are imported. Judges are looked up in the environment and not asked: `python -m tempact.doctor
    judges` asks them."""
    try:
        load_rewards(config.rewards.custom)
    except UserError as error:
        yield str(error)
    if not _real_video(config):
        return
    if importlib.util.find_spec("openai") is None:
        yield "judges: found no package openai; accepted: after pip install -e '.[judges]'"
    for role, fallback in ROLES.items():
        yield from _tried("judges", partial(JudgeConfig.from_environment, {role: fallback}))
    settings = config.judges
    for key, name, file in (
        ("judges.aesthetics_weights", settings.aesthetics_weights, "config.json"),
        ("judges.aesthetics_processor", settings.aesthetics_processor, "tokenizer_config.json"),
    ):
        if hub_folder(name, file) is None:
            found = f"{name}, which is no folder with a {file} and not in the Hugging Face hub's cache"
            yield f"{key}: found {found}; accepted: a CLIP folder, or a name that the hub serves"


def _real_video(config: RunConfig) -> bool:
    return shapeworld_folder("executor", config.executor.weights) is None


def _folders(config: RunConfig) -> Iterator[str]:
    wan = shapeworld_folder("executor", config.executor.weights) is None and not is_random(config.executor.weights)
    folders = {"output": config.output} | ({"executor.text_cache": config.executor.text_cache} if wan else {})
    if _real_video(config) and config.judges.cache:
        folders["judges.cache"] = str(Path(config.judges.cache).parent)
    for key, folder in folders.items():
        reason = why_not_writable(Path(folder))
        if reason is not None:
            yield f"{key}: cannot write to {folder} ({reason}); accepted: a writable folder"


def _tried(key: str, read: Callable[[], object]) -> Iterator[str]:
    try:
        read()
    except (UserError, OSError) as error:
        yield f"{key}: {' '.join(str(error).split())}"


LEAST_CONTINUATIONS = 2  # of an execution group
MOST_BRANCHES = 256  # asked for: the cache's bookkeeping takes its time


def dry_run(config: RunConfig, gpu_gib: float) -> list[str]:
    """What the run would take. gpu_gib: memory of the GPU to plan for; 0: that at hand, else usual ones.

    UserError for settings that cannot work and files that are not what they should be.
    """
    budgets = budgets_of(config, gpu_gib)
    run = run_of(config, on_gpu=budgets[0].on_gpu)
    return [*_models(run), *_work(run), *_memory(run, budgets), *_missing(run)]


def budgets_of(config: RunConfig, gpu_gib: float) -> list[Budget]:
    """The devices to plan for."""
    if gpu_gib:
        return [Budget(f"a GPU of {gpu_gib:g} GiB", int(gpu_gib * GIB))]
    if config.device != "cpu" and torch.cuda.is_available():
        return [Budget(torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory)]
    small = shapeworld_folder("executor", config.executor.weights) is not None
    if config.device == "cpu" or (small and config.device == "auto"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return [Budget("this machine's memory", memory, on_gpu=False)]
    return list(USUAL_GPUS)


def run_of(config: RunConfig, *, on_gpu: bool) -> Run:
    """A configuration with the sizes of its models."""
    sizes = executor_sizes(config.executor, kernels=on_gpu and config.kernels != "torch")
    wan = shapeworld_folder("executor", config.executor.weights) is None
    return Run(config, sizes, planner_sizes(config.planner), wan, on_gpu)


def _models(run: Run) -> Iterator[str]:
    model, settings = run.sizes.model, run.config.executor
    parameters = footprint.parameters_of(run.sizes)
    published = run.wan and not is_random(settings.weights) and not is_wan(settings.weights)
    of = ", sizes as published" if published else ""
    yield (
        f"executor: {model.layers} blocks, {model.dim} channels, {parameters.weights:,} parameters, "
        f"{settings.precision}{of}; {settings.frames} latent frames of {run.sizes.frame_tokens} tokens; "
        f"LoRA r={settings.lora.rank}, {parameters.trained:,} trained parameters"
    )
    kernels = "csrc_triton's kernels" if run.sizes.kernels else "the torch path"
    graphs = ", CUDA graphs" if run.graphs else ""
    yield f"planned for {kernels}{graphs}; K and V of a latent frame: {size(run.sizes.frame_bytes)}"
    if run.planner is None:
        yield f"planner: {run.config.planner.weights}: its sizes are not known here and left out below"


def _work(run: Run) -> Iterator[str]:
    work = work_of(run)
    calls = ", ".join(f"{frames}: {tera(flops)}" for frames, flops in work.calls.items())
    yield f"a denoiser call by latent frames attended to, own ones included, without adapters: {calls}"
    phases = ", ".join(f"{name} {tera(flops)}" for name, flops in work.phases.items())
    yield f"an iteration: {phases}"


def _memory(run: Run, budgets: list[Budget]) -> Iterator[str]:
    needs = needs_of(run)
    yield ""
    yield (
        f"memory of {run.config.data.prompts_per_iteration} prompts x {run.config.planner.plans_per_prompt} plans x "
        f"{run.config.executor.continuations} continuations, instructions of {INSTRUCTION_TOKENS} tokens, the earliest "
        "switch:"
    )
    yield from table(needs)
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

    def most(own: Run) -> int:
        return largest(lambda n: taken(own.changed(continuations=n)), budget.usable, LEAST_CONTINUATIONS, _most(own))

    found = most(run)
    if found:
        yield f"  largest N at {prompts} x {plans} plans: {_count(found, run)}"
    else:
        yield f"  largest N at {prompts} x {plans} plans: none, not even {LEAST_CONTINUATIONS} continuations fit"
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
    """The most continuations that are asked for."""
    return max(LEAST_CONTINUATIONS, MOST_BRANCHES // run.plans, run.config.executor.continuations)


def _count(found: int, run: Run) -> str:
    return f"{found} or more" if found == _most(run) else str(found)


def _missing(run: Run) -> Iterator[str]:
    lines = missing_paths(run.config, run.sizes.model)
    yield ""
    yield f"missing: {len(lines)}" if lines else "missing: nothing"
    yield from (f"  {line}" for line in lines)
