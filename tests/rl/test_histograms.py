"""Bins of ratios and advantages: where terms lie, as shares that add up over micro-batches and processes."""

from __future__ import annotations

import math

import pytest
import torch

from tempact.config import HISTOGRAM_BINS
from tempact.reporting import folded
from tempact.rl.flow_grpo import flow_grpo_gradient
from tempact.rl.histograms import advantage_shares, ratio_bins
from tempact.rl.plain_ratio import plain_ratio_gradient
from tempact.rl.planner_losses import LOSSES

CLIPS = {"clip_low": 0.1, "clip_high": 0.2}
MIDDLE = HISTOGRAM_BINS // 2


def one_hot(*places: int) -> list[float]:
    return [places.count(place) / len(places) for place in range(HISTOGRAM_BINS)]


def test_a_ratio_s_clip_ends_at_an_edge_and_what_lies_beyond_is_outermost() -> None:
    distance = torch.tensor([0.0, 0.999, 1.001, -0.999, -1.001, 2.99, 50.0, -math.inf, math.nan])
    inside = torch.stack([*ratio_bins(distance).values()]).double()
    places = [MIDDLE, MIDDLE + 3, MIDDLE + 4, MIDDLE - 3, MIDDLE - 4, 20, 20, 0]
    assert inside[:, :-1].argmax(0).tolist() == places and inside.sum(0).tolist() == [1.0] * 8 + [0.0]


def test_advantages_count_where_their_mask_says_so_and_a_flat_group_is_in_the_middle() -> None:
    advantage = torch.tensor([[-2.0, 2.0], [0.0, 0.0], [0.19, -1.7], [5.0, 5.0]])
    mask = torch.tensor([[True, True], [True, True], [True, False], [False, False]])
    (shares,) = folded(advantage_shares(advantage, mask, 2.0)).values()
    assert shares == one_hot(0, 20, MIDDLE, MIDDLE, MIDDLE + 1)
    assert all(map(math.isnan, advantage_shares(advantage, mask & False, 2.0).values()))


@pytest.mark.parametrize("loss", LOSSES)
def test_sequences_are_counted_in_clips_of_their_side(loss: str) -> None:
    """Ratios of tokens (grpo), of means (gspo) and of whole sequences (rloo), with padding and a row that is out."""
    moved = torch.tensor([[0.15, 0.15, 9.0], [-0.05, -0.25, -0.05], [4.0, 4.0, 4.0], [0.0, 0.0, 0.0]])
    counted = torch.tensor([[True, True, False], [True] * 3, [True] * 3, [True] * 3])
    mask, none = torch.tensor([True, True, False, True]), torch.zeros(4, 3)
    whole = LOSSES[loss](moved, none, none, counted, torch.ones(4), mask, kl_weight=0.0, **CLIPS)[1]
    ratios = {
        "gspo": [[0.15], [-0.35 / 3], [0.0]],
        "rloo": [[0.3], [-0.35], [0.0]],
        "grpo": [[0.15, 0.15], [-0.05, -0.25, -0.05], [0.0]],
    }[loss]
    expected = [0.0] * HISTOGRAM_BINS
    for own in ratios:
        for log_ratio in own:
            away = math.expm1(log_ratio)
            in_clips = away / (0.2 if away > 0 else 0.1)
            expected[min(20, max(0, math.floor((in_clips / 3 + 1) * 10.5)))] += 1 / len(own) / 3
    (found,) = (own for name, own in folded(whole).items() if name == "ratio_histogram")
    assert found == pytest.approx(expected, abs=1e-12) and sum(found) == pytest.approx(1.0)


def test_transitions_are_counted_in_clips_and_parts_add_up() -> None:
    torch.manual_seed(0)
    velocity, noise = torch.randn(6, 2, 1, 4, 4), torch.randn(6, 2, 1, 4, 4)
    old = velocity + 0.02 * torch.randn_like(velocity)
    mask, advantage = torch.tensor([True] * 5 + [False]), torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, math.nan])
    more = {"clip": 0.004, "kl_weight": 0.0, "terms": 5}
    k = torch.full((6,), 1.3)

    def shares(rows: slice, *, plain: bool = False, before: torch.Tensor = old) -> list[float]:
        tensors = [values[rows].clone() for values in (velocity, before, velocity, noise)]
        weights = [k[rows], torch.ones(6)[rows]] if plain else []
        call = plain_ratio_gradient if plain else flow_grpo_gradient
        found = call(*tensors, *weights, advantage[rows], mask[rows], **more)[1]
        return [found[f"ratio_histogram/{number:02d}"].item() for number in range(HISTOGRAM_BINS)]

    log_ratio = (noise * (velocity - old)).flatten(1).mean(1)
    drifting = -(1.3 * noise * (velocity - old) + 0.5 * (1.3 * (velocity - old)).square()).flatten(1).mean(1)
    for plain, own in ((False, -log_ratio), (True, drifting)):
        places = ((own.expm1() / 0.004 / 3 + 1) * 10.5).floor().clamp(0, 20)[:5].int().tolist()
        whole = shares(slice(None), plain=plain)
        assert whole == pytest.approx(one_hot(*places)) and len(set(places)) > 2, plain
        parts = [shares(part, plain=plain) for part in (slice(0, 2), slice(2, 6))]
        assert [a + b for a, b in zip(*parts, strict=True)] == pytest.approx(whole, abs=1e-15)
    assert shares(slice(None), before=velocity) == pytest.approx(one_hot(MIDDLE))
