"""Timelines: what moves when."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from shapeworld_films import reference_cues, tell

from tempact.executor.rollout import smooth_prompts
from tempact.shapeworld.grammar import parse_instruction, sample_story, split_of
from tempact.shapeworld.pretraining import clips as timelines
from tempact.shapeworld.pretraining.clips import Cue, relaxed_cues, sample_clip
from tempact.shapeworld.pretraining.matcher import CORRUPTIONS, corrupt, draw_corrupted
from tempact.shapeworld.story import (
    CHUNK,
    CHUNKS,
    COLOUR,
    COLOURS,
    FRAMES,
    JUMP_HEIGHT,
    OPACITY,
    RADII,
    RADIUS,
    Entity,
    Event,
    X,
    Y,
    coverage,
    draw,
    entity_track,
    states,
)

ENTITY = Entity("circle", "red", 0, 0)


def test_a_quick_move_takes_one_chunk_and_a_slow_one_three() -> None:
    for slow, frames in ((False, 3), (True, 9)):
        x = tell([ENTITY], [Cue(Event("move", 0, "right", slow), 6)])[:, 0, X]
        assert np.allclose(x[:6], 4) and np.allclose(x[6 + frames - 1 :], 20)
        assert np.allclose(np.diff(x[5 : 6 + frames]), 16 / frames)


def test_jump_and_blink_come_back() -> None:
    y = tell([ENTITY], [Cue(Event("jump", 0), 3)])[:, 0, Y]
    assert np.allclose(y[3:5], 7 - JUMP_HEIGHT) and np.allclose(np.delete(y, [3, 4]), 7)
    opacity = tell([ENTITY], [Cue(Event("blink", 0), 3)])[:, 0, OPACITY]
    assert opacity.tolist() == [1.0] * 3 + [0.0, 0.0] + [1.0] * 19


def test_an_event_that_is_cut_stays_as_far_as_it_came() -> None:
    colour = tell([ENTITY], [Cue(Event("turn", 0, "blue", slow=True), 3, 6)])[:, 0, COLOUR:]
    assert np.allclose(colour[-1], [2 / 3, 0, 1 / 3])
    assert np.allclose(tell([ENTITY], [Cue(Event("turn", 0, "blue"), 6, 6)])[:, 0, COLOUR:], COLOURS["red"])


def test_a_story_ends_in_its_last_state() -> None:
    rng = random.Random(0)
    for _ in range(100):
        story = sample_story(rng, "train", category="hard")
        tracks = tell(story.entities, reference_cues(story))
        for i, entity in enumerate(states(story)[-1]):
            end = np.array(entity_track(entity))
            if not entity.visible:
                end = np.where(np.arange(7) == OPACITY, 0, tracks[-1, i])
            assert np.allclose(tracks[-1, i], end, atol=1e-5)


def test_relaxed_timing_keeps_order_and_pace() -> None:
    rng = random.Random(3)
    onsets = set()
    for _ in range(200):
        story = sample_story(rng, "train", category="hard")
        cues = relaxed_cues(story, rng)
        assert [cue.event for cue in cues] == list(story.events)
        ends = [CHUNK, *(cue.start + cue.event.frames for cue in cues)]
        assert all(cue.start >= end and cue.start % CHUNK == 0 for cue, end in zip(cues, ends, strict=False))
        assert ends[-1] <= FRAMES
        onsets.add(cues[0].start)
    assert len(onsets) > 3


def test_pretraining_clips_come_from_the_training_split_and_open_as_their_captions_say() -> None:
    rng = random.Random(4)
    radii = set()
    for _ in range(300):
        clip = sample_clip(rng)
        radii |= set(timelines.tell([clip.scene])[0, 0, :, RADIUS].tolist())
        if len(set(clip.captions)) == 1:
            assert split_of(parse_instruction(clip.captions[0])) == "train"
    assert radii == {0.0, RADII["normal"]}  # no caption names a size; 0 is the track of an absent entity


def test_pretraining_clips_react_late_and_are_captioned_by_the_chunk() -> None:
    rng = random.Random(0)
    clips = [sample_clip(rng) for _ in range(1500)]
    whole = [clip for clip in clips if len(set(clip.captions)) == 1]
    assert 0.30 < len(whole) / len(clips) < 0.42
    lags = []
    for clip in clips:
        assert len(clip.captions) == CHUNKS
        if len(set(clip.captions)) != 2:
            continue
        switch = clip.captions.index(clip.captions[-1])
        moving = np.abs(np.diff(tell(*clip.scene), axis=0)).max((1, 2)) > 1e-6
        first = (np.flatnonzero(moving)[0] + 1) // CHUNK if moving.any() else CHUNKS
        lags.append(first - switch)
    counts = [lags.count(lag) / len(lags) for lag in (0, 1, 2)]
    assert min(lags) >= 0
    assert all(abs(got - wanted) < 0.08 for got, wanted in zip(counts, (0.45, 0.35, 0.20), strict=True))


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_lower_the_target(kind: str) -> None:
    rng = random.Random(0)
    made = [corrupt(sample_story(rng, "train", category="hard"), kind, rng) for _ in range(60)]
    own = [one.target for one in made if one.kind == kind]
    assert len(own) > 5
    assert all(target == 1.0 for target in own) if kind == "truth" else max(own) < 1.0
    changed = (
        (draw_corrupted(made) - draw_corrupted([one._replace(copy=None) for one in made])).abs().amax((1, 2, 3, 4))
    )
    assert ((changed > 0.5) == (kind == "duplicated")).all()


def test_scenes_told_together_are_those_told_alone() -> None:
    """Also where their events differ in number and overlap."""
    rng = random.Random(6)
    scenes = [sample_clip(rng).scene for _ in range(60)] + [([ENTITY], [])]
    together = timelines.tell(scenes)
    assert together.shape == (61, FRAMES, 2, 7)
    for scene, tracks in zip(scenes, together.numpy(), strict=True):
        assert np.array_equal(tell(*scene), tracks)


def test_an_event_of_a_hidden_entity_happens_unseen() -> None:
    hidden = Entity("circle", "red", 0, 0, visible=False)
    tracks = tell([hidden], [Cue(Event("move", 0, "right"), 3), Cue(Event("appear", 0), 9)])
    assert np.allclose(tracks[11:, 0, X], 20) and np.allclose(tracks[:9, 0, OPACITY], 0)


def test_drawing_covers_the_right_pixels() -> None:
    for shape in range(4):
        track = torch.tensor([[12.0, 12.0, 4.0, 1.0, 1.0, 0.0, 0.0]])
        mask = coverage(track, torch.tensor([shape]))[0]
        assert mask[12, 12] == 1 and mask[0].sum() == 0 and mask[:, :6].sum() == 0
        area = {0: 50.3, 1: 51.8, 2: 33.0, 3: 38.0}[shape]
        assert abs(mask.sum() - area) < 4
        assert torch.allclose(mask, mask.flip(1), atol=1e-5)
    both = torch.tensor([[12.0, 12, 4, 1, 1, 0, 0], [12.0, 12, 2, 0.5, 0, 0, 1]])
    picture = draw(both, torch.tensor([0, 0]))
    assert torch.allclose(picture[:, 12, 12], torch.tensor([0.5, 0.0, 0.5]))
    assert picture[:, 0, 0].sum() == 0


def test_smoothing_appends_the_raw_next_prompt() -> None:
    raw = ["A.", "B.", "C."]
    assert smooth_prompts(raw) == ["A. Next: B.", "B. Next: C.", "C."]
    assert raw == ["A.", "B.", "C."]
    assert smooth_prompts(["A."]) == ["A."]
