"""torch.library.opcheck on every op that the package registers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreter import rounds_to_nearest  # noqa: F401 - used by every test here
from op_samples import CLIP, EPS, HEADS, INPUTS, B, L, draw, registered
from torch import Tensor

from csrc_triton.kv_cache import CacheView


def leaves(*names: str) -> tuple[Tensor, ...]:
    return tuple(INPUTS[name].clone().requires_grad_() for name in names)


def plain(*names: str) -> tuple[Tensor, ...]:
    return tuple(INPUTS[name] for name in names)


def pools() -> tuple[Tensor, ...]:
    return tuple(draw(B * L, HEADS, INPUTS["q4"].shape[3], seed=seed) for seed in (20, 21))


ROWS = torch.tensor([0, L])
STATS = draw(B, L, seed=22), draw(B, L, seed=23).exp()  # mean and rstd
BY_HEADS = draw(B, L, HEADS, INPUTS["q4"].shape[3], seed=24)
LEVELS = torch.tensor([0.9, 0.8]), torch.tensor([0.5, 0.4])
NUMBERS = [0.5, 0.4, 0.3, 2.0, 1.0]  # a step's coefficients
TABLE = CacheView.of(*pools(), [[(0, 5)]]).table
SAVED = draw(B, L, HEADS, INPUTS["q4"].shape[3], seed=25), draw(B, HEADS, L, seed=26) + 9  # an output and a log-sum-exp

QUICK = "test_schema", "test_autograd_registration", "test_faketensor"
# every op, with calls that give and leave out each optional argument
CASES: dict[str, list[tuple[Any, ...]]] = {
    "adaln": [
        (*leaves("x"), None, None, *leaves("shift", "scale"), EPS),
        (*leaves("x", "y", "gate", "shift", "scale"), EPS),
        (*leaves("x", "y"), None, *leaves("bias", "weight"), EPS),
    ],
    "adaln_backward": [
        (*plain("v", "noise", "x", "y", "gate", "shift", "scale"), *STATS, [True] * 5),
        (*plain("v"), None, *plain("x"), None, None, *plain("shift", "scale"), *STATS, [True, *[False] * 3, True]),
    ],
    "gated_residual": [leaves("x", "y", "gate"), (None, *leaves("y", "gate"))],
    "gated_residual_backward": [(*plain("x", "y", "gate"), wants) for wants in (True, False)],
    "qk_norm_rope": [
        (*leaves("q", "k", "weight", "bias"), *plain("cos", "sin"), HEADS, EPS),
        (*leaves("q"), None, *leaves("weight"), None, None, None, HEADS, EPS),
    ],
    "qk_norm_rope_backward": [
        (BY_HEADS, *plain("q", "weight", "cos", "sin"), EPS, True, True),
        (BY_HEADS, *plain("q", "weight"), None, None, EPS, False, True),
    ],
    "qk_norm_rope_write": [
        (*plain("q", "k", "v", "weight", "bias", "cos", "sin"), *pools(), ROWS, HEADS, EPS, True),
        (None, *plain("k", "v"), None, *plain("bias"), None, None, *pools(), ROWS, HEADS, EPS, False),
    ],
    "flow_sde_step": [
        (*leaves("x", "v"), *plain("noise"), None, None, NUMBERS, "cps", 0, 0, True),
        (*leaves("x", "v"), None, *LEVELS, [0.7, 0.0], "flow_grpo", 5, 3, False),
    ],
    "flow_sde_step_backward": [
        (*plain("noise"), draw(4, B).exp(), *plain("advantage", "x"), torch.float32, torch.bfloat16),
        (*plain("noise"), draw(4, B).exp(), *plain("advantage"), None, None, torch.float32),
    ],
    "flow_policy_loss": [
        (*leaves("x"), *plain("y", "v", "noise", "advantage"), CLIP),
        (*leaves("x"), *plain("y"), None, *plain("noise", "advantage"), CLIP),
    ],
    "flow_policy_loss_backward": [
        (*plain("x", "v", "noise", "advantage", "advantage"), *plain("advantage") * 2, None, *plain("advantage")),
        (*plain("x"), None, *plain("noise", "advantage", "advantage"), None, None, *plain("advantage"), None),
    ],
    "flow_policy_loss_and_grad": [
        (*plain("x", "y", "v", "noise", "advantage"), CLIP, *plain("advantage", "advantage")),
        (*plain("x", "y"), None, *plain("noise", "advantage"), CLIP, *plain("advantage"), None),
    ],
    "fork_attention": [
        (*leaves("q4", "k4", "v4"), *plain("past_k", "past_v"), None, 0.2),
        (*leaves("q4", "k4", "v4"), *pools(), TABLE, 0.2),
        (*leaves("q4", "k4", "v4"), None, None, None, 0.2, None, 2),
        (*leaves("q4", "k4", "v4"), *plain("past_k", "past_v"), None, 0.2, torch.zeros(B, dtype=torch.int32)),
    ],
    "fork_attention_backward": [
        (BY_HEADS, None, *plain("q4", "k4", "v4", "past_k", "past_v"), None, *SAVED, 0.2, True, True),
        (BY_HEADS, -SAVED[1], *plain("q4", "k4", "v4"), None, None, None, *SAVED, 0.2, False, True, None, 2),
        (BY_HEADS, None, *plain("q4", "k4", "v4"), *pools(), TABLE, *SAVED, 0.2, True, False),
    ],
    "norm_silu": [
        (*plain("x", "y", "bias", "weight"), torch.zeros(B, L, 32), torch.zeros(B, L, 48)),
        (*plain("x"), None, None, None, None, torch.zeros(B, L, 32)),
    ],
    "enlarge": [
        (INPUTS["x"][:, None].contiguous(), INPUTS["y"][:, None].contiguous(), *plain("bias"), 2),
        (INPUTS["x"][:, None].contiguous(), None, None, 1),
    ],
    "decode_attention": [(*plain("query", "keys", "values", "lengths"), 0.2)],
    "fp8_rows": [(*plain("x"), False), (INPUTS["x"].mT, True)],
}  # fmt: skip


def test_every_registered_op_is_checked() -> None:
    assert set(CASES) == registered()


@pytest.mark.parametrize("name", CASES)
def test_an_op_keeps_torchs_rules(name: str) -> None:
    """Its schema, its outputs' shapes on fake tensors, its gradient's registration, and its tracing for compilers."""
    registered()
    op, (first, *others) = getattr(torch.ops.csrc_triton, name).default, CASES[name]
    torch.library.opcheck(op, first)
    for arguments in others:
        torch.library.opcheck(op, arguments, test_utils=QUICK)


def test_a_rule_that_is_broken_is_found() -> None:
    """That opcheck looks at these ops at all: a fake output of another shape."""
    from csrc_triton.feature_maps import ops

    kept = ops.enlarge_op._abstract_fn
    ops.enlarge_op.register_fake(lambda x, update, bias, parts: x.new_empty(x.shape))
    try:
        with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError):
            torch.library.opcheck(ops.enlarge_op, CASES["enlarge"][1], test_utils="test_faketensor")
    finally:
        ops.enlarge_op.register_fake(kept)
