from __future__ import annotations

import argparse

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from bench.harness import Bench
from bench.tune import TABLES, Trial, candidates, tune
from csrc_triton.fork_attention.tiles import Tiling


def options(kernel: str, **changes: object) -> argparse.Namespace:
    few = {
        "queries": [16],
        "keys": [16, 32],
        "warps": [4],
        "stages": [1],
        "descriptors": False,
        "seconds": 0.0,
        "rounds": 1,
    }
    return argparse.Namespace(kernel=kernel, branches=1, **(few | changes))


def make_bench(printed: list[str]) -> Bench:
    return Bench(torch.device("cuda" if torch.cuda.is_available() else "cpu"), True, None, printed.append)


@pytest.mark.parametrize("kernel", TABLES)
def test_it_ranks_tilings_and_leaves_the_table_alone(kernel: str) -> None:
    printed: list[str] = []
    before = dict(TABLES[kernel])
    ranked = tune(make_bench(printed), options(kernel))
    assert TABLES[kernel] == before
    assert {tiling.keys for tiling, _ in ranked} >= {16, 32}
    assert [spread.ms for _, spread in ranked] == sorted(spread.ms for _, spread in ranked)
    assert sum("(in the table)" in line for line in printed) == 1


def test_a_tiling_that_fails_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []
    wrong = Tiling(16, 32, 4, 1)
    real = Trial.forward
    monkeypatch.setattr(Trial, "forward", lambda self, tiling: real(self, tiling) * (1.1 if tiling == wrong else 1.0))
    ranked = tune(make_bench(printed), options("forward", queries=[16, 48]))  # 48 is no power of two
    assert wrong not in [tiling for tiling, _ in ranked] and all(tiling.queries != 48 for tiling, _ in ranked)
    assert any(line.startswith(f"out: {wrong}: out is off by") for line in printed)


def test_candidates_are_all_combinations() -> None:
    asked = options("dq", queries=[64, 128], keys=[64], stages=[2, 3], descriptors=True)
    assert len(set(candidates(asked))) == 4 and all(tiling.descriptors for tiling in candidates(asked))
