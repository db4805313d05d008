"""Frame picks stay in their window and hold its ends (invariant 28); pictures arrive as they were."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rewards.reward_cases import picture_of

from tempact.rewards import jpegs, media_hash, pixel_window, spread


@given(st.integers(0, 500), st.integers(0, 500), st.integers(2, 40))
def test_picks_hold_both_ends_rise_and_are_even(first: int, length: int, count: int) -> None:
    picks = spread(first, first + length, count)
    assert picks[0] == first and picks[-1] == first + length
    assert len(picks) == min(count, length + 1)
    gaps = [b - a for a, b in pairwise(picks)]
    assert all(gap >= 1 for gap in gaps) and (not gaps or max(gaps) - min(gaps) <= 1)


def test_picks_of_the_published_length_reach_the_tail() -> None:
    assert spread(0, 116, 6) == [0, 23, 46, 70, 93, 116]  # a stride of 117 // 6 would end at 95
    assert spread(21, 44, 8) == [21, 24, 28, 31, 34, 37, 41, 44]
    assert spread(7, 7, 6) == [7]


def test_a_latent_window_in_pixel_frames() -> None:
    assert pixel_window(6, 12, 30, 117) == (4 * 5 + 1, 4 * 6 + 20)  # 4(s-1)+1 .. 24 frames
    assert pixel_window(0, 6, 30, 117) == (0, 20)
    assert pixel_window(27, 30, 30, 117) == (105, 116)
    assert pixel_window(3, 6, 24, 24) == (3, 5)  # a codec that makes one frame of one
    assert pixel_window(0, 1, 1, 1) == (0, 0)


@given(st.integers(1, 40), st.integers(1, 8), st.data())
def test_windows_of_a_plan_cover_the_video_once(frames: int, rate: int, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, frames), max_size=5)) | {frames})
    pixel_frames = rate * (frames - 1) + 1
    windows = [pixel_window(a, b, frames, pixel_frames) for a, b in pairwise([0, *cuts])]
    assert [t for first, last in windows for t in range(first, last + 1)] == list(range(pixel_frames))


def test_a_length_that_no_codec_makes_is_an_error() -> None:
    with pytest.raises(AssertionError, match="118 pixel frames of 30"):
        pixel_window(0, 3, 30, 118)


def test_pictures_are_sent_in_order_and_as_they_were() -> None:
    rows = torch.linspace(0, 255, 64).view(1, 1, 64, 1)
    frames = (rows * torch.tensor([0.2, 0.6, 1.0]).view(3, 1, 1, 1)).repeat(1, 3, 1, 96).to(torch.uint8)
    frames[:, 0] = 255 - frames[:, 0]
    files = jpegs(frames)
    assert all(file[:3] == b"\xff\xd8\xff" for file in files)
    for file, frame in zip(files, frames, strict=True):
        assert (picture_of(file).float() - frame.float()).abs().mean() < 2.0
    assert jpegs(frames) == files  # the cache of replies lives on that


def test_the_hash_of_media_sees_content_and_order() -> None:
    one, two = b"one", b"two"
    assert media_hash((one, two)) == media_hash((one, two))
    assert len({media_hash(media) for media in [(one, two), (two, one), (one,), (b"onetwo",), (b"on", b"etwo")]}) == 5
