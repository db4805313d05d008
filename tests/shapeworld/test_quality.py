"""Picture quality, clearness and the count of extra and misplaced shapes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from shapeworld_films import picture, shape_indices, tell
from torch import Tensor

from tempact.shapeworld.grammar import sample_story
from tempact.shapeworld.matcher import clearness
from tempact.shapeworld.pretraining.clips import relaxed_cues
from tempact.shapeworld.pretraining.matcher import corrupt, draw_corrupted
from tempact.shapeworld.story import CHUNK, Entity, Event, Story
from tempact.shapeworld.verifier import duplicates, picture_quality


@pytest.fixture(scope="module")
def stories() -> list[Story]:
    rng = random.Random(5)
    return [sample_story(rng, "train", None, category=rng.choice(("simple", "hard"))) for _ in range(60)]


@pytest.fixture(scope="module")
def truth(stories: list[Story]) -> Tensor:
    rng = random.Random(6)
    return picture(
        [tell(s.entities, relaxed_cues(s, rng)) for s in stories], [shape_indices(s.entities) for s in stories]
    )


def noise(frames: Tensor, strength: float) -> Tensor:
    dots = torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    return (frames + strength * dots).clamp(0.0, 1.0)


def blur(frames: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(frames.flatten(0, 1), 3, 1, 1).view_as(frames)


def test_clean_drawings_are_clean_in_every_phase_of_an_event(truth: Tensor) -> None:
    quality = picture_quality(truth)
    assert quality.shape == truth.shape[:2]
    assert quality.min() > 0.94 and quality.quantile(0.01) > 0.97 and quality.max() <= 1.0


DAMAGE: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "noise": (lambda f: noise(f, 0.1), 0.45),
    "strong noise": (lambda f: noise(f, 0.2), 0.15),
    "blur": (blur, 0.75),
    "smear": (lambda f: torch.maximum(f, 0.5 * f.roll(3, -1)), 0.55),
    "ghost": (lambda f: torch.maximum(f, 0.5 * f.roll(9, -1)), 0.5),
    "tint": (lambda f: (f + 0.1).clamp(0.0, 1.0), 0.3),
    "white noise": (lambda f: torch.rand(f.shape, generator=torch.Generator().manual_seed(0)), 0.02),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_lowers_quality(name: str, truth: Tensor) -> None:
    change, most = DAMAGE[name]
    full = truth.amax((2, 3, 4)) > 0.9  # an empty frame has nothing to smear
    assert picture_quality(change(truth))[full].mean() < most


CLEAR: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "noise": (lambda f: noise(f, 0.05), 0.8),
    "strong noise": (lambda f: noise(f, 0.2), 0.2),
    "blur": (blur, 0.8),
    "smear": (lambda f: torch.maximum(f, 0.5 * f.roll(3, -1)), 0.7),
    "ghost": (lambda f: torch.maximum(f, 0.5 * f.roll(9, -1)), 0.55),
    "tint": (lambda f: (f + 0.1).clamp(0.0, 1.0), 0.6),
    "white noise": (lambda f: torch.rand(f.shape, generator=torch.Generator().manual_seed(0)), 0.01),
    "nothing": (torch.zeros_like, 0.0),
    "grey": (lambda f: torch.full_like(f, 0.5), 0.0),
}


@pytest.mark.parametrize("name", CLEAR)
def test_damage_lowers_clearness(name: str, truth: Tensor) -> None:
    change, most = CLEAR[name]
    found = clearness(change(truth))
    assert found.shape == truth.shape[:1] and found.min() >= 0.0 and found.max() <= 1.0 and found.mean() <= most


def test_exact_drawings_are_clear_in_every_phase_of_an_event(truth: Tensor) -> None:
    found = clearness(truth)
    assert found.min() > 0.95 and found.mean() > 0.98 and found.max() <= 1.0
    torch.testing.assert_close(clearness(truth[20:21]), found[20:21], atol=1e-5, rtol=0.0)  # whatever the batch


def test_what_raises_the_reward_without_a_better_picture_does_not_raise_clearness(truth: Tensor) -> None:
    """Fainter and emptier pictures, and colours that the world has not, are clean to picture quality."""
    worn = noise(truth[:24], 0.04)
    faint, half_empty = 0.3 * truth[:24], worn.clone()
    half_empty[:, ::2] = 0.0
    assert picture_quality(noise(faint, 0.04)).mean() >= picture_quality(worn).mean() - 0.01
    assert clearness(noise(faint, 0.04)).mean() < clearness(worn).mean() - 0.2
    assert picture_quality(half_empty).mean() > picture_quality(worn).mean() + 0.1
    assert clearness(half_empty).mean() == pytest.approx(clearness(worn).mean().item(), abs=0.03)
    assert picture_quality(torch.zeros_like(truth[:1])).min() == 1.0 and clearness(torch.zeros_like(truth[:1])) == 0.0
    white = truth[:24, :, [0, 0, 0]]
    seen = white.amax((1, 2, 3, 4)) > 0
    assert picture_quality(white[seen]).mean() > 0.97 and clearness(white[seen]).mean() < 0.5


def test_quality_falls_with_the_damage(truth: Tensor) -> None:
    means = [picture_quality(noise(truth[:16], s)).mean().item() for s in (0.0, 0.03, 0.06, 0.12, 0.25)]
    assert all(b < a for a, b in pairwise(means))
    means = [picture_quality(truth[:16].lerp(blur(truth[:16]), s)).mean().item() for s in (0.0, 0.3, 0.6, 1.0)]
    assert all(b < a for a, b in pairwise(means))


def test_quality_reads_single_chunks(truth: Tensor) -> None:
    torch.testing.assert_close(
        picture_quality(truth[:, 6 : 6 + CHUNK]), picture_quality(truth)[:, 6 : 6 + CHUNK], atol=1e-4, rtol=0.0
    )


def test_duplicates_count_frames(stories: list[Story], truth: Tensor) -> None:
    assert duplicates(truth, stories).max() == 0.0
    assert duplicates(noise(truth, 0.06), stories).mean() < 0.01
    rng = random.Random(7)
    copies = [corrupt(story, "duplicated", rng) for story in stories]
    moved = [corrupt(story, "misplaced", rng) for story in stories]
    for made, share in ((copies, 0.5), (moved, 0.5)):
        assert duplicates(draw_corrupted(made), stories).mean() > share


def test_where_a_shape_may_stand() -> None:
    circle = Entity("circle", "red", 0, 0)
    story = Story((circle,), (Event("move", 0, "middle"),))

    def share(entities: tuple[Entity, ...], edit: Callable[[np.ndarray], None] = lambda tracks: None) -> float:
        tracks = tell(entities, [])
        edit(tracks)
        return duplicates(picture([tracks], [shape_indices(entities)]), [story]).item()

    def higher(tracks: np.ndarray) -> None:
        tracks[12:, 0, 1] -= 4.5

    def between(tracks: np.ndarray) -> None:
        tracks[18:, 0, 0] = 8.0

    assert share((circle,)) == 0.0
    assert share((replace(circle, column=1),)) == 0.0
    assert share((replace(circle, column=2),)) == 1.0
    assert share((replace(circle, row=1),)) == 1.0
    assert share((circle, Entity("square", "blue", 1, 1))) == 1.0
    assert share((circle,), higher) == 0.5
    assert 0.2 <= share((circle,), between) <= 0.25
