"""One optimiser step of a policy, and the exponential moving average of its parameters (docs/algorithm.md 2.7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tempact.config import OptimConfig
from tempact.distributed import Ranks
from tempact.distributed.reduction import Gradient
from tempact.errors import UserError


@dataclass
class PolicyOptimizer:
    """AdamW over the trained parameters of one policy.

    parameters: by name. gradient: theirs, summed over the ranks. skipped: updates in a row that were refused because a
    gradient was not finite. moved: this process has taken a step along a gradient.
    """

    parameters: dict[str, nn.Parameter]
    config: OptimConfig
    ranks: Ranks = field(default_factory=Ranks)
    optimizer: torch.optim.Optimizer = field(init=False)
    gradient: Gradient = field(init=False)
    skipped: int = 0
    moved: bool = False

    def __post_init__(self) -> None:
        c = self.config
        self.gradient = Gradient(self.parameters.values(), self.ranks)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay
        )

    def step(self, progress: float) -> dict[str, float]:
        """Clips the gradients, steps if all of them are finite, and clears them.

        progress: in [0, 1], 0 at the first iteration and 1 at the last; sets the learning rate.
        Returns grad_norm (before clipping, NaN if not finite) and skipped_updates.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * (1 + progress * (self.config.lr_end - 1))
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.grad_clip)
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimizer.step()
            self.moved |= bool(norm > 0)
        self.skipped = 0 if finite else self.skipped + 1
        self.clear()
        return {"grad_norm": norm.item() if finite else float("nan"), "skipped_updates": float(self.skipped)}

    def finite(self) -> bool:
        """Are all weights numbers?"""
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters.values())

    def clear(self) -> None:
        """Sets the gradients to 0."""
        self.gradient.clear()


class EMA:
    """average <- average + (1 - d_n)(parameter - average), d_n = min((1 + n) / (10 + n), decay), n = 0, 1, ...

    The averages are fp32, in which the small steps of a long average are not rounded away.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self.decay, self.updates = decay, 0
        self.average = {name: p.detach().to(torch.float32, copy=True) for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Moves the averages towards `parameters`; called once after each optimiser step."""
        decay = min((1 + self.updates) / (10 + self.updates), self.decay)
        self.updates += 1
        for name, average in self.average.items():
            average.lerp_(parameters[name].detach().float(), 1 - decay)

    @contextmanager
    def applied(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """A context in which `parameters` hold the averages; their own values come back afterwards, bit for bit."""
        kept = {name: p.detach().clone() for name, p in parameters.items()}
        _copy(self.average, parameters)
        try:
            yield
        finally:
            _copy(kept, parameters)

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        """Loads a saved average; UserError if names or shapes differ from those of the trained parameters."""
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
