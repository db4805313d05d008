"""What the processes of a run must have in common, checked in every iteration, and metrics of all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tempact.distributed import Ranks
from tempact.distributed.reduction import checksum
from tempact.errors import UserError
from tempact.executor.executor import Executor
from tempact.executor.sampler import NoiseSource
from tempact.meter import Meter
from tempact.planner.planner import Planner
from tempact.rewards.judges import merged_stats
from tempact.rl import PolicyOptimizer
from tempact.types import PlanBatch


class AdapterWithoutEffect(RuntimeError):
    """What samples does not use the weights that are trained."""


class PoliciesDiffer(RuntimeError):
    """Processes that must hold the same weights do not."""


@dataclass
class Agreement:
    """The policies of this process, which must be those of all."""

    planner: Planner
    executor: Executor
    policies: Mapping[str, PolicyOptimizer]
    ranks: Ranks

    def compare(self, configuration: str) -> None:
        """UserError where processes differ in what must be equal: configuration, versions, GPU, weights."""
        gpu = torch.cuda.get_device_name() if self.executor.device.type == "cuda" else "cpu"
        own = {"configuration": configuration, "torch": torch.__version__, "device": gpu}
        weights = {f"weights of the {name}": found for name, found in self.checksums().items()}
        everyone = self.ranks.gather(own | weights)
        for rank, other in enumerate(everyone):
            for name, value in other.items():
                if value != everyone[0][name]:
                    found = f"{value} on rank {rank} and {everyone[0][name]} on rank 0"
                    raise UserError(f"ranks: found {name} {found}; accepted: the same on all of them")

    def canaries(self, number: int, plans: PlanBatch, noise: NoiseSource) -> dict[str, float]:
        """How far the policies that have sampled in iteration `number` are from their starts: root mean square of what
        one input gives.

        Raises AdapterWithoutEffect where weights that gradients have moved give what their start gives, and
        PoliciesDiffer where this process has sampled from another policy than the first.
        """
        pairs = {
            "planner": self.planner.canary(plans.prompts[0].text),
            "executor": self.executor.canary(plans.plans[0], noise),
        }
        found: dict[str, float] = {}
        digests: dict[str, str] = {}
        for name, (trained, start) in pairs.items():
            if torch.equal(trained, start) and self.policies[name].moved:
                told = f"the {name} samples as its start does, though its adapter is trained"
                raise AdapterWithoutEffect(f"iteration {number}: {told}")
            digests[name] = hashlib.sha256(trained.numpy().tobytes()).hexdigest()
            found[f"{name}/canary"] = (trained - start).square().mean().sqrt().item()
        self._equal(number, digests, "samples of the")
        return found

    def metrics(self, number: int, meter: Meter, judges: Mapping[str, float]) -> dict[str, float]:
        """Of meter and judges, of all processes, and of the processes themselves, which have ended their updates here.

        Raises PoliciesDiffer where one holds other weights than the first.
        """
        self._equal(number, self.checksums(), "weights of the")
        took = sum(value for name, value in meter.metrics.items() if name.startswith("timing_s/"))
        own = meter.metrics, dict(judges), self.ranks.waited(), took
        meters, stats, waited, seconds = zip(*self.ranks.gather(own), strict=True)
        metrics = merged_stats(stats) | {name: max(each[name] for each in meters) for name in meters[0]}
        if not self.ranks.alone:
            shares = [min(1.0, idle / max(time, 1e-9)) for idle, time in zip(waited, seconds, strict=True)]
            metrics |= {f"ranks/idle/{rank}": share for rank, share in enumerate(shares)}
            metrics["ranks/idle"] = sum(shares) / len(shares)
        return metrics

    def checksums(self) -> dict[str, list[int]]:
        """Of the weights of both policies."""
        return {name: checksum(policy.parameters.values()) for name, policy in self.policies.items()}

    def _equal(self, number: int, own: Mapping[str, object], what: str) -> None:
        everyone = self.ranks.gather(own)
        for rank, other in enumerate(everyone):
            for name, value in other.items():
                if value != everyone[0][name]:
                    found = f"{what} {name} on rank {rank} that are not those of rank 0"
                    raise PoliciesDiffer(f"iteration {number}: found {found}; accepted: the same bits on all")
