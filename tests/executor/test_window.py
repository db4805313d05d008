"""The attended frames and positions of docs/backbones.md section 2."""

from __future__ import annotations

import pytest

from tempact.config import ROPE_POSITIONS
from tempact.errors import UserError
from tempact.executor.sampler import WINDOWS, WindowPolicy

C = 3
INFINITY_ROPE = WINDOWS["infinity-rope"]
# first recent frame that a chunk attends to behind the sink, by chunk index from 4 on
LONGLIVE = {4: 6, 5: 9, 6: 12, 7: 15}
TEMPACT = {4: 4, 5: 7, 6: 10, 7: 13}


@pytest.mark.parametrize("chunk", range(8))
def test_key_frames_of_every_chunk(chunk: int) -> None:
    start = chunk * C
    own = [start, start + 1, start + 2]
    everything = [*range(start + C)]
    assert WINDOWS["full"].attended(start, C) + own == everything
    assert WINDOWS["self-forcing"].attended(start, C) + own == everything
    longlive = everything if chunk < 4 else [0, 1, 2, *range(LONGLIVE[chunk], start + C)]
    assert WINDOWS["longlive"].attended(start, C) + own == longlive
    tempact = everything if chunk < 4 else [0, *range(TEMPACT[chunk], start + C)]
    assert WINDOWS["tempact-self-forcing"].attended(start, C) + own == tempact
    infinity = everything if chunk < 2 else [0, *range(start - 2, start + C)]
    assert INFINITY_ROPE.attended(start, C) + own == infinity


def renumbered(history: list[int], own: list[int]) -> tuple[list[int], list[int]]:
    """Counted from the first attended frame: RoPE sees nothing but differences."""
    return [position - history[0] for position in history], [position - history[0] for position in own]


def positions(window: WindowPolicy, start: int) -> tuple[list[int], list[int]]:
    """Of the attended frames and of the chunk's own."""
    return window.positions_of(window.attended(start, C), start, start + C), [start, start + 1, start + 2]


def recache_positions(window: WindowPolicy, start: int) -> tuple[list[int], list[int]]:
    """Of the sink frames that stay and of the rewritten ones."""
    frames = window.recached(start)
    return window.positions_of(list(range(min(window.sink, frames[0]))), frames[0], start), frames


def test_positions_absolute_and_relative() -> None:
    assert positions(WINDOWS["longlive"], 21) == ([0, 1, 2, *range(15, 21)], [21, 22, 23])
    relative = WINDOWS["tempact-self-forcing"]
    assert positions(relative, 9) == (list(range(9)), [9, 10, 11])  # as long as all fits: absolute
    for start in (12, 15, 27):
        assert renumbered(*positions(relative, start)) == (list(range(9)), [9, 10, 11])
    assert renumbered(*positions(INFINITY_ROPE, 6)) == ([0, 1, 2], [3, 4, 5])


def test_recached_frames_keep_the_sink_only_beyond_the_window() -> None:
    longlive = WINDOWS["longlive"]
    assert longlive.recached(6) == list(range(6))
    assert longlive.recached(12) == list(range(12))
    assert longlive.recached(15) == list(range(6, 15))
    for start in (3, 12, 15, 60):  # absolute: every frame keeps its own
        assert recache_positions(longlive, start) == ([0, 1, 2] if start > 12 else [], longlive.recached(start))
    infinite = WINDOWS["longlive-infinite"]
    assert infinite.recached(60) == list(range(51, 60)) and infinite.recached(12) == list(range(12))
    assert renumbered(*recache_positions(infinite, 60)) == ([0, 1, 2], list(range(3, 12)))
    assert recache_positions(infinite, 12) == ([], list(range(12)))


def test_lengths_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(UserError, match="executor.frames: found 20; accepted: a positive multiple of the chunk"):
        WINDOWS["full"].check(20, C)
    with pytest.raises(UserError, match="found 24; accepted: whole chunks of 3, at most 21"):
        WINDOWS["self-forcing"].check(24, C)
    WINDOWS["longlive"].check(240, C)


@pytest.mark.parametrize("name", WINDOWS)
def test_absolute_positions_end_and_relative_ones_do_not(name: str) -> None:
    window = WINDOWS[name]
    last = ROPE_POSITIONS // C * C
    if window.positions == "relative":
        window.check(100 * last, C)
        history, own = positions(window, 99 * last)
        assert own[-1] - history[0] == window.window - 1
    elif window.max_frames is None:
        window.check(last, C)
        with pytest.raises(
            UserError, match=f"found {last + C}; accepted: whole chunks of 3, at most {last} .*relative"
        ):
            window.check(last + C, C)
    else:
        with pytest.raises(UserError, match=f"found {last}; accepted: whole chunks of 3, at most {window.max_frames} "):
            window.check(last, C)


@pytest.mark.parametrize("chunk", [0, 10, 12])
def test_a_chunk_fits_into_the_window_beside_the_sink(chunk: int) -> None:
    with pytest.raises(
        UserError, match=f"executor.chunk_frames: found {chunk}; accepted: 1, 2, 3, 4, 5, 6, 8 with this window"
    ):
        WINDOWS["longlive"].check(120, chunk)
    WINDOWS["longlive"].check(117, 9)
    assert WINDOWS["longlive"].attended(18, 9) == [0, 1, 2]
