"""Fork attention of few queries, whose keys are cut into parts, against naive.py in fp64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from attention_cases import NAMES, Case, Segments, assert_right, equal, make, on_kernel, on_torch
from interpreter import rounds_to_nearest  # noqa: F401 - a fixture of every test here
from kernel_checks import SHARED, assert_as_good, compiled_kernels
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from csrc_triton import fork_attention, runtime
from csrc_triton.fork_attention import ops, selection
from csrc_triton.fork_attention.portable import few
from csrc_triton.fork_attention.tiles import Call, Past

MULTIPROCESSORS = 4  # so 8 programs of 4 warps, or 4 of 8 (fp32 and large tiles), for one branch
UNEVEN: Segments = [[(0, 30), (40, 0), (50, 55), (110, 3)], [(50, 5)], []]
# name -> branches, queries, heads, head_dim, segments, and what else is not as usual
SHAPES: dict[str, tuple[int, int, int, int, Segments, dict[str, Any]]] = {
    "one segment, one branch": (1, 1, 1, 16, [[(3, 90)]], {"own": 0}),
    "several segments, two branches a context": (6, 2, 1, 16, UNEVEN, {"own": 0}),
    "three heads a head of keys, own keys": (2, 2, 6, 16, UNEVEN[:1], {"own": 33, "kv_heads": 2}),
    "eight heads a head of keys, many tiles": (2, 3, 8, 24, UNEVEN[:1], {"own": 1, "kv_heads": 1}),
    "own keys alone": (2, 3, 2, 16, [], {"own": 75}),
    "keys fewer than a step, and contexts without any": (3, 1, 2, 16, [[(2, 3)], [], [(9, 1)]], {"own": 2}),
    "no keys": (2, 2, 1, 16, [[], [(0, 40)]], {"own": 0}),
    "causal by token": (1, 16, 1, 16, [[(0, 40)]], {"own": 50, "causal_block": 1}),
    "causal, queries that see nothing": (3, 8, 2, 16, UNEVEN, {"own": 3, "kv_heads": 1, "causal_block": 5}),
    "contexts by index": (4, 1, 2, 16, UNEVEN, {"index": [1, 0, 0, 2], "own": 20}),
    "wide heads": (2, 2, 1, 80, UNEVEN[:1], {"own": 5}),
}
# steps and parts of 16 keys
SMALL: dict[str, Any] = {"multiprocessors": lambda device: MULTIPROCESSORS, "LEAST_KEYS": 16, "TILE_BYTES": 0}
USED = {name: getattr(few, name) for name in SMALL}
# the logarithm of the sum of no exponentials, which is meant
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> list[few.Parts]:
    """The kernels for few queries serve, also in the interpreter, with short parts; those of each call."""
    found: list[few.Parts] = []
    parts_of = few.parts_of

    def watched(call: Call, by: few.Tiling) -> few.Parts:
        found.append(parts_of(call, by))
        return found[-1]

    monkeypatch.setattr(few, "parts_of", watched)
    for name, value in SMALL.items():
        monkeypatch.setattr(few, name, value)
    return found


def case_of(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Case:
    *sizes, segments, more = SHAPES[name]
    return make(device, *sizes, dtype, segments, **more)


def attend(case: Case, context: Any = None, by: str = "triton") -> list[Tensor]:
    """Output and log-sum-exp, without gradients."""
    given = {"softmax_scale": case.scale, "context_index": case.index, "causal_block": case.causal_block}
    with runtime.backend(by):
        return list(fork_attention(case.q, case.k, case.v, context or case.view, return_lse=True, **given))  # type: ignore[call-overload]


def pair_of(case: Case) -> tuple[Tensor, Tensor]:
    """The contexts, which are one run each of one length, as tensors."""
    [k, v] = (torch.stack([pool[row : row + n] for [(row, n)] in case.segments]) for pool in case.pools)
    return k, v


def assert_forward_right(case: Case, got: list[Tensor]) -> None:
    """Each branch within the error bound of attention_cases."""
    for branch in range(len(case.q)):
        same, exact = on_torch(case, branch, case.q.dtype)[:2], on_torch(case, branch, torch.float64, exact=True)[:2]
        for name, a, b, c in zip(NAMES, (t[branch : branch + 1] for t in got), same, exact, strict=False):
            if name == "lse":
                assert torch.equal(a == -torch.inf, c == -torch.inf)
                a, b, c = (t.nan_to_num(neginf=0.0) for t in (a, b.to(a.dtype), c))
            assert_as_good(f"{name} of branch {branch}", a, b, c)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(device: torch.device, parts: list[few.Parts], name: str) -> None:
    case = case_of(name, device)
    got = attend(case)
    assert_forward_right(case, got)
    assert max(parts[0]) > 1


@pytest.mark.parametrize(("length", "dtype"), [(6, torch.bfloat16), (16, torch.float16)])
def test_sixteen_bits(device: torch.device, parts: list[few.Parts], length: int, dtype: torch.dtype) -> None:
    """Tiles of 32 and of 64 rows, with rows behind the last one in both."""
    case = make(device, 2, length, 3, 128, dtype, [[(0, 100), (130, 37)]], own=19, kv_heads=1, causal_block=3)
    got = attend(case)
    assert_forward_right(case, got)
    assert equal(got, attend(case))  # bit for bit
    assert parts == 2 * [few.Parts(4 if length == 16 else 8, 2)]


def test_the_backward_pass_goes_on_from_the_merged_sums(device: torch.device) -> None:
    case = make(device, 2, 2, 2, 16, torch.float32, UNEVEN[:1], own=20, kv_heads=1, causal_block=1)
    grad_lse = torch.randn(2, 2, 2, device=device)
    assert_right(case, on_kernel(case, case.view, grad_lse), grad_lse=grad_lse)


def test_parts_of_very_different_size(device: torch.device) -> None:
    """Scores of later keys are some forty powers of two larger, then smaller: each part's weight counts."""
    case = make(device, 1, 2, 2, 16, torch.float32, [[(0, 120)]], own=40)
    case.q.abs_().add_(1)
    for keys, size in ((case.pools[0][40:80], 4.0), (case.pools[0][80:120], -4.0), (case.k, 3.9)):
        keys.copy_(torch.rand_like(keys) * 0.1 + size)
    assert_forward_right(case, attend(case))


def test_pairs_of_tensors(device: torch.device) -> None:
    case = make(device, 4, 1, 2, 16, torch.float32, [[(10, 70)], [(90, 70)]], own=20, kv_heads=1)
    got = attend(case, pair_of(case))
    assert_forward_right(case, got)
    assert equal(got, attend(case))
    case.index = [1, 0, 0, 1]
    got = attend(case, pair_of(case))
    assert_forward_right(case, got)
    assert equal(got, attend(case))


def test_a_branch_has_the_same_bits_beside_others(device: torch.device) -> None:
    case = make(device, 6, 2, 2, 16, torch.bfloat16, UNEVEN, own=35, kv_heads=1)
    out, lse = attend(case)
    for branch in (1, 5):
        one = slice(branch, branch + 1)
        alone = Case(
            *(t[one] for t in (case.q, case.k, case.v, case.grad)), case.pools, [UNEVEN[branch // 2]], case.scale
        )
        assert equal(attend(alone), [out[one], lse[one]])


def test_strides_are_free_but_for_the_last(device: torch.device) -> None:
    case = make(device, 2, 3, 2, 24, torch.float32, [[(0, 40)]], own=20)
    got = attend(case)
    odd = [
        torch.full((2, 50, 2, 27), float("nan"), device=device)[:, : t.shape[1], :, 2:-1]
        for t in (case.q, case.k, case.v)
    ]
    for to, tensor in zip(odd, (case.q, case.k, case.v), strict=True):
        to.copy_(tensor)
    pools = tuple(torch.stack([torch.full_like(pool, float("nan")), pool], 1)[:, 1] for pool in case.pools)
    strided = dataclasses.replace(case, q=odd[0], k=odd[1], v=odd[2], pools=pools)
    assert equal(attend(strided), got)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_not_a_number_stays_one(device: torch.device) -> None:
    case = make(device, 2, 1, 2, 16, torch.float32, [[(0, 90)]], own=20)
    case.q[1, 0, 1] = float("nan")
    out, lse = attend(case)
    assert out[1, 0, 1].isnan().all() and lse[1, 1].isnan().all()
    assert out[0].isfinite().all() and out[1, 0, 0].isfinite().all() and lse[0].isfinite().all()


def call_of(device: torch.device, length: int, heads: int, kv_heads: int, own: int = 0, past: int = 0) -> Call:
    q = torch.zeros(1, length, heads, 16, device=device)
    k, context = (torch.zeros(1, n, kv_heads, 16, device=device) for n in (own, past))
    return Call(q, k, k, Past.of(q, context, context, None), 1.0)


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "served"),
    [(1, 24, 6, True), (16, 24, 3, True), (16, 4, 4, True), (17, 4, 4, False), (48, 4, 4, False), (15, 9, 1, False)],
)
def test_few_queries_are_those_of_a_branch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, length: int, heads: int, kv_heads: int, served: bool
) -> None:
    call = call_of(device, length, heads, kv_heads, own=1)
    assert few.serves(call) is served
    with runtime.backend("hopper"):
        assert not selection.few_queries(call)
    monkeypatch.setattr(few, "multiprocessors", lambda device: 0)
    assert not few.serves(call)


def test_the_number_of_parts_fills_a_gpu_with_one_branch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few, "multiprocessors", lambda device: 132)
    narrow, wide = few.Tiling(32, 64, 4, 3), few.Tiling(64, 64, 8, 3)
    assert few.parts_of(call_of(device, 1, 24, 6, own=40, past=5), narrow) == few.Parts(44, 3)  # of 16 keys or more
    assert few.parts_of(call_of(device, 1, 24, 6, own=0, past=900), narrow) == few.Parts(44, 0)
    assert few.parts_of(call_of(device, 16, 24, 3, own=9000), wide) == few.Parts(0, 22)
    assert few.parts_of(call_of(device, 1, 24, 1, own=9000, past=1), narrow) == few.Parts(64, 64)


@pytest.mark.parametrize("length", [16, 17])
def test_which_kernels_serve(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, parts: list[few.Parts], length: int
) -> None:
    """Equal numbers of queries and own keys, which Hopper's kernels take too."""
    asked: list[Any] = []
    serves = selection.hopper_serves
    monkeypatch.setattr(
        selection, "hopper_serves", lambda *given, **more: asked.append(given) or serves(*given, **more)
    )
    case = make(device, 1, length, 1, 64, torch.bfloat16, [[(0, 20)]])
    with runtime.backend("auto" if device.type == "cuda" else "triton"):
        fork_attention(case.q, case.k, case.v, case.view)
    assert len(parts) == (length == 16) and len(asked) == (length == 17)


def test_the_custom_op_keeps_torchs_rules(device: torch.device, parts: list[few.Parts]) -> None:
    case = make(device, 2, 2, 2, 16, torch.float32, [[(0, 40)]], own=3, kv_heads=1)
    leaves = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
    rules = ["test_schema", "test_faketensor"]
    torch.library.opcheck(ops.forward, (*leaves, *pair_of(case), None, 0.2, None, 2), test_utils=rules)
    assert parts


def test_under_compile(device: torch.device, parts: list[few.Parts]) -> None:
    case = make(device, 2, 1, 4, 16, torch.float32, UNEVEN[:2], own=2, kv_heads=2)
    view = case.view

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = fork_attention(2 * q, k, v, view, return_lse=True)
        return out.square().sum(-1) + lse.transpose(1, 2)

    with runtime.backend("triton"):
        expected = attention(case.q, case.k, case.v)
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(case.q, case.k, case.v), expected)
    assert len(parts) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 4, 16])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_at_a_time_after_many(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, group: int, queries: int
) -> None:
    """With the numbers of parts that are in use."""
    for name, used in USED.items():
        monkeypatch.setattr(few, name, used)
    contexts: Segments = [[(0, 9_000), (10_000, 9_720)], [(19_000, 77)]]
    kv_heads = max(2, 16 // (group * queries))  # the error of fewer numbers of 16 bits is no firm bound
    case = make(device, 4, queries, kv_heads * group, 128, dtype, contexts, own=queries, kv_heads=kv_heads)
    got = attend(case, by="auto")
    assert_forward_right(case, got)
    assert equal(got, attend(case, by="auto"))


@pytest.mark.gpu
def test_one_captured_graph_serves_another_table(device: torch.device) -> None:
    case = make(
        device, 2, 1, 4, 128, torch.bfloat16, [[(0, 300), (400, 140)], [(0, 30), (600, 500)]], own=0, kv_heads=2
    )
    view = case.view
    assert view is not None
    fork_attention(case.q, None, None, view)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fork_attention(case.q, None, None, view)
    view.table.copy_(view.table.flip(0))
    expected = fork_attention(case.q, None, None, view)
    graph.replay()
    assert torch.equal(out, expected)


def test_nothing_spills() -> None:
    rows = compiled_kernels("ahead_few_queries", [80], "one")
    assert rows and all(row["stack"] == 0 for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_spills_in_any_specialisation() -> None:
    rows = compiled_kernels("ahead_few_queries", SHARED)
    assert {row["target"] for row in rows} == set(SHARED) and all(row["stack"] == 0 for row in rows)
