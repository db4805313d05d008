"""From checked options to a finished benchmark; the policies are built by the caller."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch

from tempact.config import RunConfig
from tempact.errors import UserError
from tempact.infra.checkpoint import COMPLETE, latest
from tempact.infra.files import safe_name
from tempact.rewards.judge_client import JudgeClient
from tempact.rewards.judge_config import ROLES as FALLBACKS
from tempact.rewards.judge_config import JudgeConfig
from tempact.temporal_order.judging import ServedJudge, VideoJudge
from tempact.temporal_order.making import ExecutorPolicy, Maker, Noise, PlannerPolicy
from tempact.temporal_order.options import NONE, ROLES, SHAPEWORLD, OrderOptions
from tempact.temporal_order.results import gather, markdown, write_results
from tempact.temporal_order.suite import Suite, evaluate_suite
from tempact.temporal_order.vbench import export_vbench

log = logging.getLogger(__name__)

FPS = {SHAPEWORLD: 8.0}
WAN_FPS = 16.0


class Policies(Protocol):
    @property
    def planner(self) -> PlannerPolicy: ...
    @property
    def executor(self) -> ExecutorPolicy: ...


@contextmanager
def served_judges(names: Sequence[str], cache: Path) -> Iterator[list[VideoJudge]]:
    """The asked judges behind one client; their replies are cached, so that a reply is paid for once.

    UserError where the environment does not say where a judge is, or names one model for both judges.
    """
    if not names:
        yield []
        return
    config = JudgeConfig.from_environment({ROLES[name]: FALLBACKS.get(ROLES[name], "") for name in names}, cache=cache)
    models = {name: config.roles[ROLES[name]][0].model for name in dict.fromkeys(names)}
    if len(set(models.values())) < len(models):
        accepted = "another model for the held-out judge: TEMPACT_JUDGE_HELD_OUT_BASE_URL, _MODEL and _API_KEY"
        raise UserError(f"--judge: found {next(iter(models.values()))!r} for all judges; accepted: {accepted}")
    with JudgeClient(config) as client:
        yield [ServedJudge(name, model, client) for name, model in models.items()]


def evaluate_order(
    folder: Path,
    options: OrderOptions,
    config: RunConfig,
    policies: Policies,
    *,
    noise: Noise,
    judges: Sequence[VideoJudge],
    weights: str,
    tell: Callable[[str], None],
) -> list[Path]:
    """Runs what is left of the benchmark in `folder`; returns what it wrote.

    weights: which weights the policies hold, for the settings that scores are kept under.
    """
    settings = config.evaluation
    fps = FPS.get(config.executor.weights, WAN_FPS)
    maker = Maker(
        folder, policies.planner, policies.executor, noise, batch=settings.batch, seed=settings.seed, fps=fps
    )  # fmt: skip
    suite = Suite(options.prompts, options.frames, options.methods, options.seeds, judges)
    known = f"{config.preset}, {weights}, settings {policy_digest(config)}"
    ledger = evaluate_suite(folder, suite, maker, policies=known, retry_missing=options.retry_missing, tell=tell)
    written = []
    if judges:
        results = gather(suite, ledger, settings.bootstrap, settings.seed)
        written += write_results(folder, suite, maker, results, settings.strips)
        log.info("\n%s", markdown(results, {}))
    if options.export:
        written += export_vbench(folder, suite, maker)
    return written


def policy_digest(config: RunConfig) -> str:
    """Short hash of all settings that videos depend on."""
    told = json.dumps([asdict(config.planner), asdict(config.executor), config.seed], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def load_pickscore(options: OrderOptions, device: torch.device) -> list[VideoJudge]:
    """PickScore, unless it is not asked for."""
    if options.pickscore == NONE:
        return []
    from tempact.temporal_order.pickscore import PickScore  # late: without it transformers' CLIP is not needed

    return [PickScore(options.pickscore, device)]


def untrained_folder(config: RunConfig) -> Path:
    """Where an evaluation of a preset goes: beside its runs, never into one."""
    return Path(f"{config.output}-untrained")


def weights_of(run: Path | None) -> str:
    """Which weights the newest checkpoint of a run holds, by name and hash; "untrained" without a run."""
    newest = None if run is None else latest(run)
    if newest is None:
        return "untrained"
    return f"{newest.name} ({hashlib.sha256((newest / COMPLETE).read_bytes()).hexdigest()[:12]})"


def evaluation_name(config: RunConfig, weights: str) -> str:
    """A folder name that differs wherever scores may: weights, sampler, prompts, seed."""
    told = json.dumps([weights, policy_digest(config), asdict(config.evaluation)], sort_keys=True)
    return f"{safe_name(weights.split()[0])}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
