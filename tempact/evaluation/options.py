"""Options of `python -m tempact.evaluate`: parsed and checked before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tempact.cli import LineParser
from tempact.config import RunConfig
from tempact.errors import UserError
from tempact.evaluation.methods import BOTH, CONDITIONS, SINGLE, STEP, Method
from tempact.evaluation.temporal_order.prompts import OrderPrompt, choose_prompts

SUITES = ("temporal-order", "shapeworld")
# what a judge of the benchmark is called on the command line and in tables, and its role at the judge client; the
# in-domain judge is the one that training is rewarded by
ROLES = {"in-domain": "temporal_following", "held-out": "held_out"}
PAPER_FRAMES = {"simple": 36, "hard": 60}  # latent frames (ALGORITHM.md section 7)
SEEDS = 2
SHAPEWORLD = "shapeworld"
ORDER_ONLY = ("judge", "pickscore", "prompts", "seeds", "frames", "conditions", "export", "retry_missing", "output")


def parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """The options of both suites; None for what was not given."""
    made = LineParser(prog=program, description=description, allow_abbrev=False)
    made.add_argument("target", metavar="PRESET|RUN", help="a preset's untrained policies, or a training run's folder")
    made.add_argument("--suite", choices=SUITES, help="default: shapeworld for its executor, else temporal-order")
    made.add_argument("--simple", type=int, help="videos of the simple set (default: as the run, or all prompts)")
    made.add_argument("--hard", type=int, help="videos of the hard set (default: as the run, or all prompts)")
    made.add_argument("--seed", type=int, help="of prompts, plans and noise (default: as the run)")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: as the run")
    order = made.add_argument_group("temporal-order")
    order.add_argument("--output", type=Path, help="folder (default: temporal-order in the run's or preset's own)")
    order.add_argument("--judge", nargs="*", choices=tuple(ROLES), help="default: in-domain")
    order.add_argument(
        "--pickscore", choices=("yes", "no"), help="default: yes where judges are (--judges.aesthetics_)"
    )
    order.add_argument("--prompts", nargs="+", metavar="SET=FILE", help="CSV, JSONL or text (default: the own prompts)")
    order.add_argument("--seeds", type=int, help=f"videos of a prompt and condition (default: {SEEDS})")
    order.add_argument("--frames", nargs="+", metavar="SET=N", help="latent frames (default: simple=36 hard=60)")
    order.add_argument("--conditions", nargs="+", choices=CONDITIONS, help="default: single-prompt step-prompt trained")
    order.add_argument("--export", choices=("vbench",), help="copies of the videos, named as VBench reads them")
    order.add_argument("--retry-missing", action="store_true", default=None, help="asks again for missing scores")
    return made


@dataclass(frozen=True)
class OrderOptions:
    """What the benchmark was asked for, checked."""

    prompts: dict[str, list[OrderPrompt]]
    frames: dict[str, int]  # latent frames of each set
    methods: list[Method]
    seeds: int
    judges: tuple[str, ...]
    pickscore: bool
    export: bool
    retry_missing: bool


def order_options(arguments: argparse.Namespace, config: RunConfig, trained: bool, real_video: bool) -> OrderOptions:
    """Reads the prompts and checks the rest. UserError for what cannot be done.

    trained: the target is a run. real_video: videos may have the benchmark's lengths.
    """
    seeds = SEEDS if arguments.seeds is None else arguments.seeds
    if seeds < 1:
        raise UserError(f"--seeds: found {seeds}; accepted: at least 1")
    usual = () if arguments.export else ("in-domain",)
    judges = tuple(dict.fromkeys(usual if arguments.judge is None else arguments.judge))
    pickscore = bool(judges) if arguments.pickscore is None else arguments.pickscore == "yes"
    if not judges and not pickscore and not arguments.export:
        raise UserError("--judge: found none, and neither --pickscore nor --export; accepted: one of them")
    prompts = choose_prompts(arguments.prompts or (), {"simple": arguments.simple, "hard": arguments.hard})
    named = list(dict.fromkeys(arguments.conditions or ()))
    methods = [CONDITIONS[name] for name in named]
    shown = (SINGLE, STEP, BOTH) if trained else (SINGLE, STEP)
    methods = methods or [method for method in CONDITIONS.values() if method.name in shown]
    untaught = next((name for name in named if CONDITIONS[name].trained and not trained), None)
    if untaught is not None:
        accepted = "single-prompt, step-prompt; the others need the folder of a training run"
        raise UserError(f"--conditions: found {untaught!r} for an untrained preset; accepted: {accepted}")
    frames = _lengths(arguments.frames or (), config, list(prompts), PAPER_FRAMES if real_video else {})
    return OrderOptions(
        prompts, frames, methods, seeds, judges, pickscore, bool(arguments.export), bool(arguments.retry_missing)
    )


def shapeworld_counts(arguments: argparse.Namespace) -> dict[str, int]:
    """Videos of each set that were asked for. UserError for those and other options that ShapeWorld's suite lacks."""
    given = next((name for name in ORDER_ONLY if getattr(arguments, name) is not None), None)
    if given is not None:
        raise UserError(
            f"--{given.replace('_', '-')}: is not for --suite shapeworld; accepted: --simple, --hard, --seed"
        )
    counts = {name: getattr(arguments, name) for name in ("simple", "hard") if getattr(arguments, name) is not None}
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"--{name}: found {count}; accepted: at least 1")
    return counts


def _lengths(given: Sequence[str], config: RunConfig, sets: list[str], usual: Mapping[str, int]) -> dict[str, int]:
    """Latent frames of each set."""
    lengths = {name: usual.get(name, config.executor.frames) for name in sets}
    chunk = config.executor.chunk_frames
    for one in given:
        name, _, number = one.partition("=")
        if name not in lengths or not number.isdecimal() or int(number) < 1 or int(number) % chunk:
            accepted = f"SET=NUMBER with a set of {', '.join(sets)} and a positive multiple of {chunk}"
            raise UserError(f"--frames: found {one!r}; accepted: {accepted}")
        lengths[name] = int(number)
    return lengths
