"""Judges of several processes: their limits are divided, their statistics are those of one."""

from __future__ import annotations

import pytest

from tempact.rewards.judges import JudgeStats, merged_stats
from tempact.rewards.judges.config import EndpointConfig, JudgeConfig

ROLES = ("plan_quality", "step_following")


def stats(calls: int, missing: int, hits: int, retries: int, *latencies_s: float) -> dict[str, float]:
    counted = JudgeStats(ROLES)
    for name, count in (("calls", calls), ("missing", missing), ("cache_hits", hits), ("retries", retries)):
        counted.count(ROLES[0], *[name] * count)
    for seconds in latencies_s:
        counted.latency(ROLES[0], seconds)
    return counted.take()


def test_statistics_of_several_processes_are_those_of_one() -> None:
    own = stats(6, 3, 0, 2, 1.0, 2.0), stats(2, 0, 1, 5, 7.0), stats(0, 0, 0, 0)
    merged = merged_stats([*own, {"reward/ahead": 3.0}])
    whole = stats(8, 3, 1, 7, 1.0, 2.0, 7.0)
    assert merged.pop("reward/ahead") == 3.0
    assert merged.keys() == whole.keys()
    role = f"judge/{ROLES[0]}"
    for name in ("calls", "missing", "cache_hits", "retries", "latency_max_s"):
        assert merged[f"{role}/{name}"] == pytest.approx(whole[f"{role}/{name}"]), name
    assert merged[f"{role}/latency_mean_s"] == pytest.approx((6 * 1.5 + 2 * 7.0) / 8)
    assert merged[f"{role}/latency_p95_s"] >= whole[f"{role}/latency_p95_s"]
    assert merged_stats([own[0]]) == own[0] and merged_stats([own[2], own[2]]) == {}


def test_events_of_several_processes_are_counted_as_those_of_one() -> None:
    def counted(kind: str, done: int, told: int) -> dict[str, float]:
        return {f"events/{kind}/count": float(told), f"events/{kind}/success": done / told}

    own = [counted("move", 11, 49) | counted("turn", 1, 3), counted("move", 3, 7), {}]
    assert merged_stats(own) == counted("move", 14, 56) | counted("turn", 1, 3)


@pytest.mark.parametrize("processes", [1, 2, 3, 32])
def test_servers_are_not_asked_more_often_by_several_processes(processes: int) -> None:
    endpoints = (
        EndpointConfig("http://one/v1", "judge", "key", 16, 60.0),
        EndpointConfig("http://two/v1", "judge", "", 3, 0.0),
    )
    config = JudgeConfig({ROLES[0]: endpoints, ROLES[1]: endpoints[1:]}, outage_s=7.0)
    parts = [config.divided(processes)] * processes
    for role, whole in config.roles.items():
        for i, endpoint in enumerate(whole):
            own = [part.roles[role][i] for part in parts]
            assert sum(each.requests_per_minute for each in own) == pytest.approx(endpoint.requests_per_minute)
            assert all(each.concurrency == max(1, endpoint.concurrency // processes) for each in own)
            assert {(each.base_url, each.model, each.api_key) for each in own} == {
                (endpoint.base_url, endpoint.model, endpoint.api_key)
            }
    assert parts[0].outage_s == 7.0 and config.divided(1) == config
