"""What a run went on: versions, hardware and command, noted each time it starts or resumes.

What a run records while it goes: metrics.jsonl and the sample tables.

The local file is the record. Trackers, if asked for, are fed by processes of their own that read that file
(`runs/trackers.py`), so that no tracker can slow, hang or fail a run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempact.config import HISTOGRAM_BINS, VIDEO, RunConfig, flatten, keys_of
from tempact.files import reading, write_atomic
from tempact.presets import get_preset

if TYPE_CHECKING:  # a tracker's process reads metrics and waits for no torch
    from torch import Tensor

    from tempact.types import Batch, PlanBatch, Scored

log = logging.getLogger(__name__)

ENVIRONMENT = "environment.json"
PACKAGES = ("torch", "triton", "transformers", "peft", "safetensors", "numpy")


@dataclass(frozen=True)
class Session:
    """One start of a run. `started` is UTC, `versions` maps packages to versions, memory is in GiB."""

    started: str
    from_step: int
    command: str
    versions: dict[str, str]
    cpu: str
    cores: int
    memory_gib: float
    gpus: list[str]


def record_environment(run_folder: Path, from_step: int) -> None:
    """Adds this process to `run_folder`/environment.json."""
    sessions = [*read_environment(run_folder), _this_session(from_step)] if from_step else [_this_session(0)]
    path = Path(run_folder) / ENVIRONMENT
    write_atomic(path, json.dumps([asdict(session) for session in sessions], indent=1) + "\n")


def read_environment(run_folder: Path) -> list[Session]:
    """Sessions of a run in order, none if nothing was noted."""
    path = Path(run_folder) / ENVIRONMENT
    with reading(path):
        noted = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        for session in noted:
            if not (isinstance(session["versions"], dict) and isinstance(session["gpus"], list)):
                raise TypeError("versions or gpus of another kind")
        return [Session(**session) for session in noted]


def _this_session(from_step: int) -> Session:
    import torch

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Session(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        from_step=from_step,
        command=shlex.join(["python", *sys.orig_argv[1:]]),
        versions=versions,
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(memory, 1),
        gpus=gpus,
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


CARD = """\
---
library_name: peft
tags: [lora, tempact]
---

# {title}

A LoRA adapter of the {policy} of a TempAct run after {step} iterations. The planner
splits an instruction into timed steps, the executor draws them chunk by chunk; both were trained together, the planner
with GSPO and the executor with Flow-GRPO, on the videos that they made.

| | |
|---|---|
| base | {base} |
| preset | {preset}, seed {seed} |
| adapter | rank {rank}, alpha {alpha} |
| gain | {gain} |

```python
{code}
```
"""
LOAD = {
    "planner": """\
planner = build_planner(config, torch.device("cpu"))
planner.load_adapter(Path({folder!r}))  # this folder
plan = planner.sample([Prompt("", "A red circle is at the top left. The circle turns blue.")], 1, seed=0).plans[0]""",
    "executor": """\
executor = build_executor(config, torch.device("cpu"))
executor.load_adapter(Path({folder!r}))  # this folder""",
}


def model_card(policy: str, config: RunConfig, step: int, gain: str = "") -> str:
    """README.md of an adapter's folder: what it is, its base, method and gain, and code that loads it.

    policy: "planner" or "executor". step: iterations that the run has done. gain: in words; nothing for a run that has
    not been evaluated. The code holds the values in which the run's videos differ from its preset's.
    """
    own, preset, keys = getattr(config, policy), flatten(get_preset(config.preset)), keys_of(RunConfig)
    words = [config.preset]
    for name, value in flatten(config).items():
        if keys[name].sets == VIDEO and value != preset[name]:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    code = [
        "from pathlib import Path", "", "import torch", "from tempact.cli import parse_run",
        f"from tempact.policies import build_{policy}",
        *(["from tempact.types import Prompt"] if policy == "planner" else []), "",
        f'config = parse_run({words!r}, "")[0]', LOAD[policy].format(folder=policy),
    ]  # fmt: skip
    return CARD.format(
        title=f"{policy.capitalize()} of {config.preset}, iteration {step}", policy=policy, step=step,
        base=own.weights, preset=config.preset, seed=config.seed, rank=own.lora.rank, alpha=own.lora.alpha,
        gain=gain or "not evaluated when it was saved; the run's report.html tells", code="\n".join(code),
    )  # fmt: skip


METRICS, SAMPLES = "metrics.jsonl", "samples"


def read_metrics(run_folder: Path) -> list[dict]:
    """Rows of metrics.jsonl in order: a whole number "step", a number "time_s", elsewhere numbers or None, and lists of
    numbers for histograms.

    A last line cut by a kill and a tracker's end mark are left out; so are, with a warning, other rows without the two.
    """
    path = Path(run_folder) / METRICS
    if not path.is_file():
        return []
    with reading(path):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows, odd = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # not only JSONDecodeError: of a number with too many digits
            row = None
        row = {key: _value(key, value) for key, value in row.items()} if isinstance(row, dict) else {}
        step, time = row.get("step"), row.get("time_s")
        if step is not None and time is not None and step >= 1 and step == int(step):
            rows.append(row | {"step": int(step)})
        elif "finished" not in row:
            odd.append(number)
    if odd:
        accepted = "accepted: an object with a whole number step and a number time_s"
        log.warning("%s: row %d and %d others are left out; %s", path, odd[0], len(odd) - 1, accepted)
    return rows


HISTOGRAM = re.compile(r"(.+_histogram)(@\d+)?")
BIN = re.compile(r"(.+_histogram)/\d\d(@\d+)?")


def folded(metrics: Mapping[str, float | None]) -> dict[str, float | list[float] | None]:
    """Metrics with the bins of a histogram, NAME/00 and on, as one list NAME; None where a bin has no value."""
    rows: dict[str, Any] = {}
    for key, value in metrics.items():
        if found := BIN.fullmatch(key):
            rows.setdefault(found[1] + (found[2] or ""), []).append(value)
        else:
            rows[key] = value
    return {key: None if isinstance(value, list) and None in value else value for key, value in rows.items()}


def _value(key: str, value: object) -> float | list[float] | None:
    """A finite number, of histograms a list of them, or None for anything else."""
    if not HISTOGRAM.fullmatch(key):
        return _number(value)
    shares = [_number(share) for share in value] if isinstance(value, list) else []
    known = [share for share in shares if share is not None]
    return known if len(shares) == len(known) == HISTOGRAM_BINS else None


def _number(value: object) -> float | None:
    """A finite number, or None for anything else."""
    try:
        return finite_or_none(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:  # of a whole number that no float holds
        return None


def write_samples(run_folder: Path, step: int, plans: PlanBatch, scored: Scored, batch: Batch) -> Path:
    """samples/step-000040.jsonl: one row a continuation with its prompt, plan, rewards and advantages.

    Missing rewards and masked advantages are null. A run with rewards of its own has them under "custom".
    """
    rows = []
    for p, plan in enumerate(plans.plans):
        prompt = plans.prompt_of(p)
        for n in range(scored.temporal_following.shape[1]):
            custom = {own.name: _at(own.scores, *(p, n)[: own.scores.ndim]) for own in scored.custom}
            rows.append(
                {
                    "step": step,
                    "prompt_id": prompt.prompt_id,
                    "category": prompt.category,
                    "prompt": prompt.text,
                    "plan_index": p,
                    "continuation": n,
                    "plan": [{"start": s.start, "end": s.end, "prompt": s.prompt} for s in plan.steps],
                    "repairs": list(plan.repairs),
                    "format_score": _at(scored.format_score, p),
                    "plan_quality": _at(scored.plan_quality, p),
                    "temporal_following": _at(scored.temporal_following, p, n),
                    "step_following": _at(scored.step_following, p, n),
                    "aesthetics": _at(scored.aesthetics, p, n),
                    "plan_advantage": _at(batch.plan_advantage, p) if batch.plan_mask[p] else None,
                    "execution_advantage": _rounded(execution_advantage_of(batch, p, n)),
                    **({"custom": custom} if custom else {}),
                }
            )
    path = Path(run_folder) / SAMPLES / f"step-{step:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    return path


def execution_advantage_of(batch: Batch, plan: int, continuation: int) -> float | None:
    """Of a video: that of its branch at the plan's first fork; None where masked."""
    row, column = plan, continuation
    if batch.siblings:
        row, column = next(
            (row, column)
            for row, own in enumerate(batch.siblings)
            if (own.plan, own.depth) == (plan, 0)
            for column, leaves in enumerate(own.leaves)
            if continuation in leaves
        )
    return batch.execution_advantage[row, column].item() if batch.execution_mask[row, column] else None


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN: null says that there is no value."""
    return value if math.isfinite(value) else None


def _at(values: Tensor, *index: int) -> float | None:
    return _rounded(values[index].item())


def _rounded(value: float | None) -> float | None:
    return None if value is None else finite_or_none(round(value, 6))


def duration(seconds: float) -> str:
    """ "42 s", "3:07 min" or "2:05 h"."""
    if seconds != seconds:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


# keys of metrics.jsonl and their meanings; docs/metrics.md is written from them (tests/write_references.py)
MEANINGS = {
    "step": "iteration, from 1",
    "time_s": "seconds that the run has taken, over all its resumed parts",
    "POLICY/reward": "mean combined reward, of plans for the planner and of continuations for the executor",
    "POLICY/reward_std": "deviation of rewards from group means, over all groups; by default it divides advantages",
    "POLICY/frac_reward_zero_std": "share of groups whose rewards are all equal, which teach nothing",
    "POLICY/missing": "share of combined rewards that are missing",
    "POLICY/loss": "policy loss plus weighted divergence, of the first update; keys of the second end in @2",
    "POLICY/kl": "divergence from the frozen reference, of that update",
    "POLICY/ratio": "mean ratio of the new to the old probability",
    "POLICY/ratio_deviation": "mean distance of that ratio from 1; 0 in the first update of an iteration",
    "POLICY/clip_ratio/low": "share of terms whose ratio the lower clip stops, at negative advantages",
    "POLICY/clip_ratio/high": "share of terms whose ratio the upper clip stops, at positive advantages",
    "executor/DEPTH/reward": "the same as executor/reward, of the branches of a later fork (executor.forks tree)",
    "executor/DEPTH/reward_std": "the same of executor/reward_std",
    "executor/DEPTH/frac_reward_zero_std": "the same of executor/frac_reward_zero_std",
    "executor/DEPTH/missing": "the same of executor/missing",
    "executor/level": "number of the denoising call that was trained, from 0; with executor.levels drawn or sliding",
    "executor/clean_error": "of diffusion_nft: mean error with which clean chunks are predicted from new noise",
    "executor/velocity_change": "of diffusion_nft: mean square of what velocities have moved; 0 in the first update",
    "POLICY/advantage_histogram": "shares of the advantages that count in 21 equal bins from -advantage_clip to it",
    "POLICY/ratio_histogram": "of that update: shares of ratios less 1, in clips, in 21 equal bins from -3 to 3",
    "POLICY/grad_norm": "global norm of the gradient before its clip; null where it is not finite",
    "POLICY/skipped_updates": "updates in a row that were left out for gradients that are not finite",
    "POLICY/canary": "root mean square of what the trained policy and its start give for one input as they sample",
    "planner/sampling_gap": "mean difference of log-probs between sampling and training, nats a token",
    "planner/sampling_k3": "divergence (k3) between the two distributions, nats a token",
    "planner/importance": "mean weight of plans: their probability in training over that at sampling; if served",
    "planner/importance_truncated": "share of plans whose weight planner.max_importance cuts",
    "planner/server_canary": "root mean square of the canary's log-probs between server and trainer, nats",
    "planner/server_canary/others": "the same between the adapter and the nearest other that can be told from it",
    "planner/server_swap_s": "seconds to write the adapter and load it on the server",
    "planner/server_wake_s": "seconds to wake the server for its plans; with planner.server_sleep",
    "planner/server_sleep_s": "seconds to put it to sleep after them",
    "executor/rollout_gap/SIGMA": "difference of log-probs between roll-out and training at that noise level, in clips",
    "rewards/REWARD/mean": "mean of a raw reward, from 0 to 1",
    "rewards/REWARD/std": "deviation of a raw reward",
    "rewards/REWARD/missing": "share of a raw reward's scores that are missing",
    "rewards/REWARD/DEPTH/mean": "mean of a raw reward of continuations by the step that begins at a later fork",
    "rewards/REWARD/DEPTH/std": "deviation of it",
    "rewards/REWARD/DEPTH/missing": "share of its scores that are missing, as all of plans without such a fork are",
    "events/KIND/success": "share of a kind's events that happen as told: the verifier gives each credit by half",
    "events/KIND/count": "events of the kind in the iteration's videos",
    "watch/reward": "mean reward for temporal order of the videos that alarms look at, every alarms.every iterations",
    "watch/held_out": "mean score that the held-out judge gives them",
    "watch/gap": "mean difference of the two",
    "watch/clearness": "mean clearness of their pictures, a quality that training never sees",
    "watch/duplicates": "share of their frames with an extra or a misplaced shape",
    "alarms/ALARM": "1 where gap, held_out, quality or duplicates has moved for the worse beyond alarms.ALARM, else 0",
    "rewards/aesthetics/truncated": "share of prompts longer than PickScore reads",
    "judge/ROLE/calls": "calls of a judge that ended",
    "judge/ROLE/missing": "share of them without a valid reply",
    "judge/ROLE/cache_hits": "share of them that the cache answered",
    "judge/ROLE/retries": "requests beyond the first of each call",
    "judge/ROLE/requests": "requests that a server took; refused ones and those that reached nobody are not counted",
    "judge/ROLE/prompt_tokens": "tokens of their prompts, where the server says so; pictures are among them",
    "judge/ROLE/completion_tokens": "tokens of their replies, thoughts among them",
    "judge/ROLE/reasoning_tokens": "those of thoughts, where the server tells them apart",
    "judge/ROLE/cached_tokens": "tokens of prompts that the server's prefix cache held",
    "judge/ROLE/latency_mean_s": "mean seconds of calls that reached a server; _p95_s and _max_s likewise",
    "judge/ROLE/latency_p95_s": "95th percentile of these",
    "judge/ROLE/latency_max_s": "longest of these",
    "timing_s/PHASE": "seconds of a phase: plan, rollout, rewards (beyond what overlaps with it), update",
    "ranks/idle": "share of an iteration that processes wait for others, mean; only of several processes",
    "ranks/idle/RANK": "the same of one of them",
    "memory/PHASE_gib": "most GPU memory that tensors have taken in a phase, with what is held all the time, GiB",
    "memory/held_gib": "GPU memory that tensors take as an iteration begins, GiB",
    "memory/graphs_gib": "GPU memory that CUDA graphs keep for their next replay as an iteration begins, GiB",
    "memory/peak_gib": "most GPU memory that tensors have taken since the process began, GiB",
}
