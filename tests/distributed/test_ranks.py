"""What the processes of a run exchange, share and raise together, in 1, 2, 3 and 5 processes."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
from distributed import among_ranks
from distributed.among_ranks import MOST_UNITS, SHAPES, leaf
from distributed.processes import joined
from torch import Tensor

from tempact.distributed import Ranks
from tempact.distributed.reduction import blocks, checksum

SIZES = (1, 2, 3, 5)


@pytest.fixture(scope="module", params=SIZES)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of so many ranks has found."""
    folder = tmp_path_factory.mktemp("ranks")
    if request.param == 1:
        among_ranks.everything(folder)
    else:
        assert joined(request.param, 120.0, among_ranks.everything, folder) == [0] * request.param
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(request.param)]


def test_all_ranks_get_the_values_of_all(found: list[dict[str, Any]]) -> None:
    size = len(found)
    for own in found:
        exchanged = own["exchanged"]
        assert exchanged["gather"] == [(rank, [rank, rank]) for rank in range(size)]
        assert exchanged["own"] and exchanged["first"] == "of 0"
        assert exchanged["agreed"] == [-rank for rank in range(size)]


def test_shares_are_consecutive_and_even(found: list[dict[str, Any]]) -> None:
    for count, shares in enumerate(found[0]["exchanged"]["shares"]):
        assert [unit for share in shares for unit in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_an_error_of_one_rank_is_raised_by_all_and_says_where(found: list[dict[str, Any]]) -> None:
    size = len(found)
    for own in found[1:]:
        assert own["refused"] == found[0]["refused"]
    if size > 1:
        last, middle = size - 1, min(1, size - 1)
        raised = [last, middle, 0, None, 0, 0]
        for (error, notes), rank in zip(found[0]["refused"], raised, strict=True):
            where = [f"rank {rank} on {socket.gethostname()}, looking"]
            assert error == ("" if rank is None else f"rank {rank}")
            assert notes[:1] == ([] if rank is None else where)


def test_the_first_rank_of_a_machine_acts_before_the_others(found: list[dict[str, Any]]) -> None:
    (_, ended), *others = found[0]["turns"]
    assert all(began >= ended for began, _ in others)


def test_units_go_to_whoever_is_free_the_costly_first(found: list[dict[str, Any]]) -> None:
    size = len(found)
    for queue in (found[0]["taken"][:size], found[0]["taken"][size:]):
        assert sorted(unit for own in queue for unit in own) == [1, 1, 2, 3, 4, 5, 6, 9]
        if size > 1:
            assert all(own == sorted(own, reverse=True) for own in queue)
    if size > 1:
        assert len(found[0]["taken"][size - 1]) <= 2  # the slow one


def tree(leaves: list[Tensor]) -> Tensor:
    """Pairs of neighbours, then pairs of those: an absent one adds nothing."""
    while len(leaves) > 1:
        leaves = [sum(leaves[i + 1 : i + 2], start=leaves[i]) for i in range(0, len(leaves), 2)]
    return leaves[0]


def test_the_sum_is_that_of_one_tree(found: list[dict[str, Any]]) -> None:
    for own in found:
        for units, (gradients, metrics) in enumerate(own["sums"]):
            leaves = [leaf(unit) for unit in range(units)]
            for i, shape in enumerate(SHAPES):
                whole = tree([own_leaf[i] for own_leaf in leaves]) if units else torch.zeros(shape)
                assert torch.equal(gradients[i], whole), units
            assert metrics == own["sums"][units][1] and (metrics == {}) is (units == 0)
    assert len(found[0]["sums"]) == MOST_UNITS + 1


def test_metrics_are_summed_alike_on_all(found: list[dict[str, Any]]) -> None:
    alone = among_ranks.sums(Ranks())
    for own in found:
        assert [metrics for _, metrics in own["sums"]] == [metrics for _, metrics in alone]


def test_records_come_to_whoever_wants_them(found: list[dict[str, Any]]) -> None:
    assert [own["moved"] for own in found] == [[True] * 7] * len(found)


def test_nobody_stays_in_a_meeting_that_one_does_not_come_to(found: list[dict[str, Any]]) -> None:
    """What left a meeting later than in 5 s has failed there."""
    last = len(found) - 1
    line = f"rank {last} on {socket.gethostname()}, leaving: gave up"
    assert [own["an_end"] for own in found] == [(line, 7) if last else ("", 0)] * len(found)


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 5, 8, 12, 13, 64])
def test_blocks_are_whole_subtrees_that_make_up_a_share(size: int, count: int) -> None:
    for rank in range(size):
        share = Ranks(rank, size).share(count)
        found = blocks(share)
        units = [unit for level, number in found for unit in range(number << level, (number + 1) << level)]
        assert units == list(share)
        assert len(found) <= 2 * max(1, len(share)).bit_length()


def test_a_checksum_sees_other_bits_and_other_places() -> None:
    values = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[4.0, 0.0]])]
    same = checksum(values)
    assert checksum([each.clone() for each in values]) == same
    assert checksum([torch.tensor([2.0, 1.0, 3.0]), values[1]]) != same
    assert checksum([values[0], torch.tensor([[0.0, 4.0]])]) != same
    assert checksum([values[0], torch.tensor([[4.0, -0.0]])]) != same
    assert checksum([values[0], torch.nextafter(values[1], values[1] + 1)]) != same
    assert checksum([values[1], values[0]]) != same
