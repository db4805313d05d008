"""Shapes and options of fork attention, on the kernels and in plain PyTorch, against naive.py in fp64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from attention_cases import Case, Segments, assert_right, draw_case, equal, make, on_kernel
from torch import Tensor

from csrc_triton import CacheView, fork_attention, runtime
from csrc_triton.fork_attention import eager, naive, ops

MANY: Segments = [[(0, 30), (40, 0), (50, 16)], [(50, 5)], []]
WAYS = ("pointers", "descriptors")
# name -> branches, queries, heads, head_dim, segments, and what else is not as usual
SHAPES: dict[str, tuple[int, int, int, int, Segments, dict[str, Any]]] = {
    "two heads of keys": (1, 20, 4, 16, MANY[:1], {"kv_heads": 2}),
    "one head of keys, a pair": (1, 20, 3, 16, [[(0, 21)]], {"kv_heads": 1}),
    "a token at a time": (3, 1, 1, 16, MANY, {"own": 33}),
    "more queries than keys": (1, 35, 1, 16, MANY[:1], {"own": 3}),
    "heads of 24": (1, 20, 1, 24, MANY[:1], {}),
    "contexts by index": (4, 9, 1, 16, MANY, {"index": [1, 0, 0, 2]}),
    "no own keys": (3, 18, 1, 16, MANY, {"own": 0}),
    "causal by token": (1, 40, 1, 16, MANY[:1], {"causal_block": 1}),
    "causal by frame, fewer queries": (1, 19, 1, 16, [], {"causal_block": 9, "own": 45}),
    "causal, queries that see nothing": (3, 43, 1, 16, MANY, {"causal_block": 5, "own": 21}),
    "all at once": (2, 20, 2, 24, MANY, {"own": 37, "kv_heads": 1, "index": [2, 0], "causal_block": 7}),
}


@pytest.fixture
def way(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes the kernels take their tiles this way; small tiles on the CPU, so that short chunks have several."""
    from csrc_triton.fork_attention import tiles

    descriptors = request.param == "descriptors"
    if device.type == "cuda" and descriptors:
        pytest.skip("on a GPU the head sizes of these cases have no descriptors; test_fork_attention_kernel has them")
    if device.type == "cpu":
        for table in (tiles.FORWARD, tiles.QUERY_GRADIENT, tiles.KEY_GRADIENT):
            for width in tiles.WIDTHS:
                monkeypatch.setitem(table, (0, width, 2), tiles.Tiling(16, 32, 4, 1, descriptors))
                monkeypatch.setitem(table, (0, width, 4), tiles.Tiling(32, 16, 4, 1, descriptors))
    return str(request.param)


pointers = pytest.mark.parametrize("way", WAYS[:1], indirect=True)
# the logarithm of the sum of no exponentials, which is meant
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")


def case_of(name: str, device: torch.device, dtype: torch.dtype) -> Case:
    *sizes, segments, more = SHAPES[name]
    return make(device, *sizes, dtype, segments, **more)


def pair_of(case: Case) -> tuple[Tensor, Tensor]:
    """The contexts, which are one run each of one length, as tensors."""
    [k, v] = (torch.stack([pool[row : row + n] for [(row, n)] in case.segments]) for pool in case.pools)
    return k, v


@pytest.mark.parametrize("name", SHAPES)
@pointers
def test_shapes_on_the_kernels(device: torch.device, way: str, name: str) -> None:
    case = case_of(name, device, torch.float32)
    grad_lse = torch.randn(case.q.shape[:3], device=device).transpose(1, 2).contiguous()
    if "nothing" in name or "no own" in name:
        grad_lse = None
    pair = name.endswith("a pair")
    assert_right(case, on_kernel(case, pair_of(case) if pair else case.view, grad_lse), grad_lse=grad_lse)


@pytest.mark.parametrize(
    ("way", "name"),
    [
        (WAYS[0], "two heads of keys"),
        (WAYS[1], "causal, queries that see nothing"),
        (WAYS[1], "one head of keys, a pair"),
    ],
    indirect=["way"],
)
def test_shapes_in_sixteen_bits(device: torch.device, way: str, name: str) -> None:
    case = case_of(name, device, torch.bfloat16)
    assert_right(case, on_kernel(case, pair_of(case) if name.endswith("a pair") else case.view))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_shapes_in_plain_pytorch(device: torch.device, name: str, dtype: torch.dtype) -> None:
    case = case_of(name, device, dtype)
    assert_right(case, on_kernel(case, case.view, by="torch"))
    with runtime.backend("torch"):
        given = {"softmax_scale": case.scale, "context_index": case.index, "causal_block": case.causal_block}
        alone = fork_attention(case.q, case.k, case.v, case.view, **given)
    with_lse = on_kernel(case, case.view, by="torch")[0]
    assert (alone - with_lse).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-5)


def test_a_few_scores_at_a_time_are_the_same_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("cpu", 2, 11, 4, 8, torch.float64, MANY[:2], own=13, kv_heads=2, causal_block=3)
    grad_lse = torch.randn(2, 4, 11)
    whole = on_kernel(case, case.view, grad_lse, by="torch")
    sizes: list[int] = []
    plain = naive.attention
    monkeypatch.setattr(eager, "SCORES", 200)
    monkeypatch.setattr(
        naive, "attention", lambda q, k, *rest: sizes.append(q[..., 0].numel() * k.shape[1]) or plain(q, k, *rest)
    )
    for a, b in zip(on_kernel(case, case.view, grad_lse, by="torch"), whole, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    assert len(sizes) > 16 and max(sizes) <= 200


@pytest.mark.parametrize("head_dim", [80, 160])
@pytest.mark.parametrize("way", WAYS[:1], indirect=True)
def test_columns_behind_a_head_are_left_alone(device: torch.device, way: str, head_dim: int) -> None:
    case = make(device, 1, 17, 2, head_dim, torch.bfloat16, [[(0, 20)]])
    expected = on_kernel(case, case.view)
    assert_right(case, expected)

    def embedded(tensor: Tensor) -> Tensor:
        whole = torch.full((*tensor.shape[:-1], 256), float("nan"), device=device, dtype=tensor.dtype)
        return whole[..., :head_dim].copy_(tensor)

    inside = Case(
        *(embedded(t) for t in (case.q, case.k, case.v, case.grad)), tuple(embedded(p) for p in case.pools),
        case.segments, case.scale,
    )  # fmt: skip
    assert equal(on_kernel(inside, inside.view), expected)


@pointers
def test_an_index_of_pairs_and_of_views(device: torch.device, way: str) -> None:
    segments = [[(20 * i, 20)] for i in range(3)]
    index = [2, 0, 0, 1]
    case = make(device, 4, 9, 1, 16, torch.float32, segments, index=index)
    expected = on_kernel(case, pair_of(case))
    assert_right(case, expected)
    for given in (index, torch.tensor(index), torch.tensor(index, dtype=torch.int32).to(device)):
        for context in (case.view, pair_of(case)):
            with runtime.backend("triton"):
                out = fork_attention(case.q, case.k, case.v, context, context_index=given)
            case.index = given  # type: ignore[assignment]
            found = on_kernel(case, context, by="torch")
            assert torch.equal(out, expected[0])
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pointers
def test_no_keys_at_all(device: torch.device, way: str, backend: str) -> None:
    case = make(device, 2, 20, 2, 16, torch.float32, [[], [(0, 5)]], own=0)
    got = on_kernel(case, case.view, torch.ones(2, 2, 20, device=device), by=backend)
    assert torch.equal(got[0][0], torch.zeros_like(got[0][0])) and torch.equal(got[2][0], got[0][0])
    assert (got[1][0] == -torch.inf).all() and got[1][1].isfinite().all() and got[0][1].abs().min() > 0
    with runtime.backend(backend):
        seen = fork_attention(case.q, None, None, case.view, softmax_scale=case.scale)
        q = case.q.detach().requires_grad_()
        out, lse = fork_attention(q, case.k, case.v, return_lse=True)
    assert torch.allclose(seen, got[0])
    assert torch.equal(out, torch.zeros_like(out)) and (lse == -torch.inf).all()
    assert torch.equal(torch.autograd.grad(out, q, case.grad)[0], torch.zeros_like(q))


@pointers
def test_gradients_of_shared_keys_are_sums_over_their_heads(device: torch.device, way: str) -> None:
    case = make(device, 1, 17, 3, 16, torch.float32, [], own=20, kv_heads=1)
    got = on_kernel(case, None)
    assert equal(on_kernel(case, None), got)
    k, v = (t.expand(-1, -1, 3, -1).contiguous() for t in (case.k, case.v))
    apart = on_kernel(Case(case.q, k, v, case.grad, case.pools, [], case.scale), None)
    assert equal(apart[:3], got[:3])
    for shared, each in zip(got[3:], apart[3:], strict=True):
        assert torch.allclose(each.sum(2, keepdim=True), shared, atol=1e-5)


def test_fp32_stays_fp32_under_autocast(device: torch.device) -> None:
    case = make(device, 2, 20, 2, 16, torch.float32, MANY[:2])
    plain = on_kernel(case, case.view, by="torch")
    leaves = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
    with runtime.backend("torch"), torch.autocast(device.type, torch.bfloat16):
        out, lse = fork_attention(*leaves, case.view, softmax_scale=case.scale, return_lse=True)
        alone = fork_attention(*leaves, case.view, softmax_scale=case.scale)
    assert equal([out, lse, *torch.autograd.grad(out, leaves, case.grad)], plain)
    assert alone.dtype == torch.float32 and (alone - plain[0]).abs().max() < 1e-5


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pointers
def test_slices_of_a_cache_that_is_written_in_place(device: torch.device, way: str, backend: str) -> None:
    """Later rows are another chunk's: their writes are no business of the backward pass."""
    case = make(device, 2, 9, 1, 16, torch.float32, [])
    cache = [torch.randn(2, 50, 1, 16, device=device) for _ in range(2)]

    def window() -> list[Any]:
        runs = [[(50 * b, 3), (50 * b + 10, 10)] for b in range(2)]
        return [tuple(t[:, :20] for t in cache), CacheView.of(*(t.flatten(0, 1) for t in cache), runs)]

    for which in range(2):
        expected = on_kernel(case, window()[which], by=backend)[2]
        q = case.q.detach().requires_grad_()
        with runtime.backend(backend):
            out = fork_attention(q, case.k, case.v, window()[which], softmax_scale=case.scale)
            empty = fork_attention(q, None, None, window()[which], softmax_scale=case.scale)
        for tensor in cache:
            tensor[:, 20:] = 7.0
        assert torch.allclose(torch.autograd.grad(out, q, case.grad)[0], expected, atol=1e-6)
        torch.autograd.grad(empty, q, case.grad)


@pointers
def test_the_custom_ops_keep_torchs_rules(device: torch.device, way: str) -> None:
    case = make(device, 1, 2, 2, 24, torch.float32, [[(0, 3)], [(3, 3)]], own=3, kv_heads=1)
    leaves = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
    index = torch.tensor([1], device=device)
    empty = [t[:, :0] for t in leaves[1:]]
    torch.library.opcheck(ops.forward, (*leaves, *pair_of(case), None, 0.2, index, 2))
    rules = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(ops.forward, (leaves[0], *empty, *pair_of(case), None, 0.2, index), test_utils=rules)
    out, lse = ops.forward(*(t.detach() for t in leaves), *pair_of(case), None, 0.2, index, 2)
    given = case.grad, None, case.q, case.k, case.v, *pair_of(case), None, out, lse, 0.2
    torch.library.opcheck(ops.backward, (*given, True, True, index, 2), test_utils=rules)


def test_under_compile(device: torch.device) -> None:
    case = make(device, 2, 9, 4, 16, torch.float32, [[(0, 6)], [(6, 6)]], own=5, kv_heads=2)
    leaves = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
    index = torch.tensor([1, 0], device=device)

    def objective(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, index: Tensor) -> Tensor:
        given = {"context_index": index, "causal_block": 2, "return_lse": True}
        out, lse = fork_attention(2 * q, k, v, (past_k, past_v), **given)
        return out.square().sum() + lse.sum()

    for backend in ("torch", "triton"):
        with runtime.backend(backend):
            run = torch.compile(objective, backend="aot_eager", fullgraph=True)
            given = *leaves, *pair_of(case), index
            wanted = torch.autograd.grad(objective(*given), leaves)
            for a, b in zip(torch.autograd.grad(run(*given), leaves), wanted, strict=True):
                assert torch.allclose(a, b, atol=1e-5)


def drawn(seed: int, count: int, device: torch.device, most: int, dtypes: list[torch.dtype], backend: str) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for i in range(count):
        case = draw_case(draw, device, most, dtypes)
        try:
            assert_right(case, on_kernel(case, case.view, by=backend), [draw.randrange(len(case.q))])
        except AssertionError as wrong:
            shapes = [tuple(t.shape) for t in (case.q, case.k)]
            told = f"{shapes}, {case.q.dtype}, {case.segments}, {case.index}, {case.causal_block}"
            raise AssertionError(f"combination {i}: {told}") from wrong


@pointers
def test_some_random_combinations(device: torch.device, way: str) -> None:
    drawn(0, 3 if device.type == "cpu" else 40, device, 20, [torch.float32, torch.bfloat16, torch.float16], "triton")


def test_random_combinations_in_plain_pytorch(device: torch.device) -> None:
    drawn(1, 40, device, 40, [torch.float64, torch.float32], "torch")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_a_thousand_random_combinations(device: torch.device, backend: str) -> None:
    drawn(2, 1000, device, 700, [torch.float32, torch.bfloat16, torch.float16], backend)
