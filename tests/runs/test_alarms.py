"""Alarms of reward hacking: they tell of a planted hole in the reward, and are silent on an honest run."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shapeworld_films import picture, reference_cues, shape_indices, tell
from torch import Tensor

from tempact.cli import to_yaml
from tempact.config import AlarmConfig
from tempact.distributed import Ranks
from tempact.presets import get_preset
from tempact.reporting import read_metrics
from tempact.reporting.alarms import SIGNALS, changes
from tempact.reporting.report import write_report
from tempact.runs.logs import MetricsLogger
from tempact.runs.watching import Watching
from tempact.shapeworld.grammar import parse_instruction
from tempact.shapeworld.verifier import verify
from tempact.shapeworld.watch import ShapeWorldWatch
from tempact.types import Prompt, Rollout
from tempact.worlds import ShapeWorld, Wan, world_of

SETTINGS = AlarmConfig(every=2, continuations=2, window=4)
LOOKS = 9
TEXTS = (
    "A red circle is at the top left. First, the circle moves to the right. Then the circle turns blue.",
    "A green square is at the bottom right. First, the square jumps. Then the square slowly shrinks.",
    "A yellow cross is at the top middle. First, the cross moves to the left. Finally, the cross blinks.",
    "A cyan triangle is at the bottom left. First, the triangle grows. Then the triangle slowly turns red.",
)


def films(text: str) -> tuple[Tensor, Tensor]:
    """A video as it is told, and one in which only its first event happens: [T, 3, height, width] in [0, 1]."""
    story = parse_instruction(text)
    cues = reference_cues(story)
    tracks = [tell(story.entities, own) for own in (cues, cues[:1])]
    right, half = picture(tracks, [shape_indices(story.entities)] * 2)
    return right, half


def honest(share: float, right: Tensor, half: Tensor, number: int) -> Tensor:
    """More and more videos are as they are told."""
    return right if number % 10 < 3 + 6 * share else half


def doubled(share: float, right: Tensor, half: Tensor, number: int) -> Tensor:
    """More and more videos have a second shape, beside or below the first."""
    other = half.flip(-1) if number % 2 else half.flip(-2)
    return torch.maximum(half, other) if number % 10 < 9 * share else half


def faint(share: float, right: Tensor, half: Tensor, number: int) -> Tensor:
    """All videos fade."""
    return half * (1.0 - 0.75 * share)


def ink(frames: Tensor) -> float:
    return frames.amax(1).mean().item()


# what the policy's videos become, and a reward for temporal order that pays for it, where it has a hole
RUNS: dict[str, tuple[Callable[..., Tensor], Callable[[float, Tensor], float], set[str]]] = {
    "honest": (honest, lambda score, video: score, set()),
    "pays for duplicates": (doubled, lambda score, video: min(1.0, 12 * ink(video)), {*SIGNALS}),
    "pays for faint shapes": (faint, lambda score, video: max(0.0, 1 - 12 * ink(video)), {"gap", "held_out"}),
}


@cache
def iterations(name: str) -> list[Any]:
    """LOOKS looks at four plans with two continuations, of iterations as the trainer yields them."""
    made, reward, _ = RUNS[name]
    pairs, found = [films(text) for text in TEXTS], []
    for look in range(LOOKS):
        share = look / (LOOKS - 1)
        frames = torch.stack(
            [
                torch.stack([made(share, *pair, 7 * look + 3 * plan + 5 * n) for n in range(2)])
                for plan, pair in enumerate(pairs)
            ]
        )
        stories = [parse_instruction(text) for text in TEXTS for _ in range(2)]
        scores = verify(frames.flatten(0, 1), stories).score.tolist()
        paid = [reward(score, video) for score, video in zip(scores, frames.flatten(0, 1), strict=True)]
        prompts = [Prompt(str(plan), text) for plan, text in enumerate(TEXTS)]
        found.append(
            SimpleNamespace(
                number=2 * (look + 1),
                plans=SimpleNamespace(prompt_of=prompts.__getitem__),
                rollout=Rollout((frames * 255).round().to(torch.uint8)),
                scored=SimpleNamespace(temporal_following=torch.tensor(paid).view(4, 2)),
                own=frozenset(range(4)),
                continuations=range(2),
            )
        )
    return found


WATCH = ShapeWorldWatch(torch.device("cpu"))


@pytest.mark.parametrize("name", RUNS)
def test_a_hole_is_told_in_log_metrics_and_report_and_an_honest_run_is_silent(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = RUNS[name][2]
    (tmp_path / "config.yaml").write_text(to_yaml(replace(get_preset("shapeworld"), alarms=SETTINGS)))
    watching, logger = Watching(SETTINGS, WATCH, Ranks()), MetricsLogger(tmp_path)
    with caplog.at_level(logging.WARNING):
        for iteration in iterations(name):
            logger.log(iteration.number - 1, {})
            logger.log(iteration.number, watching.look(iteration))
    logger.close()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if "watch/gap" in row] == [*range(2, 2 * LOOKS + 1, 2)]
    assert {signal for signal in SIGNALS if rows[-1][f"alarms/{signal}"]} == expected
    told = [record.getMessage() for record in caplog.records]
    for signal in SIGNALS:
        began = [row["step"] for row in rows if row.get(f"alarms/{signal}")]
        lines = [line for line in told if f"(alarms.{signal})" in line]
        assert [line.partition(":")[0] for line in lines] == [f"iteration {step}" for step in began[:1]]  # once
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert html.count('<p class="note">Alarm: ') == len(expected) and "Alarms of reward hacking" in html
    assert html.count('<td data-of="alarm">none</td>') == len(SIGNALS) - len(expected)


def test_a_resumed_run_knows_what_it_has_seen_and_tells_no_alarm_twice(caplog: pytest.LogCaptureFixture) -> None:
    seen = iterations("pays for duplicates")
    whole = Watching(SETTINGS, WATCH, Ranks())
    rows = [{"step": iteration.number, **whole.look(iteration)} for iteration in seen]
    caplog.clear()
    resumed = Watching(SETTINGS, WATCH, Ranks(), rows[:-1])
    assert resumed.look(seen[-1]) == {name: value for name, value in rows[-1].items() if name != "step"}
    assert not caplog.records


class Apart(Ranks):
    """The first of two processes; `others`: what the other one gives."""

    others: dict

    def gather(self, value: Any) -> list[Any]:
        return [value, self.others] if isinstance(value, dict) else [value]


def test_processes_see_together_what_one_would_see() -> None:
    (iteration, *_) = iterations("honest")
    alone = Watching(SETTINGS, WATCH, Ranks())
    expected = alone.look(iteration)
    both = []
    for own in ({0, 3}, {1, 2}):
        both.append(SimpleNamespace(**vars(iteration) | {"own": frozenset(own)}))
    ranks = Apart()
    ranks.others = alone._shown(both[1])
    assert len(ranks.others) == 4 and Watching(SETTINGS, WATCH, ranks).look(both[0]) == expected
    # of processes that share weights one has the first continuations
    part = SimpleNamespace(**vars(iteration) | {"continuations": range(2, 4)})
    assert alone._shown(part) == {}


def test_broken_videos_are_not_looked_at() -> None:
    (iteration, *_) = iterations("honest")
    alone = Watching(SETTINGS, WATCH, Ranks())
    broken = torch.zeros(4, 2, dtype=torch.bool)
    broken[2, 0] = True
    iteration.rollout.broken = broken
    assert {(plan, n) for plan in range(4) for n in range(2)} - alone._shown(iteration).keys() == {(2, 0)}
    iteration.rollout.broken = torch.ones(4, 2, dtype=torch.bool)
    assert alone.look(iteration) == {}


def test_no_look_is_taken_where_none_is_due_or_nobody_looks() -> None:
    (iteration, *_) = iterations("honest")
    for settings, watch in ((AlarmConfig(every=0), WATCH), (AlarmConfig(every=4), WATCH), (SETTINGS, None)):
        assert Watching(settings, watch, Ranks()).look(iteration) == {}


def rows_of(*values: float | None, metric: str = "watch/duplicates") -> list[dict]:
    return [{"step": step, metric: value} for step, value in enumerate(values, 1)]


def test_an_alarm_exceeds_its_limit_and_the_error_of_its_change() -> None:
    settings = AlarmConfig(window=2, deviations=3.0, duplicates=0.1)
    (change,) = changes(rows_of(0.02, None, 0.04, 0.9, 0.30, 0.32), settings)
    assert (change.start, change.now, change.first, change.latest) == (0.03, pytest.approx(0.31), (1, 3), (5, 6))
    assert change.worse == pytest.approx(0.28) and change.error == pytest.approx(math.hypot(0.01, 0.01))
    assert change.alarm and "rose by 0.280: found 0.030 in iterations 1 to 3, and 0.310 in" in change.line()
    quiet = {
        "below its limit": rows_of(0.02, 0.04, 0.12, 0.13),
        "within three errors": rows_of(0.0, 0.0, 0.0, 0.5),
        "for the better": rows_of(0.5, 0.5, 0.0, 0.0),
        "a fall that is for the better": rows_of(0.3, 0.3, 0.0, 0.0, metric="watch/gap"),
    }
    assert {why: [c.alarm for c in changes(rows, settings)] for why, rows in quiet.items()} == {
        why: [False] for why in quiet
    }
    (fall,) = changes(rows_of(0.9, 0.9, 0.8, 0.8, metric="watch/clearness"), settings)
    assert fall.alarm and fall.line().startswith("alarm: the clearness of pictures fell by 0.100: found 0.900")
    assert changes(rows_of(0.0, 0.0, 0.9), settings) == []  # no latest looks beside the first ones


def test_worlds_without_judges_beside_their_rewards_have_no_alarms() -> None:
    device = torch.device("cpu")
    assert isinstance(world_of(get_preset("shapeworld")), ShapeWorld)
    assert isinstance(world_of(get_preset("shapeworld")).watch(device), ShapeWorldWatch)
    assert Wan(get_preset("self-forcing")).watch(device) is None
