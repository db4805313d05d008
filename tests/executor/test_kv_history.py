"""What a relative window costs: the turned sink is there once for all branches that share it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from csrc_triton import CacheView
from tempact.executor.executor import Executor
from tempact.executor.kv_history import KVHistory
from tempact.models.wan.transformer import TextKV

Make = Callable[..., Executor]
TOKENS = 4  # of a latent frame
FRAMES, CHUNK = 24, 3


def filled(executor: Executor, plans: int, fork: int, count: int) -> tuple[KVHistory, list[int], TextKV]:
    """`plans` videos of 15 frames that fork into `count` branches at frame `fork`."""
    history = executor.history()
    ids = [history.new_branch() for _ in range(plans)]
    with torch.no_grad():
        text = executor.model.project_text(executor.encode(["any"]))
        for start in range(0, 15, CHUNK):
            if start == fork:
                ids = [new for branch in ids for new in history.fork(branch, count)]
            own = text.select(torch.zeros(len(ids), dtype=torch.int64))
            history.commit(ids, torch.randn(len(ids), 3, CHUNK, 8, 8), own)
    return history, ids, text


def test_branches_of_a_plan_share_one_turned_sink(make_executor: Make) -> None:
    executor = make_executor(window="tempact-self-forcing", frames=FRAMES)
    cache = executor.cache
    for plans, fork, count, sinks in ((1, 6, 4, 1), (2, 6, 4, 2), (1, 0, 4, 4)):
        history, ids, _ = filled(executor, plans, fork, count)
        with history, torch.no_grad():
            context = history.context(ids, 15)
            kept = cache.rows_used
            assert len(cache.branches) == len(ids) + sinks
            assert history.context(ids, 15) is not None and cache.rows_used == kept  # turned once a chunk
            assert isinstance(context[0], CacheView) and context[0].gather()[0].shape[1] == 9 * TOKENS
        assert (cache.branches, cache.rows_used) == ((), 0)


def test_the_turned_sink_moves_with_the_video(make_executor: Make) -> None:
    """Its keys at every chunk are those at the position nine frames before the chunk; values stay."""
    executor = make_executor(window="tempact-self-forcing", frames=FRAMES)
    history, ids, text = filled(executor, 1, 3, 2)
    shares = text.select(torch.zeros(2, dtype=torch.int64))
    with history, torch.no_grad():
        plain = history.cache.views(ids, [(0, TOKENS)])
        for start in (15, 18):
            context = history.context(ids, start)
            for turned, stored in zip(context, plain, strict=True):
                keys, values = (x[:, :TOKENS] for x in turned.gather())
                at, own = stored.gather()
                # the first pair of a head's channels turns by one radian a frame
                angle, even, odd = torch.tensor(float(start - 9)), at[..., 0], at[..., 1]
                torch.testing.assert_close(keys[..., 0], even * angle.cos() - odd * angle.sin())
                torch.testing.assert_close(keys[..., 1], even * angle.sin() + odd * angle.cos())
                spatial = slice(-8, None)  # rows and columns stay where they are
                assert torch.equal(keys[..., spatial], at[..., spatial]) and torch.equal(values, own)
            history.commit(ids, torch.randn(2, 3, CHUNK, 8, 8), shares)
