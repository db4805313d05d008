"""The benchmark with policies that draw their noise: shared noise, nothing made or scored twice, tables, files."""

from __future__ import annotations

import base64
import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tempact.distributed import Ranks
from tempact.errors import Stopped, UserError
from tempact.evaluation import METHODS, OVERFITTING, Method, harness, with_best_of
from tempact.evaluation import tables as vbench
from tempact.evaluation.harness import Evaluation
from tempact.evaluation.judges import JudgedVideo, Suite, Verdict
from tempact.evaluation.ledger import Ledger, Row
from tempact.evaluation.prompts import OrderPrompt
from tempact.evaluation.statistics import PICKSCORE
from tempact.evaluation.tables import export_vbench, gather
from tempact.executor.sampler import WINDOWS, gaussian_noise
from tempact.reporting.report import write_results
from tempact.rewards.judges import JudgeOutage
from tempact.types import Plan, PlanBatch, Prompt, Rollout, Step
from tempact.video import LOSSLESS, VideoFormat, mp4_format

SINGLE, STEP, PLANNER_ONLY, EXECUTOR_ONLY, BOTH = METHODS
SIDE = 16


@dataclass(frozen=True)
class Settings:
    frames: int = 6
    chunk: int = 3
    window: object = WINDOWS["self-forcing"]  # at most 21 frames


@dataclass
class FakePlanner:
    frames: int = 6
    asked: list[tuple[str, bool, int]] = field(default_factory=list)

    def sample(
        self, prompts: list[Prompt], plans_per_prompt: int, seed: int, *, reference: bool = False, ranks: Ranks
    ) -> PlanBatch:
        self.asked += [(prompt.prompt_id, reference, seed) for prompt in prompts]
        who = "start" if reference else "trained"
        steps = [(Step(0, 3, f"{who} a"), Step(3, self.frames, f"{who} {seed} {i}")) for i in range(len(prompts))]
        plans = [Plan(p.text, own, 0.5, ("padded",), "raw") for p, own in zip(prompts, steps, strict=True)]
        return PlanBatch(prompts, plans, plans_per_prompt)


@dataclass
class FakeExecutor:
    """A video's first frames show its noise, darker by the trained policy."""

    settings: Settings = Settings()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    started: bool = False
    brightness: float = 0
    made: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def prompts(self, plans: list[Plan]) -> list[str]:
        return [plan.instruction for plan in plans]

    def read(self, prompts: list[str]) -> None:
        assert prompts

    def noise_shape(self, plans: int, continuations: int) -> tuple[int, ...]:
        return (plans, continuations, 1, 1, 3, 1, 1)

    def rollout(self, plans: list[Plan], switch_frames: list[int], noise) -> Rollout:
        drawn = noise(0, [(plan, 0) for plan in range(len(plans))])
        assert noise.shape == self.noise_shape(len(plans), 1) and len(plans) == len(switch_frames)
        self.made += [f"{plan.instruction} | {plan.steps[-1].prompt}" for plan in plans]
        self.lengths.append(self.settings.frames)
        level = self.brightness + 100 + 40 * drawn[:, 0, 0, 0, 0, 0].tanh() - (0 if self.started else 50)
        frames = level[:, None, None, None, None].expand(-1, self.settings.frames, 3, SIDE, SIDE).to(torch.uint8)
        return Rollout(frames[:, None])

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.started = True
        yield
        self.started = False


@dataclass
class FakeJudge:
    """Scores by the condition's brightness; says what it was asked; fails where it is told to."""

    name: str = "in-domain"
    version: str = "model 1"
    missing: tuple[str, ...] = ()
    outage_after: int = 10**9
    asked: list[str] = field(default_factory=list)

    def submit(self, videos: Sequence[JudgedVideo]) -> list[Future[Verdict]]:
        futures = []
        for video in videos:
            future: Future[Verdict] = Future()
            if len(self.asked) >= self.outage_after:
                future.set_exception(JudgeOutage("silent"))
            else:
                self.asked.append(video.prompt.prompt_id)
                future.set_result(self.verdict(video))
            futures.append(future)
        return futures

    def verdict(self, video: JudgedVideo) -> Verdict:
        if video.prompt.prompt_id in self.missing:
            return Verdict({}, "garbage")
        level = video.frames.float().mean().item() / 255
        return Verdict(
            {PICKSCORE: 20 + level} if self.name == PICKSCORE else {"combined": level, "temporal_order": level / 2}
        )


def prompts(name: str, count: int) -> list[OrderPrompt]:
    return [OrderPrompt(f"{name}-{i}", name, "object", f"{name} event {i}.", ("a", "b")) for i in range(count)]


def save_plain(frames: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(frames.contiguous().numpy().tobytes())


def read_plain(path: Path) -> Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).view(-1, 3, SIDE, SIDE)


# in the place of mp4, whose encoder takes 0.1 s to start; test_evaluate has real files
PLAIN = VideoFormat(".mp4", save_plain, read_plain)


@dataclass
class Bench:
    """One evaluation in a folder, which can be begun again with other objects."""

    folder: Path
    judges: list[FakeJudge] = field(default_factory=lambda: [FakeJudge(), FakeJudge("held-out", "model 2")])
    methods: Sequence[Method] = (SINGLE, STEP, BOTH)
    counts: tuple[int, int] = (3, 2)
    seeds: int = 2
    frames: tuple[int, int] = (6, 9)
    batched: bool = False
    files: VideoFormat = PLAIN

    def __post_init__(self) -> None:
        self.planner, self.executor = FakePlanner(), FakeExecutor()

    @property
    def suite(self) -> Suite:
        sets = dict(zip(("simple", "hard"), map(prompts, ("simple", "hard"), self.counts), strict=True))
        frames = dict(zip(sets, self.frames, strict=True))
        return Suite(sets, frames, self.methods, self.seeds, self.judges, 7, 2, self.batched)

    def evaluation(self, suite: Suite | None = None, again: bool = False) -> Evaluation:
        return Evaluation(
            self.folder, suite or self.suite, self.planner, self.executor, gaussian_noise, self.files, again
        )

    def run(self, policies: str = "w", suite: Suite | None = None, again: bool = False) -> Evaluation:
        evaluation = self.evaluation(suite, again)
        evaluation.run(policies, lambda text: None)
        return evaluation

    def levels(self, method: Method, seed: int = 0) -> list[float]:
        evaluation = self.evaluation()
        rows = [evaluation.video(method, prompt, seed) for prompt in self.suite.all_prompts]
        return [self.files.read(self.folder / row["file"]).float().mean().item() for row in rows if row is not None]

    def results(self, evaluation: Evaluation, strips: int = 0) -> list[Path]:
        return write_results(evaluation, gather(evaluation, 10), strips)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_every_video_is_made_once_and_scored_once_by_every_judge(bench: Bench) -> None:
    ledger = bench.run().scores
    assert len(ledger) == 5 * 3 * 2 * 2 and len(bench.executor.made) == 30
    assert all(set(Counter(judge.asked).values()) == {6} for judge in bench.judges)
    assert not bench.executor.started and bench.planner.frames == 6 and bench.executor.settings.frames == 6
    assert Counter(bench.executor.lengths) == {6: 3 * 2 * 2, 9: 3 * 2}


def test_what_the_conditions_are() -> None:
    """The baselines are made by both policies as they were before training."""
    found = {method.name: (method.planner, method.executor) for method in METHODS}
    assert found == {
        "single-prompt": (None, "start"),
        "step-prompt": ("start", "start"),
        "planner only": ("trained", "start"),
        "executor only": ("start", "trained"),
        "+ TempAct": ("trained", "trained"),
    }


@pytest.mark.parametrize("batched", [False, True])
def test_a_condition_is_made_by_the_policies_that_it_names(bench: Bench, batched: bool) -> None:
    bench.methods, bench.batched, bench.seeds = METHODS, batched, 1
    bench.run()
    single, step, planner_only, executor_only, both = (bench.levels(method) for method in METHODS)
    assert single == step == planner_only and executor_only == both
    assert [a - b for a, b in zip(step, both, strict=True)] == pytest.approx([50] * 5, abs=2)
    rows = Ledger(bench.folder / "videos.jsonl", ("prompt_id", "condition", "seed"))
    told = {(row["condition"], row["steps"][0]["prompt"].split()[0]) for row in rows}
    assert told == {
        ("single-prompt", "simple"), ("single-prompt", "hard"), ("step-prompt", "start"), ("planner only", "trained"),
        ("executor only", "start"), ("+ TempAct", "trained"),
    }  # fmt: skip


def test_reworded_plans_are_told_in_other_words_and_share_plan_and_noise(bench: Bench) -> None:
    def louder(plan: Plan) -> Plan:
        return replace(plan, steps=tuple(replace(step, prompt=step.prompt.upper()) for step in plan.steps))

    single_after, reworded, reworded_after = OVERFITTING
    bench.methods, bench.seeds = (SINGLE, STEP, EXECUTOR_ONLY, *OVERFITTING), 1
    bench.run(suite=replace(bench.suite, reword=louder))
    assert bench.levels(STEP) == bench.levels(reworded) and bench.levels(EXECUTOR_ONLY) == bench.levels(reworded_after)
    assert bench.levels(single_after) == bench.levels(EXECUTOR_ONLY) != bench.levels(SINGLE)
    rows = Ledger(bench.folder / "videos.jsonl", ("prompt_id", "condition", "seed"))
    told = {name: [row["steps"][0]["prompt"] for row in rows if row["condition"] == name] for name in (
        STEP.name, reworded.name, reworded_after.name, single_after.name)}  # fmt: skip
    assert told[reworded.name] == told[reworded_after.name] == [prompt.upper() for prompt in told[STEP.name]]
    assert told[single_after.name] == [prompt.text for prompt in bench.suite.all_prompts]
    assert [method.baseline for method in OVERFITTING] == [SINGLE.name, STEP.name, reworded.name]


@pytest.mark.parametrize("batched", [False, True])
def test_conditions_share_noise_but_not_prompts_and_seeds(bench: Bench, batched: bool) -> None:
    bench.batched = batched
    bench.run()
    single, step, both = (bench.levels(method) for method in bench.methods)
    assert single == step and len({round(level) for level in single}) == 5
    assert [a - b for a, b in zip(step, both, strict=True)] == pytest.approx([50] * 5, abs=2)
    assert all(abs(a - b) > 0.5 for a, b in zip(single, bench.levels(SINGLE, 1), strict=True))


@pytest.mark.parametrize("batched", [False, True])
def test_neither_noise_nor_plans_depend_on_the_batch(bench: Bench, tmp_path: Path, batched: bool) -> None:
    bench.batched = batched
    bench.run()
    for counts, size in (((3, 2), 1), ((3, 2), 8), ((2, 2), 2)):
        other = Bench(tmp_path / f"{counts} {size}", counts=counts, batched=batched)
        other.run(suite=replace(other.suite, batch=size))
        for method in (STEP, BOTH):
            mine = bench.levels(method, 1)
            assert other.levels(method, 1) == [*mine[: counts[0]], *mine[3:]]
        plans = [{planned_for(row): row["steps"] for row in planned(own)} for own in (bench, other)]
        assert plans[1].items() <= plans[0].items() and len(plans[1]) == 2 * 2 * sum(counts)
        assert len({str(steps) for steps in plans[0].values()}) == len(plans[0])


def planned_for(row: Row) -> tuple[str, str, int]:
    return row["prompt_id"], row["planner"], row["seed"]


def planned(bench: Bench) -> Ledger:
    return Ledger(bench.folder / "plans.jsonl", ("prompt_id", "planner", "seed"))


def test_planner_and_start_are_asked_with_the_same_seeds(bench: Bench) -> None:
    bench.run()
    asked = {who: [(p, seed) for p, start, seed in bench.planner.asked if start is who] for who in (True, False)}
    assert asked[True] == asked[False] and len(asked[True]) == len(set(asked[True])) == 10
    assert len({seed for _, seed in asked[True]}) == 4  # of a set and a seed
    row = next(iter(planned(bench)))
    assert row["repairs"] == ["padded"] and row["response"] == "raw" and row["format_score"] == 0.5
    made = Counter(made.partition(" | ")[2].split()[0] for made in bench.executor.made)
    assert made["start"] == made["trained"] == 10 and made["simple"] + made["hard"] == 10


def test_a_finished_evaluation_does_nothing_again(bench: Bench) -> None:
    bench.run()
    again = Bench(bench.folder)
    assert len(again.run().scores) == 60
    assert again.executor.made == again.planner.asked == again.judges[0].asked == []


def test_an_outage_keeps_what_was_scored_and_the_next_start_goes_on(bench: Bench) -> None:
    bench.judges[0].outage_after = 7
    with pytest.raises(JudgeOutage):
        bench.run()
    again = Bench(bench.folder)
    again.run()
    assert len(bench.judges[0].asked) == 7 and len(again.judges[0].asked) == 30 - 7
    assert len(bench.executor.made) + len(again.executor.made) == 30
    asked = [(p, start, seed) for one in (bench, again) for p, start, seed in one.planner.asked]
    assert len(asked) == len(set(asked))
    unbroken = Bench(bench.folder / "unbroken")
    unbroken.run()
    assert [unbroken.levels(m) for m in bench.methods] == [again.levels(m) for m in bench.methods]


def test_videos_that_were_made_but_not_scored_are_scored_from_their_files(bench: Bench) -> None:
    bench.judges = []
    bench.run()
    again = Bench(bench.folder)
    assert len(again.run().scores) == 60 and again.executor.made == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replaced(path: Path) -> None:
    path.write_bytes(path.with_name("simple-1-0" + path.suffix).read_bytes())


DAMAGE = {
    "cut": cut,
    "emptied": lambda path: path.write_bytes(b""),
    "replaced": replaced,
    "removed": lambda path: path.unlink(),
    "garbage": lambda path: path.write_bytes(b"no video"),
}
MP4 = mp4_format(8.0)


@pytest.mark.parametrize("files", [LOSSLESS, MP4, PLAIN], ids=["safetensors", "mp4", "plain"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_video_that_is_not_as_it_was_made_is_made_again(bench: Bench, damage: str, files: VideoFormat) -> None:
    """Before and after its scoring; a judge is never shown the damaged file, nor asked again about the same one."""
    bench.files, bench.counts, bench.seeds, bench.methods = files, (2, 1), 1, (STEP,)
    judges, bench.judges = bench.judges, []
    evaluation = bench.run()
    row = evaluation.video(STEP, bench.suite.all_prompts[0], 0)
    assert row is not None
    path = bench.folder / row["file"]
    whole = path.read_bytes()
    DAMAGE[damage](path)
    assert evaluation.video(STEP, bench.suite.all_prompts[0], 0) is None
    bench.judges = judges
    bench.run()
    assert path.read_bytes() == whole and len(bench.executor.made) == 4
    asked = [list(judge.asked) for judge in judges]
    assert [len(each) for each in asked] == [3, 3]
    DAMAGE[damage](path)
    results = gather(bench.run(), 10)
    assert path.read_bytes() == whole and len(bench.executor.made) == 5
    assert [judge.asked for judge in judges] == asked
    assert not results.missing and bench.run().left == 0


def test_a_score_counts_for_the_file_that_was_scored(bench: Bench) -> None:
    """A video that comes out otherwise the second time is scored again."""
    bench.counts, bench.seeds, bench.methods = (2, 1), 1, (STEP,)
    evaluation = bench.run()
    row = evaluation.video(STEP, bench.suite.all_prompts[0], 0)
    assert row is not None
    (bench.folder / row["file"]).unlink()
    before = evaluation.score("simple-0", STEP, 0, "in-domain", "combined")
    bench.executor = FakeExecutor(brightness=-30)
    evaluation = bench.run()
    assert [judge.asked for judge in bench.judges] == [["simple-0", "simple-1", "hard-0", "simple-0"]] * 2
    assert evaluation.score("simple-0", STEP, 0, "in-domain", "combined") < before - 0.05
    assert bench.run().left == 0 and len(bench.executor.made) == 1


def test_a_stop_keeps_the_verdicts_that_came(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real, made = Evaluation._make, list[int]()

    def stopped(self, *given) -> None:
        made.append(1)
        if len(made) == 3:
            workers.submit(lambda: None).result()  # the verdicts before have come
            raise Stopped("SIGTERM")
        real(self, *given)

    class Late(FakeJudge):
        """The verdict comes while the next video is made."""

        def submit(self, videos: Sequence[JudgedVideo]) -> list[Future[Verdict]]:
            futures = [Future() for _ in videos]
            workers.submit(lambda: [f.set_result(self.verdict(v)) for f, v in zip(futures, videos, strict=True)])
            return futures

    with ThreadPoolExecutor(1) as workers:
        bench.judges = [Late()]
        monkeypatch.setattr(Evaluation, "_make", stopped)
        with pytest.raises(Stopped):
            bench.run()
        monkeypatch.setattr(Evaluation, "_make", real)
        again = Bench(bench.folder, judges=bench.judges)
        assert again.evaluation().left == 30 - 3 and len(again.run().scores) == 30
    assert len(bench.executor.made) == 3 and len(again.executor.made) == 27


def test_progress_counts_what_is_left(bench: Bench) -> None:
    bench.judges = bench.judges[:1]
    bench.judges[0].outage_after = 7
    with pytest.raises(JudgeOutage):
        bench.run()
    again, steps = Bench(bench.folder, judges=[FakeJudge()]).evaluation(), list[int]()
    left = again.left
    again.run("w", lambda text: None, steps.append)
    assert left == 30 - 7 == sum(steps) and again.left == 0 and max(steps) <= 2
    steps.clear()
    again.run("w", lambda text: None, steps.append)
    assert steps == []


def test_more_prompts_seeds_and_judges_can_be_added(bench: Bench) -> None:
    bench.judges, bench.counts, bench.seeds = bench.judges[:1], (2, 1), 1
    assert len(bench.run().scores) == 9
    again = Bench(bench.folder)
    assert len(again.run().scores) == 60
    assert len(again.executor.made) == 30 - 9 and len(again.judges[0].asked) == 21 and len(again.judges[1].asked) == 30


def test_scores_under_other_settings_are_never_mixed(bench: Bench) -> None:
    bench.run()
    changed = {
        "judge.in-domain": {"judges": [FakeJudge(version="model 9")]},
        "latent_frames.hard": {"frames": (6, 12)},
    }
    for key, change in changed.items():
        with pytest.raises(UserError, match=f"{key}: found .* another --output"):
            replace(bench, **change).run()
    with pytest.raises(UserError, match="policies: found 'v'"):
        bench.run(policies="v")


def test_videos_of_older_draws_are_never_mixed_with_others(bench: Bench) -> None:
    """A folder of a version that did not name its draws."""
    bench.run()
    path = bench.folder / "settings.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "draws"}))
    with pytest.raises(UserError, match="draws: found 'a seed a video', but .* 'a seed a batch'; .* another --output"):
        bench.run()


def test_a_length_that_the_window_cannot_make_is_refused(bench: Bench) -> None:
    bench.frames = (6, 24)
    with pytest.raises(UserError, match="found 24; accepted: whole chunks of 3, at most 21"):
        bench.run()
    assert bench.planner.frames == 6 and bench.executor.settings.frames == 6


def test_missing_scores_are_kept_until_they_are_asked_for_again(bench: Bench) -> None:
    bench.judges[0].missing = ("hard-1", "simple-0")
    ledger = bench.run().scores
    assert [row["missing"] for row in ledger if row["scores"] is None] == ["garbage"] * 12
    again = Bench(bench.folder)
    again.run()
    assert again.judges[0].asked == []
    ledger = again.run(again=True).scores
    assert sorted(again.judges[0].asked) == ["hard-1"] * 6 + ["simple-0"] * 6 and again.judges[1].asked == []
    assert all(row["scores"] for row in ledger)


def test_videos_whose_latents_are_not_numbers_have_no_score(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = FakeExecutor.rollout

    def partly(self: FakeExecutor, plans: list[Plan], switch_frames: list[int], noise) -> Rollout:
        made = rollout(self, plans, switch_frames, noise)
        made.broken = torch.zeros(len(plans), 1, dtype=torch.bool)
        made.broken[0] = not self.started
        return made

    monkeypatch.setattr(FakeExecutor, "rollout", partly)
    whole = bench.run()
    rows = list(whole.scores)
    broken = [row for row in rows if row["scores"] is None]
    assert broken and len(broken) < len(rows)
    assert {row["condition"] for row in broken} == {BOTH.name}
    assert {row["missing"] for row in broken} == {"the video's latents are not finite"}
    asked = [list(judge.asked) for judge in bench.judges]
    again = bench.run()  # kept
    assert [judge.asked for judge in bench.judges] == asked
    assert [row["scores"] for row in again.scores] == [row["scores"] for row in rows]


def test_the_makers_do_not_run_away_from_slow_judges(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "WAITING", 4)
    most = 0

    class Slow(FakeJudge):
        """Needs 50 ms for a video, one after another."""

        worker = ThreadPoolExecutor(1)

        def submit(self, videos: Sequence[JudgedVideo]) -> list[Future[Verdict]]:
            nonlocal most
            most = max(most, self.worker._work_queue.qsize())
            return [self.worker.submit(self.answer, video) for video in videos]

        def answer(self, video: JudgedVideo) -> Verdict:
            time.sleep(0.05)
            return self.verdict(video)

    bench.judges = [Slow()]
    assert len(bench.run().scores) == 30 and 2 <= most <= 4


def test_tables_count_what_is_missing_and_keep_pickscore_apart(bench: Bench) -> None:
    bench.judges = [FakeJudge(missing=("hard-1",)), FakeJudge("held-out", "m"), FakeJudge(PICKSCORE, "clip")]
    found = gather(bench.run(), 200)
    cells = {(row.method, row.set, row.judge): row for row in found.rows["combined"]}
    level = sum(bench.levels(STEP, seed)[i] for seed in (0, 1) for i in range(3)) / 6 / 255
    assert cells["step-prompt", "simple", "in-domain"].score == pytest.approx(level, abs=1e-6)
    halves = {(row.method, row.set, row.judge): row.score for row in found.rows["temporal_order"]}
    assert halves["step-prompt", "simple", "in-domain"] == pytest.approx(level / 2, abs=1e-6)
    assert cells["step-prompt", "hard", "in-domain"].n == 2 and cells["step-prompt", "hard", "held-out"].n == 4
    four = [cells["+ TempAct", name, judge].score for name in ("simple", "hard") for judge in ("in-domain", "held-out")]
    assert cells["+ TempAct", "average", "average"].score == pytest.approx(sum(four) / 4)
    assert 20 < cells["+ TempAct", "average", PICKSCORE].score < 21
    assert [(one.missing, len(one.scores)) for one in found.missing] == [(2, 4)] * 3
    gain = next(one for one in found.comparisons["combined"] if one.method == "+ TempAct" and one.set == "average")
    assert gain.difference == pytest.approx(-50 / 255, abs=0.01)
    single = next(
        one for one in found.comparisons["combined"] if one.method == "single-prompt" and one.set == "average"
    )
    assert single.difference == 0


def test_the_result_files_say_what_was_measured(bench: Bench) -> None:
    bench.judges[0].missing = ("hard-1",)
    paths = bench.results(bench.run(), strips=1)
    assert [path.suffix for path in paths] == [".json", ".md", ".html"]
    found = json.loads(paths[0].read_text(), parse_constant=pytest.fail)
    assert found["settings"]["judge.held-out"] == "model 2" and found["about"]["judged frames"].startswith(
        "6 (simple), 10"
    )
    assert len(found["tables"]["combined"]) == len(found["tables"]["temporal_order"]) == 3 * (2 * 2 + 1)
    text = paths[1].read_text()
    assert "in-domain: 2 of 4 videos (+ TempAct, hard)" in text and "## Temporal order alone" in text
    assert "+ TempAct against step-prompt, video by video: -0.1" in text
    page = paths[2].read_text()
    assert page.count('<div class="film">') == 2 * 3 and "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert "simple event 0." in page and "simple event 1." not in page and "in-domain gave no score to 2 of 4" in page
    picture = base64.b64decode(re.findall(r"base64,([^\"]*)", page)[0])
    assert picture.startswith(b"\x89PNG")


@pytest.mark.parametrize("missing", [["simple-0", "simple-1", "simple-2", "hard-0", "hard-1"], ["hard-0", "hard-1"]])
def test_results_without_scores_have_no_numbers(bench: Bench, missing: list[str]) -> None:
    for judge in bench.judges:
        judge.missing = tuple(missing)
    paths = bench.results(bench.run(), strips=1)
    json.loads(paths[0].read_text(), parse_constant=pytest.fail)
    for path in paths[1:]:
        text = re.sub(r"base64,[^\"]*", "", path.read_text())
        assert not re.search(r"\bnan\b|\[\]|\[, \]", text), path
    assert "+ TempAct against step-prompt, video by video: no video has the scores of both." in paths[1].read_text()


def test_strips_tell_the_scores_of_what_they_show(bench: Bench) -> None:
    bench.judges = [FakeJudge(missing=("hard-0",)), FakeJudge("held-out", "m"), FakeJudge(PICKSCORE, "clip")]
    page = bench.results(bench.run(), strips=1)[2].read_text(encoding="utf-8")
    titles = re.findall("<h4>(.*)</h4>", page)
    level = bench.levels(STEP)[0] / 255
    assert titles[1] == f"step-prompt: in-domain {level:.2f}, held-out {level:.2f}, PickScore {20 + level:.2f}"
    assert len(titles) == 6 and titles[3].startswith("single-prompt: in-domain missing, held-out 0.")


def test_prompts_that_pickscore_did_not_read_whole_are_counted(bench: Bench) -> None:
    class Cutting(FakeJudge):
        def verdict(self, video: JudgedVideo) -> Verdict:
            return Verdict({PICKSCORE: 20.0, "cut": float(video.prompt.prompt_id in ("hard-1", "simple-0"))})

    bench.judges = [FakeJudge(), Cutting(PICKSCORE, "clip")]
    for counts, words in (((3, 2), "2 of 5 prompts"), ((3, 1), "1 of 4 prompts")):  # a smaller table of one folder
        bench.counts = counts
        text = bench.results(bench.run())[1].read_text()
        assert f"- PickScore: 8 frames, first and last included, against the whole prompt; {words}" in text


@pytest.mark.parametrize(("policies", "told"), [("self-forcing, random weights, settings 1", True), ("w", False)])
def test_random_weights_are_said_above_the_tables(bench: Bench, policies: str, told: bool) -> None:
    paths = bench.results(bench.run(policies))
    for path in paths[1:]:
        head = path.read_text().partition("Combined score")[0]
        assert ("Random weights: the videos are noise." in head) is told


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_seeds_than_the_protocol_has_are_said(bench: Bench, seeds: int) -> None:
    bench.seeds = seeds
    text = bench.results(bench.run())[1].read_text()
    assert ("the protocol has 2 or more" in text) is (seeds < 2)


def test_the_page_escapes_prompts(bench: Bench) -> None:
    own = OrderPrompt("x", "simple", "", "<script>alert(1)</script>", ("<b>",))
    suite = Suite({"simple": [own]}, {"simple": 6}, (STEP,), 1, bench.judges, 7, 2)
    page = bench.results(bench.run(suite=suite), strips=1)[2].read_text()
    assert "<script" not in page and "<b>" not in page and "&lt;script&gt;" in page


def test_vbench_gets_every_video_where_two_prompts_want_one_name(bench: Bench) -> None:
    """One text in two sets, and a text that is the prompt_id of another."""
    own = {
        "a": [OrderPrompt("a-1", "a", "", "A cat sits."), OrderPrompt("a-2", "a", "", "b-2")],
        "b": [OrderPrompt("b-1", "b", "", "A cat sits."), OrderPrompt("b-2", "b", "", "x/y")],
    }
    evaluation = bench.run(suite=Suite(own, {"a": 6, "b": 6}, (STEP,), 2, (), 7, 2))
    for _ in range(2):
        (folder,) = export_vbench(evaluation)
    names = {f"{stem}-{seed}.mp4" for stem in ("A cat sits.", "a-2", "b-1", "b-2") for seed in (0, 1)}
    assert {path.name for path in folder.iterdir()} == names
    told = json.loads((bench.folder / "vbench" / "step-prompt-prompts.json").read_text())
    assert set(told) == names and told["b-1-1.mp4"] == "A cat sits." and told["a-2-0.mp4"] == "b-2"
    for prompt, stem in zip([*own["a"], *own["b"]], ("A cat sits.", "a-2", "b-1", "b-2"), strict=True):
        row = evaluation.video(STEP, prompt, 1)
        assert row and (folder / f"{stem}-1.mp4").read_bytes() == (bench.folder / row["file"]).read_bytes()


def test_vbench_gets_its_names(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["a cat, and a dog", "either/or", "long " * 60]
    own = [OrderPrompt(f"v-{i}", "vbench", "", text.strip()) for i, text in enumerate(texts)]
    evaluation = bench.run(suite=Suite({"vbench": own}, {"vbench": 6}, (SINGLE, STEP), 2, (), 7, 2))
    for _ in range(2):  # again is no fault
        folders = export_vbench(evaluation)
    names = {"a cat, and a dog-0.mp4", "a cat, and a dog-1.mp4", "v-1-0.mp4", "v-1-1.mp4", "v-2-0.mp4", "v-2-1.mp4"}
    assert [folder.name for folder in folders] == ["single-prompt", "step-prompt"]
    assert all({path.name for path in folder.iterdir()} == names for folder in folders)
    told = json.loads((bench.folder / "vbench" / "step-prompt-prompts.json").read_text())
    assert set(told) == names and told["v-1-0.mp4"] == "either/or" and told["a cat, and a dog-1.mp4"] == own[0].text
    row = evaluation.video(STEP, own[0], 1)
    assert row and (folders[1] / "a cat, and a dog-1.mp4").read_bytes() == (bench.folder / row["file"]).read_bytes()
    assert "wants --seeds 5" in caplog.text and "evaluate with --prompt_file" in caplog.text


def test_an_export_that_was_cut_off_leaves_nothing_that_vbench_would_read(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = bench.run()

    def cut_off(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(vbench.shutil, "copyfile", cut_off)
    with pytest.raises(KeyboardInterrupt):
        export_vbench(evaluation)
    assert list((bench.folder / "vbench" / "single-prompt").iterdir()) == []


def test_a_batched_suite_judges_a_batch_at_once(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    class Together(FakeJudge):
        def submit(self, videos: Sequence[JudgedVideo]) -> list[Future[Verdict]]:
            asked.append([video.prompt.prompt_id for video in videos])
            return super().submit(videos)

    bench = Bench(tmp_path, judges=[Together()], seeds=1, batched=True)
    evaluation = bench.run()
    batches = [["simple-0", "simple-1"], ["simple-2"]] * 3 + [["hard-0", "hard-1"]] * 3
    assert asked == batches and json.loads((tmp_path / "settings.json").read_text())["batch"] == 2
    # one lost video is made alone, with its own noise, and not judged again
    row = evaluation.video(STEP, bench.suite.prompts["simple"][1], 0)
    assert row is not None
    before = (tmp_path / row["file"]).read_bytes()
    (tmp_path / row["file"]).unlink()
    again = Bench(tmp_path, judges=[Together()], seeds=1, batched=True)
    again.run()
    assert len(again.executor.made) == 1 and (tmp_path / row["file"]).read_bytes() == before and asked == batches


def test_lossless_videos_are_read_as_they_were_and_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4).transpose(2, 3)
    path = tmp_path / "videos" / "a.safetensors"

    def full(tensors: object, path: Path) -> None:
        Path(path).write_bytes(b"a part")
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr("tempact.video.save_file", full)
        with pytest.raises(UserError, match="a.safetensors: found no space left on the disk"):
            LOSSLESS.save(frames, path)
    assert list(path.parent.iterdir()) == []
    LOSSLESS.save(frames, path)
    assert torch.equal(LOSSLESS.read(path), frames)


def test_evaluation_leaves_random_state_untouched(bench: Bench) -> None:
    before: Tensor = torch.get_rng_state()
    bench.run()
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_of_best_of_n_stand_beside_those_of_one(bench: Bench) -> None:
    """Their videos are made one by one, with the noise of all others, and their rows say what was chosen."""
    made: list[tuple[str, tuple[int, ...], float, bool]] = []

    def best(executor: FakeExecutor, plan: Plan, noise) -> tuple[Tensor, bool, list[dict]]:
        made.append((plan.instruction, noise.shape, noise.draw(0, 0, 0).sum().item(), executor.started))
        frames = torch.full((6, 3, SIDE, SIDE), 200, dtype=torch.uint8)
        return frames, False, [{"frame": 3, "continuation": len(made)}]

    methods = with_best_of([SINGLE, STEP, BOTH], 4)
    assert [method.name for method in methods[3:]] == ["step-prompt, best of 4", "+ TempAct, best of 4"]
    assert with_best_of([SINGLE, PLANNER_ONLY], 4) == [SINGLE, PLANNER_ONLY]
    bench.run(suite=replace(bench.suite, methods=methods[:3]))
    alone = len(bench.executor.made)
    suite = replace(bench.suite, methods=methods, best_of={"chunks": 1})
    evaluation = Evaluation(bench.folder, suite, bench.planner, bench.executor, gaussian_noise, PLAIN, best_of=best)
    evaluation.run("w", lambda told: None)
    assert len(bench.executor.made) == alone  # nothing is made a second time
    expected = 2 * len(suite.all_prompts) * suite.seeds
    assert len(made) == expected and {shape for _, shape, _, _ in made} == {bench.executor.noise_shape(1, 4)}
    assert [started for *_, started in made].count(True) == expected // 2
    assert len({(text, level) for text, _, level, _ in made}) == expected // 2  # both methods share noise
    row = evaluation.video(methods[3], suite.all_prompts[0], 0)
    assert row is not None and row["choices"] == [{"frame": 3, "continuation": 1}]
    assert evaluation.score(suite.all_prompts[0].prompt_id, methods[4], 0, suite.judges[0].name, "combined") > 0.7
    assert suite.settings("w")["best_of.4"] == '{"chunks": 1}'
    with pytest.raises(UserError, match="best_of.4"):
        Evaluation(
            bench.folder, replace(suite, best_of={"chunks": 2}), bench.planner, bench.executor, gaussian_noise, PLAIN,
            best_of=best,
        ).run("w", lambda told: None)  # fmt: skip
