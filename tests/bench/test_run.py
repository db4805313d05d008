"""`pytest bench` as a user calls it, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
COMMANDS = ("judge_client", "reduction", "scaling", "shapeworld")  # of their own, not benches of pytest
FIELDS = {
    "op", "case", "impl", "ms", "p20", "p80", "tflops", "gbps", "ratio_to", "error", "torch", "triton", "commit"
}  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # torch.compile takes seconds a function, and what it makes on a CPU is nobody's concern here
    # pytest-benchmark times nothing in a worker of pytest-xdist
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**kept, "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "bench", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY, env=environment)


@pytest.mark.slow
def test_it_checks_every_op_and_says_what_it_ran_on() -> None:
    done = run()
    assert done.returncode == 0, done.stdout[-3000:]
    assert "tiny shapes on the torch path" in done.stdout and "errors only" in done.stdout
    benches = (path.stem.removeprefix("bench_") for path in (REPOSITORY / "bench").glob("bench_*.py"))
    ops = sorted(name for name in benches if name not in COMMANDS)
    assert {op for op in ops if f"\n{op}: " in done.stdout} >= set(ops) - {"kv_cache"}
    assert "no speed" not in done.stdout


def test_it_times_and_writes_what_it_found(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark: pip install -e '.[bench]'")
    done = run("--benchmark", "--benchmark-out", str(tmp_path), "-k", "flow_policy_loss or kv_cache")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "no speed" not in done.stdout and "best peer: " in done.stdout
    results = json.loads((tmp_path / "cpu.json").read_text())
    assert (tmp_path / "cpu.png").is_file()
    assert all(set(row) >= FIELDS for row in results["rows"])
    ours = {(row["op"], row["case"].split(",")[0]): row for row in results["rows"] if row["impl"] == "ours"}
    forked = ("kv_cache", "fork into 24 branches on the host")
    assert set(ours) == {
        ("flow_policy_loss", "forward"),
        ("flow_policy_loss", "backward"),
        ("flow_policy_loss", "loss and gradient"),
        forked,
    }
    assert all(row["ms"] > 0 and row["p20"] <= row["ms"] <= row["p80"] for row in ours.values())
    assert ours[forked]["ms"] < 50


def test_without_pytest_benchmark_only_the_host_time_is_missing() -> None:
    done = run("--benchmark", "-k", "kv_cache", "-p", "no:benchmark")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "needs pytest-benchmark" in done.stdout and "2 skipped" in done.stdout
