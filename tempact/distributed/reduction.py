"""The sum of a policy's gradients over the units of an update, in one order whatever the number of processes.

Floating-point sums depend on their order. Here it is a binary tree over the units: 0 with 1, 2 with 3, then the pairs,
and so on; an absent right child adds nothing. A rank works on consecutive leaves and adds whole subtrees by itself. The
top of the tree is added slice by slice: the slices of all subtrees go to the rank that owns the slice
(`all_to_all_single`), and sums come back (`all_gather_into_tensor`). That is what an all-reduce moves, where every rank
has one subtree.

Where members of a group work on the same units, each on a part of their terms, there is a leaf for each member and
unit: those of one member stand together, and the sum depends on the number of members, not on that of groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tempact.distributed import Ranks, share_of


class Gradient:
    """The gradients of a policy's parameters, as views of one flat buffer that stays where it is.

    Recorded backward passes write to it. `length` is that of all parameters, filled up to equal slices for the ranks.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks | None = None):
        self.parameters, self.ranks = list(parameters), ranks or Ranks()
        used = sum(parameter.numel() for parameter in self.parameters)
        self.length = -(-used // self.ranks.size) * self.ranks.size
        first = self.parameters[0]
        self.flat = torch.zeros(self.length, dtype=first.dtype, device=first.device)
        ends = [0, *torch.tensor([p.numel() for p in self.parameters]).cumsum(0).tolist()]
        self._views = [self.flat[a:b].view_as(p) for (a, b), p in zip(pairwise(ends), self.parameters, strict=True)]
        self.attach()

    def attach(self) -> None:
        """Makes the views the parameters' gradients, where something has taken their place, with its values."""
        for parameter, own in zip(self.parameters, self._views, strict=True):
            if parameter.grad is not own:
                if parameter.grad is None:
                    own.zero_()
                else:
                    own.copy_(parameter.grad)
                parameter.grad = own

    def clear(self) -> None:
        self.flat.zero_()
        for parameter, own in zip(self.parameters, self._views, strict=True):
            parameter.grad = own


class UpdateSum:
    """Gradient and metrics of an update, while its units are worked on.

    Args:
        gradient: of the policy; it holds nothing yet.
        units: number of all units. terms: what the update's mean is over, in all of them.
        members: processes that each have a part of every unit.
    """

    def __init__(self, gradient: Gradient, units: int, terms: int, members: int = 1):
        self.gradient, self.leaves, self.terms = gradient, units * members, terms
        ranks = gradient.ranks
        self.layout = [leaves_of(units, rank, ranks.size, members) for rank in range(ranks.size)]
        self.own = self.layout[ranks.rank]
        self._next = self.own.start
        self._nodes: list[tuple[int, Tensor]] = []  # level and value of the subtrees that wait for their right sibling
        self._metrics: list[Mapping[str, Tensor | float]] = []

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """What the parameters' gradients hold is that of the next unit; metrics: its shares in those of the update."""
        self._metrics.append(metrics)
        index, level = self._next, 0
        self._next += 1
        if self.leaves == 1:
            return  # the gradient is where it belongs
        self.gradient.attach()
        value = self.gradient.flat
        while self._nodes and self._nodes[-1][0] == level and index % 2:  # the left sibling is there
            left = self._nodes.pop()[1]
            value = left.add_(value)
            index, level = index // 2, level + 1
        self._nodes.append((level, value.clone() if value is self.gradient.flat else value))
        self.gradient.flat.zero_()

    def finish(self) -> dict[str, float]:
        """Leaves the sum over all units in the parameters' gradients, on every rank; returns the summed metrics."""
        assert self._next == self.own.stop, f"{self._next - self.own.start} of {len(self.own)} units"
        ranks = self.gradient.ranks
        shares = [share for own in ranks.gather(_numbers(self._metrics)) for share in own]
        if self.leaves > 1 or (self.leaves and not ranks.alone):
            if self.leaves == 1 and self.own:  # the gradient is its only node
                self._nodes = [(0, self.gradient.flat.clone())]
            self._sum(ranks)
        return {name: math.fsum(share[name] for share in shares) for share in shares[:1] for name in share}

    def _sum(self, ranks: Ranks) -> None:
        if ranks.alone:
            self.gradient.flat.copy_(_top([(level, i, v) for i, (level, v) in _placed(self._nodes, self.own.start)]))
            return
        layout = [blocks(own) for own in self.layout]
        assert [level for level, _ in layout[ranks.rank]] == [level for level, _ in self._nodes]
        staged = self.gradient.flat if ranks.direct else self.gradient.flat.cpu()
        width = self.gradient.length // ranks.size
        slices: list[tuple[int, int, Tensor]] = []
        with ranks.meeting():
            for turn in range(max(map(len, layout))):
                sent = self._nodes[turn][1] if turn < len(self._nodes) else staged[:0]
                givers = [rank for rank, own in enumerate(layout) if turn < len(own)]
                received = staged.new_empty(len(givers) * width)
                sizes = [width if rank in givers else 0 for rank in range(ranks.size)]
                dist.all_to_all_single(
                    received, sent.to(staged.device), sizes, [width if len(sent) else 0] * ranks.size
                )
                parts = received.view(len(givers), width)
                slices += [(*layout[rank][turn], part) for rank, part in zip(givers, parts, strict=True)]
            whole = staged.new_empty(self.gradient.length)
            _all_gather(whole, _top(slices).contiguous())
            if staged.is_cuda:  # what the host does next may not come before
                torch.cuda.current_stream().synchronize()
        self.gradient.flat.copy_(whole)
        self._nodes.clear()


# torch 2.13 has given the function another name, and warns of the old one
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def leaves_of(units: int, rank: int, size: int, members: int) -> range:
    """The leaves of a rank: its group's share of the units, behind the leaves of the members before it."""
    own, before = share_of(units, rank // members, size // members), rank % members * units
    return range(before + own.start, before + own.stop)


def blocks(own: range) -> list[tuple[int, int]]:
    """The largest whole subtrees that consecutive leaves are made of: level and number in the level, in order."""
    found, start = [], own.start
    while start < own.stop:
        level = (start & -start).bit_length() - 1 if start else (own.stop - start).bit_length() - 1
        while start + (1 << level) > own.stop:
            level -= 1
        found.append((level, start >> level))
        start += 1 << level
    return found


def _placed(nodes: Sequence[tuple[int, Tensor]], start: int) -> list[tuple[int, tuple[int, Tensor]]]:
    """Nodes of consecutive units from `start` with their numbers in their levels."""
    placed = []
    for level, value in nodes:
        placed.append((start >> level, (level, value)))
        start += 1 << level
    return placed


def _top(found: Sequence[tuple[int, int, Tensor]]) -> Tensor:
    """Sum of subtrees (level, number in the level, value) by the tree that they are parts of."""
    stack: list[tuple[int, int, Tensor]] = []
    for level, index, value in sorted(found, key=lambda node: node[1] << node[0]):
        while stack and stack[-1][0] == level and index % 2:
            value, level, index = stack.pop()[2] + value, level + 1, index // 2
        stack.append((level, index, value))
    total = stack.pop()[2]
    while stack:  # what has no right sibling: an absent one adds nothing
        total = stack.pop()[2] + total
    return total


def _numbers(metrics: Sequence[Mapping[str, Tensor | float]]) -> list[dict[str, float]]:
    """Numbers of each unit; one wait for the device."""
    names = list(metrics[0]) if metrics else []
    if not names or not any(isinstance(value, Tensor) for value in metrics[0].values()):
        return [{name: float(each[name]) for name in names} for each in metrics]
    wide = partial(torch.as_tensor, dtype=torch.float64)
    rows = torch.stack([torch.stack([wide(each[name]) for name in names]) for each in metrics]).tolist()
    return [dict(zip(names, row, strict=True)) for row in rows]


def checksum(parameters: Iterable[Tensor]) -> list[int]:
    """Of the bits of 32-bit tensors: their sum, and that of the bits in their places. Equal bits have equal ones; of
    others those that agree are one in billions."""
    sums = []
    for number, parameter in enumerate(parameters, 1):
        bits = parameter.detach().reshape(-1).view(torch.int32).long()
        places = torch.arange(1, bits.numel() + 1, device=bits.device) % 65521
        sums.append(number * torch.stack([bits.sum(), (bits * places).sum()]))
    return torch.stack(sums).sum(0).tolist() if sums else []
