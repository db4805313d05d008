"""An evaluation over ranks: the bits of one process, one ledger, ends that all share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from distributed.forked import in_ranks
from evaluation.test_harness import METHODS, Bench, FakeExecutor, FakeJudge

from tempact import cli, evaluate, train
from tempact.distributed import Ranks
from tempact.distributed import launch as launching
from tempact.errors import UserError, guarded
from tempact.evaluation.harness import Evaluation
from tempact.evaluation.judges import JudgedVideo, Verdict
from tempact.evaluation.ledger import Ledger
from tempact.executor.executor import Executor
from tempact.executor.sampler import gaussian_noise
from tempact.presets import get_preset
from tempact.rewards.judges import JudgeOutage
from tempact.runs import evaluation as module
from tempact.runs import together
from tempact.runs.evaluation import run_shown

REPOSITORY = Path(__file__).parents[2]
KEYS = {
    "plans": ("prompt_id", "planner", "seed"), "videos": ("prompt_id", "condition", "seed"),
    "scores": ("prompt_id", "condition", "seed", "judge"),
}  # fmt: skip
VIDEOS = 5 * 3 * 2  # of a Bench


class BatchJudge(FakeJudge):
    """Writes down how many videos it was shown at a time."""

    log: Path

    def submit(self, videos: Sequence[JudgedVideo]) -> list[Future[Verdict]]:
        with self.log.open("a") as file:
            file.write(f"{len(videos)} {videos[0].prompt.prompt_id}\n")
        return super().submit(videos)


def bench(folder: Path, batched: bool = False) -> Bench:
    made = Bench(folder, judges=[BatchJudge(), FakeJudge("held-out", "model 2")], batched=batched)
    made.judges[0].log = folder.with_suffix(".shown")
    return made


def evaluated(own: Bench, ranks: Ranks, policies: str = "w") -> Evaluation:
    made = Evaluation(own.folder, own.suite, own.planner, own.executor, gaussian_noise, own.files, ranks=ranks)
    run_shown(made, policies)
    return made


def act(own: Bench, change: Callable[[Ranks, Bench], None] = lambda ranks, own: None) -> int:
    """One rank's evaluation, as the command runs it. change: what is otherwise on this rank."""

    def work(ranks: Ranks) -> int:
        module.setup_logging()
        change(ranks, own)
        evaluated(own, ranks)
        return 0

    config = replace(get_preset("shapeworld-smoke"), device="cpu")
    return guarded(lambda: together(config, own.folder, work, "what is done is kept"))


def rows(folder: Path) -> dict[str, dict]:
    """Every row of the ledgers by its key; a key that stands twice is a fault."""
    found = {}
    for name, keys in KEYS.items():
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        found[name] = {tuple(json.loads(line)[key] for key in keys): json.loads(line) for line in lines}
        assert len(found[name]) == len(lines), name
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in (folder / "videos").rglob("*.*")}


def shown(own: Bench) -> Counter[str]:
    return Counter(own.folder.with_suffix(".shown").read_text().splitlines())


@pytest.mark.parametrize("batched", [True, False])
def test_results_do_not_depend_on_the_number_of_ranks(batched: bool, tmp_path: Path) -> None:
    alone = bench(tmp_path / "alone", batched)
    scores = evaluated(alone, Ranks()).method_scores("combined")
    for size in (2, 3):
        own = bench(tmp_path / str(size), batched)
        assert in_ranks(size, partial(act, own)) == [0] * size
        assert rows(own.folder) == rows(alone.folder) and files(own.folder) == files(alone.folder)
        assert len(rows(own.folder)["scores"]) == 2 * VIDEOS
        assert shown(own) == shown(alone)  # a judge is shown the same batches
        assert evaluated(own, Ranks()).method_scores("combined") == scores  # and does nothing again
        assert shown(own) == shown(alone) and own.executor.made == []


def test_every_rank_takes_its_part_and_the_longest_come_first(tmp_path: Path) -> None:
    own, taken = bench(tmp_path / "own"), tmp_path / "taken"
    real = Evaluation._make

    def noted(self: Evaluation, method, prompts, seed) -> None:
        with (taken.with_suffix(f".{self.ranks.rank}")).open("a") as file:
            file.write(f"{prompts[0].set} {len(prompts)}\n")
        real(self, method, prompts, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluation, "_make", noted)
        assert in_ranks(2, partial(act, own)) == [0, 0]
    each = [taken.with_suffix(f".{rank}").read_text().splitlines() for rank in (0, 1)]
    assert all(each) and Counter(each[0] + each[1]) == {"simple 2": 6, "simple 1": 6, "hard 2": 6}
    order = ["hard 2", "simple 2", "simple 1"]  # 18, 12 and 6 latent frames
    assert all(lines == sorted(lines, key=order.index) for lines in each)


def test_one_rank_of_a_machine_encodes_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = tmp_path / "read"

    def noted(self: FakeExecutor, prompts: list[str]) -> None:
        with read.open("a") as file:
            file.write("".join(f"{os.environ['RANK']} {prompt}\n" for prompt in prompts))

    monkeypatch.setattr(FakeExecutor, "read", noted)
    own = bench(tmp_path / "own")
    assert in_ranks(2, partial(act, own)) == [0, 0]
    texts = Counter(read.read_text().splitlines())
    assert texts == Counter({f"0 {prompt.text}": 3 * 2 for prompt in own.suite.all_prompts})


def test_ranks_without_a_batch_or_a_plan_wait(tmp_path: Path) -> None:
    alone, own = (replace(bench(tmp_path / name), counts=(1, 1), seeds=1, methods=METHODS[1:2]) for name in "ab")
    for each in (alone, own):
        each.judges[0].log = each.folder.with_suffix(".shown")
    evaluated(alone, Ranks())
    assert in_ranks(3, partial(act, own)) == [0, 0, 0]
    assert rows(own.folder) == rows(alone.folder) and len(rows(own.folder)["videos"]) == 2


def test_a_killed_evaluation_goes_on_with_other_numbers_of_ranks(tmp_path: Path) -> None:
    """All are killed at once, three times, with 2, 3 and 1 ranks; 2 finish what is left."""
    unbroken, own = bench(tmp_path / "unbroken"), bench(tmp_path / "own")
    evaluated(unbroken, Ranks())

    def dies(ranks: Ranks, own: Bench, least: int) -> None:
        real = Ledger.add

        def add(self: Ledger, new, *, again: bool = False) -> None:
            real(self, new, again=again)
            if ranks.first and self.path.name == "scores.jsonl" and len(self) >= least:
                os.killpg(0, signal.SIGKILL)

        Ledger.add = add  # type: ignore[method-assign]

    before: dict[tuple, dict] = {}
    for size, least in ((2, 10), (3, 25), (1, 40)):
        group = tmp_path / f"group-{size}"

        def first_leads(least: int = least, group: Path = group) -> int:
            if os.environ["RANK"] == "0":
                os.setpgid(0, 0)
                group.write_text(str(os.getpid()))
            while not group.exists() or not group.read_text():
                pass
            os.setpgid(0, int(group.read_text()))
            return act(own, partial(dies, least=least))

        assert in_ranks(size, first_leads) == [-signal.SIGKILL] * size
        known = rows(own.folder)["scores"]
        assert least <= len(known) < 2 * VIDEOS and known.items() >= before.items()
        before = known
    assert in_ranks(2, partial(act, own)) == [0, 0]
    assert rows(own.folder) == rows(unbroken.folder) and files(own.folder) == files(unbroken.folder)


def ends(ranks: Ranks, own: Bench, rank: int, end: Callable[[], None]) -> None:
    """The rank's second batch ends so; batches take a while, so that each rank has several."""
    made: list[int] = []
    real = FakeExecutor.rollout

    def rollout(self: FakeExecutor, *given):
        made.append(1)
        time.sleep(0.05)
        if ranks.rank == rank and len(made) == 2:
            end()
        return real(self, *given)

    FakeExecutor.rollout = rollout  # type: ignore[method-assign]


def raising(error: Exception) -> None:
    raise error


HOST = os.uname().nodename


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ValueError("planted"), 1, "ValueError: planted"),
        (UserError("x: found no space left"), 2, "x: found no space left"),
        (JudgeOutage("judge in-domain: silent for 300 s"), 3, "judge in-domain: silent for 300 s"),
    ],
)
def test_an_error_of_one_rank_ends_all_in_one_line(
    rank: int, error: Exception, code: int, told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = bench(tmp_path / "own")
    assert in_ranks(2, partial(act, own, partial(ends, rank=rank, end=partial(raising, error)))) == [code, code]
    lines = [line for line in capfd.readouterr().err.splitlines() if "INFO" not in line]
    assert len(lines) == 1 and told in lines[0], lines
    assert (f"rank 1 on {HOST}, evaluation, " in lines[0]) is (rank == 1)
    assert ("what is done is kept" in lines[0]) is (code != 2 or rank == 1)
    assert (own.folder / "tracebacks.txt").exists() is (code == 1)
    unbroken = bench(tmp_path / "unbroken")
    evaluated(unbroken, Ranks())
    assert 0 < len(rows(own.folder)["videos"]) < VIDEOS
    assert in_ranks(2, partial(act, own)) == [0, 0]
    assert rows(own.folder) == rows(unbroken.folder)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all(rank: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    own = bench(tmp_path / "own")
    change = partial(ends, rank=rank, end=lambda: signal.raise_signal(signal.SIGTERM))
    assert in_ranks(2, partial(act, own, change)) == [130, 130]
    lines = [line for line in capfd.readouterr().err.splitlines() if "INFO" not in line]
    assert len(lines) == 1 and lines[0].endswith("SIGTERM: what is done is kept"), lines
    assert in_ranks(2, partial(act, own)) == [0, 0] and len(rows(own.folder)["scores"]) == 2 * VIDEOS


def test_machines_that_see_other_folders_are_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def elsewhere(ranks: Ranks, own: Bench) -> None:
        if ranks.rank:
            own.folder = tmp_path / "other"

    assert in_ranks(2, partial(act, bench(tmp_path / "own"), elsewhere)) == [2, 2]
    lines = [line for line in capfd.readouterr().err.splitlines() if "INFO" not in line]
    other = tmp_path / "other"
    assert lines == [f"error: {other}: found another folder on rank 1; accepted: one that all machines share"]


def test_other_weights_on_a_rank_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    own = bench(tmp_path / "own")

    def work(ranks: Ranks) -> int:
        evaluated(own, ranks, f"weights {ranks.rank}")
        return 0

    config = replace(get_preset("shapeworld-smoke"), device="cpu")
    assert in_ranks(2, lambda: guarded(lambda: together(config, own.folder, work, ""))) == [2, 2]
    lines = [line for line in capfd.readouterr().err.splitlines() if "INFO" not in line]
    assert len(lines) == 1 and "ranks: found different weights" in lines[0]
    assert not (own.folder / "scores.jsonl").exists() or not rows(own.folder)["scores"]


def test_progress_is_rank_0s_and_counts_every_video(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert in_ranks(2, partial(act, bench(tmp_path / "own"))) == [0, 0]
    told = [line for line in capfd.readouterr().err.splitlines() if "evaluation: " in line]
    assert f"evaluation: {VIDEOS} videos" in told[0] and f"evaluation: {VIDEOS}/{VIDEOS}" in told[-1]
    assert not any("rank 1" in line for line in told)


# what is posted


def test_posts_come_in_order_and_again_where_their_reader_fails(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> int:
        ranks.arrive()
        for i in range(20 if ranks.rank else 0):
            ranks.post((ranks.rank, i))
        found = list[tuple[int, int]]()
        if ranks.rank == 0:
            with pytest.raises(KeyError):
                for _ in ranks.posted(wait=True):
                    raise KeyError
        found += ranks.posted(wait=True)
        ranks.arrive()
        expected = [] if ranks.rank else [(rank, i) for rank in (1, 2) for i in range(20)]
        assert sorted(found) == expected and list(ranks.posted()) == []
        of_one = [i for rank, i in found if rank == 1]
        assert of_one == sorted(of_one)
        return 0

    config = replace(get_preset("shapeworld-smoke"), device="cpu")
    assert in_ranks(3, lambda: together(config, tmp_path, work, "")) == [0, 0, 0]


# the command

LINE = (
    "shapeworld-smoke", "--device", "cpu", "--threads", "1", "--simple", "2", "--hard", "1",
    "--evaluation.batch", "1", "--executor.timesteps", "1000", "500", "--planner.max_new_tokens", "48",
)  # fmt: skip
RESULTS = ("evaluation.json", "comparisons.json", "evaluation_scores.jsonl", "config.yaml", "videos/index.json")


def results(folder: Path) -> dict[str, object]:
    (own,) = (folder / "evaluation").iterdir()
    return {name: (folder / name).read_bytes() for name in RESULTS} | {"rows": rows(own), "files": files(own)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The results of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("alone"))
        assert evaluate.main(LINE) == 0
        return results(Path("runs", "shapeworld-smoke-untrained"))


def test_shapeworlds_table_is_that_of_one_process(
    alone: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two ranks are stopped, three go on."""
    real = Executor.rollout
    made: list[int] = []

    def counted(self: Executor, *given):
        made.append(1)
        if len(made) == 2 and os.environ["RANK"] == "1" and not Path("stopped").exists():
            Path("stopped").touch()
            signal.raise_signal(signal.SIGINT)
        return real(self, *given)

    monkeypatch.setattr(Executor, "rollout", counted)
    monkeypatch.chdir(tmp_path)
    assert in_ranks(2, lambda: evaluate.main(LINE)) == [130, 130]
    stopped = capfd.readouterr()
    assert stopped.out == "" and stopped.err.count("the same command goes on from here") == 1
    folder = Path("runs", "shapeworld-smoke-untrained")
    assert not (folder / "evaluation.json").exists()
    assert in_ranks(3, lambda: evaluate.main(LINE)) == [0, 0, 0]
    assert results(folder) == alone
    assert capfd.readouterr().out.count("report: ") == 1


def test_the_benchmark_over_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """Real files, a judge each; its limits are divided."""
    text = tmp_path / "simple.txt"
    text.write_text("A red circle is at the top left. First, the circle grows.\nA red circle is at the top left.\n")
    line = ["shapeworld", "--suite", "temporal-order", "--prompts", f"simple={text}", "--pickscore", "no"]
    line += ["--judge", "in-domain", "--device", "cpu", "--seeds", "1", "--executor.timesteps", "1000", "500"]
    line += ["--planner.max_new_tokens", "48", "--evaluation.batch", "1", "--evaluation.strips", "1"]
    asked = tmp_path / "processes"

    @contextmanager
    def served(names, settings, processes):
        with asked.open("a") as file:
            file.write(f"{processes} ")
        yield [FakeJudge()]

    monkeypatch.setattr(module, "served_judges", served)
    assert evaluate.main([*line, "--output", str(tmp_path / "one")]) == 0
    assert in_ranks(2, lambda: evaluate.main([*line, "--output", str(tmp_path / "two")])) == [0, 0]
    one, two = ((tmp_path / name) for name in ("one", "two"))
    assert rows(two) == rows(one) and files(two) == files(one) and asked.read_text() == "1 2 2 "
    for name in ("temporal-order.json", "temporal-order.md"):
        assert (two / name).read_bytes() == (one / name).read_bytes()
    assert capfd.readouterr().out.count("temporal-order.json") == 2


# options


@pytest.mark.parametrize("module", ["evaluate", "generate"])
@pytest.mark.parametrize(
    ("given", "ranks", "told"),
    [
        (["--gpus", "-1"], "1", "--gpus: found -1; accepted: 0 (as started), or 1 to 64"),
        (["--gpus", "65"], "1", "--gpus: found 65; accepted: 0 (as started), or 1 to 64"),
        (["--gpus", "two"], "1", "--gpus: found 'two'; accepted: a whole number"),
        (["--gpus"], "1", "argument --gpus: expected one argument"),
        (["--gpus", "2"], "4", "--gpus: found 2 in one of 4 processes, as torchrun starts them; accepted: nothing"),
        (["--gpus=1"], "2", "--gpus: found 1 in one of 2 processes"),
    ],
)
def test_wrong_numbers_of_processes_are_one_line(
    module: str, given: list[str], ranks: str, told: str, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setattr(launching, "launch", None)
    more = ["--prompt", "A red circle is at the top left."] if module == "generate" else []
    assert cli._verb(module)(["shapeworld-smoke", *more, *given]) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"error: {told}") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "started"),
    [
        (["--gpus", "3", "shapeworld-smoke", "--simple", "2"], (["shapeworld-smoke", "--simple", "2"], 3)),
        (["shapeworld-smoke", "--gpus=2", "--seed", "4"], (["shapeworld-smoke", "--seed", "4"], 2)),
        (["shapeworld-smoke", "--gpus", "1"], None),
        (["shapeworld-smoke", "--gpus", "0"], None),
    ],
)
def test_processes_are_started_where_several_are_asked_for(
    given: list[str], started: tuple | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple] = []
    monkeypatch.setattr(launching, "launch", lambda *given: seen.append(given) or 7)
    monkeypatch.setattr("tempact.runs.together", lambda *given: 0)
    assert evaluate.main(given) == (7 if started else 0)
    assert seen == ([(*started, 0, ("-m", "tempact.evaluate"))] if started else [])


@pytest.mark.parametrize("module", ["evaluate", "generate"])
def test_help_names_the_option(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli._verb(module)(["--help"])
    assert "--gpus N" in capsys.readouterr().out


# with processes of their own


@pytest.mark.slow
def test_a_rank_that_is_lost_ends_the_command_which_goes_on(alone: dict[str, object], tmp_path: Path) -> None:
    def command(*more: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        given = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **(environment or {})}
        words = [sys.executable, "-m", "tempact.evaluate", *LINE, *more]
        return subprocess.run(words, cwd=tmp_path, env=given, capture_output=True, text=True, check=False)

    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import signal\n"
        "    from tempact.evaluation.harness import Evaluation\n"
        "    real, made = Evaluation._make, []\n"
        "    def make(self, *given):\n"
        "        made.append(1)\n"
        "        len(made) == 2 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "        real(self, *given)\n"
        "    Evaluation._make = make\n"
    )
    lost = command("--gpus", "3", environment={"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"})
    lines = [line for line in lost.stderr.splitlines() if "INFO" not in line]
    assert lost.returncode == 137 and len(lines) == 1 and f"rank 1 on {HOST}" in lines[0], lost.stderr
    assert command("--gpus", "2").returncode == 0
    assert results(tmp_path / "runs" / "shapeworld-smoke-untrained") == alone


@pytest.mark.slow
def test_the_evaluation_of_a_training_run_is_dealt(tmp_path: Path) -> None:
    line = ["shapeworld-smoke", "--device", "cpu", "--threads", "1", "--trainer.iterations", "1"]
    line += ["--evaluation.simple", "3", "--evaluation.hard", "2", "--evaluation.batch", "2"]
    line += ["--executor.timesteps", "1000", "500", "--planner.max_new_tokens", "64", "--output"]
    assert train.main([*line, str(tmp_path / "1")]) == 0
    assert in_ranks(3, lambda: train.main([*line, str(tmp_path / "3")]), 300) == [0, 0, 0]
    one, three = (results(tmp_path / name) for name in "13")
    one.pop("config.yaml"), three.pop("config.yaml")  # of other folders
    assert one == three
