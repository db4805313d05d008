"""Presets, YAML, command lines: what is read back unchanged, and what is refused with which words."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tempact.cli import RunOptions, fingerprint, from_yaml, nearest, parse_run, to_yaml
from tempact.config import (
    RESUME_MAY_CHANGE,
    RUN,
    SPEED,
    TRAINING,
    VIDEO,
    RunConfig,
    flatten,
    keys_of,
    validate,
)
from tempact.errors import UserError
from tempact.presets import DEFAULT, PRESETS, get_preset

PACKAGE = Path(__file__).parents[1] / "tempact"


def parse(*arguments: str) -> RunConfig:
    return parse_run(arguments, "program")[0]


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def write(tmp_path: Path):
    def make(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return make


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_survives_yaml(name: str, write) -> None:
    config = get_preset(name)
    validate(config)
    assert config.preset == name and config.output == f"runs/{name}" and str(PRESETS[name].__doc__).strip()
    assert from_yaml(write(to_yaml(config))) == config


def test_values_that_yaml_could_bend_come_back_equal(write) -> None:
    config = parse(
        "--output", "1e-3", "--tracker_project", "no: ü #1", "--planner.optim.lr", "1e-22", "--seed", "3",
        "--executor.ema_decay", "0.1", "--executor.timesteps", "900", "800", "--planner.lora.targets", "null", "~",
    )  # fmt: skip
    again = from_yaml(write(to_yaml(config)))
    assert again == config and type(again.output) is str and again.planner.lora.targets == ("null", "~")
    assert again.planner.optim.lr == 1e-22


def test_the_default_presets_are_those_of_the_readme() -> None:
    assert DEFAULT == "shapeworld" and {"shapeworld", "shapeworld-full", "shapeworld-smoke"} <= set(PRESETS)
    outputs = Counter(make().output for make in PRESETS.values())
    assert max(outputs.values()) == 1  # two presets never share a run folder


def test_command_line_values_go_over_the_file_and_the_file_over_the_preset(write) -> None:
    path = write("executor: {continuations: 6, kl_weight: 0.25}\nplanner: {optim: {lr: 1e-5}}\nseed: 4\n")
    config = parse("shapeworld-full", "--config", str(path), "--executor.continuations", "5", "--seed=9")
    assert (config.preset, config.seed, config.executor.continuations) == ("shapeworld-full", 9, 5)
    assert config.executor.kl_weight == 0.25 and config.planner.optim.lr == 1e-5
    assert config.trainer == get_preset("shapeworld-full").trainer


def test_a_file_may_name_its_preset_but_not_another_one(write) -> None:
    path = write("preset: shapeworld-smoke\n")
    assert from_yaml(path) == get_preset("shapeworld-smoke") == parse("--config", str(path))
    assert "accepted: shapeworld-full" in refusal("shapeworld-full", "--config", str(path))


def test_options_and_their_forms() -> None:
    assert parse_run([], "p") == (get_preset(DEFAULT), RunOptions(resume="auto", dry_run=False, gpu_gib=0.0))
    config, options = parse_run(["--dry-run", "--resume", "runs/x", "--deterministic", "--executor.no-train"], "p")
    assert options == RunOptions(resume="runs/x", dry_run=True)
    assert config.deterministic and not config.executor.train and config.planner.train
    assert parse("--planner.train", "False", "--executor.train").planner.train is False
    assert parse("--executor.timesteps", "1000", "500").executor.timesteps == (1000, 500)
    assert parse("--planner.plans-per-prompt", "3") == parse("--planner.plans_per_prompt=3")
    assert parse("--planner.optim.betas", "0.5", "0.75").planner.optim.betas == (0.5, 0.75)
    assert parse("--seed", "1", "--seed", "2").seed == 2


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["shapewrld-full"], "'shapewrld-full'; accepted: shapeworld, shapeworld-full, .*nearest: shapeworld-full"),
        (["self-force"], "preset: found 'self-force'; accepted: shapeworld.*nearest: self-forcing"),
        (["--preset", "shapeworld-full"], "accepted: program shapeworld-full"),
        (["--planner.plan_per_prompt", "4"], "unknown option; nearest: --planner.plans_per_prompt"),
        (["--lr", "1e-3"], r"unknown option; nearest: --\w+.optim.lr"),
        (["--iterations=3"], "nearest: --trainer.iterations"),
        (["--resum", "auto"], "nearest: --resume"),
        (["--seed", "x"], "--seed: found 'x'; accepted: a whole number"),
        (["--seed", "1.0"], "a whole number"),
        (["--seed"], "nothing after it"),
        (["--seed", "3", "shapeworld-full"], "found '3 shapeworld-full'"),
        (["--planner.train", "maybe"], "true or false"),
        (["--planner.optim.lr", "nan"], "a finite number"),
        (["--planner.optim.betas", "0.9"], "2 values, each a finite number"),
        (["--executor.timesteps"], "one or more values, each a whole number"),
        (["-x"], "-x: found before any option"),
        (["--executor.frames", "25"], r"executor.frames: found 25; accepted: a positive multiple of .*\(3\)"),
        (["--executor.frames", "0"], "executor.frames: found 0"),
        (["--executor.chunk_frames", "0"], "executor.chunk_frames: found 0; accepted: at least 1"),
        (["--planner.plans_per_prompt", "1"], "planner.plans_per_prompt: found 1; accepted: at least 2"),
        (["--executor.continuations", "1"], "executor.continuations: found 1; accepted: at least 2"),
        (["--trainer.samples_every", "0"], "trainer.samples_every: found 0; accepted: at least 1"),
        (["--executor.optim.lr", "-1"], "executor.optim.lr: found -1.0; accepted: at least 0"),
        (["--executor.optim.betas", "0.9", "1"], r"betas: found \(0.9, 1.0\); accepted: each 0 to below 1"),
        (["--planner.optim.grad_clip", "-1"], "planner.optim.grad_clip: found -1.0; accepted: above 0"),
        (["--planner.lora.alpha", "0"], "planner.lora.alpha: found 0; accepted: at least 1"),
        (["--planner.clip_low", "-1"], "planner.clip_low: found -1.0; accepted: above 0"),
        (["--executor.kl_weight", "-1"], "executor.kl_weight: found -1.0; accepted: at least 0"),
        (["--executor.ema_decay", "2.5"], "executor.ema_decay: found 2.5; accepted: 0 to 1"),
        (["--rewards.format_penalty", "-1"], "rewards.format_penalty: found -1.0; accepted: at least 0"),
        (["--trainer.max_skipped_updates", "-1"], "trainer.max_skipped_updates: found -1; accepted: at least 0"),
        (["--evaluation.seed", "-1"], "evaluation.seed: found -1; accepted: 0 to 4611686018427387904"),
        (["--seed", "99999999999999999999"], "seed: found 99999999999999999999; accepted: 0 to"),
        (["--threads", "-2"], "threads: found -2; accepted: at least 0"),
        (["--output", ""], "output: found ''; accepted: a folder"),
        (["--config", "/nowhere/run.yaml"], "/nowhere/run.yaml: cannot be read .No such file"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_refused_in_one_line(arguments: list[str], found: str) -> None:
    message = refusal(*arguments)
    assert re.search(found, message), message


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("executor: {lora: {rnk: 3}}", "executor.lora.rnk: unknown key; nearest: executor.lora.rank"),
        ("iterations: 3", "iterations: unknown key; nearest: trainer.iterations"),
        ("planner: 4", "planner: found 4; accepted: a mapping"),
        ("seed: {a: 1}", "seed: found {'a': 1}; accepted: a whole number"),
        ("seed: true", "seed: found True; accepted: a whole number"),
        ("seed:", "seed: found None; accepted: a whole number"),
        ("output: 3", "output: found 3; accepted: text"),
        ("planner: {train: 1}", "planner.train: found 1; accepted: true or false"),
        ("planner: {optim: {lr: .inf}}", "planner.optim.lr: found inf; accepted: a finite number"),
        ("executor: {timesteps: [1000, 1.5]}", "executor.timesteps: found [1000, 1.5]; accepted: one or more values"),
        ("executor: {timesteps: 1000}", "executor.timesteps: found 1000; accepted: one or more values"),
        ("seed: 1\nseed: 2", "seed is given twice"),
        ("executor: {frames: 25}\npreset: shapeworl", "preset: found 'shapeworl'"),
        ("- 3", "found list; accepted: a mapping"),
        ("a: [", "cannot be read"),
        ("!!python/object/apply:os.system ['true']", "cannot be read"),
        ("3: 4", "3: unknown key"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_its_name_and_key(write, text: str, found: str) -> None:
    path = write(text)
    with pytest.raises(UserError) as caught:
        from_yaml(path)
    assert str(caught.value).startswith(f"{path}: ") and found in str(caught.value)


def test_a_file_is_read_with_or_without_a_byte_order_mark(write) -> None:
    assert from_yaml(write("\ufeffseed: 3\n")).seed == 3
    path = write("")
    path.write_bytes(b"output: \xff\n")
    with pytest.raises(UserError, match="cannot be read"):
        from_yaml(path)


def test_a_list_may_be_empty_in_a_file_where_it_means_something(write) -> None:
    config = get_preset(DEFAULT)
    assert config.executor.adapters == () and from_yaml(write(to_yaml(config))) == config
    given = ("--executor.adapters", "lora.pt", "runs/x/executor")
    assert parse(*given).executor.adapters == ("lora.pt", "runs/x/executor")
    assert "--executor.adapters: found nothing after it; accepted: one or more" in refusal("--executor.adapters")
    for key in ("executor: {timesteps", "executor: {lora: {targets", "planner: {lora: {targets"):
        path = write(f"{key}: []{'}' * key.count('{')}")
        accepted = "two or more, or one where" if key.endswith("timesteps") else "at least one"
        found = f"{key.replace(': {', '.')}: found (); accepted: {accepted}"
        assert found in refusal("--config", str(path))


def other(value: Any, key: str) -> Any:
    """Another value of the same type."""
    if isinstance(value, tuple):
        return tuple(2 * item for item in value) or (1 if key == "first_timesteps" else "x",)
    return (not value) if isinstance(value, bool) else value * 2 if value else type(value)("1")


def changed(config: Any, name: str, *names: str) -> Any:
    """The configuration with another value of the key of these names."""
    value = getattr(config, name)
    return dataclasses.replace(config, **{name: changed(value, *names) if names else other(value, name)})


def test_the_fingerprint_sees_every_value() -> None:
    base = get_preset(DEFAULT)
    seen = {fingerprint(base), fingerprint(get_preset("shapeworld-smoke"))}
    for key in keys_of(RunConfig).keys() - {"preset"}:
        seen.add(fingerprint(changed(base, *key.split("."))))
    assert len(seen) == 1 + len(keys_of(RunConfig)) and fingerprint(get_preset(DEFAULT)) in seen


def test_the_nearest_key_weighs_the_last_name() -> None:
    keys = keys_of(RunConfig)
    assert nearest("executor.optim.grad_clp", keys) == "executor.optim.grad_clip"
    assert nearest("shuffle", keys) == "rewards.shuffle_advantages"
    assert nearest("evaluate.simple", keys) == "evaluation.simple"


def test_every_configuration_field_is_read_somewhere() -> None:
    """A field nobody reads is an option that does nothing."""
    read: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name in ("config.py", "presets.py"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        read |= {
            node.attr for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in called
        }  # fmt: skip
    assert [key for key in keys_of(RunConfig) if key.split(".")[-1] not in read] == []


def test_yaml_is_plain_data() -> None:
    text = to_yaml(get_preset(DEFAULT))
    assert "!!" not in text and set(yaml.safe_load(text)) == {field.name for field in dataclasses.fields(RunConfig)}


def scoped(key: str, value: object) -> RunConfig:
    """The default preset with one value that is not read from words."""

    def put(config: object, names: list[str]) -> object:
        inner = put(getattr(config, names[0]), names[1:]) if names[1:] else value
        return dataclasses.replace(config, **{names[0]: inner})

    return put(get_preset(DEFAULT), key.split("."))


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--planner.loss_tokens", "bogus"], "planner.loss_tokens: found 'bogus'; accepted: all, json"),
        (["--planner.temperature", "0.3"], "planner.temperature: found 0.3; accepted: 1.0 where the planner"),
        (["--planner.temperature", "0"], "planner.temperature: found 0.0; accepted: 1, or above 0"),
        (["--planner.top_p", "0.7"], "planner.top_p: found 0.7; accepted: 1.0 where the planner"),
        (["--planner.top_k", "20"], "planner.top_k: found 20; accepted: 0 where the planner is trained"),
        (["--planner.precision", "fp8"], "planner.precision: found 'fp8'; accepted: fp32, bf16"),
        (["--planner.liger", "yes"], "planner.liger: found 'yes'; accepted: auto, off, model, all"),
        (["--executor.reweight", "true"], "executor.reweight: found True; accepted: False with executor.ratio_norm"),
        (
            ["--executor.loss", "diffusion_nft", "--executor.ratio_norm", "false"],
            "executor.ratio_norm: found False; accepted: True with executor.loss diffusion_nft, which has no ratio",
        ),
        (
            ["--planner.loss", "grpo", "--planner.liger", "all"],
            "planner.liger: found all; accepted: auto, off, model with planner.loss grpo: Liger's is GSPO",
        ),
        (["--executor.precision", "fp8"], "executor.precision: found 'fp8'; accepted: fp32, bf16, bf16-fp32-gates"),
        (["--executor.window", "wide"], "executor.window: found 'wide'; accepted: full, self-forcing, longlive"),
        (["--executor.switch_rounding", "down"], "executor.switch_rounding: found 'down'; accepted: nearest, up"),
        (["--executor.video_size", "32", "40"], "executor.video_size: found 32x40; accepted: positive multiples of 16"),
        (["--executor.video_size", "0", "16"], "executor.video_size: found 0x16; accepted"),
        (["--executor.timesteps", "500", "750"], "executor.timesteps: found (500, 750); accepted: falling numbers in"),
        (["--executor.timesteps", "750", "750"], "executor.timesteps: found (750, 750); accepted: falling numbers"),
        (["--executor.timesteps", "1001", "500"], "executor.timesteps: found (1001, 500); accepted: falling numbers"),
        (["--executor.timesteps", "500", "0"], "executor.timesteps: found (500, 0); accepted: falling numbers in (0,"),
        (["--executor.timesteps", "1000"], "executor.timesteps: found (1000,); accepted: two or more where"),
        (["--executor.first_timesteps", "5", "7"], "executor.first_timesteps: found (5, 7); accepted: falling numbers"),
        (["--executor.shift", "0"], "executor.shift: found 0.0; accepted: above 0"),
        (["--executor.eta", "0"], "executor.eta: found 0.0; accepted: above 0, at most 1"),
        (["--executor.shard", "3"], "executor.continuations: found 4; accepted: a multiple of executor.shard (3)"),
        (["--executor.shard", "2"], "executor.cuda_graphs: found True; accepted: False with executor.shard 2, as"),
        (["--executor.shard", "0"], "executor.shard: found 0; accepted: at least 1"),
        (["--executor.window", "self-forcing"], "executor.frames: found 24; accepted: whole chunks"),
        (["--executor.frames", "1026"], "executor.frames: found 1026; accepted: whole chunks"),
        (["--rewards.custom", "mine.score"], "rewards.custom: found ('mine.score',); accepted: each module:function"),
        (["--rewards.custom", "a:b:c"], "rewards.custom: found ('a:b:c',); accepted: each module:function"),
        (["--judges.attempts", "0"], "judges.attempts: found 0; accepted: at least 1"),
        (["--judges.video_frames", "1"], "judges.video_frames: found 1; accepted: at least 2"),
        (["--judges.outage_s", "10"], "judges.outage_s: found 10.0; accepted: above judges.attempt_s (60.0)"),
        (["--device", "tpu"], "device: found 'tpu'; accepted: auto, cpu, cuda"),
        (["--kernels", "cuda"], "kernels: found 'cuda'; accepted: torch, triton, auto"),
        (["--gpu_gib", "-1"], "--gpu_gib: found -1.0; accepted: GiB of the GPU to plan for, 0 for the one at hand"),
    ],
)  # fmt: skip
def test_what_the_configuration_alone_shows_to_be_wrong_is_refused(arguments: list[str], found: str) -> None:
    assert refusal(*arguments).startswith(found)


def test_what_is_not_trained_may_be_otherwise() -> None:
    sampled = ("--planner.train", "false", "--planner.temperature", "0.3", "--planner.top_k", "20")
    assert parse(*sampled).planner.temperature == 0.3
    assert parse("--executor.train", "false", "--executor.timesteps", "1000").executor.timesteps == (1000,)
    assert parse("--rewards.custom", "my_rewards.motion:smooth", "x:y").rewards.custom[1] == "x:y"


BAD: dict[object, list[object]] = {
    int: [-1, 0, 1, 2**70], float: [-1.0, 0.0, 2.0, float("inf")], str: [" ", "bogus"],
    tuple[str, ...]: [(), ("bogus",)], tuple[int, ...]: [(), (5, 7), (2000, 1)], tuple[int, int]: [(7, 16)],
    tuple[float, float]: [(0.5, 1.5)],
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, key in keys_of(RunConfig).items() if key.rules])
def test_every_rule_refuses_something_alike_with_and_without_dry_run(name: str) -> None:
    key = keys_of(RunConfig)[name]
    for rule in key.rules:
        bad = next(value for value in BAD[key.kind] if not rule.good(value))
        with pytest.raises(UserError) as caught:
            validate(scoped(name, bad))
        said = str(caught.value)
        assert said == f"{name}: found {rule.shown(bad)}; accepted: {rule.accepted}" and "\n" not in said
        words = [str(one) for one in (bad if isinstance(bad, tuple) else (bad,))]
        if words and "inf" not in words:  # what words can say
            assert refusal(f"--{name}", *words) == refusal(f"--{name}", *words, "--dry-run") == said


def test_every_number_has_a_range() -> None:
    free = [name for name, key in keys_of(RunConfig).items() if key.kind in (int, float) and not key.rules]
    assert free == []
    assert all(key.about for key in keys_of(RunConfig).values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_beyond_the_command_line_too(value: float) -> None:
    for name, key in keys_of(RunConfig).items():
        if key.kind is float:
            with pytest.raises(UserError, match=f"^{name}: found {value}"):
                validate(scoped(name, value))


def test_train_and_its_dry_run_refuse_before_torch_is_imported() -> None:
    code = (
        "import sys; from tempact import train; code = train.main(sys.argv[1:]); "
        "sys.exit(code if 'torch' not in sys.modules else 99)"
    )
    bad = ["--planner.loss_tokens", "bogus"]
    lines = set()
    for options in (bad, [*bad, "--dry-run"]):
        done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        lines.add(done.stderr)
    assert lines == {"error: planner.loss_tokens: found 'bogus'; accepted: all, json\n"}


def test_flattened_values_are_those_of_the_sections() -> None:
    config = get_preset("longlive")
    values = flatten(config)
    assert values["executor.lora.rank"] == 256 and values["seed"] == 0 and values["executor.timesteps"][0] == 1000
    assert values.keys() == keys_of(RunConfig).keys()
    data = yaml.safe_load(to_yaml(config))
    assert data["planner"]["optim"]["lr"] == values["planner.optim.lr"]


def test_what_a_key_sets() -> None:
    sets = {name: key.sets for name, key in keys_of(RunConfig).items()}
    assert set(sets.values()) == {VIDEO, TRAINING, SPEED, RUN}
    same = ("micro_batch", "rollout_videos", "cuda_graphs", "text_cache", "checkpoint_activations")
    assert {sets[f"executor.{name}"] for name in same} == {sets["device"], sets["kernels"]} == {SPEED}
    assert sets["planner.sampled_together"] == SPEED  # a plan is drawn from numbers of its own
    assert sets["executor.kl_weight"] == sets["data.prompts"] == TRAINING
    assert all(value in RESUME_MAY_CHANGE for name, value in sets.items() if name.startswith("evaluation."))
    assert {name.split(".")[0] for name, value in sets.items() if value == VIDEO} == {"planner", "executor", "seed"}
