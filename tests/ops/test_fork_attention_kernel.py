"""The fork attention kernels against naive.py in fp64, along every way that tiles can come."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import ONE, Case, Segments, assert_exact, assert_right, equal, make, on_kernel
from kernel_checks import compiled_kernels
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from csrc_triton import CacheView, fork_attention, runtime
from csrc_triton.fork_attention import naive, ops

IN_TIME = [] if torch.cuda.is_available() else [pytest.mark.slow]  # the interpreter takes half precision alike
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=IN_TIME)]
HEAD_DIMS = [32, 64, 128]
WAYS = ("pointers", "descriptors")
MANY: Segments = [[(0, 70), (100, 0), (150, 64), (90, 5)], [(150, 64), (70, 20), (214, 55)]]


@pytest.fixture
def way(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes the kernels take their tiles this way; small tiles on the CPU, so that short chunks have several."""
    from csrc_triton.fork_attention import tiles

    descriptors = request.param == "descriptors"
    hopper = device.type == "cuda" and torch.cuda.get_device_capability()[0] == tiles.HOPPER
    if descriptors and device.type == "cuda" and not hopper:
        pytest.skip("needs a GPU of capability 9.0")
    for table in (tiles.FORWARD, tiles.QUERY_GRADIENT, tiles.KEY_GRADIENT):
        for head_dim in HEAD_DIMS:
            if device.type == "cpu":
                monkeypatch.setitem(table, (0, head_dim, 2), tiles.Tiling(64, 32, 4, 1, descriptors))
                monkeypatch.setitem(table, (0, head_dim, 4), tiles.Tiling(32, 64, 4, 1, descriptors))
            elif hopper:
                tiling = tiles.tiling_of(table, tiles.HOPPER if descriptors else tiles.PLAIN, head_dim, 2)
                monkeypatch.setitem(table, (tiles.HOPPER, head_dim, 2), tiling)
    return request.param


every_way = pytest.mark.parametrize("way", WAYS, indirect=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@every_way
def test_every_precision_and_head_size(device: torch.device, way: str, head_dim: int, dtype: torch.dtype) -> None:
    case = make(device, 1, 63, 1, head_dim, dtype, ONE)
    assert_right(case, on_kernel(case, case.view))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_way
def test_many_segments_shared_by_several_branches(device: torch.device, way: str, dtype: torch.dtype) -> None:
    case = make(device, 4, 33, 2, 32, dtype, MANY)
    assert_right(case, on_kernel(case, case.view))


@every_way
def test_chunks_of_many_tiles(device: torch.device, way: str) -> None:
    case = make(device, 1, 500, 1, 32, torch.float16, [[(0, 300)]])
    assert_right(case, on_kernel(case, case.view))


@every_way
@pytest.mark.parametrize("length", [1, 64])
def test_without_context(device: torch.device, way: str, length: int) -> None:
    case = make(device, 2, length, 2, 32, torch.bfloat16, [])
    got = on_kernel(case, None)
    assert_right(case, got)
    empty = case.q[:1, :0]
    nothing = CacheView(case.k[0], case.v[0], torch.zeros(2, 3, 2, dtype=torch.int32, device=device))
    for context in ((empty, empty), nothing, CacheView(nothing.k, nothing.v, nothing.table[:, :0].contiguous())):
        assert equal(got, on_kernel(case, context))


@every_way
@pytest.mark.parametrize("contexts", [1, 2])
def test_pairs_equal_views(device: torch.device, way: str, contexts: int) -> None:
    runs = [[(70 * i, 70)] for i in range(contexts)]
    case = make(device, 2, 20, 2, 32, torch.bfloat16, runs)
    got = on_kernel(case, case.view)
    assert_right(case, got)
    pair = tuple(torch.stack([pool[run[0][0] : run[0][0] + 70] for run in runs]) for pool in case.pools)
    heads_first = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in pair)
    for context in (pair, (pair[0], heads_first[1])):
        assert equal(got, on_kernel(case, context))


@every_way
def test_strides_are_free_but_for_the_last(device: torch.device, way: str) -> None:
    case = make(device, 2, 40, 2, 32, torch.bfloat16, [[(0, 40)]])
    got = on_kernel(case, case.view)
    packed = torch.stack([case.q, case.k, case.v, case.grad], 2).unbind(2)
    odd = torch.full((2, 2, 41, 35), float("nan"), device=device, dtype=torch.bfloat16)  # no 16-byte alignment
    unaligned = odd[:, :, 1:, 2:-1].transpose(1, 2).copy_(case.q)
    pools = tuple(torch.stack([p, p], 1)[:, 1] for p in case.pools)
    strided = Case(*packed, pools, case.segments, case.scale)
    assert equal(got, on_kernel(strided, strided.view))
    strided.q = unaligned
    assert_right(case, on_kernel(strided, strided.view))


@every_way
def test_gradient_of_the_log_sum_exp(device: torch.device, way: str) -> None:
    case = make(device, 2, 40, 1, 32, torch.float32, MANY)
    grad_lse = torch.randn(2, 1, 40, device=device)
    assert_right(case, on_kernel(case, case.view, grad_lse), grad_lse=grad_lse)
    q, k = (t.detach().requires_grad_() for t in (case.q, case.k))
    with runtime.backend("triton"):
        _, lse = fork_attention(q, k, case.v, case.view, return_lse=True)
    alone = torch.autograd.grad(lse, (q, k), grad_lse)
    case.grad.zero_()
    for name, a, b in zip(("dq", "dk"), alone, on_kernel(case, case.view, grad_lse)[2:4], strict=True):
        assert torch.equal(a, b), name


@every_way
def test_softmax_scale_and_large_scores(device: torch.device, way: str) -> None:
    case = make(device, 1, 40, 1, 32, torch.float32, ONE)
    with runtime.backend("triton"):
        out, lse = fork_attention(200 * case.q, case.k, case.v, case.view, softmax_scale=0.5, return_lse=True)
    given = [t.double() for t in (200 * case.q, case.k, case.v)], tuple(p.double() for p in case.past(0))
    exact, exact_lse = naive.fork_attention(*given[0], given[1], 0.5)
    assert (out - exact).abs().max() < 1e-3  # scores of about 1,600: their rounding is 6e-5
    assert (lse / exact_lse - 1).abs().max() < 1e-6


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of rows behind the chunk's end, which nobody stores
@every_way
def test_scores_far_below_zero(device: torch.device, way: str) -> None:
    """exp(0 - lse) overflows, which a row of zeros behind a segment's end must not see."""
    case = make(device, 1, 40, 1, 32, torch.bfloat16, ONE)
    case.q.abs_().add_(20)
    for keys in (case.k, case.pools[0]):
        keys.abs_().neg_().sub_(1)
    got = on_kernel(case, case.view)
    assert got[1].max() < -100
    assert_right(case, got)


@pytest.mark.parametrize("length", [64, pytest.param(1560, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", DTYPES)
@every_way
def test_integers_come_out_exact(device: torch.device, way: str, length: int, dtype: torch.dtype) -> None:
    """Scores are integers and exponentials powers of two, so the sums are exact and only the division rounds."""
    head_dim = 128
    past = length // 2 + 3
    case = make(device, 2, length, 2, head_dim, dtype, [[(0, past), (past + 1, 37)]], integers=True)
    case.v.copy_(torch.randint(-4, 5, case.v.shape))
    assert_exact(case, on_kernel(case, case.view)[0])


def test_equal_inputs_give_equal_bits_and_only_wanted_gradients(device: torch.device) -> None:
    case = make(device, 2, 70, 2, 32, torch.bfloat16, MANY)
    got = on_kernel(case, case.view)
    assert equal(got, on_kernel(case, case.view))
    for wanted in ((0,), (1, 2), (2,)):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate((case.q, case.k, case.v))]
        with runtime.backend("triton"):
            out = fork_attention(*leaves, case.view)
        grads = torch.autograd.grad(out, [leaves[i] for i in wanted], case.grad)
        assert all(torch.equal(grad, got[2 + i]) for i, grad in zip(wanted, grads, strict=True))


def test_a_pool_may_be_written_before_the_backward_pass_and_a_table_not(device: torch.device) -> None:
    case = make(device, 1, 20, 1, 32, torch.float32, ONE)
    expected = on_kernel(case, case.view)[2]
    view, q = case.view, case.q.detach().requires_grad_()
    with runtime.backend("triton"):
        outs = [fork_attention(q, case.k, case.v, view) for _ in range(2)]
    case.pools[0][-3:] = 1.0  # rows of another branch
    assert torch.equal(torch.autograd.grad(outs[0], q, case.grad)[0], expected)
    view.table.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outs[1], q, case.grad)


def objective(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
    out, lse = fork_attention(2 * q, k, v, (past_k, past_v), return_lse=True)
    return out.square().sum() + lse.sum()


@pytest.mark.parametrize("how", ["checkpoint", "aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_under_compile_and_checkpoint(device: torch.device, how: str) -> None:
    case = make(device, 2, 20, 2, 32, torch.float32, ONE)
    leaves = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
    with runtime.backend("triton"):
        expected = torch.autograd.grad(objective(*leaves, *case.past(0)), leaves)
        if how == "checkpoint":
            value = checkpoint(objective, *leaves, *case.past(0), use_reentrant=False)
        else:
            value = torch.compile(objective, backend=how, fullgraph=True)(*leaves, *case.past(0))
        got = torch.autograd.grad(value, leaves)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_view_under_compile(device: torch.device) -> None:
    case = make(device, 2, 20, 2, 32, torch.float32, MANY)
    view = case.view
    with runtime.backend("triton"):
        expected = fork_attention(case.q, case.k, case.v, view)
        compiled = torch.compile(lambda q: fork_attention(q, case.k, case.v, view), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(case.q), expected)


def test_the_custom_ops_keep_torchs_rules(device: torch.device) -> None:
    case = make(device, 2, 5, 1, 32, torch.float32, [[(0, 9)]])
    leaves = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
    table = CacheView.of(*case.pools, case.segments).table
    torch.library.opcheck(ops.forward, (*leaves, *case.pools, table, 0.2))
    torch.library.opcheck(ops.forward, (*leaves, *case.past(0), None, 0.2))
    out, lse = ops.forward(case.q, case.k, case.v, None, None, None, 0.2)
    given = (case.grad, None, case.q, case.k, case.v, None, None, None, out, lse, 0.2)
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.backward, (*given, *wanted))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("branches", "length"), [(1, 1560), (3, 500), (8, 63)])
@every_way
def test_lengths_of_frames(
    device: torch.device, way: str, branches: int, length: int, head_dim: int, dtype: torch.dtype
) -> None:
    case = make(device, branches, length, 3, head_dim, dtype, [[(0, 1560), (1600, 3120), (5000, 77)]])
    assert_right(case, on_kernel(case, case.view), branches=[0, branches - 1])


@pytest.fixture(params=["triton", "hopper"])
def by(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Both kinds of kernels, on the same cases."""
    if request.param == "hopper" and (device.type == "cpu" or torch.cuda.get_device_capability()[0] != 9):
        pytest.skip("needs a GPU of capability 9.0")
    return request.param


@pytest.mark.gpu
@pytest.mark.parametrize("branches", [1, 8, 24])
def test_chunks_of_wan(device: torch.device, by: str, branches: int) -> None:
    reference = torch.float32 if by == "hopper" else torch.float64
    case = make(device, branches, 4680, 2, 128, torch.bfloat16, [[(0, 14040)]])
    assert_right(case, on_kernel(case, case.view, by=by), [branches - 1], reference=reference)
    own = [[(0, 1560), (9000 + b, 4680)] for b in range(branches)]
    case = make(device, branches, 1560, 2, 128, torch.bfloat16, own)
    assert_right(case, on_kernel(case, case.view, by=by), [branches // 2], reference=reference)


@pytest.mark.gpu
def test_pools_of_more_than_two_to_the_31_elements(device: torch.device, by: str) -> None:
    rows = 2**31 // (4 * 128) + 1000
    pools = tuple(torch.empty(rows, 4, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
    case = make(device, 2, 200, 4, 128, torch.bfloat16, [[(0, 300), (400, 140)]])
    for big, small in zip(pools, case.pools, strict=True):
        big[rows - 600 :] = float("nan")
        big[rows - 600 : rows - 600 + len(small)] = small
    moved = [[(rows - 600 + row, n) for row, n in runs] for runs in case.segments]
    assert equal(on_kernel(case, CacheView.of(*pools, moved), by=by), on_kernel(case, case.view, by=by))


@pytest.mark.gpu
def test_one_captured_graph_serves_another_table(device: torch.device, by: str) -> None:
    case = make(device, 2, 200, 2, 128, torch.bfloat16, [[(0, 300), (400, 140)], [(0, 300), (600, 500)]])
    view = case.view
    assert view is not None
    with runtime.backend(by):
        fork_attention(case.q, case.k, case.v, view)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fork_attention(case.q, case.k, case.v, view)
        view.table.copy_(view.table.flip(0))
        expected = fork_attention(case.q, case.k, case.v, view)
    graph.replay()
    assert torch.equal(out, expected)


def assert_lean(rows: list[dict[str, int]]) -> None:
    for row in rows:
        # a bound of the slot loop is kept on the stack there, outside of the loops over tiles
        allowed = 8 if "sm_80, bf16" in str(row["name"]) and row["target"] == 80 else 0
        assert row["stack"] <= allowed, row
        assert row["shared"] <= (101376 if row["target"] != 90 else 232448), row  # of sm_86, sm_89 and sm_120; sm_90


def test_the_kernels_compile_ahead_without_spills() -> None:
    assert_lean([row for row in compiled_kernels("ahead_fork_attention") if row["target"] == 80])


def test_no_gpus_kernels_spill() -> None:
    rows = compiled_for("portable")
    assert len(rows) == 5
    assert_lean(rows)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_gpus_kernels_spill_in_any_specialisation() -> None:
    rows = compiled_for("portable", "all")
    assert {row["target"] for row in rows} == {80, 90, 120}
    assert_lean(rows)


def compiled_for(*options: str) -> list[dict[str, int]]:
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(map(str, (tests, tests.parent)))
    command = [sys.executable, tests / "ops/ahead_fork_attention.py", *options]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hoppers_matrix_products_stay_asynchronous_and_nothing_spills() -> None:
    rows = compiled_for()
    assert len(rows) == 8
    for row in rows:
        assert row["stack"] == 0 and row["loads"] > 0, row
        assert row["shared"] <= 232448, row  # what a program may have on sm_90
        assert row["products"] >= 4 * row["waits"], row  # where ptxas serialises them there is a wait for each


@pytest.mark.slow
def test_everything_compiles_ahead() -> None:
    assert {row["target"] for row in compiled_for("everything")} == {80, 90}
