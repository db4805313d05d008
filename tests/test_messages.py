"""What a message says is accepted is accepted: for every key, and for files of prompts and plans."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tempact.cli import parse_run
from tempact.config import LARGEST_SEED, RunConfig, keys_of
from tempact.errors import UserError
from tempact.planner.plans import read_plan, read_requests
from tempact.prompt_file import read_prompts

# a rule's words: the values that are refused with them, and values that they name
VALUES = {
    "at least 1": (["0"], ["1"]),
    "at least 2": (["1"], ["2"]),
    "at least 2 (a group's members are compared)": (["1"], ["2"]),
    "at least 0": (["-1"], ["0"]),
    "0 (all), or at least 1": (["-1"], ["0"], ["1"]),
    "0 (32), or at least 1": (["-1"], ["0"], ["1"]),
    "0 (off), or more where the planner is not trained": (["-1"], ["0"], ["20", "--planner.train", "false"]),
    "above 0": (["0"], ["1"]),
    "above 0, at most 1": (["0"], ["1"], ["0.5"]),
    "1, or above 0 where the planner is not trained": (["0"], ["1"], ["2", "--planner.train", "false"]),
    "1, or above 0 and at most 1 where the planner is not trained": (["0"], ["1"], ["0.5", "--planner.train", "false"]),
    "0 to 1": (["2"], ["0"], ["1"]),
    f"0 to {LARGEST_SEED}": (["-1"], ["0"], [str(LARGEST_SEED)]),
    "each 0 to below 1": (["0", "1"], ["0", "0.999"]),
    "a folder": ([" "], ["somewhere"]),
    "a positive multiple of executor.chunk_frames": (["0"], ["3"]),
    "above judges.attempt_s": (["0"], ["60.5"]),
    "at least planner.server_attempt_s": (["0"], ["120"]),
    "an address http(s)://host[:port], or nothing": (["localhost:8000"], ["http://localhost:8000"], [""]),
    "each module:function": (["mine.score"], ["mine:score"]),
    "each tensorboard, wandb or trackio": (["wandb", "mlflow"], ["tensorboard"], ["trackio", "wandb"]),
    "a project": ([" "], ["films"]),
    "a name, or nothing": (["two words"], ["max_completion_tokens"], [""]),
    "falling numbers in (0, 1000]": (["5", "7"], ["1000", "7"]),
    "positive multiples of 16": (["30", "40"], ["16", "48"]),
    "each at least 2": (["4", "1"], ["2", "2"], ["4"]),
}
UNSAID = ("at least one", "two or more, or one where the executor is not trained")  # an empty list, in files alone


def cases() -> Iterator[tuple[str, str, list[str], list[str]]]:
    """Key, words, values that are refused with them, values that they name."""
    for name, own in keys_of(RunConfig).items():
        for rule in own.rules:
            if rule.accepted in VALUES:
                bad, *good = VALUES[rule.accepted]
            elif rule.accepted in UNSAID:
                continue
            else:
                bad, good = ["no such value"], [["" if one == "nothing" else one] for one in rule.accepted.split(", ")]
            for values in good:
                yield name, rule.accepted, bad, values


@pytest.mark.parametrize(("name", "words", "bad", "good"), cases())
def test_a_key_accepts_what_its_message_names(name: str, words: str, bad: list[str], good: list[str]) -> None:
    needed = {
        "executor.window": ["--executor.frames", "21"],  # as long as every window allows
        "planner.sampler": ["--planner.server", "http://localhost:8000"],
        "executor.forks": ["--executor.branching", "2", "2"] if good == ["tree"] else [],
        "executor.branching": ["--executor.forks", "tree"],
        "executor.compared": ["--executor.forks", "tree", "--executor.branching", "2", "2"]
        if good == ["depth"]
        else [],
    }
    with pytest.raises(UserError) as caught:
        parse_run([f"--{name}", *bad], "program")
    assert f"{name}: found " in str(caught.value) and str(caught.value).endswith(f"; accepted: {words}")
    parse_run([*needed.get(name, []), f"--{name}", *good], "program")


SERVED = ["--planner.sampler", "served", "--planner.server", "http://localhost:8000"]
TREE = ["--executor.forks", "tree"]
SHARDED = ["--executor.shard", "2", "--executor.cuda_graphs", "false"]
FOLLOWED = [  # a command line, the end of what it says, and the command lines that do what that says
    (
        [*TREE, "--executor.branching", "3"],
        "at most 7 numbers whose product is executor.continuations (4) with executor.forks tree",
        [*TREE, "--executor.branching", "2", "2"],
    ),
    (["--executor.branching", "4"], "nothing with executor.forks one", ["--executor.forks", "one"]),
    (
        [*TREE, "--executor.branching", "4", *SHARDED],
        "1 with executor.forks tree, whose branches one process makes",
        [*TREE, "--executor.branching", "4", "--executor.shard", "1"],
    ),
    (
        ["--executor.forks", "random_chunk", "--executor.frames", "3"],
        "two chunks or more with executor.forks random_chunk",
        ["--executor.forks", "random_chunk", "--executor.frames", "6"],
    ),
    (
        ["--executor.forks", "none", *SHARDED],
        "1 with executor.forks none, whose videos one process makes",
        ["--executor.forks", "none"],
    ),
    (
        ["--executor.trained_chunks", "step", *SHARDED],
        "1 with executor.trained_chunks step",
        ["--executor.trained_chunks", "step"],
    ),
    (
        [*TREE, "--executor.branching", "4", "--executor.trained_chunks", "step"],
        "first with executor.forks tree",
        [*TREE, "--executor.branching", "4", "--executor.trained_chunks", "first"],
    ),
    (["--executor.compared", "depth"], "siblings with executor.forks one", ["--executor.compared", "siblings"]),
    (
        ["--executor.reweight", "true"],
        "False with executor.ratio_norm, whose gradients have one scale",
        ["--executor.reweight", "true", "--executor.ratio_norm", "false"],
    ),
    (
        ["--executor.loss", "diffusion_nft", "--executor.ratio_norm", "false"],
        "True with executor.loss diffusion_nft, which has no ratio",
        ["--executor.loss", "diffusion_nft", "--executor.ratio_norm", "true"],
    ),
    (
        ["--planner.loss", "grpo", "--planner.liger", "all"],
        "auto, off, model with planner.loss grpo: Liger's is GSPO",
        ["--planner.loss", "grpo", "--planner.liger", "auto"],
    ),
    (
        ["--planner.train", "false", "--trainer.alternate", "1"],
        "0 where one policy alone is trained",
        ["--planner.train", "false", "--trainer.alternate", "0"],
    ),
    (["--frames"], "nearest: --executor.frames", ["--executor.frames", "3"]),
    (
        ["--executor.frames", "161"],
        "a positive multiple of the chunk, executor.chunk_frames (3), in latent frames",
        ["--executor.frames", "162"],
    ),
    (
        ["--executor.window", "self-forcing"],
        "whole chunks of 3, at most 21 latent frames, with this window",
        ["--executor.window", "self-forcing", "--executor.frames", "21"],
    ),
    (
        ["--executor.window", "self-forcing", "--executor.frames", "24", "--executor.chunk_frames", "4"],
        "whole chunks of 4, at most 20 latent frames, with this window",
        ["--executor.window", "self-forcing", "--executor.frames", "20", "--executor.chunk_frames", "4"],
    ),
    (
        ["--executor.frames", "1026"],
        "at most 1023 latent frames (RoPE positions), with this window, or one of relative positions",
        ["--executor.frames", "1023"],
    ),
    (
        ["--executor.frames", "1026"],
        "relative positions",
        ["--executor.frames", "1026", "--executor.window", "longlive-infinite"],
    ),
    (
        ["--executor.window", "longlive", "--executor.chunk_frames", "12"],
        "1, 2, 3, 4, 6, 8 with this window (12 frames, 3 of them sink) and 24 frames",
        ["--executor.window", "longlive", "--executor.chunk_frames", "8"],
    ),
    (
        ["--planner.temperature", "0.3"],
        "1.0 where the planner is trained, because log-probs are those of the full distribution",
        ["--planner.temperature", "1.0"],
    ),
    (
        ["--planner.sampler", "served"],
        "the server's address with planner.sampler served",
        SERVED,
    ),
    (
        ["--planner.server_outage_s", "60"],
        "at least planner.server_attempt_s (120), or one slow plan is an outage",
        ["--planner.server_outage_s", "120"],
    ),
    (
        ["--planner.server_sleep", "true"],
        "False with planner.sampler inside, which has no server",
        ["--planner.server_sleep", "false"],
    ),
    (
        [*SERVED, "--planner.server_sleep", "true"],
        "False with planner.server_ahead, for which the server is awake while the executor is updated",
        [*SERVED, "--planner.server_sleep", "true", "--planner.server_ahead", "false"],
    ),
    (
        ["--executor.timesteps", "500"],
        "two or more where the executor is trained, because the last step is deterministic",
        ["--executor.timesteps", "500", "250"],
    ),
    (
        ["--judges.outage_s", "60"],
        "above judges.attempt_s (60.0), or one slow reply is an outage",
        ["--judges.outage_s", "60.1"],
    ),
    (["--executor.shard", "3"], "a multiple of executor.shard (3)", ["--executor.continuations", "6", *SHARDED]),
    (["--executor.shard", "2"], "False with executor.shard 2, as weights then move", SHARDED),
    (["--executor.timesteps"], "one or more values, each a whole number", ["--executor.timesteps", "500", "250"]),
    (["--planner.optim.betas", "0.9"], "2 values, each a finite number", ["--planner.optim.betas", "0.9", "0.9"]),
    (["--executor.train", "maybe"], "true or false", ["--executor.train", "false"]),
    (["--seed", "1.0"], "a whole number", ["--seed", "1"]),
    (["--judges.outage_s", "long"], "a finite number", ["--judges.outage_s", "300"]),
]


@pytest.mark.parametrize(("given", "words", "followed"), FOLLOWED)
def test_a_command_line_accepts_what_its_message_names(given: list[str], words: str, followed: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_run(given, "program")
    assert str(caught.value).endswith(words)
    parse_run(followed, "program")


STEPS = [{"start": 0, "end": 6, "prompt": "A"}, {"start": 6, "end": 18, "prompt": "B"}]
PLAN, TWO = json.dumps(STEPS), '{"prompt": "A", "prompt_id": "1"}\n{"prompt": "B", "prompt_id": "2"}'
FILES = [  # file, content, what is said, another file or content that does what it says
    ("a.xlsx", b"PK", ".csv, .tsv, .jsonl, .parquet, .txt", "a.tsv", "prompt\nA"),
    ("a.csv", "Prompts\nA", "a column called prompt", "a.csv", "prompt\nA"),
    ("a.csv", "prompt,prompt\nA,B", "each once", "a.csv", "prompt\nA"),
    ("a.csv", "prompt\nA, B", "1, as in the header (text with ',' stands in quotes)", "a.csv", 'prompt\n"A, B"'),
    (
        "a.csv",
        "prompt;seed\nA;B;C",
        "2, as in the header (text with ';' stands in quotes)",
        "a.csv",
        'prompt;seed\n"A;B";1',
    ),
    ("a.csv", "prompt\n", "at least one row", "a.csv", "prompt\nA"),
    ("a.csv", 'prompt\n"A', "CSV", "a.csv", 'prompt\n"A"'),
    ("a.csv", "prompt,seed\n,1", "a text of 1 to 10000 characters", "a.csv", "prompt\n" + "A" * 10000),
    ("a.csv", "prompt,prompt_id\nA,1\nB,1", "an id for each prompt", "a.csv", "prompt,prompt_id\nA,1\nB,2"),
    (
        "a.csv",
        "prompt\nA caf\u00e9".encode("latin-1"),
        "UTF-8, or UTF-16 with a byte order mark",
        "a.csv",
        "prompt\nA caf\u00e9".encode("utf-16"),
    ),
    ("a.txt", "A".encode("utf-16-be"), "UTF-8, or UTF-16 with a byte order mark", "a.txt", "A"),
    ("a.jsonl", "[1]", "a JSON object", "a.jsonl", TWO),
    ("a.jsonl", '{"prompt": "A"', "a JSON object", "a.jsonl", TWO),
    ("a.jsonl", '{"prompt": 3}', "text", "a.jsonl", TWO),
    (
        "a.jsonl",
        '{"prompt": "A", "seed": 0.5}',
        f"a whole number from 0 to {LARGEST_SEED}",
        "a.jsonl",
        f'{{"prompt": "A", "seed": {LARGEST_SEED}}}',
    ),
    (
        "a.jsonl",
        '{"prompt": "A", "plan": true}',
        "steps, as in a plan file",
        "a.jsonl",
        f'{{"prompt": "A", "plan": {PLAN}}}',
    ),
    (
        "a.jsonl",
        '{"prompts": ["A", 1]}',
        '"prompt" with one text, or "prompts" with texts, one for each step, of equal length',
        "a.jsonl",
        '{"prompts": ["A", "B"]}',
    ),
    ("plan.json", "nothing", 'a JSON file with steps: "start" and "end" (latent frames), "prompt"', "plan.json", PLAN),
    ("plan.json", PLAN[:-1], 'a JSON file with steps: "start" and "end" (latent frames), "prompt"', "plan.json", PLAN),
    ("plan.json", PLAN.replace('"A"', '"A", "prompt": "B"'), "each key once", "plan.json", PLAN),
    ("plan.json", PLAN + PLAN, "the steps of one plan", "plan.json", PLAN),
    (
        "plan.json",
        '[{"start": 0, "end": 18}]',
        'a text "prompt" in each step',
        "plan.json",
        '[{"start": 0, "end": 18, "prompt": "A"}]',
    ),
    (
        "plan.json",
        json.dumps(list("ABCDEFG")),
        "one step for each chunk, or fewer",
        "plan.json",
        json.dumps(list("ABCDEF")),
    ),
    ("plan.json", PLAN.replace("6", "[6]"), '"start" and "end", whole numbers of latent frames', "plan.json", PLAN),
]


@pytest.mark.parametrize(("name", "content", "words", "other", "followed"), FILES)
def test_files_are_accepted_as_their_messages_say(
    tmp_path: Path, name: str, content: str | bytes, words: str, other: str, followed: str | bytes
) -> None:
    def read(name: str, content: str | bytes) -> object:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_plan(path, "x", 18, 3) if name == "plan.json" else read_requests(path, 18, 3)

    with pytest.raises(UserError) as caught:
        read(name, content)
    assert f"; accepted: {words}" in str(caught.value) and "\n" not in str(caught.value)
    read(other, followed)


def test_a_list_of_prompts_is_for_plans_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompts": ["A", "B"]}')
    with pytest.raises(UserError, match='accepted: "prompt" with one text$'):
        read_prompts(path)
    path.write_text('{"prompt": "A B"}')
    assert [prompt.text for prompt in read_prompts(path)] == ["A B"]
