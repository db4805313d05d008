"""The memory plan: its traces against published and measured numbers and against real runs, and what it concludes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from csrc_triton import runtime
from tempact import train
from tempact.cli import from_yaml
from tempact.config import ExecutorConfig, LoraConfig, OptimConfig, RunConfig
from tempact.diagnostics import dry_run as report
from tempact.diagnostics import footprints as footprint
from tempact.diagnostics.dry_run import (
    _fit,
    _time,
    budgets_of,
    dry_run,
    largest,
    missing,
    run_of,
    size,
    table,
    tera,
    work_of,
)
from tempact.diagnostics.footprints import PlannerSizes, Sizes, plan_bytes, trace_plan
from tempact.diagnostics.memory import (
    EXACT,
    GIB,
    PLANNING,
    Budget,
    Item,
    Needs,
    Phase,
    Run,
    needs_of,
    total,
)
from tempact.diagnostics.sizes import PLANNERS, Decoder, planner_sizes, qwen3
from tempact.diagnostics.trace import Trace, Watch, fake, traced
from tempact.models.wan.transformer import WanConfig
from tempact.planner.language_model import LOGITS_AT_ONCE
from tempact.presets import EXECUTOR_TARGETS, SELF_FORCING_TARGETS, get_preset

LORA = LoraConfig(256, 256, SELF_FORCING_TARGETS)
SETTINGS = ExecutorConfig(weights="", lora=LORA, optim=OptimConfig(1e-5), precision="bf16", frames=21)
FULL = Sizes(WanConfig(), SETTINGS, (60, 104))  # Wan2.1-T2V-1.3B at 480x832
SMALL = WanConfig(dim=64, ffn_dim=96, freq_dim=16, text_dim=24, text_len=8, heads=2, layers=2, in_dim=4, out_dim=4)
TINY = Sizes(SMALL, replace(SETTINGS, lora=LoraConfig(4, 4, SELF_FORCING_TARGETS), precision="fp32"), (4, 8))


pytestmark = pytest.mark.usefixtures("no_judges")


known_sizes = cache(planner_sizes)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large counts are not asked for, and a planner's sizes are traced once: both take their time."""
    monkeypatch.setattr(report, "MOST_BRANCHES", 16)
    monkeypatch.setattr(report, "planner_sizes", known_sizes)


@cache
def published() -> Run:
    """The preset self-forcing on a GPU, with the sizes of its models."""
    return run_of(get_preset("self-forcing"), on_gpu=True)


# against docs/backbones.md and what was measured


def test_denoiser_calls_take_the_operations_of_backbones_section_7() -> None:
    """By frames attended to, the own chunk of 3 among them."""
    found = [footprint.denoise(FULL, 1, frames - 3, 3, adapters=False).flops / 1e12 for frames in range(3, 22, 9)]
    assert [round(flops, 1) for flops in found] == [16.2, 28.3, 40.4]
    frozen = replace(SETTINGS, train=False)
    run = Run(replace(get_preset("self-forcing"), executor=frozen), FULL)
    calls = {frames: round(flops / 1e12, 1) for frames, flops in work_of(run).calls.items()}
    assert calls == {3: 16.2, 6: 20.2, 9: 24.3, 12: 28.3, 15: 32.3, 18: 36.4, 21: 40.4}


def test_the_81_frames_of_self_forcing_take_990_tera_and_adapters_more() -> None:
    calls = [footprint.denoise(FULL, 1, start, 3, adapters=False).flops for start in (0, 18)]
    assert 7 * 5 * sum(calls) / 2 == pytest.approx(990e12, rel=1e-3)  # linear in the context
    n = 4680  # tokens of a chunk
    widths = 4 * (1536 + 1536) + 2 * (1536 + 8960)
    more = footprint.denoise(FULL, 1, 0, 3).flops - calls[0]
    assert more == 2 * n * 256 * widths * 30


def test_a_switch_that_rewrites_the_window_takes_operations_of_its_own() -> None:
    """At frame 3 once a plan, behind the fork once a video; 9 frames, the sink is attended to beyond the window."""
    preset = get_preset("longlive")
    plain = replace(preset, executor=replace(preset.executor, text_switch="cross_attention"))
    run, without = (Run(config, FULL) for config in (preset, plain))
    found = [work_of(each).phases["rollout"] for each in (run, without)]
    assert run.switches == [3, 9, 15, 21]
    passes = [footprint.denoise(FULL, 1, *shape).flops for shape in ((0, 3), (0, 9), (3, 9), (3, 9))]
    assert found[0] - found[1] == 64 * passes[0] + 512 * sum(passes[1:])
    assert 0.15 < found[0] / found[1] - 1 < 0.25


def test_weights_adapters_and_caches_have_the_published_sizes() -> None:
    parameters = footprint.parameters_of(FULL)
    assert parameters.weights == 1_418_996_800 and parameters.weight_bytes == 2 * 1_418_996_800
    assert parameters.trained == 255_590_400  # "256 M"
    assert parameters.adapted_bytes == 2 * 30 * (4 * 1536**2 + 2 * 1536 * 8960)
    everything = replace(FULL, settings=replace(SETTINGS, lora=replace(LORA, targets=EXECUTOR_TARGETS)))
    assert footprint.parameters_of(everything).trained == 349_962_240  # "350 M"
    assert FULL.frame_bytes == 287_539_200 and FULL.text_bytes == 94_371_840
    gates = footprint.parameters_of(replace(FULL, settings=replace(SETTINGS, precision="bf16-fp32-gates")))
    assert gates.weight_bytes > parameters.weight_bytes and gates.weights == parameters.weights


@pytest.mark.parametrize(("impl", "kernels"), [("ours", True), ("torch path", False)])
def test_the_update_peaks_where_it_was_measured(impl: str, kernels: bool) -> None:
    """bench_step's update on an H200: 1 continuation x 1 transition, LoRA r=256, bf16, 6 context frames, 480x832.

    What tensors are counted comes out 2 to 3% below what torch's allocator has counted.
    """
    baseline = Path(__file__).parents[2] / "bench" / "baselines" / "nvidia-h200.json"
    case = "executor update, 1 continuation x 1 transition, LoRA r=256, 6 context frames: peak memory"
    rows = json.loads(baseline.read_text())["rows"]
    measured = next(row["mib"] for row in rows if row["case"] == case and row["impl"] == impl) * 2**20
    parameters = footprint.parameters_of(FULL)
    adapters = 3 * 4 * parameters.trained  # trained, reference, gradients
    activations = footprint.update(replace(FULL, kernels=kernels), 1, 6).bytes
    planned = parameters.weight_bytes + adapters + 6 * FULL.frame_bytes + activations
    assert 0.96 * measured < planned < measured


def test_recomputation_keeps_a_few_tensors_a_block() -> None:
    """Of each block its inputs: the stream and what is to be added, bf16."""
    kept = footprint.update(FULL, 1, 6).bytes
    again = footprint.update(FULL, 1, 6, checkpointing=True)
    stream = 2 * 4680 * 1536
    assert 30 * 2 * stream < again.bytes < 30 * 2 * stream + 1.2 * GIB < kept / 2
    assert again.flops > footprint.update(FULL, 1, 6).flops


@pytest.mark.slow
def test_a_run_that_recomputes_is_planned_so() -> None:
    run = run_of(get_preset("longlive"), on_gpu=True)
    again = replace(run.config, executor=replace(run.config.executor, checkpoint_activations=True))
    held = [
        next(item.bytes for item in needs_of(own, planning=False).kept if "held by CUDA graphs" in item.what)
        for own in (run, run_of(again, on_gpu=True))
    ]
    assert held[1] < 0.4 * held[0]


def test_the_decoder_takes_what_backbones_section_5_says() -> None:
    pytest.importorskip("diffusers", reason="needs diffusers: pip install -e '.[test]'")
    decoder = Decoder(FULL, {}, on_gpu=True)
    assert decoder.weights / 2 == pytest.approx(126.9e6, rel=1e-3)
    assert decoder.state == pytest.approx(1.89e9, rel=2e-3)  # 944 M numbers, bf16
    assert (decoder.videos, decoder.latents) == (1, 3)
    plain = Decoder(FULL, {}, on_gpu=False)
    assert plain.flops_later == pytest.approx(13.55e12, rel=5e-3)
    assert plain.flops(21) == pytest.approx(4.35e12 + 20 * 13.55e12, rel=5e-3)
    # six convolutions of 96 channels read 128, and the last one writes 8 instead of 3
    more = 2 * (6 * 96 * 32 + 5 * 96) * 27 * 4 * 480 * 832
    assert decoder.flops_later - plain.flops_later == more and plain.state == decoder.state


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        pytest.param("Qwen/Qwen3-4B", 4_022_468_096, marks=pytest.mark.slow),
        pytest.param("Qwen/Qwen3-8B", 8_190_735_360, marks=pytest.mark.slow),
    ],
)
def test_published_planners_have_their_sizes(name: str, count: int) -> None:
    sizes = PlannerSizes.of(PLANNERS[name], get_preset("self-forcing").planner, 256)
    layers = PLANNERS[name].num_hidden_layers
    assert (sizes.weights, sizes.cached) == (2 * count, 2 * layers * 8 * 128 * 2)
    assert sizes.logits_bytes(2, 10) == 20 * 151_936 * 2 * (2 + 4)
    assert sizes.logits_bytes(64, 2024) <= LOGITS_AT_ONCE * 2 * (2 + 4)  # however many plans there are
    whole = PlannerSizes.of(PLANNERS[name], get_preset("shapeworld").planner, 256)
    assert whole.weights == 2 * sizes.weights and whole.row_bytes > 4 * sizes.row_bytes  # fp32, nothing recomputed


# the traces


def test_a_trace_counts_what_is_alive_once_and_operations() -> None:
    with traced(kernels=False) as trace:
        a = torch.empty(128, 256)
        view = a.t()
        assert trace.live == 128 * 256 * 4
        b = a @ view
        assert trace.flops == 2 * 128 * 256 * 128 and trace.live == (128 * 256 + 128 * 128) * 4
        del a
        assert trace.live == (128 * 256 + 128 * 128) * 4  # the view holds it
        del view
        assert trace.live == 128 * 128 * 4 and trace.peak == (128 * 256 + 128 * 128) * 4
        trace.restart()
        assert trace.peak == trace.live == b.numel() * 4 and trace.flops == 0
        small = torch.empty(1)
        assert trace.live == b.numel() * 4 + 512  # as the allocator rounds
        del small


@contextmanager
def watched(backend: str) -> Iterator[Trace]:
    trace = Trace()
    with Watch(trace), runtime.backend(backend):
        yield trace


@pytest.mark.parametrize("kernels", [True, False])
def test_fake_tensors_keep_what_real_ones_keep(kernels: bool) -> None:
    """The policy's forward, with what autograd keeps of it, on real tensors (kernels interpreted) and on fake ones."""
    if kernels and torch.cuda.is_available():
        pytest.skip("kernels run interpreted where there is no GPU")
    sizes = replace(TINY, kernels=kernels)

    def kept(trace: Trace, device: str) -> int:
        executor = footprint.make_executor(sizes)
        fake(executor.peft)
        x, sigma, positions = footprint._inputs(sizes, 2, 6, 3)
        words = torch.zeros(1, SMALL.text_len, SMALL.text_dim)
        index = torch.zeros(2, dtype=torch.int64)
        context = footprint._context(sizes, 6, 1)
        before = trace.live
        out = executor.runner.policy_velocity(x, sigma, words, index, positions, context)
        assert out.requires_grad
        return trace.live - before

    with traced(kernels=kernels) as shapes:
        planned = kept(shapes, "fake")
    with watched("triton" if kernels else "torch") as real:
        found = kept(real, "cpu")
    # torch's attention on a CPU keeps its output by heads and, copied, by tokens; on a GPU that is one tensor, but
    # there are two numbers of the generator
    stream, small = 4 * 2 * 24 * 64, 512
    if kernels:
        assert found - planned == SMALL.layers * (stream - 2 * small)
    else:
        assert planned == pytest.approx(found, rel=0.03)


@pytest.mark.slow
def test_blocks_and_rows_are_extrapolated_to_the_bytes_of_the_whole() -> None:
    five = replace(TINY, model=replace(SMALL, layers=5))
    pairs = [(footprint.denoise(five, 4, 6, 3), footprint.trace_denoise(five, 4, 6, 3, True))]
    for again in (False, True):  # without and with checkpointing
        planned = footprint.update(five, 4, 6, checkpointing=again)
        pairs.append((planned, footprint.trace_update(five, 4, 6, again)))
    for planned, whole in pairs:
        assert planned.flops == whole.flops
        assert planned.bytes == pytest.approx(whole.bytes, rel=0.01)  # small tensors are rounded up to 512 bytes
    assert pairs[1][0].bytes > 1.5 * pairs[2][0].bytes


@pytest.mark.slow
def test_a_planners_layers_and_tokens_are_extrapolated() -> None:
    for layers, again in ((5, False), (5, True), (2, False)):
        sizes = qwen3(2048, 6144, layers, 16, True)
        config = replace(get_preset("self-forcing").planner, checkpoint_activations=again)
        planned = plan_bytes(sizes, config, 1024)
        assert planned == pytest.approx(trace_plan(sizes, config, 1024).bytes, rel=0.01)


# what follows from them


def needs(kept: int, *phases: int) -> Needs:
    return Needs(
        (Item("w", kept, EXACT),), tuple(Phase(f"p{i}", (Item("a", n, EXACT),)) for i, n in enumerate(phases)), ()
    )


def test_a_run_needs_what_is_kept_and_its_worst_phase() -> None:
    found = needs(10, 3, 7, 5)
    assert (found.peak, found.worst.name) == (17, "p1")
    lines = table(needs(2 * GIB, GIB // 2))
    assert lines[0] == "kept all the time: 2.00 GiB" and lines[2] == "p0: 512 MiB, in all 2.50 GiB"
    budget = Budget("g", 10 * GIB)
    assert budget.usable == int(9 * GIB * 0.95)
    assert budget.fits(needs(budget.usable - 5, 5)) and not budget.fits(needs(budget.usable - 5, 6))


def test_the_largest_count_that_fits() -> None:
    assert [largest(lambda n: 10 * n, room, 2, 64) for room in (19, 20, 29, 90, 640, 10_000)] == [0, 2, 2, 9, 64, 64]
    assert largest({2: 5, 3: 12, 4: 9, 5: 11}.__getitem__, 10, 2, 5) == 4  # growth in steps
    asked: list[int] = []
    largest(lambda n: asked.append(n) or 10 * n, 50, 2, 10**9)  # type: ignore[func-returns-value]
    assert asked[-1] == 11


@pytest.mark.parametrize(("count", "text"), [(1023, "1023 B"), (3 * GIB, "3.00 GiB"), (12 * 2**20, "12.0 MiB")])
def test_sizes_as_people_read_them(count: int, text: str) -> None:
    assert size(count) == text
    assert (tera(28.3e12), tera(8.93e15)) == ("28.3 TF", "8.93 PF")


def tiny(**changes: object) -> RunConfig:
    base = get_preset("self-forcing")
    settings = {"weights": "random-tiny", "video_size": (64, 96)} | changes
    executor = replace(base.executor, **settings)
    return replace(base, planner=replace(base.planner, weights="random"), executor=executor)


def test_more_continuations_and_frames_need_more_and_graphs_hold_activations() -> None:
    run = published()
    assert run.sizes.kernels and run.graphs and (run.plans, run.branches, run.update_rows) == (64, 512, 3)
    bounded = run = run.changed(prompts=1)
    run = replace(run, config=replace(run.config, executor=replace(run.config.executor, rollout_videos=0)))
    assert (run.together, bounded.together, bounded.changed(continuations=3).together) == (32, 8, 6)
    assert needs_of(bounded).peak < needs_of(run).peak
    four, eight = (needs_of(run.changed(continuations=n)) for n in (4, 8))
    kept = [{item.what.split(",")[0]: item.bytes for item in found.kept} for found in (four, eight)]
    assert four.peak < eight.peak and kept[0]["executor's weights"] == kept[1]["executor's weights"]
    assert kept[0]["executor's weights with the adapter merged"] == 2_217_738_240
    assert kept[0]["K/V cache"] < kept[1]["K/V cache"] and "activations of rollout and update" in kept[0]
    assert eight.host[0].bytes == 32 * 117 * 480 * 832 * 3
    stays = replace(run, config=replace(run.config, executor=replace(run.config.executor, offload_text_encoder=False)))
    text = next(item.bytes for item in needs_of(stays).kept if item.what == "text encoder")
    assert text == pytest.approx(11.4e9, rel=0.01) and "text encoder" not in kept[0]
    assert kept[0]["PickScore"] == 2 * 986_109_441
    assert [(phase.name, phase.bytes) for phase in eight.phases][2] == ("text", text) and eight.host[1].bytes == text
    loose = replace(run, config=replace(run.config, executor=replace(run.config.executor, cuda_graphs=False)))
    assert not loose.graphs and needs_of(loose).peak < eight.peak
    assert "planner update" not in [phase.name for phase in needs_of(run, planning=False).phases]


@pytest.mark.slow
def test_the_caches_size_is_that_of_the_larger_of_roll_out_and_update() -> None:
    """A micro-batch of many plans holds more contexts than `rollout_videos` lets in."""
    run = published()
    frames = {}
    for micro_batch in (1, 24, 480):
        executor = replace(run.config.executor, micro_batch=micro_batch)
        own = replace(run, config=replace(run.config, executor=executor))
        found = [item.what for item in needs_of(own, planning=False).kept if item.what.startswith("K/V cache")]
        frames[own.contexts] = int(found[0].split()[2])
    assert frames.keys() == {1, 20} and frames[1] <= 111 < 20 * 9 < frames[20] <= 20 * 17
    frozen = replace(run, config=replace(own.config, executor=replace(own.config.executor, train=False)))
    assert any(item.what.startswith(f"K/V cache, {frames[1]} ") for item in needs_of(frozen, planning=False).kept)


def test_what_only_an_update_needs_is_not_on_the_device_meanwhile() -> None:
    """Recorded transitions wait on the host; latents are those of the videos that advance together."""
    run = published()
    found = [needs_of(own, planning=False) for own in (run, run.changed(prompts=32))]
    host = [next(item.bytes for item in own.host if item.what == "recorded transitions") for own in found]
    chunk = 4 * 16 * 3 * 60 * 104
    assert host == [plans * (8 * 7 + 9) * chunk for plans in (64, 128)]
    assert total(found[0].kept) == pytest.approx(total(found[1].kept), rel=0.01)  # text rows
    assert found[0].peak < 76 * GIB and found[1].peak < 77 * GIB


def named(items: tuple[Item, ...], begin: str) -> Item:
    return next(item for item in items if item.what.startswith(begin))


def test_an_update_holds_the_partial_sums_of_its_tree() -> None:
    """64 plans of the executor are as many leaves, 8 micro-batches of the planner."""
    run = published()
    assert run.planner is not None
    trained = {"executor update": 255_590_400, "planner update": run.planner.trained}
    for prompts, updates, executor, planner in ((16, 1, 6, 3), (16, 2, 5, 2), (3, 1, 4, 1), (1, 1, 2, 0)):
        own = run.changed(prompts=prompts)
        trainer = replace(own.config.trainer, updates_per_iteration=updates)
        phases = {
            phase.name: phase.items
            for phase in needs_of(replace(own, config=replace(own.config, trainer=trainer))).phases
        }
        for name, count in (("executor update", executor), ("planner update", planner)):
            found = [item.bytes for item in phases[name] if item.what == f"partial sums of gradients, {count}"]
            assert found == [count * trained[name] * 4] * bool(count)


def forked(run: Run, **changes: object) -> Run:
    """The run with another executor's settings."""
    return replace(run, config=replace(run.config, executor=replace(run.config.executor, **changes)))


def test_a_tree_records_and_trains_the_branches_of_all_its_forks() -> None:
    """2, 4 and 8 branches of three forks, two of each context; their roll-out is at most that of one fork."""
    one = published()
    tree = forked(one, forks="tree", branching=(2, 2, 2))
    assert (one.recorded, one.siblings, one.rows) == (8, 8, 64)
    assert (tree.recorded, tree.siblings, tree.rows) == (14, 2, 64 * 7)
    found = [needs_of(own, planning=False) for own in (one, tree)]
    host = [named(own.host, "recorded transitions").bytes for own in found]
    chunk = 4 * 16 * 3 * 60 * 104
    assert host == [64 * (8 * 7 + 9) * chunk, 64 * (14 * 7 + 7 * 9) * chunk]
    sums = [[item.what for item in own.phases[-1].items if item.what.startswith("partial")] for own in found]
    assert sums == [["partial sums of gradients, 6"], ["partial sums of gradients, 9"]]
    phases = [work_of(own).phases for own in (one, tree)]
    assert phases[0]["rollout"] == phases[1]["rollout"]
    assert phases[1]["executor update"] == pytest.approx(phases[0]["executor update"] * 14 / 8)
    for size_of, contexts in ((1, 1), (6, 1), (24, 4)):
        own = forked(tree, micro_batch=size_of)
        assert own.contexts == contexts and own.update_rows == size_of
    alone = forked(one, forks="tree", branching=(8,))
    assert needs_of(alone, planning=False) == found[0] and work_of(alone) == work_of(one)


def test_videos_that_share_nothing_and_all_their_chunks_are_counted() -> None:
    one = published()
    apart, whole = forked(one, forks="none"), forked(one, trained_chunks="video")
    assert [(own.recorded, own.siblings, own.rows) for own in (apart, whole)] == [(8, 1, 64 * 8), (72, 1, 64 * 72)]
    assert (one.fork, apart.fork, whole.fork) == (3, 0, 3) and apart.switches == one.switches
    chunk = 4 * 16 * 3 * 60 * 104
    for own in (apart, whole):
        host = named(needs_of(own, planning=False).host, "recorded transitions").bytes
        assert host == own.rows * (7 + 9) * chunk  # a context of its own for every chunk
    phases = [work_of(own).phases for own in (one, apart, whole)]
    assert phases[1]["rollout"] > phases[0]["rollout"] == phases[2]["rollout"]
    assert phases[1]["decode"] > phases[0]["decode"] == phases[2]["decode"]
    assert phases[2]["executor update"] == pytest.approx(phases[0]["executor update"] * 9)


def test_the_largest_tree_that_fits_has_whole_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MOST_BRANCHES", 64)  # of 4 plans
    tree = forked(run_of(tiny(), on_gpu=True), forks="tree", branching=(2, 2, 2)).changed(prompts=1)
    assert tree.changed(continuations=12).config.executor.branching == (3, 2, 2)
    needs = needs_of(tree.changed(continuations=12), planning=False)
    budget = Budget("a GPU", needs.peak + 1, on_gpu=False)
    lines = "\n".join(_fit(tree, needs_of(tree), replace(budget, bytes=budget.taken(needs) + 1)))
    assert re.search(r"largest N at 1 x 4 plans: 12$", lines), lines


def test_a_rank_has_its_share_of_the_plans_and_the_first_one_the_text_encoder() -> None:
    run = published()
    needs = {ranks: needs_of(replace(run, ranks=ranks), planning=ranks == 8) for ranks in (1, 8, 48, 64)}
    one, eight = needs[1], needs[8]
    for begin, whole in (("512 videos", "64 videos"), ("recorded", "recorded")):
        assert named(one.host, begin).bytes == 8 * named(eight.host, whole).bytes
    assert named(one.host, "text encoder") == named(eight.host, "text encoder")
    phases = {phase.name: phase for phase in eight.phases}
    assert named(phases["executor update"].items, "partial").what == "partial sums of gradients, 3, and one received"
    assert named(phases["executor update"].items, "partial").bytes == 4 * 255_590_400 * 4
    assert named(phases["planner update"].items, "partial").what == "partial sums of gradients, 0, and one received"
    assert named(needs[48].host, "16 videos").bytes == 2 * named(needs[64].host, "8 videos").bytes
    assert (
        total(one.kept) - total(eight.kept) == named(one.kept, "text rows").bytes - named(eight.kept, "text rows").bytes
    )


@pytest.mark.slow
def test_on_a_cpu_the_adapter_is_merged_unless_the_torch_path_is_asked_for() -> None:
    config, what = replace(get_preset("shapeworld-smoke"), device="cpu"), "executor's weights with the adapter merged"
    auto, torch_path = (
        kept_of(needs_of(run_of(replace(config, kernels=kernels), on_gpu=False), planning=False))
        for kernels in ("auto", "torch")
    )
    assert auto.pop(what) > 0 and auto == torch_path


@pytest.mark.slow
def test_the_plan_of_several_ranks_says_whose_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MOST_BRANCHES", 4)
    config = replace(get_preset("shapeworld-smoke"), output=str(tmp_path / "run"), device="cpu")
    alone = needs_of(run_of(config, on_gpu=False), planning=False)
    lines, _ = dry_run(config, 0, 2)
    assert any(line.endswith("the earliest switch of rank 0 of 2, 1 plans:") for line in lines)
    hosts = [line for line in lines if line.startswith("on the host")]
    assert (
        hosts[1] == f"on the host, all 2 ranks: {size(total(alone.host))}"
        and hosts[1].split()[-2:] != hosts[0].split()[-2:]
    )
    assert any(line.startswith("this machine's memory, 1/2 of it for each rank, ") for line in lines)


@pytest.mark.parametrize(("gpus", "ranks", "part"), [(4, 4, ""), (2, 4, ", 1/2 of it for each rank"), (1, 1, "")])
def test_ranks_share_the_gpus_at_hand(gpus: int, ranks: int, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GIB))
    found = budgets_of(get_preset("shapeworld"), 0, ranks)
    assert found == [Budget(f"a GPU{part}", (40 if part else 80) * GIB)]
    assert budgets_of(get_preset("shapeworld"), 80, ranks) == [Budget("a GPU of 80 GiB", 80 * GIB)]


@pytest.mark.slow
def test_processes_that_share_weights_hold_a_part_of_the_blocks_each() -> None:
    """14.29 billion parameters; a block without what is read outside its calls, and what lies outside of blocks."""
    run = run_of(get_preset("wan-14b"), on_gpu=True)
    parameters, width, inner = footprint.parameters_of(run.sizes), 5120, 13_824
    assert parameters.weights == 14_288_491_584 and run.sizes.frame_bytes == 40 * 2 * 2 * 1560 * width
    blocks = 6 * width**2 + 2 * width * inner  # without k and v of the cross-attention
    assert parameters.shared_bytes == pytest.approx(40 * 2 * blocks, rel=1e-3)
    whole = replace(run.config.executor, shard=1, continuations=2)
    alone = replace(run, config=replace(run.config, executor=whole))
    assert (run.continuations, run.together, run.branches) == (alone.continuations, alone.together, alone.branches)
    (shared, of_shared), (single, of_single) = ((own, kept_of(own)) for own in (needs_of(run), needs_of(alone)))
    own = of_shared.pop("executor's weights, 1 / 2 of its blocks")
    assert own == of_single.pop("executor's weights") - parameters.shared_bytes // 2
    assert of_single.pop("executor's weights with the adapter merged") == parameters.adapted_bytes
    assert of_single == of_shared
    for phase, other in zip(shared.phases, single.phases, strict=True):
        more = 3 * parameters.shared_bytes // 40 if phase.name in ("rollout", "executor update") else 0
        assert phase.bytes - other.bytes == more
    assert shared.host == single.host


@pytest.mark.slow
def test_a_planner_that_waits_is_on_the_device_for_its_own_phases_alone() -> None:
    run = run_of(get_preset("wan-14b"), on_gpu=True)
    stays = replace(run, config=replace(run.config, planner=replace(run.config.planner, offload=False)))
    assert run.planner_waits and not replace(run, on_gpu=False).planner_waits and run.planner is not None
    waiting, staying = needs_of(run), needs_of(stays)
    assert total(staying.kept) - total(waiting.kept) == run.planner.weights
    assert total(waiting.host) - total(staying.host) == run.planner.weights
    for phase, other in zip(waiting.phases, staying.phases, strict=True):
        assert phase.bytes - other.bytes == (run.planner.weights if phase.name in PLANNING else 0)


def kept_of(needs: Needs) -> dict[str, int]:
    return {item.what: item.bytes for item in needs.kept}


@pytest.mark.slow
def test_two_gpus_of_80_gb_hold_the_14b(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--executor.continuations", "8", "--executor.rollout_videos", "0", "--data.prompts_per_iteration", "1"]
    for code in (0, 4):
        assert train.main(["wan-14b", "--dry-run", "--gpus", "2", "--gpu-gib", "79.65", *more[: 2 * code]]) == code
        told = capsys.readouterr().out
        assert "40 blocks, 5120 channels, 14,288,491,584 parameters" in told
        assert "one of 2 processes that share the blocks' weights" in told
        assert f"continuations ({4 if code else 2} in each process)" in told
    assert "  largest N at 1 x 4 plans: none, not even 2 continuations fit" in told
    assert train.main(["wan-14b", "--dry-run", "--gpus", "3"]) == 2
    assert "executor.shard: found 2, with 3 processes on a machine; accepted: a divisor" in capsys.readouterr().err


def test_numbers_of_continuations_are_tried_by_the_processes_that_share_them() -> None:
    assert largest(lambda n: n, 9, 2, 20, 4) == 8
    assert largest(lambda n: n, 3, 2, 20, 4) == 0
    assert largest(lambda n: n, 9, 2, 20) == 9


def test_the_largest_n_grows_with_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MOST_BRANCHES", 32)
    run = run_of(replace(get_preset("shapeworld-smoke"), device="cpu"), on_gpu=False)
    found = []
    for n in (2, 5, 10):
        just = needs_of(run.changed(continuations=n), planning=False)
        budget = Budget("b", just.peak + total(just.host), on_gpu=False)
        line = next(line for line in _fit(run, needs_of(run), budget) if "largest N at 1 x 2 plans" in line)
        found.append(int(line.rsplit(" ", 1)[1]))
    assert found[0] == 2 and 5 <= found[1] <= 7 and 10 <= found[2] <= 14  # the cache grows in steps
    lines = list(_fit(run, needs_of(run), Budget("b", 2**20, on_gpu=False)))
    assert "does not fit" in lines[0] and "none, not even 2 continuations fit" in lines[1]
    assert lines[2].endswith("none, not even 1 fits") and lines[-1].startswith("  with any N the planner update phase")


def test_a_plan_of_shapeworld_misses_nothing(tmp_path: Path) -> None:
    config = replace(get_preset("shapeworld-smoke"), output=str(tmp_path / "run"), device="cpu")
    lines, fits = dry_run(config, 0)
    assert fits
    assert "missing: nothing" in lines and not (tmp_path / "run").exists()
    assert any("1,242,348 parameters" in line for line in lines) and not any("rank" in line for line in lines)
    assert any(line.startswith("this machine's memory") and line.endswith(": fits") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["self-forcing", "longlive", "causal-forcing"])
def test_a_dry_run_of_a_backbone_takes_less_than_30_seconds(preset: str, tmp_path: Path) -> None:
    started = time.monotonic()
    command = [sys.executable, "-m", "tempact.train", preset, "--dry-run", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and time.monotonic() - started < 30, done.stderr
    assert "12: 28.3 TF" in done.stdout and "largest N at 16 x 4 plans" in done.stdout
    assert "most prompts an iteration at 4 plans x 8 continuations" in done.stdout  # of an H100, which holds fewer
    (tmp_path / "run.yaml").write_text(done.stdout)
    assert from_yaml(tmp_path / "run.yaml").preset == preset  # the plan is a comment


@pytest.mark.slow
def test_small_random_weights_are_planned_on_the_torch_path() -> None:
    lines, _ = dry_run(tiny(), 80)
    assert any(line.startswith("planned for the torch path") for line in lines)  # heads of 24 channels
    missing = lines[lines.index("missing: 6") + 1 :]
    assert [line.split(":")[0] for line in missing if line.startswith("  ")][:6] == [
        "  data.prompts", *["  judges"] * 3, "  judges.aesthetics_weights", "  judges.aesthetics_processor",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_time_is_an_estimate_from_measured_rates() -> None:
    """64 plans of self-forcing are decoded together, in 26 s of 1,812; the default run takes 4 to 5 s an iteration."""
    config = get_preset("self-forcing")
    line = _time(Run(config, FULL, planner_sizes(config.planner)), 1050e15)
    assert re.match(r"estimated time: 30:0\d min an iteration, 50\.1 hours for 100 iterations \(588 TF/s", line), line
    run = run_of(replace(get_preset("shapeworld"), device="cpu"), on_gpu=False)
    line = _time(run, sum(work_of(run).phases.values()))
    assert re.match(r"estimated time: [45] s an iteration, 0\.1 hours for 84 iterations \(75\.0 GF/s", line), line


@pytest.mark.parametrize(("gib", "code"), [("0.9", 4), ("8", 0)])
def test_a_run_that_fits_nowhere_has_an_exit_code_of_its_own(
    gib: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["shapeworld-smoke", "--dry-run", "--gpu-gib", gib]) == code
    assert ("does not fit" in capsys.readouterr().out) is bool(code)


@pytest.mark.slow
def test_a_plain_install_is_told_what_a_backbone_misses() -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(('diffusers', 'ftfy', 'openai'))\n"  # None: not to be found
        "from tempact import train; sys.exit(train.main(sys.argv[1:]))"
    )
    sizes = ["--executor.weights", "random-tiny", "--executor.video_size", "32", "48", "--executor.frames", "9"]
    command = [sys.executable, "-c", code, "longlive", *sizes, "--dry-run", "--data.prompts_per_iteration", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    for told in ("needs diffusers, ftfy; accepted: after pip install -e '.[wan]'", "found no package openai",
                 "VAE, decoding, videos and PickScore are left out below", "estimated time"):  # fmt: skip
        assert told in done.stdout
    assert "executor.wan_folder" in " ".join(missing(get_preset("longlive")))
