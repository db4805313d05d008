"""Which adapter a server samples with: a few tokens that it has drawn, and what the trainer computes for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from tempact.models.adapters import reference_active, without_adapter
from tempact.planner.planner import Planner
from tempact.planner.server import Served

APART = 3.0  # rounding alone makes it about 1, and where it is one offset for many tokens sometimes 2
EARLIER, START, NONE = "the adapter of an earlier iteration", "the adapter of the start", "no adapter"


class Told(NamedTuple):
    """Log-probs of a canary [n] fp64: of the server, of the trained adapter, of others by their names."""

    server: Tensor
    trained: Tensor
    others: dict[str, Tensor]

    @property
    def off(self) -> float:
        """Root mean square by which server and trainer differ, nats."""
        return (self.server - self.trained).square().mean().sqrt().item()

    @property
    def gap(self) -> float:
        """Mean size of that difference, nats."""
        return (self.server - self.trained).abs().mean().item()

    def off_from(self, name: str) -> float:
        """As `off`, of the server and another adapter."""
        return (self.server - self.others[name]).square().mean().sqrt().item()

    def apart(self, name: str) -> float:
        """Root mean square by which the trained adapter and another differ, nats."""
        return (self.others[name] - self.trained).square().mean().sqrt().item()

    def telling(self, name: str) -> tuple[bool, bool]:
        """Whether the trained adapter and another can be told apart, and whether the server is nearer to the other.

        All log-probs are rounded, the trainer's as well: where two adapters are alike, three roundings of the same
        numbers are left, which lie equally far from one another. Two adapters are told apart where they lie APART times
        as far from each other as the server lies from the nearer one.
        """
        off, other = self.off, self.off_from(name)
        return self.apart(name) > APART * min(off, other), other < off


def told(planner: Planner, prompt: Sequence[int], served: Served, earlier: Mapping[str, Tensor] | None = None) -> Told:
    """What planner and server find at the tokens of `served`, a response to `prompt`. earlier: an adapter's weights."""
    tokens, drawn_at = served.response
    rows = [*range(len(tokens)), *(row for row, each in enumerate(served.top) for _ in each)]
    columns = [*tokens, *(token for each in served.top for token in each)]
    values = [*drawn_at, *(value for each in served.top for value in each.values())]

    def of(policy: AbstractContextManager[None]) -> Tensor:
        with policy:
            return planner.next_log_probs(prompt, tokens)[rows, columns].double()

    others = {START: of(reference_active(planner.peft)), NONE: of(without_adapter(planner.peft))}
    if earlier:
        others[EARLIER] = of(holding(planner, earlier))
    return Told(torch.tensor(values, dtype=torch.float64), of(nullcontext()), others)


def weights_of(planner: Planner) -> dict[str, Tensor]:
    """A copy of the trained adapter on the host."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in planner.parameters().items()}


@contextmanager
@torch.no_grad()
def holding(planner: Planner, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the trained adapter has other weights."""
    parameters = planner.parameters()
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.copy_(kept[name])
