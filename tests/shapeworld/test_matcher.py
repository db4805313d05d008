"""The held-out judge: what it learns from, how it is kept, and what the shipped weights can tell apart."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tempact.errors import UserError
from tempact.shapeworld import pretraining as training
from tempact.shapeworld.grammar import sample_story, write_instruction
from tempact.shapeworld.matcher import PAD, WEIGHTS, JudgeConfig, JudgeModel, ShapeWorldJudge
from tempact.shapeworld.pretraining.clips import NONE
from tempact.shapeworld.pretraining.matcher import (
    CORRUPTIONS,
    JudgeCourse,
    corrupt,
    draw_corrupted,
    fit_tokenizer,
    told_stories,
)
from tempact.shapeworld.pretraining.matcher_clips import Performance, StoryTable, perform
from tempact.shapeworld.story import FRAMES, Story, entity_track, states

VIDEOS = 64  # a kind of corruption
TRUTH = 0.95  # least mean score of ground truth
# kind of fault -> least difference of its mean score to that of ground truth
MARGINS = {
    "shuffled": 0.25, "missing": 0.3, "cut": 0.25, "overlapping": 0.2, "pace": 0.25, "argument": 0.25,
    "duplicated": 0.35, "misplaced": 0.35, "frozen": 0.8,
}  # fmt: skip


def render(stories: list[Story], kind: str, rng: random.Random) -> tuple[Tensor, Tensor, list[str]]:
    """Frames and targets of stories corrupted in one way, and the kinds that came of it."""
    shows = [corrupt(story, kind, rng) for story in stories]
    return draw_corrupted(shows), torch.tensor([show.target for show in shows]), [show.kind for show in shows]


@pytest.fixture(scope="module")
def judge() -> ShapeWorldJudge:
    return ShapeWorldJudge.load(WEIGHTS)


@pytest.fixture(scope="module")
def held_out() -> tuple[list[Story], list[str]]:
    """Stories of 1 to 4 events whose event sequences no training saw, and their instructions."""
    rng = random.Random(11)
    stories = [sample_story(rng, "test", 1 + i % 4) for i in range(VIDEOS)]
    return stories, [write_instruction(story, rng) for story in stories]


@pytest.fixture(scope="module")
def scored(judge: ShapeWorldJudge, held_out: tuple[list[Story], list[str]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Kind -> scores and targets, over stories that offer this kind of fault."""
    stories, texts = held_out
    rng, table = random.Random(12), {}
    for kind in CORRUPTIONS:
        frames, targets, kinds = render(stories, kind, rng)
        own = torch.tensor([found == kind for found in kinds])
        table[kind] = (judge.score(frames, texts)[own], targets[own])
    return table


def test_ground_truth_scores_high(scored: dict[str, tuple[Tensor, Tensor]]) -> None:
    scores, targets = scored["truth"]
    assert (targets == 1).all()
    assert scores.mean() > TRUTH
    assert scores.quantile(0.1) > 0.85


@pytest.mark.parametrize("kind", MARGINS)
def test_faults_score_lower(scored: dict[str, tuple[Tensor, Tensor]], kind: str) -> None:
    assert scored["truth"][0].mean() - scored[kind][0].mean() > MARGINS[kind]


def test_scores_follow_the_share_told_right(scored: dict[str, tuple[Tensor, Tensor]]) -> None:
    scores, targets = (torch.cat(column) for column in zip(*scored.values(), strict=True))
    assert torch.corrcoef(torch.stack([scores, targets]))[0, 1] > 0.9


def test_slight_faults_of_generated_videos_are_forgiven(
    judge: ShapeWorldJudge, held_out: tuple[list[Story], list[str]]
) -> None:
    stories, texts = held_out
    frames, _, _ = render(stories, "truth", random.Random(13))
    kernel = torch.tensor([0.15, 0.7, 0.15])
    blur = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    soft = F.conv2d(frames.flatten(0, 1), blur, padding=1, groups=3).view_as(frames)
    noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(14))
    assert judge.score((soft + 0.04 * noise).clamp(0, 1), texts).mean() > 0.9
    assert judge.score((frames + 0.4 * noise).clamp(0, 1), texts).mean() < 0.6


def test_the_text_of_another_story_scores_near_zero(
    judge: ShapeWorldJudge, held_out: tuple[list[Story], list[str]]
) -> None:
    stories, texts = held_out
    frames, _, _ = render(stories, "truth", random.Random(15))
    assert judge.score(frames, [*texts[1:], texts[0]]).mean() < 0.15


def test_a_score_does_not_depend_on_the_rest_of_the_batch(
    judge: ShapeWorldJudge, held_out: tuple[list[Story], list[str]]
) -> None:
    stories, texts = held_out
    frames, _, _ = render(stories[:8], "missing", random.Random(16))
    together = judge.score(frames, texts[:8])
    alone = torch.cat([judge.score(frames[i : i + 1], [texts[i]]) for i in range(8)])
    assert len({len(text.split()) for text in texts[:8]}) > 1
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def small_judge() -> ShapeWorldJudge:
    torch.manual_seed(0)
    tokenizer = fit_tokenizer([text for _, text in told_stories(0, 64)])
    return ShapeWorldJudge(JudgeModel(JudgeConfig(tokenizer.get_vocab_size(), text_tokens=96, dim=32)), tokenizer)


def test_saved_and_loaded_judges_agree(tmp_path: Path, held_out: tuple[list[Story], list[str]]) -> None:
    stories, texts = held_out
    frames, _, _ = render(stories[:4], "truth", random.Random(17))
    judge = small_judge()
    judge.save(tmp_path)
    kept = ShapeWorldJudge.load(tmp_path).score(frames, texts[:4])
    torch.testing.assert_close(kept, judge.score(frames, texts[:4]), atol=2e-3, rtol=0)


def test_bad_input_is_named(tmp_path: Path) -> None:
    judge = small_judge()
    with pytest.raises(UserError, match=r"judge\.safetensors: not found"):
        ShapeWorldJudge.load(tmp_path)
    with pytest.raises(UserError, match="instruction 1: found 97 words"):
        judge.tokenize(["the circle jumps", "jumps " * 97])
    with pytest.raises(UserError, match="instruction 0: found 0 words"):
        judge.tokenize([""])


@pytest.fixture(scope="module")
def shows() -> tuple[list[Story], Performance]:
    """500 training performances of their own stories."""
    pairs = told_stories(5, 500)
    table = StoryTable.build([story for story, _ in pairs], torch.full((len(pairs), 1), PAD + 1))
    return [story for story, _ in pairs], perform(table, torch.Generator().manual_seed(6))


def begun(show: Performance, video: int) -> list[tuple[int, int]]:
    """Kind and frames of what goes on in either row, in the order of beginning."""
    runs = []
    for row in range(2):
        busy = show.busy[video, :, row].tolist()
        starts = [t for t in range(FRAMES) if busy[t] != NONE and (t == 0 or busy[t] != busy[t - 1])]
        runs += [(t, busy[t], next((u for u in range(t, FRAMES) if busy[u] != busy[t]), FRAMES) - t) for t in starts]
    return [(kind, length) for _, kind, length in sorted(runs)]


def test_performances_with_full_score_tell_the_story(shows: tuple[list[Story], Performance]) -> None:
    stories, show = shows
    perfect = [video for video in range(len(stories)) if show.target[video] == 1]
    assert 150 < len(perfect) < 350
    for video in perfect:
        story = stories[video]
        assert show.told[video].sum() == len(story.events)
        assert [kind for kind, _ in begun(show, video)] == show.kinds[video][: len(story.events)].tolist()
        assert [length > 6 for _, length in begun(show, video)] == [event.slow for event in story.events]
        for entity in states(story)[-1]:
            track, settled = show.state[video, -1, entity.row], torch.tensor(entity_track(entity))
            torch.testing.assert_close(track[3], settled[3])
            if entity.visible:
                torch.testing.assert_close(track, settled)


def test_performances_without_full_score_lack_something(shows: tuple[list[Story], Performance]) -> None:
    stories, show = shows
    counts = torch.tensor([len(story.events) for story in stories])
    assert (show.target <= show.told.sum(1) / counts + 1e-6).all()
    assert (show.target[show.told.sum(1) == 0] == 0).all()
    assert ((show.target > 0) & (show.target < 1)).float().mean() > 0.25


class Interrupted(Exception):
    """Stands for a killed process."""


def test_interrupted_training_ends_like_an_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)

    monkeypatch.setattr(JudgeCourse, "batch", 4)
    monkeypatch.setattr(JudgeCourse, "figures", lambda *_: {})

    class Stopping(JudgeCourse):
        calls = 0

        def loss(self, generator: torch.Generator) -> Tensor:
            self.calls += 1
            if self.calls == 4:
                raise Interrupted
            return super().loss(generator)

    training.train(JudgeCourse(3, "cpu", stories=64), tmp_path / "whole", 5, resume=False)
    with pytest.raises(Interrupted):
        training.train(Stopping(3, "cpu", stories=64), tmp_path / "broken", 5, resume=False)
    assert not (tmp_path / "broken" / "judge.safetensors").exists()
    training.train(JudgeCourse(3, "cpu", stories=64), tmp_path / "broken", 5, resume=True)
    whole, broken = ((tmp_path / name / "judge.safetensors").read_bytes() for name in ("whole", "broken"))
    assert whole == broken
