"""Videos of instructions without training: a plan each, generated chunk by chunk and written as the frames come."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from tempact.cli import CONFIG
from tempact.config import LARGEST_SEED, VIDEO, RunConfig, flatten, keys_of
from tempact.distributed import Ranks
from tempact.errors import UserError
from tempact.executor.executor import Executor
from tempact.executor.fp8 import round_linears
from tempact.executor.sampler import gaussian_noise
from tempact.executor.stream import stream_frames
from tempact.files import file_hash, safe_name, write_atomic
from tempact.models.wan.codec import Codec
from tempact.planner.planner import Planner
from tempact.planner.plans import Request
from tempact.policies import PolicyPair, build_executor, build_planner, device_of
from tempact.reporting.strips import COLUMNS, StripRow, film_strip, save_strip, shown_frames
from tempact.runs.best_of import Selection, selecting
from tempact.runs.checkpoint import Checkpoint
from tempact.runs.ending import quiet
from tempact.runs.evaluation import alike, claimed
from tempact.runs.logs import Progress
from tempact.runs.run import load_policies, newest, use_newest
from tempact.types import Plan, Prompt
from tempact.video import Mp4Writer
from tempact.worlds import World, world_of

log = logging.getLogger(__name__)

PLANS = 8  # plans sampled for a video, of which the best makes it, where the world rates plans


@dataclass(frozen=True)
class Asked:
    """What `make_videos` makes of every request.

    seed: of the first video. plans: sampled for a video, of which the best makes it; None for the world's default.
    best_of: continuations made at each switch, of which the best goes on.
    """

    seed: int = 0
    count: int = 1
    plans: int | None = None
    best_of: int = 1
    output: Path = Path("videos")


def write_video(
    folder: Path,
    name: str,
    plan: Plan,
    frames: Iterable[Tensor],
    latents: Sequence[int],
    fps: float,
    facts: Mapping[str, object],
    note: str = "",
) -> list[Path]:
    """mp4, film strip (PNG) and plan (JSON, which is also a plan file) of one video; returns their paths.

    frames: uint8 [n, 3, height, width], a few at a time; no more of them are held than the strip shows. latents: the
    latent frame of each frame of the whole video. facts: what else the JSON tells. note: stands in every name, on
    every frame of the mp4, on the strip and in the JSON.
    """
    stem = safe_name(note.replace(" ", "-")) + f"-{name}" if note else name
    mp4, strip, told = (folder / f"{stem}{ending}" for ending in (".mp4", ".png", ".json"))
    shown = shown_frames(len(latents), COLUMNS)
    pictures: list[Tensor] = []
    with Mp4Writer(mp4, fps, note) as writer:
        for some in frames:
            own = [frame - writer.frames for frame in shown if 0 <= frame - writer.frames < len(some)]
            pictures.append(some[own])  # a copy
            writer.write(some)
        assert writer.frames == len(latents), (writer.frames, len(latents))
    length = f"{len(latents) / fps:.1f} s"
    row = StripRow(
        f"{note}, {length}" if note else length,
        torch.cat(pictures),
        plan.steps,
        tuple(latents[frame] for frame in shown),
    )
    title = f"({note}) {plan.instruction}" if note else plan.instruction
    save_strip(film_strip([row], title, COLUMNS), strip)
    steps = [asdict(step) for step in plan.steps]
    content = {"instruction": plan.instruction, "steps": steps, "repairs": plan.repairs, **facts}
    write_atomic(told, json.dumps({**content, "note": note} if note else content, indent=1))
    return [mp4, strip, told]


def generate(
    policies: PolicyPair | str | Path, prompt: str, *, plan: Plan | None = None, seed: int = 0, best_of: int = 1,
    choices: list[dict[str, Any]] | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """One video of an instruction, chunk by chunk: uint8 frames [t, 3, height, width] on the host.

    Args:
        policies: as `load_policies` returns them, or a run folder.
        plan: steps over the whole video; None asks the planner for one.
        seed: of the noise, and of the plan that is sampled.
        best_of: continuations made at each switch of the plan, of which the one goes on that the rewards of the
            policies' configuration rate best (its keys `best_of` and `rewards`). 1: no continuations, nothing is rated.
        choices: a list that gets what was chosen at each switch, as it stands in the JSON of a generated video.

    UserError for fewer than one continuation and for rewards that cannot be had; JudgeOutage of silent judges.
    """
    if best_of < 1:
        raise UserError(f"best_of: found {best_of}; accepted: at least 1")
    pair = policies if isinstance(policies, PolicyPair) else load_policies(policies)
    request = Request("prompt", Prompt("", prompt), plan)
    own = plan or _planned(pair.planner, request, seed)
    _warn_of_unseen(pair.executor, request)
    noise = gaussian_noise(seed, pair.executor.noise_shape(1, best_of), pair.executor.device)
    if best_of == 1:
        yield from stream_frames(pair.executor, own, noise)
        return
    with TemporaryDirectory() as folder:  # of the books on judges: a run's own are not charged
        own_books = replace(pair.config, output=folder)
        with selecting(best_of, own_books, pair.executor.device) as selection:
            yield from selection.stream(pair.executor, own, noise, [] if choices is None else choices)


def make_videos(
    config: RunConfig, requests: Sequence[Request], asked: Asked, source: Path | None, ranks: Ranks | None = None
) -> Iterator[Path]:
    """Writes the videos of every request under `asked.output`; yields the paths of each video when it is written.

    Of several ranks each makes and writes the next video; rank 0 alone yields, all paths in the order of one process.
    Video n has the request's seed plus n, else `asked.seed` plus n: for its noise, and for its plans where the request
    has none. The planner is loaded only if a request needs it. source: a run, whose newest checkpoint is loaded, or a
    PEFT folder of the executor. UserError, before anything is loaded or written, for an instruction that the executor
    cannot follow, plans that the world cannot rate, a seed out of range and a run without an intact checkpoint.
    """
    world, ranks = world_of(config), ranks or Ranks()
    checkpoint = ranks.from_first(partial(_checked, world, requests, asked, source))
    plans = 1 if world.real_video else asked.plans or PLANS
    with ExitStack() as opened:
        own = replace(config, output=str(asked.output))
        selection = opened.enter_context(selecting(asked.best_of, own, device_of(config), ranks.size))
        folder = claimed(asked.output, opened, ranks)
        planned = any(each.plan is None for each in requests)
        with quiet(not ranks.first):
            executor, planner, adapter, weights = _loaded(config, source, checkpoint, planned)
        alike(ranks, (adapter, weights))
        latents, chunks = latent_of_frames(executor.codec, executor.settings.frames), executor.settings.chunks

        def write(number: int, seed: int) -> list[Path]:
            ranks.phase(f"video {number}, seed {seed}")
            request = requests[number]
            if seed == firsts[number]:
                _warn_of_unseen(executor, request)
            named = f"{number:03d}-" if len(requests) > 1 and not request.prompt.prompt_id else ""
            stem = named + safe_name(request.prompt.prompt_id or request.prompt.text)
            note = note_of(config, planned=request.plan is None)
            plan = request.plan or _planned(planner, request, seed, plans, world)
            name = f"{stem}-seed{seed}-{_digest(config, plan, weights, selection, request)}"
            frames, more = _begun(executor, plan, seed, request, selection)
            facts = _facts(config, executor, request, seed, adapter) | more
            return write_video(folder, name, plan, _counted(frames, progress), latents, executor.codec.fps, facts, note)

        firsts = [asked.seed if request.seed is None else request.seed for request in requests]
        videos = [(number, first + n) for number, first in enumerate(firsts) for n in range(asked.count)]
        missing, made = deque(videos), dict[tuple[int, int], list[Path]]()
        with Progress("making chunks", len(videos) * chunks, live=ranks.first and None) as progress:
            for video in chain(ranks.take(videos, lambda video: 1.0), [None]):
                if video is not None and ranks.first:
                    made[video] = write(*video)
                elif video is not None:
                    ranks.post((video, write(*video)))
                for other, paths in ranks.posted(wait=video is None):
                    made[other] = paths
                    progress.step({}, chunks)
                while missing and missing[0] in made:
                    yield from made.pop(missing.popleft())
        ranks.arrive()


def _checked(world: World, requests: Sequence[Request], asked: Asked, source: Path | None) -> Checkpoint | None:
    """The checkpoint of a run; UserError for what `make_videos` refuses."""
    if not 0 <= asked.seed <= LARGEST_SEED:
        raise UserError(f"--seed: found {asked.seed}; accepted: 0 to {LARGEST_SEED}")
    if world.real_video and (asked.plans or 1) > 1:
        rules = "1 here, as only ShapeWorld rates plans by rules (continuations at switches are --best-of)"
        raise UserError(f"--plans: found {asked.plans}; accepted: {rules}")
    for request in requests:
        _check_instruction(world, request)
    return None if source is None or (source / CONFIG).is_file() else newest(source)


def _loaded(
    config: RunConfig, source: Path | None, checkpoint: Checkpoint | None, planned: bool
) -> tuple[Executor, Planner | None, Path | None, list[str]]:
    """Executor, planner if `planned`, and the executor's adapter with its hashes: of a run's checkpoint, or the folder
    `source`."""
    device = device_of(config)
    executor = build_executor(config, device, preview=True)
    planner = build_planner(config, device) if planned else None

    weights: list[str] = []

    def use(found: Checkpoint) -> None:
        executor.load_adapter(found.executor_dir)
        weights[:] = _hashes(found.executor_dir)  # here, while the folder is known to be there
        if planner is not None:
            planner.load_adapter(found.planner_dir)

    adapter = source
    if source is not None and checkpoint is not None:
        adapter = use_newest(source, checkpoint, use).executor_dir
    elif source is not None:
        executor.load_adapter(source)
        weights = _hashes(source)
    if config.executor.fp8_linears:
        round_linears(executor.model)
    return executor, planner, adapter, weights


def _hashes(adapter: Path) -> list[str]:
    return [file_hash(file) for file in sorted(adapter.glob("adapter_model.*"))]


def _digest(config: RunConfig, plan: Plan, weights: list[str], selection: Selection, request: Request) -> str:
    """Short hash of a plan, the adapter's weights and the settings that decide a video, but for its seed."""
    keys = keys_of(RunConfig)
    settings = {
        name: value
        for name, value in flatten(config).items()
        if keys[name].sets == VIDEO and not name.startswith("planner.")  # the plan is what the planner decides
    }
    told: list[object] = [plan.instruction, [asdict(step) for step in plan.steps], weights, settings]
    if selection.count > 1:
        told.append(selection.settings)
    if request.chosen:
        told.append(sorted(request.chosen.items()))
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


def note_of(config: RunConfig, *, planned: bool) -> str:
    """The label of a video: "random weights", "random planner" (random weights made the plan), or ""."""
    return world_of(config).note or ("random planner" if planned and config.planner.weights == "random" else "")


def latent_of_frames(codec: Codec, latent_frames: int) -> list[int]:
    """The latent frame of every pixel frame of a video of `latent_frames`."""
    counts = [codec.pixel_frames(n + 1) - codec.pixel_frames(n) for n in range(latent_frames)]
    return [latent for latent, count in enumerate(counts) for _ in range(count)]


def _check_instruction(world: World, request: Request) -> None:
    try:
        world.check_instruction(request.prompt.text)
    except UserError as error:
        raise UserError(f"{request.where}: {error}") from error


def _planned(planner: Planner | None, request: Request, seed: int, count: int = 1, world: World | None = None) -> Plan:
    """The best of several sampled plans: of equal plan quality that whose shortest step is the longest."""
    assert planner is not None
    plans = planner.sample([request.prompt], count, seed).plans
    scores = world.plan_scores(plans) if world is not None and count > 1 else [0.0]
    shortest = [min(step.end - step.start for step in plan.steps) for plan in plans]
    plan = plans[max(range(count), key=lambda i: (scores[i], shortest[i]))]
    if plan.repairs:
        log.warning("%s: the planner's answer: %s", request.where, ", ".join(plan.repairs))
    return plan


def _warn_of_unseen(executor: Executor, request: Request) -> None:
    """A plan that is given may say more than the text encoder reads."""
    for number, step in enumerate(request.plan.steps if request.plan else (), 1):
        if unseen := executor.text_encoder.unseen(step.prompt):
            log.warning("%s: step %d: the text encoder does not see its last words: %s", request.where, number, unseen)


def _begun(
    executor: Executor, plan: Plan, seed: int, request: Request, selection: Selection
) -> tuple[Iterator[Tensor], dict[str, object]]:
    """The frames of one video; and what its JSON tells of its continuations, all of it when the last frame is there."""
    chunk = executor.settings.chunk
    choices: list[dict[str, Any]] = [
        {"frame": number * chunk, "frames": chunk, "continuation": chosen} for number, chosen in request.chosen.items()
    ]
    told: dict[str, object] = {}
    if choices or selection.count > 1:
        told["best_of"] = {**selection.settings, "choices": choices}
    noise = gaussian_noise(seed, executor.noise_shape(1, selection.count), executor.device)
    if request.chosen:
        noise = noise.following(request.chosen)
    return selection.stream(executor, plan, noise, choices), told


def _counted(video: Iterator[Tensor], progress: Progress) -> Iterator[Tensor]:
    """The frames of one video; reports progress."""
    began, frames = time.monotonic(), 0
    for chunk in video:
        frames += len(chunk)
        progress.step({"frames_per_s": frames / (time.monotonic() - began)})
        yield chunk


def _facts(
    config: RunConfig, executor: Executor, request: Request, seed: int, adapter: Path | None
) -> dict[str, object]:
    """The settings that reproduce the video."""
    prompt, settings = request.prompt, config.executor
    named = {"prompt_id": prompt.prompt_id, "category": prompt.category}
    return {
        **{key: value for key, value in named.items() if value},
        "seed": seed,
        "latent_frames": settings.frames,
        "frames": executor.codec.pixel_frames(settings.frames),
        "fps": executor.codec.fps,
        "preset": config.preset,
        "executor": {
            "weights": settings.weights,
            "adapters": settings.adapters,
            "precision": settings.precision,
            **({"fp8_linears": True} if settings.fp8_linears else {}),
        },
        "planner": "a plan given" if request.plan is not None else config.planner.weights,
        **({"adapter": str(adapter)} if adapter is not None else {}),
    }
