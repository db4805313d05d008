"""The judges that were asked for: behind the servers of the environment, and PickScore."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from tempact.config import JudgeSettings
from tempact.errors import UserError
from tempact.rewards.judge_config import ROLES as FALLBACKS
from tempact.temporal_order.judging import PickScoreJudge, ServedJudge, VideoJudge
from tempact.temporal_order.options import ROLES


@contextmanager
def served_judges(names: Sequence[str], settings: JudgeSettings) -> Iterator[list[VideoJudge]]:
    """The asked judges behind one client; its cache of replies is that of training.

    UserError where the environment does not say where a judge is, or names one model for both judges.
    """
    if not names:
        yield []
        return
    from tempact.rewards.judge_client import JudgeClient
    from tempact.rewards.real import judge_config

    config = judge_config(settings, {ROLES[name]: FALLBACKS.get(ROLES[name], "") for name in names})
    models = {name: config.roles[ROLES[name]][0].model for name in dict.fromkeys(names)}
    if len(set(models.values())) < len(models):
        accepted = "another model for the held-out judge: TEMPACT_JUDGE_HELD_OUT_BASE_URL, _MODEL and _API_KEY"
        raise UserError(f"--judge: found {next(iter(models.values()))!r} for all judges; accepted: {accepted}")
    with JudgeClient(config) as client:
        yield [ServedJudge(name, model, client) for name, model in models.items()]


def load_pickscore(settings: JudgeSettings, device: torch.device) -> list[VideoJudge]:
    """PickScore as in training, of the frames and prompts of the benchmark. UserError if it cannot be had."""
    from tempact.rewards.real import open_scorer  # late: it needs transformers' CLIP

    return [PickScoreJudge(settings.aesthetics_weights, open_scorer(settings, device))]
