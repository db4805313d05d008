"""`pytest bench` checks every op's error; `--benchmark` also times it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.harness import Bench

FOLDER = Path(__file__).parent / "baselines"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--benchmark", action="store_true", help="time every op against its peers; else only check errors")
    group.addoption(
        "--benchmark-out", metavar="DIR", help="folder of <gpu>.json and <gpu>.png (bench/baselines; none on a CPU)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    if config.pluginmanager.hasplugin("benchmark"):  # pytest-benchmark; it reads its options after this
        config.option.benchmark_disable = not config.getoption("benchmark")
    if config.option.showcapture == "all":  # torch.compile logs thousands of lines that pytest would keep
        config.option.showcapture = "no"


def pytest_report_header(config: pytest.Config) -> str:
    timed = "times and errors" if config.getoption("benchmark") else "errors only (--benchmark takes times)"
    if torch.cuda.is_available():
        return f"bench: {torch.cuda.get_device_name()}, real shapes, {timed}"
    return f"bench: no GPU, so tiny shapes on the torch path, which say nothing about the kernels; {timed}"


@pytest.fixture(scope="session")
def bench_run(request: pytest.FixtureRequest) -> Iterator[Bench]:
    config = request.config
    terminal = config.pluginmanager.getplugin("terminalreporter")
    capture = config.pluginmanager.getplugin("capturemanager")

    def write(text: str) -> None:
        with capture.global_and_fixture_disabled():
            terminal.write_line(f"\n{text}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = config.getoption("benchmark_out")
    folder = Path(out) if out else FOLDER if device.type == "cuda" else None
    run = Bench(device, config.getoption("benchmark"), folder, write)
    yield run
    run.finish()


@pytest.fixture
def bench(bench_run: Bench) -> Bench:
    """The run; every bench starts from one seed and with the memory of the one before given back."""
    torch.manual_seed(0)
    if bench_run.real:
        torch.cuda.empty_cache()
        torch._dynamo.reset()
    return bench_run
