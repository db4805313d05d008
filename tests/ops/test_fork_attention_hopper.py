"""Fork attention's Hopper kernels: what they compile to anywhere, and on a Hopper GPU their results."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from typing import Any

import attention_cases
import pytest
import torch
from attention_cases import NAMES, ONE, Case, Context, Segments, assert_exact, assert_right, equal, on_kernel
from kernel_checks import assert_well_compiled, compiled_by, error
from torch import Tensor

from csrc_triton import CacheView, fork_attention, runtime
from csrc_triton.fork_attention import selection

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of capability 9.0: run it on one")
DTYPES = [torch.bfloat16, torch.float16]
HEAD_DIMS = [64, 128]
MANY: Segments = [[(0, 70), (100, 0), (150, 64), (90, 5)], [(150, 64), (70, 20), (214, 255)]]


def make(
    branches: int, length: int, heads: int, head_dim: int, dtype: torch.dtype, segments: Segments, **more: Any
) -> Case:
    return attention_cases.make("cuda", branches, length, heads, head_dim, dtype, segments, **more)


def on_hopper(case: Case, context: Context, grad_lse: Tensor | None = None) -> list[Tensor]:
    return on_kernel(case, context, grad_lse, by="hopper")


@pytest.mark.gpu
@needs_hopper
class TestOnHopper:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    @pytest.mark.parametrize(("branches", "length"), [(1, 1), (1, 63), (2, 129), (3, 500), (1, 1560), (8, 64)])
    def test_every_precision_and_head_size(self, branches: int, length: int, head_dim: int, dtype: torch.dtype) -> None:
        for segments in (ONE, [[(0, 1560), (1600, 312), (2000, 77)]]):
            case = make(branches, length, 3, head_dim, dtype, segments)
            assert_right(case, on_hopper(case, case.view), branches=[0, branches - 1])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    @pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 2), (12, 3), (2, 1)])
    def test_fewer_heads_of_keys(self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        for branches, length, segments in ((1, 63, ONE), (2, 193, []), (4, 640, MANY), (1, 1560, ONE)):
            case = make(branches, length, heads, head_dim, dtype, segments, kv_heads=kv_heads)
            got = on_hopper(case, case.view)
            assert_right(case, got, branches=[0, branches - 1])
            assert equal(got, on_hopper(case, case.view))

    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_integers_of_grouped_heads_come_out_exact(self, head_dim: int) -> None:
        case = make(2, 1560, 8, head_dim, torch.bfloat16, [[(0, 783), (790, 37)]], integers=True, kv_heads=2)
        case.v.copy_(torch.randint(-4, 5, case.v.shape))
        got, portable = on_hopper(case, case.view), on_kernel(case, case.view, by="triton")
        assert_exact(case, got[0])
        for name, a, b in zip(NAMES, got, portable, strict=True):
            assert error(a, b) <= torch.finfo(torch.bfloat16).eps * b.abs().max().item() + 1e-6, name

    def test_many_segments_shared_by_several_branches(self) -> None:
        case = make(4, 133, 2, 128, torch.bfloat16, MANY)
        assert_right(case, on_hopper(case, case.view))

    @pytest.mark.parametrize("length", [1, 64, 300])
    def test_without_context(self, length: int) -> None:
        case = make(2, length, 2, 128, torch.bfloat16, [])
        got = on_hopper(case, None)
        assert_right(case, got)
        empty = case.q[:1, :0]
        nothing = CacheView(case.k[0], case.v[0], torch.zeros(2, 3, 2, dtype=torch.int32, device="cuda"))
        for context in ((empty, empty), CacheView(nothing.k, nothing.v, nothing.table[:, :0].contiguous())):
            assert equal(got, on_hopper(case, context))
        assert_right(case, on_hopper(case, nothing))

    @pytest.mark.parametrize("rows", [1, 70, 128, 300])
    @pytest.mark.parametrize("contexts", [1, 2, 4])
    def test_pairs_of_tensors(self, contexts: int, rows: int) -> None:
        case = make(4, 200, 2, 128, torch.bfloat16, [[(rows * i, rows)] for i in range(contexts)])
        pair = tuple(pool[: contexts * rows].unflatten(0, (contexts, rows)) for pool in case.pools)
        heads_first = pair[1].transpose(1, 2).contiguous().transpose(1, 2)
        got = on_hopper(case, pair)  # type: ignore[arg-type]
        assert_right(case, got)
        assert equal(got, on_hopper(case, (pair[0], heads_first)))

    def test_strides_are_free_but_for_the_last(self) -> None:
        case = make(2, 140, 2, 128, torch.bfloat16, [[(0, 140)]])
        got = on_hopper(case, case.view)
        packed = torch.stack([case.q, case.k, case.v, case.grad], 2).unbind(2)
        pools = tuple(torch.stack([p, p], 1)[:, 1] for p in case.pools)
        strided = Case(*packed, pools, case.segments, case.scale)  # type: ignore[arg-type]
        assert equal(got, on_hopper(strided, strided.view))

    def test_a_tensor_that_the_accelerator_cannot_address(self) -> None:
        case = make(1, 40, 2, 128, torch.bfloat16, ONE)
        odd = torch.zeros(1, 41, 2, 130, device="cuda", dtype=torch.bfloat16)
        case.q = odd[:, 1:, :, 1:-1].copy_(case.q)
        with pytest.raises(ValueError, match="fork_attention: backend 'hopper' is forced .* multiples of 16 bytes"):
            on_hopper(case, case.view)
        assert_right(case, on_kernel(case, case.view, by="auto"))

    def test_gradient_of_the_log_sum_exp(self) -> None:
        case = make(2, 140, 1, 128, torch.bfloat16, MANY)
        grad_lse = torch.randn(2, 1, 140, device="cuda")
        assert_right(case, on_hopper(case, case.view, grad_lse), grad_lse=grad_lse)

    def test_scores_far_below_zero(self) -> None:
        """exp(0 - lse) overflows, which rows behind a segment's end must not see."""
        case = make(1, 40, 1, 128, torch.bfloat16, ONE)
        case.q.abs_().add_(20)
        for keys in (case.k, case.pools[0]):
            keys.abs_().neg_().sub_(1)
        got = on_hopper(case, case.view)
        assert got[1].max() < -100
        assert_right(case, got)

    @pytest.mark.parametrize("length", [64, 65, 1560, 4680])
    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_integers_come_out_exact(self, length: int, head_dim: int, dtype: torch.dtype) -> None:
        """Sums are exact and only the division rounds: a product that is compiled wrongly shows."""
        past = length // 2 + 3
        for segments in ([[(0, past), (past + 1, 37)]], [[(0, 128), (200, 640)], [(0, 128), (128, past)]]):
            case = make(2, length, 2, head_dim, dtype, segments, integers=True)
            case.v.copy_(torch.randint(-4, 5, case.v.shape))
            out = on_hopper(case, case.view)[0]
            assert_exact(case, out)

    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gradients_of_integers_are_the_portable_kernels(self, head_dim: int, dtype: torch.dtype) -> None:
        """Their sums are of the same rounded numbers, and differ by the order of addition in fp32 alone."""
        case = make(2, 1560, 2, head_dim, dtype, [[(0, 783), (790, 37), (1800, 128)]], integers=True)
        got, portable = on_hopper(case, case.view), on_kernel(case, case.view, by="triton")
        for name, a, b in zip(NAMES, got, portable, strict=True):
            assert error(a, b) <= torch.finfo(dtype).eps * b.abs().max().item() + 1e-6, name

    def test_equal_inputs_give_equal_bits_and_only_wanted_gradients(self) -> None:
        case = make(2, 1560, 12, 128, torch.bfloat16, [[(0, 1560), (1600, 3100)]])
        got = on_hopper(case, case.view)
        for _ in range(2):
            assert equal(got, on_hopper(case, case.view))
        for wanted in ((0,), (1, 2), (2,)):
            leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate((case.q, case.k, case.v))]
            with runtime.backend("hopper"):
                out = fork_attention(*leaves, case.view)
                grads = torch.autograd.grad(out, [leaves[i] for i in wanted], case.grad)
            assert equal(list(grads), [got[2 + i] for i in wanted])

    @pytest.mark.timeout(1200)
    def test_a_thousand_random_combinations(self) -> None:
        """At most 3 combinations have a largest error beyond twice the reference's, and none beyond three times: where
        a sum lies between two numbers of 16 bits, sums that are equally good may round to either. Combination 95 does:
        its one element has the same bits by the portable kernel."""
        draw, beyond = random.Random(0), []
        for i in range(1000):
            branches, contexts = draw.choice([(1, 1), (2, 1), (2, 2), (6, 3), (8, 2), (24, 1)])
            length = draw.choice([draw.randint(1, 200), draw.randint(1, 1200)])
            segments = []
            for _ in range(contexts):
                runs, row = [], 0
                for _ in range(draw.randint(0, 5)):
                    row += draw.randint(0, 40)
                    runs.append((row, draw.choice([0, draw.randint(1, 127), 128, draw.randint(1, 900)])))
                    row += runs[-1][1]
                segments.append(runs)
            kv_heads, group = draw.randint(1, 3), draw.choice([1, 1, 2, 4])
            case = make(
                branches, length, kv_heads * group, draw.choice(HEAD_DIMS), draw.choice(DTYPES), segments,
                kv_heads=kv_heads,
            )  # fmt: skip
            got, chosen = on_hopper(case, case.view), [draw.randrange(branches)]
            try:
                assert_right(case, got, chosen)
            except AssertionError as wrong:
                beyond.append(f"combination {i}: {tuple(case.q.shape)}, {case.q.dtype}, {segments}: {wrong}")
                assert_right(case, got, chosen, times=3)
        assert len(beyond) <= 3, beyond


def test_nothing_spills_and_matrix_products_stay_asynchronous() -> None:
    rows = compiled_by("ops/ahead_hopper.py")
    assert len(rows) == 8
    assert_well_compiled(rows)


@pytest.mark.slow
def test_all_specialisations() -> None:
    rows = compiled_by("ops/ahead_hopper.py", "everything")
    assert len(rows) == 112
    assert_well_compiled(rows)


@pytest.mark.skipif(HOPPER, reason="needs a machine without a Hopper GPU")
def test_a_forced_backend_that_cannot_serve_says_why(device: torch.device) -> None:
    q = torch.zeros(1, 4, 1, 64, device=device, dtype=torch.bfloat16)
    with runtime.backend("hopper"):
        with pytest.raises(ValueError, match="fork_attention: backend 'hopper' is forced and cannot serve: .* 9.0"):
            fork_attention(q, q, q)


def test_versions_of_triton() -> None:
    for version in ("3.6.0", "3.6.1+git12", "3.7.1", "3.8.0"):
        assert selection.why_not_triton(version) is None
    for version in ("3.5.1", "3.9.0", "3.10.0", "4.0.0"):
        assert selection.why_not_triton(version) == f"Triton {version}; accepted: 3.6, 3.7, 3.8"


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """Nothing is decided and nothing said yet, nor is what a test here makes the selection believe kept."""
    decide = selection.why_not_hopper
    for remembered in (decide, selection._say):
        remembered.cache_clear()
    yield
    decide.cache_clear()


def reason(dtype: torch.dtype = torch.bfloat16, head_dim: int = 128) -> str | None:
    return selection.why_not_hopper(torch.device("cuda", 5), dtype, head_dim)


def test_what_the_kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert reason() is None and reason(torch.float16, 64) is None
    assert reason(torch.float32) == "torch.float32 tensors; accepted: bfloat16, float16"
    assert reason(head_dim=32) == "head_dim 32; accepted: 64, 128"
    selection.why_not_hopper.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert reason() == "a GPU of capability 10.0; accepted: 9.0"


def test_shapes_and_options_that_the_kernels_pass_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from csrc_triton.fork_attention.tiles import Call, Past

    def call(heads: int = 2, own: int = 4, index: Tensor | None = None, block: int = 0) -> Call:
        q, k = torch.zeros(2, 4, 2, 64), torch.zeros(2, own, heads, 64)
        past = Past.of(q, torch.zeros(3, 5, heads, 64), torch.zeros(3, 5, heads, 64), None, index)
        return Call(q, k, k, past, 0.1, block)

    assert selection.why_not_shapes(call()) is None and selection.why_not_shapes(call(heads=1)) is None
    reasons = {
        selection.why_not_shapes(call(own=3)): "a query length other than the own keys'; accepted: equal lengths",
        selection.why_not_shapes(
            call(index=torch.zeros(2))
        ): "context_index with a pair of tensors; accepted: with a view",
        selection.why_not_shapes(call(block=3)): "causal_block 3; accepted: None",
    }
    monkeypatch.setattr(selection, "why_not_hopper", lambda *_: None)
    caplog.set_level(logging.INFO)
    q = torch.zeros(1, 4, 2, 64, dtype=torch.bfloat16)
    for found, expected in reasons.items():
        assert found is not None and found.startswith(expected)
        with runtime.backend("auto"):
            assert not selection.hopper_serves(q, unfit=found)
        with (
            runtime.backend("hopper"),
            pytest.raises(ValueError, match="backend 'hopper' is forced and cannot serve: "),
        ):
            selection.hopper_serves(q, unfit=found)
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"fork_attention: the portable kernels serve: {found}" for found in reasons]


def test_an_untested_triton_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    q = torch.zeros(1, 4, 1, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(selection.triton, "__version__", "3.10.0")
    monkeypatch.setattr(selection, "why_not_hopper", lambda *_: selection.why_not_triton("3.10.0"))
    caplog.set_level(logging.INFO)
    for _ in range(3):
        with runtime.backend("auto"):
            assert not selection.hopper_serves(q)
    with runtime.backend("hopper"), pytest.raises(ValueError, match="Triton 3.10.0"):
        selection.hopper_serves(q)
    with runtime.backend("triton"):
        assert not selection.hopper_serves(q)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    found = "Triton 3.10.0; accepted: 3.6, 3.7, 3.8"
    assert record.getMessage() == f"fork_attention: the portable kernels serve: {found}"


def test_one_line_says_that_hopper_serves(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    q = torch.zeros(1, 4, 2, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(selection, "why_not_hopper", lambda *_: None)
    caplog.set_level(logging.INFO)
    with runtime.backend("auto"):
        assert selection.hopper_serves(q, q, None) and selection.hopper_serves(q, q, q)
        assert not selection.hopper_serves(q, q[..., 4:])
    assert [r.getMessage() for r in caplog.records] == [
        "fork_attention: the Hopper kernels serve",
        "fork_attention: the portable kernels serve: a tensor whose address or strides are not multiples of 16 bytes",
    ]
