from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from interpreter import rounds_to_nearest  # noqa: F401 - used by every test here
from kernel_checks import assert_as_good, compiled_kernels
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from csrc_triton import _channels, runtime
from csrc_triton._channels import Tiling
from csrc_triton.kv_cache import CacheRows
from csrc_triton.qk_norm_rope import fused, naive, ops, qk_norm_rope

IN_TIME = [] if torch.cuda.is_available() else [pytest.mark.slow]  # the interpreter takes half precision alike
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=IN_TIME)]
EPS = 1e-6
# dim, heads: heads of 32, 64 and 128; one chunk, chunks that are all full, a last chunk that is not; Wan-1.3B's
SIZES = [
    (128, 4), (96, 3), pytest.param(192, 3, marks=IN_TIME), pytest.param(384, 3, marks=IN_TIME),
    (512, 4), (1536, 12),
]  # fmt: skip


def draw(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def angles(device: torch.device, length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    turns = draw(device, length, head_dim // 2, seed=9) * 3
    return turns.cos(), turns.sin()


def inputs(device: torch.device, batch: int, length: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k [B, L, dim] of different sizes, and weights of both signs."""
    q, k = (draw(device, batch, length, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    weights = [1 + 0.5 * draw(device, dim, dtype=dtype, seed=seed) for seed in (3, 4)]
    return [3 * q, 0.2 * k, *weights]


def run(backend: str, *args: Any, **kwargs: Any) -> Any:
    with runtime.backend(backend):
        return qk_norm_rope(*args, **kwargs)


def differentiated(backend: str, tensors: list[Tensor], rope: Any, heads: int) -> list[Tensor]:
    """Queries, keys, and the gradients of all of `tensors` for gradients of the outputs that are drawn."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    outs = run(backend, *tensors, rope, heads=heads, eps=EPS)
    grads = [
        draw(out.device, *out.shape, dtype=tensors[0].dtype, seed=5 + i).to(out.dtype) for i, out in enumerate(outs)
    ]
    return [*outs, *torch.autograd.grad(outs, tensors, grads)]


NAMES = ("q", "k", "dq", "dk", "dweight_q", "dweight_k")


def assert_all_as_good(device: torch.device, dtype: torch.dtype, batch: int, length: int, dim: int, heads: int):
    tensors, rope = inputs(device, batch, length, dim, dtype), angles(device, length, dim // heads)
    got = differentiated("triton", tensors, rope, heads)
    same = differentiated("torch", tensors, rope, heads)
    # the gradients of the outputs are drawn in the tensors' dtype, then widened
    exact_grads = [draw(device, *out.shape, dtype=dtype, seed=5 + i).double() for i, out in enumerate(got[:2])]
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    outs = run("torch", *wide, rope, heads=heads, eps=EPS)
    exact = [*outs, *torch.autograd.grad(outs, wide, exact_grads)]
    for name, *three in zip(NAMES, got, same, exact, strict=True):
        assert_as_good(name, *three, atol=1e-6 * three[2].abs().max().item())
    for name, ours, theirs in zip(NAMES, got, exact, strict=True):
        gap = (ours.double() - theirs).norm() / theirs.norm()
        assert gap <= {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype], (name, gap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "heads"), SIZES)
def test_outputs_and_gradients_are_as_good_as_torch(device: torch.device, dtype: torch.dtype, dim: int, heads: int):
    assert_all_as_good(device, dtype, 2, 3, dim, heads)


TILINGS = [Tiling(rows=4, lane=4), Tiling(rows=2, steps=4, chunk=32), Tiling(rows=8, steps=16, stages=3, chunk=512)]


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("length", [1, pytest.param(63, marks=pytest.mark.slow), 100])
def test_any_length_and_any_tiling(device: torch.device, monkeypatch: pytest.MonkeyPatch, tiling: Tiling, length: int):
    monkeypatch.setattr(_channels, "ENOUGH_PROGRAMS", 1)
    for kernel in fused.TILINGS:
        monkeypatch.setitem(fused.TILINGS, kernel, tiling)
    assert_all_as_good(device, torch.bfloat16, 1, length, 64, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "heads"), [(1536, 12), (5120, 40), (2048, 32)])
@pytest.mark.parametrize(("batch", "length"), [(1, 4680), (8, 1560), (24, 63), (3, 500), (1, 1)])
def test_chunks_of_wan(device: torch.device, dtype: torch.dtype, dim: int, heads: int, batch: int, length: int):
    assert_all_as_good(device, dtype, batch, length, dim, heads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_once(device: torch.device, dtype: torch.dtype):
    tensors, rope = inputs(device, 2, 20, 128, dtype), angles(device, 20, 32)
    got = run("triton", *tensors, rope, heads=4, eps=EPS)
    exact = run("torch", *(tensor.double() for tensor in tensors), rope, heads=4, eps=EPS)
    for ours, theirs in zip(got, exact, strict=True):
        half_a_step = theirs.abs() * torch.finfo(dtype).eps / 2
        assert ((ours.double() - theirs).abs() <= half_a_step + 1e-6).all()


def test_the_reference_is_a_norm_then_a_product_of_complex_numbers():
    q, _, weight, _ = inputs(torch.device("cpu"), 2, 6, 128, torch.float64)
    turns = draw(torch.device("cpu"), 6, 16, seed=9).double()
    out, plain = naive.norm_rope(q, weight, (turns.cos(), turns.sin()), 4, EPS)
    normed = (q / (q.square().mean(-1, keepdim=True) + EPS).sqrt() * weight).view(2, 6, 4, 16, 2)
    expected = torch.view_as_complex(normed) * torch.polar(torch.ones_like(turns), turns)[:, None]
    torch.testing.assert_close(plain, normed.flatten(-2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, torch.view_as_real(expected).flatten(-2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_tables_may_have_a_dimension_for_heads(device: torch.device, backend: str):
    tensors, rope = inputs(device, 2, 5, 64, torch.float32), angles(device, 5, 32)
    flat = run(backend, *tensors, rope, heads=2, eps=EPS)
    other = run(backend, *tensors, tuple(table[:, None] for table in rope), heads=2, eps=EPS)
    assert all(torch.equal(a, b) for a, b in zip(flat, other, strict=True))


def test_norm_alone_and_queries_alone(device: torch.device):
    q, k, weight_q, weight_k = inputs(device, 2, 5, 384, torch.float32)
    both = run("triton", q, k, weight_q, weight_k, None, heads=3, eps=EPS)
    q.requires_grad_()
    alone, nothing = run("triton", q, None, weight_q, None, None, heads=3, eps=EPS)
    assert nothing is None and torch.equal(alone, both[0])
    for x, weight, out in zip((q, k), (weight_q, weight_k), both, strict=True):
        torch.testing.assert_close(out.flatten(2), naive.norm(x.detach(), weight, EPS), rtol=1e-6, atol=1e-6)
    (got,) = torch.autograd.grad(alone.sin().sum(), q)
    (expected,) = torch.autograd.grad(naive.norm(q, weight_q, EPS).sin().sum(), q)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_keys_turn_as_far_as_queries(device: torch.device):
    """Scores depend on the difference of angles alone."""
    x, _, weight, _ = inputs(device, 1, 2, 32, torch.float32)
    x = x[:, :1].expand(1, 2, 32).contiguous()
    turns = torch.tensor([[0.3], [1.0]], device=device) * torch.arange(1, 17, device=device)
    q, k = run("triton", x, x, weight, weight, (turns.cos(), turns.sin()), heads=1, eps=EPS)
    shifted = turns + 0.7
    q2, k2 = run("triton", x, x, weight, weight, (shifted.cos(), shifted.sin()), heads=1, eps=EPS)
    torch.testing.assert_close(q[:, 0] @ k[:, 1].mT, q2[:, 0] @ k2[:, 1].mT, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(q.norm(dim=-1), naive.norm(x, weight, EPS).norm(dim=-1)[..., None])


def cache(device: torch.device, heads: int, head_dim: int, length: int, dtype: torch.dtype) -> CacheRows:
    """Rows of three branches, out of order, in pools filled with -7."""
    k, v = (torch.full((40, heads, head_dim), -7.0, device=device, dtype=dtype) for _ in range(2))
    return CacheRows(k, v, torch.tensor([20, 3, 33], device=device), length)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("roped", [True, False])
@pytest.mark.parametrize("pool", [torch.float32, torch.float16])
def test_writes_keys_and_values_into_their_rows_and_no_others(
    device: torch.device, backend: str, recorded: bool, roped: bool, pool: torch.dtype
):
    q, k, weight_q, weight_k = tensors = inputs(device, 3, 7, 96, torch.float32)
    v, rope, rows = draw(device, 3, 7, 96, seed=6), angles(device, 7, 32), cache(device, 3, 32, 7, pool)
    q.requires_grad_(recorded)
    plain = run(backend, *tensors, rope, heads=3, eps=EPS)
    outs = run(backend, *tensors, rope, heads=3, eps=EPS, v=v, write=rows, write_roped=roped)
    assert all(torch.equal(a, b) for a, b in zip(outs, plain, strict=True))
    keys = plain[1] if roped else run(backend, k, k, weight_k, weight_k, None, heads=3, eps=EPS)[1]
    expected_k, expected_v = torch.full_like(rows.k, -7.0), torch.full_like(rows.v, -7.0)
    for branch, first in enumerate(rows.first_rows.tolist()):
        expected_k[first : first + 7] = keys[branch]
        expected_v[first : first + 7] = v[branch].unflatten(-1, (3, 32))
    assert torch.equal(rows.k, expected_k) and torch.equal(rows.v, expected_v)
    assert not rows.k.requires_grad and outs[0].requires_grad == recorded
    if recorded:
        grads = [torch.autograd.grad(out[0].sin().sum(), q)[0] for out in (plain, outs)]
        assert torch.equal(*grads) and weight_q.grad is None


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("page", [1, 4, 12])
def test_writes_into_pages_that_lie_anywhere(device: torch.device, backend: str, page: int):
    tensors, v, rope = inputs(device, 2, 12, 64, torch.float32), draw(device, 2, 12, 64, seed=6), angles(device, 12, 32)
    expected = run(backend, *tensors, rope, heads=2, eps=EPS)
    pages = torch.randperm(40 // page, generator=torch.Generator().manual_seed(0))[: 24 // page]
    first = (pages * page).view(2, -1).to(device)
    pool_k, pool_v = (torch.full((40, 2, 32), -7.0, device=device) for _ in range(2))
    rows = CacheRows(pool_k, pool_v, first, 12)
    outs = run(backend, *tensors, rope, heads=2, eps=EPS, v=v, write=rows)
    assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
    written = (first[..., None] + torch.arange(page, device=device)).flatten()
    assert torch.equal(rows.rows, written)
    assert torch.equal(pool_k[written], outs[1].flatten(0, 1))
    assert torch.equal(pool_v[written].flatten(1), v.flatten(0, 1))
    others = torch.ones(40, dtype=torch.bool, device=device).index_fill(0, written, False)
    assert pool_k[others].eq(-7).all() and pool_v[others].eq(-7).all()


def test_writing_spoils_no_backward_that_saved_the_pool(device: torch.device):
    rows, x = cache(device, 2, 32, 4, torch.float32), torch.ones(40, 2, 32, device=device, requires_grad=True)
    product = x * rows.k
    tensors = inputs(device, 3, 4, 64, torch.float32)
    run("triton", *tensors, None, heads=2, eps=EPS, v=tensors[0], write=rows)
    product.sum().backward()  # raises if the write counts as a change of what was saved
    assert x.grad is not None


@pytest.mark.gpu
def test_rows_beyond_32_bits(device: torch.device):
    rows, heads, head_dim = 1_500_000, 12, 128
    pools = [torch.zeros(rows, heads, head_dim, device=device, dtype=torch.bfloat16) for _ in range(2)]
    write = CacheRows(*pools, torch.tensor([rows - 63, 100], device=device), 63)
    tensors, rope = inputs(device, 2, 63, 1536, torch.bfloat16), angles(device, 63, 128)
    _, k = run("triton", *tensors, rope, heads=heads, eps=EPS, v=tensors[0], write=write)
    assert torch.equal(pools[0][-63:], k[0]) and torch.equal(pools[1][-63:].flatten(1), tensors[0][0])
    assert torch.equal(pools[0][100:163], k[1]) and pools[0][163:-63].count_nonzero() == 0


def test_layouts_are_followed(device: torch.device):
    length, dim = 5, 96
    joint = draw(device, 3, length, 3 * dim)  # one projection for all three
    slices = joint.unflatten(-1, (3, dim)).unbind(2)
    copies = [part.contiguous() for part in slices]
    weights, rope = inputs(device, 1, 1, dim, torch.float32)[2:], angles(device, length, 32)
    found = []
    for q, k, v in (slices, copies):
        rows = cache(device, 3, 32, length, torch.float32)
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        outs = run("triton", q, k, *weights, rope, heads=3, eps=EPS, v=v, write=rows)
        # gradients that come in attention's layout, and one number for all elements
        scores = outs[0].transpose(1, 2).contiguous() * torch.arange(32, device=device)
        grads = torch.autograd.grad(scores.sum() + outs[1].sum(), (q, k))
        found.append([*outs, *grads, rows.k, rows.v])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_only_what_is_needed_gets_a_gradient(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    calls = []
    original = ops.backward_op
    monkeypatch.setattr(ops, "backward_op", lambda *args: calls.append(args[-2:]) or original(*args))
    tensors, rope = inputs(device, 2, 4, 64, torch.float32), angles(device, 4, 32)
    whole = differentiated("triton", tensors, rope, 2)[2:]
    for wanted, expected in (((0, 1), [(True, False)] * 2), ((3,), [(False, True)]), ((0,), [(True, False)])):
        calls.clear()
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        outs = run("triton", *leaves, rope, heads=2, eps=EPS)
        grads = [draw(device, *out.shape, seed=5 + i) for i, out in enumerate(outs)]
        used = [i for i, out in enumerate(outs) if out.requires_grad and any(w % 2 == i for w in wanted)]
        found = torch.autograd.grad([outs[i] for i in used], [leaves[w] for w in wanted], [grads[i] for i in used])
        assert calls == expected
        for index, gradient in zip(wanted, found, strict=True):
            torch.testing.assert_close(gradient, whole[index], rtol=1e-5, atol=1e-5)


def test_weights_may_be_finer_than_what_they_weigh(device: torch.device):
    q, k, *weights = inputs(device, 2, 6, 64, torch.bfloat16)
    weights = [weight.float().requires_grad_() for weight in weights]
    for backend in ("torch", "triton"):
        outs = run(backend, q, k, *weights, None, heads=2, eps=EPS)
        grads = torch.autograd.grad(sum(out.float().square().sum() for out in outs), weights)
        assert all(out.dtype == torch.bfloat16 for out in outs) and all(g.dtype == torch.float32 for g in grads)


def test_equal_calls_give_equal_bits(device: torch.device):
    tensors, rope = inputs(device, 2, 10, 64, torch.bfloat16), angles(device, 10, 32)
    first, second = (differentiated("triton", tensors, rope, 2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def scores(q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, rope: Any) -> Tensor:
    out_q, out_k = qk_norm_rope(q, k, weight_q, weight_k, rope, heads=2, eps=EPS)
    return (out_q * out_k).sum(-1).sin()


COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_works_under_compile_and_checkpoint(device: torch.device, compiler: str):
    tensors, rope = inputs(device, 2, 5, 64, torch.float32), angles(device, 5, 32)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    with runtime.backend("triton"):
        plain = scores(*tensors, rope)
        expected = torch.autograd.grad(plain.sum(), tensors)
        compiled = torch.compile(scores, backend=compiler, fullgraph=True)(*tensors, rope)
        saved = checkpoint(scores, *tensors, rope, use_reentrant=False)
        for other in (compiled, saved):
            torch.testing.assert_close(other, plain, rtol=0, atol=1e-6)
            found = torch.autograd.grad(other.sum(), tensors)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_writes_under_compile(device: torch.device, compiler: str):
    tensors, rope = inputs(device, 3, 5, 64, torch.float32), angles(device, 5, 32)
    found = []
    for wrap in (lambda f: f, functools.partial(torch.compile, backend=compiler, fullgraph=True)):
        rows = cache(device, 2, 32, 5, torch.float32)

        def step(q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, rows: CacheRows) -> tuple[Tensor, Tensor]:
            return qk_norm_rope(q, k, weight_q, weight_k, rope, heads=2, eps=EPS, v=2 * q, write=rows)

        with torch.no_grad(), runtime.backend("triton"):
            outs = wrap(step)(*tensors, rows)
        found.append([*outs, rows.k, rows.v])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and (found[0][3] != -7).any()


def good() -> dict[str, Any]:
    q = torch.zeros(3, 4, 64)
    rows = cache(torch.device("cpu"), 2, 32, 4, torch.float32)
    return {
        "q": q, "k": q, "weight_q": torch.ones(64), "weight_k": torch.ones(64), "rope": (torch.ones(4, 16),) * 2,
        "heads": 2, "eps": EPS, "v": q, "write": rows,
    }  # fmt: skip


def rows_with(**changes: Any) -> CacheRows:
    rows = cache(torch.device("cpu"), 2, 32, 4, torch.float32)
    return CacheRows(**({"k": rows.k, "v": rows.v, "first_rows": rows.first_rows, "length": 4} | changes))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(4, 64)}, r"^q: found \(4, 64\) .*accepted: floating point \[B, L, heads \* head_dim\]"),
        ({"k": torch.zeros(3, 5, 64)}, r"^k: found \(3, 5, 64\) .*accepted: \(3, 4, 64\)"),
        ({"k": torch.zeros(3, 4, 64).bfloat16()}, r"^k: found .*bfloat16.*accepted: .*float32"),
        ({"k": torch.zeros(3, 64, 4).mT}, r"^k: found strides .*accepted: a contiguous last dimension"),
        ({"k": torch.zeros(3, 4, 64, device="meta")}, r"^k: found .* on meta; accepted: .* on cpu"),
        ({"v": torch.zeros(3, 4, 32)}, r"^v: found \(3, 4, 32\)"),
        ({"weight_q": torch.ones(32)}, r"^weight_q: found \(32,\) .*accepted: \(64,\)"),
        ({"weight_k": None}, r"^weight_k: found one of k and weight_k without the other"),
        ({"heads": 5}, r"^heads: found 5; accepted: a number that divides the 64 channels"),
        ({"heads": 64}, r"^heads: found 64 heads of 1 channels; accepted with rope: even head sizes"),
        ({"eps": -1.0}, r"^eps: found -1.0"),
        ({"rope": (torch.ones(4, 16), torch.ones(4, 32))}, r"^rope: found sin \(4, 32\) .*\(4, 16\) or \(4, 1, 16\)"),
        ({"rope": (torch.ones(4, 16).double(),) * 2}, r"^rope: found cos .*float64.*accepted: .*float32"),
        ({"rope": (torch.ones(4, 16, requires_grad=True),) * 2}, r"^rope: found cos that requires grad"),
        ({"v": None}, r"^write: found no k or no v"),
        ({"write": None}, r"^v: found values and no `write`"),
        ({"write": rows_with(k=torch.zeros(40, 4, 16))}, r"^write\.k: found \(40, 4, 16\).*\[rows, 2, 32\]"),
        ({"write": rows_with(length=3)}, r"^write\.length: found 3; accepted: 4"),
        ({"write": rows_with(first_rows=torch.tensor([0, 8]))}, r"^write\.first_rows: found \(2,\)"),
        ({"write": rows_with(first_rows=torch.zeros(3, 2, 1).long())}, r"^write\.first_rows: found \(3, 2, 1\)"),
        ({"write": rows_with(first_rows=torch.zeros(2, 3).long().T)}, r"^write\.first_rows: found .*, contiguous$"),
        ({"write": rows_with(first_rows=torch.zeros(3, 3).long())}, r"^write\.first_rows: found 3 pages; .*the 4 tok"),
        ({"write": rows_with(first_rows=torch.zeros(3, 2).long() + 39)}, r"^write\.first_rows: .*rows in \[0, 38\]"),
        ({"write": rows_with(first_rows=torch.tensor([0, 37, 8]))}, r"^write\.first_rows: .*rows in \[0, 36\]"),
    ],
)
def test_bad_input_is_named(backend: str, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        run(backend, **(good() | changes))


def test_a_forced_kernel_says_why_it_cannot_serve():
    odd = torch.zeros(2, 3, 72)
    plain = {"weight_q": torch.ones(72), "weight_k": torch.ones(72), "rope": None, "heads": 3, "eps": EPS}
    with pytest.raises(ValueError, match=r"qk_norm_rope: .*cannot serve: heads of 24 channels; accepted: a power of"):
        run("triton", odd, odd, **plain)
    assert run("auto", odd, odd, **plain)[0].shape == (2, 3, 3, 24)
    for changes, reason in (
        (
            {"q": torch.zeros(3, 0, 64), "k": torch.zeros(3, 0, 64), "rope": None, "v": None, "write": None},
            "no elements",
        ),
        ({"weight_q": torch.ones(64).double()}, "weight_q is torch.float64"),
        ({"write": rows_with(k=torch.zeros(40, 32, 2).mT)}, "a row of the pools is not contiguous"),
    ):
        with pytest.raises(ValueError, match=f"cannot serve: .*{reason}"):
            run("triton", **(good() | changes))


def test_every_kernel_compiles_ahead_of_time_without_spills():
    rows = compiled_kernels("ahead_qk_norm_rope")
    assert {row["target"] for row in rows} == {80, 90}
    assert not [row for row in rows if row["stack"]], rows
