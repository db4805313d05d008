"""Worlds: executor weights of one kind, with the prompts, rewards and evaluations that suit their videos.

`world_of` says which world a configuration names. Methods import torch and the models themselves, so that a command
may ask for the world while it still reads its options.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

from tempact.config import RunConfig, validate
from tempact.errors import UserError
from tempact.files import LEDGER

if TYPE_CHECKING:
    import torch

    from tempact.models.wan.codec import Codec
    from tempact.models.wan.text import PromptEncoder
    from tempact.models.wan.transformer import WanConfig, WanTransformer
    from tempact.rewards import RewardSet
    from tempact.trainer import PromptSource
    from tempact.types import Plan

log = logging.getLogger(__name__)

SHAPEWORLD = "shapeworld"  # name of the shipped weights, of the grammar's prompts and of the usual evaluation
STRICT = "shapeworld-strict"  # name of the evaluation on the stricter sets
# of V instructions and uint8 frames [V, T, 3, height, width], a video each: V scores by name, "held_out" and others, by
# judges that are no reward of training
Watch: TypeAlias = "Callable[[list[str], torch.Tensor], dict[str, list[float]]]"
RANDOM_PLANNER = "random"  # a planner of the shipped sizes without weights
WEIGHTS = Path(__file__).parent / "shapeworld" / "weights"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
REWARDS = ("plan_quality", "temporal_following", "step_following", "aesthetics")  # the method's own
VAE_STRIDE = 8  # pixels along a latent's side, of Wan's VAE


class ExecutorParts(NamedTuple):
    """The frozen models of an executor, on one device; size: height and width of its videos, pixels."""

    transformer: WanTransformer
    text_encoder: PromptEncoder
    codec: Codec
    size: tuple[int, int]


class WorldSizes(NamedTuple):
    """Sizes of an executor's models, from config files or as published.

    latent: (H, W) of a video's latents. text_encoder: folder whose config.json, if it has one, is a UMT5 encoder's;
    None for no encoder. vae: settings of `AutoencoderKLWan`; None where latents are pixels.
    """

    transformer: WanConfig
    latent: tuple[int, int]
    text_encoder: Path | None
    vae: dict[str, Any] | None


class World:
    """Executor weights of one kind, and the prompts, rewards and evaluations of their videos.

    A new backbone is one subclass, added to `WORLDS`. The subclass says which `executor.weights` are its own
    (`claims`), loads them (`executor_parts`), lists missing files (`missing_weights`) and tells sizes for a dry run
    (`sizes`). Everything else has a default here, for real video: prompts from a file, rewards of served judges and
    PickScore, the Temporal Order Benchmark.
    """

    suites: ClassVar[tuple[str, ...]] = ("temporal-order",)  # accepted by `evaluate --suite`, the default first
    note: ClassVar[str] = ""  # shown on every video and table made with these weights
    packages: ClassVar[tuple[str, ...]] = ()  # importable names of the extra "wan" that the world needs
    real_video: ClassVar[bool] = True  # of any length, from prompts in any words, on a GPU

    def __init__(self, config: RunConfig):
        self.config, self.weights = config, config.executor.weights

    @classmethod
    def claims(cls, weights: str) -> bool:
        """Do these `executor.weights` (a name, file or folder) belong to this world?"""
        raise NotImplementedError

    def executor_parts(self, device: torch.device, preview: bool = False) -> ExecutorParts:
        """Loads the frozen models; UserError for files that do not fit each other.

        preview: frames may come from the tiny decoder `executor.decoder`. Rewards always see those of the VAE.
        """
        raise NotImplementedError

    def missing_weights(self) -> Iterator[str]:
        """A line for each of the executor's files that is not there or cannot be read, and for packages that are not
        installed; no file is read through."""
        raise NotImplementedError

    def sizes(self) -> WorldSizes:
        """From config files; UserError for a file that cannot be read."""
        raise NotImplementedError

    @property
    def at_hand(self) -> bool:
        """Is there something at `executor.weights`? Without, `sizes` are those of the published model."""
        return True

    @property
    def judged(self) -> bool:
        """Do served judges give rewards?"""
        return self.real_video or self.config.judges.shapeworld

    def check(self) -> None:
        """UserError for settings and files that cannot work, before anything is loaded."""
        for line in self.missing_weights():
            raise UserError(line)
        self.check_settings()

    def missing_packages(self) -> Iterator[str]:
        """A line if the world's packages are not installed."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if absent:
            found = f"executor.weights: {self.weights or 'a backbone'} needs {', '.join(absent)}"
            yield f"{found}; accepted: after pip install -e '.[wan]'"

    def check_settings(self) -> None:
        """UserError for settings that cannot work."""
        validate(self.config)

    def check_instruction(self, text: str) -> None:
        """UserError for an instruction that the executor cannot follow."""

    def plan_scores(self, plans: Sequence[Plan]) -> list[float]:
        """Plan quality by the world's own rules; none where only served judges can tell."""
        return []

    def prompts(self) -> PromptSource:
        """Training prompts from the file `data.prompts`; UserError for none and for a file that cannot be used."""
        from tempact.prompt_file import FilePrompts

        source = self.config.data.prompts
        if source in ("", SHAPEWORLD):
            found = repr(source) if source else "nothing"
            raise UserError(
                f"data.prompts: found {found}, which does not serve executor.weights {self.weights or repr('')}; "
                "accepted: a CSV, JSONL, parquet or text file of prompts"
            )
        return FilePrompts(Path(source), self.config.data.prompts_per_iteration)

    def rewards(self, device: torch.device, processes: int = 1, only: Collection[str] = REWARDS) -> RewardSet:
        """Rewards of training: served judges, PickScore on `device`, and the user's own. The caller closes them.

        processes: of the run; each keeps to its part of the judges' limits. only: those of the method's that are going
        to be asked; what the others need may be missing.

        UserError for own rewards that cannot be imported, judges that the environment does not name and PickScore's
        weights.
        """
        from tempact.rewards import load_rewards
        from tempact.rewards.judges.client import JudgeClient
        from tempact.rewards.judges.config import ROLES, JudgeConfig
        from tempact.rewards.pickscore import PickScorer, real_rewards

        settings, custom = self.config.judges, load_rewards(self.config.rewards.custom)
        ledger = Path(self.config.output) / LEDGER
        roles = {role: fallback for role, fallback in ROLES.items() if role in only}
        asked = JudgeConfig.from_environment(roles, settings, ledger=ledger).divided(processes)
        judges = JudgeClient(asked) if roles else None
        try:
            scorer = PickScorer.load(settings, device) if "aesthetics" in only else None
            return real_rewards(judges, scorer, settings).extended(custom)
        except UserError:
            if judges is not None:
                judges.close()
            raise

    def watch(self, device: torch.device) -> Watch | None:
        """Judges beside the rewards, for alarms (docs/metrics.md); None where there are none at hand."""
        return None

    def chosen_suite(self, asked: str | None) -> str:
        """The suite that `evaluate` runs: the one asked for, else the default; UserError for one of other videos."""
        if asked is not None and asked not in self.suites:
            raise UserError(
                f"executor.weights: found {self.weights}, whose videos ShapeWorld's evaluation cannot score; "
                f"accepted: {SHAPEWORLD}"
            )
        return asked or self.suites[0]

    def missing(self) -> Iterator[str]:
        """A line (key, what was found, what is accepted) for each file, package and address that training lacks, beside
        the planner's.

        Judges are looked up in the environment, not asked; `python -m tempact.doctor judges` asks them.
        """
        from tempact.rewards import load_rewards
        from tempact.rewards.judges.config import ROLES, JudgeConfig

        yield from self.missing_weights()
        yield from tried("data.prompts", self.prompts)
        yield from tried("rewards.custom", lambda: load_rewards(self.config.rewards.custom))
        if self.judged and importlib.util.find_spec("openai") is None:
            yield "judges: found no package openai; accepted: after pip install -e '.[judges]'"
        for role, fallback in ROLES.items() if self.judged else ():
            yield from tried("judges", partial(JudgeConfig.from_environment, {role: fallback}))
        files = {"aesthetics_weights": "config.json", "aesthetics_processor": "tokenizer_config.json"}
        for key, file in files.items() if self.real_video else ():
            name = getattr(self.config.judges, key)
            if local_folder(name, file) is None:
                found = f"{name}, which is no folder with a {file} and not in the Hugging Face hub's cache"
                yield f"judges.{key}: found {found}; accepted: a CLIP folder, or a name that the hub serves"

    def folders(self) -> dict[str, str]:
        """Folders that training writes to, by configuration key."""
        cache = self.config.judges.cache if self.judged else ""
        return {"output": self.config.output} | ({"judges.cache": str(Path(cache).parent)} if cache else {})


class ShapeWorld(World):
    """The shipped executor, or a folder that ShapeWorld's pretraining has written (it holds transformer.json)."""

    suites = (SHAPEWORLD, STRICT, "temporal-order")
    real_video = False

    @classmethod
    def claims(cls, weights: str) -> bool:
        return weights == SHAPEWORLD or bool(weights and (Path(weights) / "transformer.json").is_file())

    @property
    def folder(self) -> Path:
        """Where the executor's files are."""
        return shipped("executor", self.weights)

    def executor_parts(self, device: torch.device, preview: bool = False) -> ExecutorParts:
        from tempact.models.wan.codec import PixelCodec
        from tempact.shapeworld.pretraining.executor import load_executor

        transformer, text_encoder = load_executor(self.folder)
        return ExecutorParts(transformer.to(device), text_encoder.to(device), PixelCodec(), self.sizes().latent)

    def missing_weights(self) -> Iterator[str]:
        for name in ("transformer.safetensors", "text_encoder/model.safetensors"):
            file = self.folder / name
            if not file.is_file():
                yield f"executor.weights: {file}: not found; accepted: a folder with an executor's weights"

    def sizes(self) -> WorldSizes:
        from tempact.models.wan.transformer import WanConfig
        from tempact.shapeworld.story import SIZE

        read = json.loads((self.folder / "transformer.json").read_text(encoding="utf-8"))
        transformer = WanConfig(**{**read, "patch": tuple(read["patch"])})
        return WorldSizes(transformer, (SIZE, SIZE), self.folder / "text_encoder", None)

    def check_settings(self) -> None:
        from tempact.shapeworld.story import CHUNK, FRAMES

        settings = self.config.executor
        super().check_settings()
        length = (settings.frames, settings.chunk_frames)
        if length != (FRAMES, CHUNK):
            raise UserError(
                f"executor.frames, executor.chunk_frames: found {length}; accepted: {(FRAMES, CHUNK)} latent frames, "
                "as in ShapeWorld"
            )
        if settings.adapters or settings.precision != "fp32":
            found = f"{len(settings.adapters)}, {settings.precision}"
            accepted = "none and fp32 in ShapeWorld"
            raise UserError(f"executor.adapters, executor.precision: found {found}; accepted: {accepted}")

    def check_instruction(self, text: str) -> None:
        from tempact.shapeworld.grammar import parse_instruction

        parse_instruction(text)

    def plan_scores(self, plans: Sequence[Plan]) -> list[float]:
        from tempact.shapeworld.world import judge_plan

        return [judge_plan(plan).score() for plan in plans]

    def prompts(self) -> PromptSource:
        """Prompts drawn from the grammar's training split; UserError for another source."""
        from tempact.shapeworld.world import ShapeWorldPrompts

        source = self.config.data.prompts
        if source != SHAPEWORLD:
            raise UserError(f"data.prompts: found {source!r}; accepted: {SHAPEWORLD}, as the executor knows no others")
        return ShapeWorldPrompts()

    def rewards(self, device: torch.device, processes: int = 1, only: Collection[str] = REWARDS) -> RewardSet:
        """ShapeWorld's four and the user's own; `judges.shapeworld`: served judges score all but picture quality."""
        from tempact.rewards import load_rewards
        from tempact.shapeworld.world import shapeworld_rewards

        rewards, settings, custom = shapeworld_rewards(), self.config.judges, load_rewards(self.config.rewards.custom)
        if settings.shapeworld:
            from tempact.rewards.judged import judged_rewards
            from tempact.rewards.judges.client import JudgeClient
            from tempact.rewards.judges.config import ROLES, JudgeConfig

            ledger = Path(self.config.output) / LEDGER
            roles = {role: fallback for role, fallback in ROLES.items() if role in only}
            if not roles:
                return rewards.extended(custom)
            judges = JudgeClient(JudgeConfig.from_environment(roles, settings, ledger=ledger).divided(processes))
            rewards = judged_rewards(judges, rewards.aesthetics, settings)
        return rewards.extended(custom)

    def watch(self, device: torch.device) -> Watch | None:
        """The matcher, clearness and duplicates."""
        from tempact.shapeworld.watch import ShapeWorldWatch

        return ShapeWorldWatch(device)


class Wan(World):
    """Published checkpoints of the Wan transformer, with the text encoder and VAE of Wan's release.

    Weights that are not there belong here too: a dry run plans for them with the sizes of Wan2.1-T2V-1.3B, or of -14B
    with the preset wan-14b.
    """

    packages = ("diffusers", "ftfy")

    @classmethod
    def claims(cls, weights: str) -> bool:
        return True

    @property
    def at_hand(self) -> bool:
        path = Path(self.weights)
        return bool(self.weights) and (path.is_file() or (path.is_dir() and any(path.iterdir())))

    @property
    def release(self) -> Path:
        """The folder of Wan's release."""
        return Path(self.config.executor.wan_folder or self.weights)

    def executor_parts(self, device: torch.device, preview: bool = False) -> ExecutorParts:
        from tempact.distributed.shards import group_of, shard_block
        from tempact.models.wan.checkpoints.load import load_transformer
        from tempact.models.wan.text import load_cached_text_encoder
        from tempact.models.wan.vae import load_codec

        settings, weights = self.config.executor, Path(self.weights)
        group = group_of(settings.shard, device)
        adapters = [Path(adapter) for adapter in settings.adapters]
        transformer = load_transformer(
            weights, device=device, precision=settings.precision, adapters=adapters, entry=settings.entry,
            block_made=partial(shard_block, group=group) if group is not None else None,
        )  # fmt: skip
        sizes, dtype = transformer.config, transformer.dtype
        decoder = Path(settings.decoder) if preview and settings.decoder else None
        codec = load_codec(self.release, dtype, device, decoder)
        if sizes.in_dim != codec.latent_channels:
            raise UserError(
                f"{weights}: found {sizes.in_dim} latent channels; accepted: {codec.latent_channels}, as the VAE"
            )
        cache, offload = Path(settings.text_cache), settings.offload_text_encoder
        text_encoder = load_cached_text_encoder(self.release, cache, dtype, device, sizes.text_len, offload=offload)
        return ExecutorParts(transformer, text_encoder, codec, settings.video_size)

    def missing_weights(self) -> Iterator[str]:
        if not self.weights:
            yield (
                f"executor.weights: found nothing, and the preset {self.config.preset} has none of its own; accepted: "
                "the backbone's checkpoint, or random or random-tiny to see everything but the pictures"
            )
        elif not self.at_hand:
            yield no_weights("executor", self.weights, ", a Wan checkpoint")
        absent = [*self.missing_packages()]
        yield from absent
        from tempact.models.wan.checkpoints.files import find_weights
        from tempact.models.wan.checkpoints.lora import open_adapter
        from tempact.models.wan.text import check_text_encoder

        if self.at_hand:
            yield from tried("executor.weights", lambda: [file.stat() for file in find_weights(Path(self.weights))])
        for adapter in self.config.executor.adapters:
            yield from tried("executor.adapters", partial(open_adapter, Path(adapter), self.sizes().transformer))
        folder, named = self.release, self.config.executor.wan_folder or self.weights
        if not named or not folder.is_dir():
            accepted = "Wan2.1-T2V-1.3B or its -Diffusers"
            yield f"executor.wan_folder: {named or repr(named)} is not a folder; accepted: {accepted}"
            return
        yield from tried("executor.wan_folder", lambda: check_text_encoder(folder))
        if not absent:
            from tempact.models.wan.vae import find_vae

            yield from tried("executor.wan_folder", lambda: find_vae(folder))

    def sizes(self) -> WorldSizes:
        from tempact.models.wan.checkpoints.files import PICKLES, find_weights
        from tempact.models.wan.checkpoints.names import read_config
        from tempact.models.wan.transformer import WAN_14B, WanConfig

        file = self.release / "vae" / "config.json"
        vae = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        weights = find_weights(Path(self.weights))[:1] if self.at_hand else []
        beside = [path.with_name("config.json") for path in weights if path.suffix not in PICKLES]
        published = WAN_14B if self.config.preset == "wan-14b" else WanConfig()
        transformer = read_config(beside[0]) if beside and beside[0].is_file() else published
        return WorldSizes(transformer, self._latent, self.release / "text_encoder", vae)

    @property
    def _latent(self) -> tuple[int, int]:
        height, width = self.config.executor.video_size
        return height // VAE_STRIDE, width // VAE_STRIDE

    def folders(self) -> dict[str, str]:
        return super().folders() | {"executor.text_cache": self.config.executor.text_cache}


class RandomWan(Wan):
    """Random weights of Wan's sizes ("random", "random-14b") or small ones ("random-tiny"), of the run's seed."""

    note = "random weights"
    at_hand = True
    folders = World.folders  # no text encoder, so no cache of its rows

    @classmethod
    def claims(cls, weights: str) -> bool:
        return weights in ("random", "random-14b", "random-tiny")

    def executor_parts(self, device: torch.device, preview: bool = False) -> ExecutorParts:
        import torch

        from tempact.models.wan.random_weights import RandomText, random_codec, random_transformer

        log.warning("executor.weights: %s: videos are noise", self.weights)
        torch.manual_seed(self.config.seed)
        transformer = random_transformer(self.weights, self.config.executor.precision, device)
        codec = random_codec(self.weights, transformer.dtype, device)
        return ExecutorParts(transformer, RandomText(self.weights, device), codec, self.config.executor.video_size)

    def missing_weights(self) -> Iterator[str]:
        return self.missing_packages()

    def sizes(self) -> WorldSizes:
        from tempact.models.wan.random_weights import RANDOM

        transformer, width = RANDOM[self.weights]
        return WorldSizes(transformer, self._latent, None, {"base_dim": width})

    def check_settings(self) -> None:
        settings = self.config.executor
        if settings.adapters:
            raise UserError(f"executor.adapters: found {len(settings.adapters)}; accepted: none on random weights")
        super().check_settings()


WORLDS: tuple[type[World], ...] = (ShapeWorld, RandomWan, Wan)  # the first that claims the weights has them


def world_of(config: RunConfig) -> World:
    """The world that `executor.weights` names."""
    return next(world(config) for world in WORLDS if world.claims(config.executor.weights))


def shipped(part: str, weights: str) -> Path:
    """The folder of weights, which may be ShapeWorld's own of "planner" or "executor"; it need not exist."""
    return WEIGHTS / part if weights in (SHAPEWORLD, RANDOM_PLANNER) else Path(weights)


def local_folder(name: str, file: str = "config.json") -> Path | None:
    """The folder with `file` that a model's name stands for on this machine; None if there is none.

    name: a folder, a name of the shipped planner, or a model whose files are in the Hugging Face hub's cache.
    """
    folder = shipped("planner", name)
    if not (folder / file).is_file() and HUB_NAME.fullmatch(name):
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (OSError, ValueError):
            return None
    return folder if (folder / file).is_file() else None


def no_weights(part: str, weights: str, more: str) -> str:
    """Why a policy's weights cannot be had; more: what else than ShapeWorld's name and a folder is accepted."""
    found = "a file" if Path(weights).is_file() else "nothing"
    accepted = f"{SHAPEWORLD}, a folder with weights{more}"
    return f"{part}.weights: found {found} at {weights or repr(weights)}; accepted: {accepted}"


def tried(key: str, read: Callable[[], object]) -> Iterator[str]:
    """The reason, under a configuration key, why something cannot be read; nothing if it can."""
    try:
        read()
    except (UserError, OSError) as error:
        told = " ".join(str(error).split())
        yield told if told.startswith(f"{key}:") else f"{key}: {told}"
