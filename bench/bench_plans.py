"""How much of ShapeWorld's score the plans decide, and how much their videos: the same plans drawn exactly.

    python -m bench.bench_plans RUN|PRESET [--videos 128] [--split validation] [--seed 7] [--save FILE]
    [--section.key value ...]

Three planners (the untrained one, the trained one, and a reference that gives every event the time it takes) are made
into videos by the untrained executor, by the trained one and by an exact drawing: every event begins with its step and
is cut where the step ends. Drawn plans have the score that the plans allow; plans of the reference, what an executor
makes of plans without a fault. A preset has no trained policies.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from bench import report
from bench.bench_shapeworld import rows_on_lines
from tempact.cli import parse_run, preset_or_run
from tempact.errors import UserError, guarded
from tempact.evaluation.prompts import SETS
from tempact.executor.sampler import NoiseSource, gaussian_noise
from tempact.files import write_atomic
from tempact.policies import PolicyPair, build_policies
from tempact.runs.run import load_newest
from tempact.seeds import derive_seed
from tempact.shapeworld.grammar import parse_instruction, read_step, reference_plan
from tempact.shapeworld.matcher import ShapeWorldJudge
from tempact.shapeworld.pretraining.clips import Cue, shape_indices, tell
from tempact.shapeworld.story import FRAMES, draw
from tempact.shapeworld.verifier import verify
from tempact.shapeworld.world import held_out_prompts
from tempact.types import Plan, Prompt
from tempact.worlds import ShapeWorld, world_of

UNTRAINED, TRAINED, REFERENCE, DRAWN = "untrained", "trained", "reference", "drawn"
NOTES = (
    "planner reference: the opening has one chunk, each event its nominal frames, the last step the rest. executor "
    "drawn: no executor; every event begins with its step and is cut where the step ends.",
    "verifier, matcher: means over the videos of a set, one of each instruction.",
)


def drawn(plans: Sequence[Plan]) -> Tensor:
    """Exact drawings [V, FRAMES, 3, SIZE, SIZE] in [0, 1] of the plans, as their steps say; steps that cannot be read
    show nothing."""
    scenes = []
    for plan in plans:
        entities = parse_instruction(plan.instruction).entities
        told = [(step, read_step(step.prompt, entities)) for step in plan.steps]
        cues = [Cue(event, step.start, step.end) for step, read in told if read is not None for event in read.events]
        scenes.append((entities, cues))
    return draw(tell(scenes), shape_indices(scenes)[:, None].expand(-1, FRAMES, -1))


def made(policies: PolicyPair, plans: Sequence[Plan], seed: int, *, trained: bool) -> Tensor:
    """Videos [V, FRAMES, 3, SIZE, SIZE] in [0, 1], on the CPU; an instruction has the same noise for all planners."""
    executor = policies.executor
    shape = executor.noise_shape(1, 1)
    sources = [gaussian_noise(derive_seed(seed, 0, plan.instruction), shape, executor.device) for plan in plans]
    noise = NoiseSource((len(plans), *shape[1:]), lambda plan, *video: sources[plan].draw(0, *video))
    with nullcontext() if trained else executor.reference():
        videos = executor.rollout(list(plans), [0] * len(plans), noise)
    return videos.frames[:, 0].float().cpu() / 255.0


def plans_of(policies: PolicyPair, planner: str, prompts: Sequence[Prompt], seed: int) -> list[Plan]:
    """One plan of each instruction."""
    if planner == REFERENCE:
        return [reference_plan(prompt.text) for prompt in prompts]
    own = derive_seed(seed, 0, f"{prompts[0].category} plans")
    return policies.planner.sample(list(prompts), 1, own, reference=planner == UNTRAINED).plans


def rows_of(
    policies: PolicyPair, prompts: dict[str, list[Prompt]], seed: int, *, trained: bool,
    tell: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for every set, planner and executor; `tell` is given each as soon as it is there."""
    matcher, found = ShapeWorldJudge.load(), []
    middle = [TRAINED] * trained
    for name, own in prompts.items():
        stories, texts = [parse_instruction(prompt.text) for prompt in own], [prompt.text for prompt in own]
        for planner in (UNTRAINED, *middle, REFERENCE):
            plans = plans_of(policies, planner, own, seed)
            for executor in (UNTRAINED, *middle, DRAWN):
                frames = drawn(plans) if executor == DRAWN else made(policies, plans, seed, trained=executor == TRAINED)
                scores = {"verifier": verify(frames, stories).score, "matcher": matcher.score(frames, texts)}
                means = {judge: round(mean(values.tolist()), 4) for judge, values in scores.items()}
                found.append({"set": name, "planner": planner, "executor": executor, **means, "videos": len(plans)})
                tell(found[-1])
    return found


def printed(row: dict[str, Any]) -> None:
    words = (row["set"], row["planner"], row["executor"], *(f"{row[judge]:.3f}" for judge in ("verifier", "matcher")))
    print("{:<8}{:<11}{:<11}{:>9}{:>9}".format(*words), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("target", metavar="RUN|PRESET")
    parser.add_argument("--videos", type=int, default=128, help="instructions of each set")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--seed", type=int, default=7, help="of instructions, plans and noise")
    parser.add_argument("--save", type=Path, help="results file")
    given, keys = parser.parse_known_args(argv)
    options, run = preset_or_run(given.target)
    config = parse_run([*options, *keys], "python -m bench.bench_plans")[0]
    if given.videos < 1:
        raise UserError(f"--videos: found {given.videos}; accepted: at least 1")
    if not isinstance(world_of(config), ShapeWorld):
        raise UserError(f"{given.target}: found videos of a backbone; accepted: a run or preset of ShapeWorld")
    policies = load_newest(config, run)[0] if run else build_policies(config)
    prompts = {name: held_out_prompts(name, given.videos, given.seed, given.split) for name in SETS}
    with torch.inference_mode():
        rows = rows_of(policies, prompts, given.seed, trained=run is not None, tell=printed)
    if given.save:
        told = {"command": report.command("bench.bench_plans"), "commit": report.commit(), "split": given.split}
        write_atomic(given.save, rows_on_lines({**told, "notes": list(NOTES), "rows": rows}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
