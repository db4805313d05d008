"""What a fork costs on the host, and what fork attention saves in memory."""

from __future__ import annotations

import pytest
import torch

from bench.attention_peers import sdpa
from bench.bench_fork_attention import make_inputs
from bench.harness import OURS, Bench
from bench.report import Row
from bench.timing import Spread, memory_of
from csrc_triton import ForkableKVCache, fork_attention

BRANCHES = 24
CONTEXT_FRAMES, CHUNK_FRAMES = 9, 3


def make_cache(bench: Bench) -> tuple[ForkableKVCache, int]:
    """A cache of all layers with a branch of nine latent frames, committed in chunks of three."""
    tokens, layers = bench.size(1560, 12), bench.size(30, 2)
    heads, head_dim = bench.size(12, 2), bench.size(128, 32)
    cache = ForkableKVCache(
        layers, heads, head_dim, rows=CONTEXT_FRAMES * tokens, dtype=torch.bfloat16, device=bench.device
    )
    root = cache.new_branch()
    for _ in range(CONTEXT_FRAMES // CHUNK_FRAMES):
        reservation = cache.reserve([root], CHUNK_FRAMES * tokens)
        reservation.mark_written()
        cache.commit(reservation)
    return cache, root


def test_fork(bench: Bench, request: pytest.FixtureRequest) -> None:
    """On the host's clock, so by pytest-benchmark; no byte may be copied."""
    if not request.config.pluginmanager.hasplugin("benchmark"):
        pytest.skip("needs pytest-benchmark: pip install -e '.[bench]'")
    benchmark = request.getfixturevalue("benchmark")
    cache, root = make_cache(bench)
    held = cache.nbytes, cache.rows_used
    allocated = torch.cuda.memory_allocated() if bench.real else 0
    forks: list[int] = []

    def release() -> None:
        while forks:
            cache.release(forks.pop())

    benchmark.pedantic(lambda: forks.extend(cache.fork(root, BRANCHES)), setup=release, rounds=100, warmup_rounds=3)
    assert len(forks) == BRANCHES
    assert (cache.nbytes, cache.rows_used) == held, "a fork took rows"
    assert not bench.real or torch.cuda.memory_allocated() == allocated, "a fork allocated device memory"
    row = Row("kv_cache", f"fork into {BRANCHES} branches on the host, {CONTEXT_FRAMES} context frames, 0 bytes", OURS)
    if benchmark.stats is not None:
        spread = Spread.of([seconds * 1e3 for seconds in benchmark.stats.stats.data])
        row = Row(*row.key, ms=spread.ms, p20=spread.p20, p80=spread.p80)
    bench.record([row])


def test_memory(bench: Bench) -> None:
    """Device memory beside the inputs while 24 branches attend to their shared context."""
    if not bench.real:
        pytest.skip("needs an NVIDIA GPU: device memory is measured")
    inputs = make_inputs(bench, BRANCHES)
    runs = {
        OURS: lambda: fork_attention(inputs.q, inputs.k, inputs.v, inputs.view),
        "expanded and concatenated keys": lambda: sdpa(inputs.q, *inputs.concatenated(), None),
    }
    case = f"peak extra memory, B={BRANCHES}, {inputs.past_k.shape[1]} shared + {inputs.q.shape[1]} own"
    rows = []
    for name, run in runs.items():
        before, most = memory_of(run, bench.device)
        rows.append(Row("kv_cache", case, name, mib=(most - before) / 2**20))
    bench.record(rows)
