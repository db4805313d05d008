"""Every path that a configuration names and that is not what a run needs there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from tempact.build import SHAPEWORLD, is_random
from tempact.config import RunConfig
from tempact.errors import UserError
from tempact.infra.checks import why_not_writable
from tempact.infra.prompt_file import FilePrompts
from tempact.models.wan.checkpoint_adapters import open_adapter
from tempact.models.wan.checkpoint_files import find_weights
from tempact.models.wan.transformer import WanConfig
from tempact.preflight.models import hub_folder, planner_folder, shapeworld_folder
from tempact.rewards.judge_config import ROLES, JudgeConfig


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
    """Judges are looked up in the environment and not asked; `python -m tempact.doctor judges` asks them."""
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
