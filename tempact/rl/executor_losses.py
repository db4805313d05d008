"""The executor's losses by name (`executor.loss`), each one file with one class of one signature."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from tempact.config import ExecutorConfig
from tempact.rl.diffusion_nft import DiffusionNFT
from tempact.rl.flow_grpo import FlowGRPO


class ExecutorLoss(Protocol):
    """A loss on the recorded chunks (`Transition`).

    forward: the chunks are noised anew and all K calls are trained; otherwise the roll-out's T transitions are.

    Called with velocity, old, reference, recorded [B, C, c, H, W] fp32, one row a (continuation, level) pair; recorded
    as `Transition.noises`. levels [B] int64: number of the denoising call. advantage, mask [B]. terms: counted rows of
    the whole update. Returns the gradient in `velocity` and metrics that add up over micro-batches, loss and kl among
    them.
    """

    forward: bool

    def __call__(
        self, velocity: Tensor, old: Tensor, reference: Tensor, recorded: Tensor, levels: Tensor, advantage: Tensor,
        mask: Tensor, *, terms: int,
    ) -> tuple[Tensor, dict[str, Tensor]]: ...  # fmt: skip


LOSSES: dict[str, type[FlowGRPO] | type[DiffusionNFT]] = {"flow_grpo": FlowGRPO, "diffusion_nft": DiffusionNFT}


def executor_loss(config: ExecutorConfig, sigmas: tuple[float, ...]) -> ExecutorLoss:
    """The configured loss; sigmas: of a chunk's K denoising calls, then 0."""
    return LOSSES[config.loss](config, sigmas)
