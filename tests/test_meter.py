"""Seconds and memory of an iteration's phases."""

from __future__ import annotations

import pytest
import torch

from tempact.meter import GIB, Meter


class FakeDevice:
    """Stands in for torch.cuda; `held` and `peak` are bytes."""

    held = peak = 0

    def is_available(self) -> bool:
        return True

    def take(self, gib: int) -> None:
        self.held += gib * GIB
        self.peak = max(self.peak, self.held)

    def memory_allocated(self) -> int:
        return self.held

    def max_memory_allocated(self) -> int:
        return self.peak

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.held

    def memory_snapshot(self) -> list[dict[str, object]]:
        """A pool of tensors, and one of a graph that keeps 5 GiB."""
        tensors = {"total_size": 20 * GIB, "allocated_size": self.held, "segment_pool_id": (0, 0)}
        return [tensors, {"total_size": 6 * GIB, "allocated_size": GIB, "segment_pool_id": (0, 1)}]


def test_each_phase_has_its_own_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    device, meter, told = FakeDevice(), Meter(), list[str]()
    monkeypatch.setattr(torch, "cuda", device)
    monkeypatch.setattr(Meter, "peak_gib", 0.0)

    def passing(name: str, gib: int) -> None:
        with meter.timed(told.append, name):
            device.take(gib)
            device.take(-gib)

    device.take(9)
    device.take(-7)  # as weights are loaded
    meter.begin()
    passing("plan", 3)
    with meter.timed(told.append, "rollout"):
        device.take(4)
        passing("rewards", 2)
        device.take(-3)
        passing("rewards", 1)
    passing("rewards", 1)
    assert told == ["plan", "rollout", "rewards", "rollout", "rewards", "rollout", "rewards"]
    found = {name: value for name, value in meter.metrics.items() if name.startswith("memory/")}
    assert found == {
        "memory/held_gib": 2, "memory/plan_gib": 5, "memory/rollout_gib": 6, "memory/rewards_gib": 8,
        "memory/peak_gib": 9, "memory/graphs_gib": 5,
    }  # fmt: skip
    with pytest.raises(RuntimeError), meter.timed(told.append, "update"):
        device.take(20)
        raise RuntimeError
    device.take(-20)
    meter.begin()
    passing("plan", 1)
    names = ("held", "graphs", "plan", "peak")
    assert meter.metrics.keys() == {*(f"memory/{name}_gib" for name in names), "timing_s/plan"}
    assert [meter.metrics[f"memory/{name}_gib"] for name in ("held", "plan", "peak")] == [3, 4, 23]
    later = Meter()  # of another run in this process
    later.begin()
    with later.timed(told.append, "plan"):
        pass
    assert later.metrics["memory/peak_gib"] == 23


@pytest.mark.gpu
def test_peaks_are_those_of_the_gpu() -> None:
    meter = Meter()
    meter.begin()
    for name, gib in (("rollout", 2), ("update", 1)):
        with meter.timed(lambda name: None, name):
            torch.empty(gib * GIB, dtype=torch.uint8, device="cuda")
    held, *peaks = (meter.metrics[f"memory/{name}_gib"] for name in ("held", "rollout", "update"))
    assert [peak - held for peak in peaks] == pytest.approx([2, 1], abs=0.01)
    assert meter.metrics["memory/peak_gib"] >= peaks[0]


def test_an_inner_phase_takes_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, meter = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0]), Meter()
    monkeypatch.setattr("tempact.meter.time.monotonic", lambda: next(clock))
    meter.begin()
    for name in ("rollout", "rewards"):
        with meter.timed(lambda name: None, name):
            if name == "rollout":
                with meter.timed(lambda name: None, "rewards"):
                    pass
    seconds = {name: value for name, value in meter.metrics.items() if name.startswith("timing_s/")}
    assert seconds == {"timing_s/rollout": 2.0 + 4.0, "timing_s/rewards": 3.0 + 6.0}
