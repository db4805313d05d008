"""Seconds of an iteration on more GPUs, simulated from the phases that a run on one has measured: an estimate.

    T(W) = plan + roll-out of the last rank + rewards + update of the last rank + exchange + rest

Plans are sampled in as many batches as the largest share needs. Units of the roll-out are taken by whoever is free, the
longest first. Those of an update are dealt in order. Gradients are exchanged once an update. Rewards (the judges'
answers behind the last video) and the rest (what lies between two iterations) take as long on any number.
"""

from __future__ import annotations

import heapq
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tempact.cli import RECORDED, from_yaml
from tempact.config import RunConfig
from tempact.errors import UserError
from tempact.executor.sampler import RolloutSettings
from tempact.files import reading
from tempact.forks import drawn_forks
from tempact.planner.decode import rows_of
from tempact.reporting import METRICS, SAMPLES, read_environment, read_metrics
from tempact.seeds import derive_seed
from tempact.types import Fork, Plan, PlanBatch, Prompt, Step, siblings_of, tree_of

PHASES = ("plan", "rollout", "rewards", "update")  # of metrics.jsonl
CONTEXT = (0.234 + 0.102) / (0.254 + 0.102)  # a chunk of a plan's context to one of a branch, decoded (docs/costs.md)
NODE_GPUS, NODE_BANDWIDTH, BANDWIDTH = 8, 450e9, 50e9  # bytes/s of a GPU: NVLink in a machine, 400 Gbit/s between them
DRAWS = 50  # iterations whose forks are drawn


@dataclass(frozen=True)
class Shape:
    """What an iteration's work is cut into. forks: of several iterations, those of each plan.

    sampled, rolled, updated: plans of a batch of sampling (at most), of a unit of the roll-out (0: a rank's share) and
    of a unit of an update. exchanged: bytes of a gradient of both adapters. updates: of an iteration.
    """

    forks: Sequence[Sequence[Fork]]
    continuations: int
    frames: int
    chunk: int
    sampled: int = 64
    rolled: int = 1
    updated: int = 1
    exchanged: int = 0
    updates: int = 1

    @property
    def plans(self) -> int:
        return len(self.forks[0])

    def costs(self, forks: Sequence[Fork], gpus: int) -> list[float]:
        """Of the roll-out's units, in chunks of one video."""
        size = self.rolled or math.ceil(self.plans / gpus)
        trees = [tree_of(fork, self.continuations) for fork in forks]
        starts = range(0, self.frames, self.chunk)
        branches = [[tree.branches_at(start) for start in starts] for tree in trees]
        each = [sum(CONTEXT if count == 1 else count for count in counts) for counts in branches]
        return [sum(each[first : first + size]) for first in range(0, self.plans, size)]


@dataclass(frozen=True)
class Seconds:
    """Of an iteration by phase. waiting: of all GPUs together, for others."""

    plan: float
    rollout: float
    rewards: float
    update: float
    exchange: float = 0.0
    rest: float = 0.0
    waiting: float = 0.0

    @property
    def total(self) -> float:
        return self.plan + self.rollout + self.rewards + self.update + self.exchange + self.rest


def simulated(measured: Seconds, shape: Shape, gpus: int, slow: float = 1.0) -> Seconds:
    """On so many GPUs, the first of which takes `slow` times as long for the same work; the mean over `shape.forks`."""
    whole = sum(sum(shape.costs(forks, 1)) for forks in shape.forks)
    rollout = waiting = 0.0
    for forks in shape.forks:
        units = [cost / whole * measured.rollout for cost in shape.costs(forks, gpus)]
        free = last_free(sorted(units, reverse=True), gpus, slow)
        rollout += max(free)
        waiting += gpus * max(free) - sum(free)
    batches = [math.ceil(math.ceil(shape.plans / each) / shape.sampled) for each in (1, gpus)]
    plan = measured.plan * batches[1] / batches[0] * slow
    part = math.ceil(shape.plans / shape.updates)  # plans of an update
    most = min(part, shape.updated * math.ceil(math.ceil(part / shape.updated) / gpus))
    update = measured.update * most / part * slow
    speed = NODE_BANDWIDTH if gpus <= NODE_GPUS else BANDWIDTH
    exchange = shape.updates * 2 * shape.exchanged * (gpus - 1) / gpus / speed  # parts are sent, sums come back
    waiting += gpus * plan - (plan + (min(gpus, shape.plans) - 1) * plan / slow)
    waiting += gpus * update - (measured.update + update * (1 - 1 / slow)) + (gpus - 1) * measured.rest
    return Seconds(plan, rollout, measured.rewards, update, exchange, measured.rest, waiting)


def last_free(units: Sequence[float], gpus: int, slow: float = 1.0) -> list[float]:
    """When each GPU is done with units that are taken in this order by whoever is free; the first GPU is the slow
    one."""
    free = [(0.0, gpu) for gpu in range(gpus)]
    for unit in units:
        done, gpu = free[0]
        heapq.heapreplace(free, (done + unit * (1.0 if gpu else slow), gpu))
    return [done for done, _ in free]


def scaling(run: Path, gpus: Sequence[int], slow: float = 1.0) -> list[str]:
    """Lines: what is estimated from what, and a table. UserError for a folder without a run's metrics."""
    for name in (RECORDED, METRICS):
        if not (run / name).is_file():
            raise UserError(f"{run}: holds no {name}; accepted: the folder of a training run")
    config = from_yaml(run / RECORDED)
    measured, steps, on_gpu = measured_seconds(run)
    forks, drawn = forks_of(run, config)
    shape = shape_of(run, config, forks, on_gpu=on_gpu)
    speeds = f"at {NODE_BANDWIDTH / 1e9:.0f} GB/s, beyond {NODE_GPUS} GPUs at {BANDWIDTH / 1e9:.0f}"
    lines = [
        f"an estimate, not a measurement: phases of one process in {steps} of {run}, dealt to more by a model",
        f"forks of {shape.plans} plans: {drawn}; a unit of the roll-out takes as long as it has chunks",
        f"gradients of {shape.exchanged / 1e9:.3g} GB are exchanged {speeds}; rewards and the rest are not divided",
    ]
    if slow > 1:
        lines.append(f"one of the GPUs takes {slow:g} times as long for the same work")
    heads = "s/iteration", "efficiency", "waiting", *PHASES, "exchange", "rest"
    lines += ["", "  GPUs" + "".join(f"{head:>12}" for head in heads)]
    for count in sorted({1, *gpus}):
        own = simulated(measured, shape, count, slow if count > 1 else 1.0)
        parts = own.total, own.plan, own.rollout, own.rewards, own.update, own.exchange, own.rest
        total, *phases = (f"{part:>12.2f}" for part in parts)
        shares = f"{measured.total / count / own.total:>12.1%}{own.waiting / count / own.total:>12.1%}"
        lines.append(f"{count:>6}{total}{shares}{''.join(phases)}")
    return lines


def measured_seconds(run: Path) -> tuple[Seconds, str, bool]:
    """Mean seconds of a run's iterations, which they are, and whether they ran on a GPU. The first after each start is
    left out where there are others: it compiles and records."""
    keys = [f"timing_s/{phase}" for phase in PHASES]
    rows, before = [], 0.0
    for row in read_metrics(run):
        rows.append(row | {"took": row["time_s"] - before})
        before = row["time_s"]
    rows = [row for row in rows if all(row.get(key) is not None for key in keys)]
    alone = [row for row in rows if "ranks/idle" not in row]
    if not alone:
        found = "iterations of several processes alone" if rows else f"no row with {', '.join(keys)}"
        raise UserError(f"{run / METRICS}: found {found}; accepted: iterations of a run with one process")
    firsts = {1, *(session.from_step + 1 for session in read_environment(run))}
    used = [row for row in alone if row["step"] not in firsts] or alone
    plan, rollout, rewards, update = (sum(row[key] for row in used) / len(used) for key in keys)
    rest = sum(row["took"] for row in used) / len(used) - (plan + rollout + rewards + update)
    steps = f"iterations {used[0]['step']} to {used[-1]['step']}" if len(used) > 1 else f"iteration {used[0]['step']}"
    return Seconds(plan, rollout, rewards, update, rest=max(0.0, rest)), steps, "memory/peak_gib" in used[-1]


def forks_of(run: Path, config: RunConfig) -> tuple[list[list[Fork]], str]:
    """Forks of the plans of several iterations, drawn as in training, and of which plans, in words."""
    each, chunk = config.planner.plans_per_prompt, config.executor.chunk_frames
    prompts = [Prompt("", "")] * config.data.prompts_per_iteration
    starts, told = range(0, config.executor.frames, chunk), "a switch at any chunk, as there are no sample tables"
    spans = [[(start, start + chunk) for start in starts]] * (len(prompts) * each)
    for file in sorted((run / SAMPLES).glob("step-*.jsonl"))[-1:]:
        told = f"a switch of the plans in {SAMPLES}/{file.name}, drawn as in training"
        with reading(file):
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            found = {row["plan_index"]: [(int(s["start"]), int(s["end"])) for s in row["plan"]] for row in rows}
            spans = [found[plan] for plan in range(len(spans))]
    plans = PlanBatch(prompts, [Plan("", tuple(Step(*span, "") for span in own)) for own in spans], each)
    seeds = [[derive_seed(config.seed, draw, "switch", i) for i in range(len(prompts))] for draw in range(DRAWS)]
    return [drawn_forks(config.executor, plans, [random.Random(seed) for seed in own]) for own in seeds], told


def shape_of(run: Path, config: RunConfig, forks: Sequence[Sequence[Fork]], *, on_gpu: bool) -> Shape:
    """How a run's work is cut; the adapters' size is that of their newest files, 0 where there is none."""
    settings, n = config.executor, config.executor.continuations
    transitions = RolloutSettings.of(settings).trained if settings.levels == "all" else 1
    trained = len(siblings_of(forks[0], n, 1)) // len(forks[0])  # chunks of a plan
    newest = sorted((run / "checkpoints").glob("step-*"))[-1:]
    files = [file for folder in newest for file in folder.glob("*/adapter_model.safetensors")]
    return Shape(
        forks, n, settings.frames, settings.chunk_frames,
        sampled=rows_of(config.planner, on_gpu=on_gpu),
        rolled=max(1, settings.rollout_videos // n) if settings.rollout_videos else 0,
        updated=max(1, settings.micro_batch // max(1, trained * transitions)),
        exchanged=sum(file.stat().st_size for file in files),
        updates=config.trainer.updates_per_iteration,
    )  # fmt: skip
