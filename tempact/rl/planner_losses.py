"""The planner's losses by name (`planner.loss`)."""

from __future__ import annotations

from tempact.rl.grpo import grpo_loss
from tempact.rl.gspo import gspo_loss
from tempact.rl.rloo import rloo_loss
from tempact.rl.sequences import SequenceLoss

LOSSES: dict[str, SequenceLoss] = {"gspo": gspo_loss, "grpo": grpo_loss, "rloo": rloo_loss}
LEAVE_ONE_OUT = ("rloo",)  # losses whose baseline leaves the plan itself out
