"""The fork attention kernels against naive.py in fp64, along every way that tiles can come."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import assert_as_good, compiled_kernels
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from csrc_triton import CacheView, fork_attention, runtime
from csrc_triton.fork_attention import naive, ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD_DIMS = [32, 64, 128]
WAYS = ("pointers", "descriptors")
Segments = Sequence[Sequence[tuple[int, int]]]
ONE: Segments = [[(3, 40)]]
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


@dataclass
class Case:
    """Queries, keys and values of branches, and the pools and segments of their context; all else there is NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    pools: tuple[Tensor, Tensor]
    segments: Segments

    @property
    def view(self) -> CacheView | None:
        return CacheView.of(*self.pools, self.segments) if self.segments else None

    def past(self, branch: int) -> tuple[Tensor, Tensor]:
        """One branch's context written out, [1, Lc, heads, head_dim]."""
        runs = self.segments[branch * len(self.segments) // len(self.q)] if self.segments else []
        k, v = (torch.cat([p[:0], *(p[row : row + n] for row, n in runs)])[None] for p in self.pools)
        return k, v


def make(
    device: torch.device, branches: int, length: int, heads: int, head_dim: int, dtype: torch.dtype, segments: Segments
) -> Case:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device, dtype)

    q, k, v, grad = (draw(branches, length, heads, head_dim) for _ in range(4))
    rows = 7 + max((row + n for runs in segments for row, n in runs), default=0)
    pools = tuple(torch.full((rows, heads, head_dim), float("nan"), device=device, dtype=dtype) for _ in range(2))
    for row, n in sorted({run for runs in segments for run in runs}):
        for pool in pools:
            pool[row : row + n] = draw(n, heads, head_dim)
    return Case(q, k, v, grad, pools, segments)  # type: ignore[arg-type]


def on_torch(case: Case, branch: int, dtype: torch.dtype, grad_lse: Tensor | None = None) -> list[Tensor]:
    """Output, log-sum-exp and gradients of q, k and v of one branch by plain attention over written-out keys."""
    one = slice(branch, branch + 1)
    leaves = [t[one].detach().to(dtype).requires_grad_() for t in (case.q, case.k, case.v)]
    past = tuple(p.to(dtype) for p in case.past(branch))
    scale = case.q.shape[-1] ** -0.5
    working = torch.promote_types(dtype, torch.float32)
    out, lse = naive.fork_attention(*(t.to(working) for t in leaves), past, scale)
    if dtype != torch.float64 and grad_lse is None:
        q, k, v = (t.transpose(1, 2) for t in (leaves[0], *naive.concatenate(*leaves[1:], past)))
        out = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    wanted = (out.to(dtype),) if grad_lse is None else (out.to(dtype), lse)
    grads = (case.grad[one].to(dtype),) if grad_lse is None else (case.grad[one].to(dtype), grad_lse[one].to(lse.dtype))
    return [out.detach().to(dtype), lse.detach(), *torch.autograd.grad(wanted, leaves, grads)]


def on_kernel(case: Case, context: CacheView | tuple[Tensor, Tensor] | None, grad_lse: Tensor | None = None):
    leaves = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
    with runtime.backend("triton"):
        out, lse = fork_attention(*leaves, context, return_lse=True)
    wanted, grads = ((out,), (case.grad,)) if grad_lse is None else ((out, lse), (case.grad, grad_lse))
    return [out.detach(), lse.detach(), *torch.autograd.grad(wanted, leaves, grads)]


def assert_right(case: Case, got: list[Tensor], branches: Sequence[int] | None = None, grad_lse: Tensor | None = None):
    for branch in range(len(case.q)) if branches is None else branches:
        same = on_torch(case, branch, case.q.dtype, grad_lse)
        exact = on_torch(case, branch, torch.float64, grad_lse)
        for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv"), got, same, exact, strict=True):
            assert_as_good(f"{name} of branch {branch}", a[branch : branch + 1], b, c)


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
        assert all(torch.equal(a, b) for a, b in zip(got, on_kernel(case, context), strict=True))


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
        assert all(torch.equal(a, b) for a, b in zip(got, on_kernel(case, context), strict=True))


@every_way
def test_strides_are_free_but_for_the_last(device: torch.device, way: str) -> None:
    case = make(device, 2, 40, 2, 32, torch.bfloat16, [[(0, 40)]])
    got = on_kernel(case, case.view)
    packed = torch.stack([case.q, case.k, case.v, case.grad], 2).unbind(2)
    odd = torch.full((2, 2, 41, 35), float("nan"), device=device, dtype=torch.bfloat16)  # no 16-byte alignment
    unaligned = odd[:, :, 1:, 2:-1].transpose(1, 2).copy_(case.q)
    pools = tuple(torch.stack([p, p], 1)[:, 1] for p in case.pools)
    strided = Case(*packed, pools, case.segments)
    assert all(torch.equal(a, b) for a, b in zip(got, on_kernel(strided, strided.view), strict=True))
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
    case = make(device, 2, length, 2, head_dim, dtype, [[(0, past), (past + 1, 37)]])
    for tensor in (case.q, case.k, *case.pools):
        tensor.copy_(torch.randint(-1, 2, tensor.shape) * (torch.rand(tensor.shape) < 0.1))
    case.v.copy_(torch.randint(-4, 5, case.v.shape))
    case.pools[0][past], case.pools[1][past] = float("nan"), float("nan")
    log_2 = 0.6931471805599453
    with runtime.backend("triton"):
        out = fork_attention(case.q, case.k, case.v, case.view, softmax_scale=log_2)
    for branch in range(2):
        own = [t[branch : branch + 1].double() for t in (case.q, case.k, case.v)]
        exact, _ = naive.fork_attention(*own, tuple(p.double() for p in case.past(branch)), log_2)
        # the division is good to 2 units in the last place of fp32, the result is rounded to nearest
        step = exact[0].abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        allowed = step / 2 + exact[0].abs() * 2 * torch.finfo(torch.float32).eps + 1e-12  # the reference's own rounding
        assert ((out[branch].double() - exact[0]).abs() / allowed).max() <= 1


def test_equal_inputs_give_equal_bits_and_only_wanted_gradients(device: torch.device) -> None:
    case = make(device, 2, 70, 2, 32, torch.bfloat16, MANY)
    got = on_kernel(case, case.view)
    assert all(torch.equal(a, b) for a, b in zip(got, on_kernel(case, case.view), strict=True))
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


@pytest.mark.gpu
@pytest.mark.parametrize("branches", [1, 8, 24])
def test_chunks_of_wan(device: torch.device, branches: int) -> None:
    case = make(device, branches, 4680, 2, 128, torch.bfloat16, [[(0, 14040)]])
    assert_right(case, on_kernel(case, case.view), branches=[branches - 1])
    case = make(
        device, branches, 1560, 2, 128, torch.bfloat16, [[(0, 1560), (9000 + b, 4680)] for b in range(branches)]
    )
    assert_right(case, on_kernel(case, case.view), branches=[branches // 2])


@pytest.mark.gpu
def test_pools_of_more_than_two_to_the_31_elements(device: torch.device) -> None:
    rows = 2**31 // (4 * 128) + 1000
    pools = tuple(torch.empty(rows, 4, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
    case = make(device, 2, 200, 4, 128, torch.bfloat16, [[(0, 300), (400, 140)]])
    for big, small in zip(pools, case.pools, strict=True):
        big[rows - 600 :] = float("nan")
        big[rows - 600 : rows - 600 + len(small)] = small
    moved = [[(rows - 600 + row, n) for row, n in runs] for runs in case.segments]
    got = on_kernel(case, CacheView.of(*pools, moved))
    assert all(torch.equal(a, b) for a, b in zip(got, on_kernel(case, case.view), strict=True))


@pytest.mark.gpu
def test_one_captured_graph_serves_another_table(device: torch.device) -> None:
    case = make(device, 2, 200, 2, 128, torch.bfloat16, [[(0, 300), (400, 140)], [(0, 300), (600, 500)]])
    view = case.view
    assert view is not None
    with runtime.backend("triton"):
        fork_attention(case.q, case.k, case.v, view)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fork_attention(case.q, case.k, case.v, view)
        view.table.copy_(view.table.flip(0))
        expected = fork_attention(case.q, case.k, case.v, view)
    graph.replay()
    assert torch.equal(out, expected)


def test_the_kernels_compile_ahead_without_spills() -> None:
    for row in compiled_kernels("ahead_fork_attention"):
        # a bound of the slot loop is kept on the stack there, outside of the loops over tiles
        allowed = 8 if row["name"].startswith("query gradient, sm_80, bf16") and row["target"] == 80 else 0
        if "bf16" in row["name"] and row["target"] == 80:
            assert row["stack"] <= allowed, row


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
