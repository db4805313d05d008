"""Exponential moving average of a policy's trainable parameters (ALGORITHM.md 2.7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tempact.errors import UserError


class EMA:
    """average <- average + (1 - d_n)(parameter - average), d_n = min((1 + n) / (10 + n), decay), n = 0, 1, ...

    Kept in fp32, where the small steps of a long average do not vanish.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self.decay, self.updates = decay, 0
        self.average = {name: p.detach().to(torch.float32, copy=True) for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Once per optimiser step."""
        decay = min((1 + self.updates) / (10 + self.updates), self.decay)
        self.updates += 1
        for name, average in self.average.items():
            average.lerp_(parameters[name].detach().float(), 1 - decay)

    @contextmanager
    def applied(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Inside, the parameters hold the averages; afterwards their own values again, bit for bit."""
        kept = {name: p.detach().clone() for name, p in parameters.items()}
        _copy(self.average, parameters)
        try:
            yield
        finally:
            _copy(kept, parameters)

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        """Takes over a saved average; UserError if its names or shapes are not those of the parameters."""
        saved = state["average"]
        for name in sorted(self.average.keys() ^ saved.keys()):
            place = "missing" if name in self.average else "unexpected"
            raise UserError(f"EMA state: {place} tensor {name}; accepted: the {len(self.average)} trained tensors")
        for name, average in self.average.items():
            if saved[name].shape != average.shape:
                found, accepted = tuple(saved[name].shape), tuple(average.shape)
                raise UserError(f"EMA state: {name} has shape {found}; accepted: {accepted}")
        self.updates = state["updates"]
        _copy(saved, self.average)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(values[name])
