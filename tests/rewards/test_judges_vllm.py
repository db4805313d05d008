"""Judges served by vLLM on the CPU: schemas, pictures, a run, 64 calls at once, and a server that is killed."""

from __future__ import annotations

import io
import json
import math
import os
import random
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from rewards.judge_cases import ROLE
from rewards.test_judge_client_server import client
from rewards.tiny_server import (
    THOUGHT,
    VLLM,
    documented_flags,
    free_port,
    make_text_model,
    make_video_model,
    serving_vllm,
)

from tempact import train
from tempact.diagnostics import FAULT
from tempact.diagnostics.judges import findings
from tempact.reporting import read_metrics
from tempact.rewards.judged import PlanVerdict, StepVerdict, video_fields
from tempact.rewards.judges import JudgeCall, Rubric
from tempact.rewards.judges.replies import response_format
from tempact.types import Missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not os.environ.get(VLLM), reason=f"needs {VLLM}=/path/to/vllm, of vLLM for the CPU"),
]
TEXT, VIDEO = "Qwen/Qwen3-8B", "Qwen/Qwen3-VL-8B-Instruct"  # commands of docs/judges.md


def picture(number: int) -> bytes:
    generator, file = random.Random(number), io.BytesIO()
    Image.new("RGB", (416, 240), tuple(generator.randrange(256) for _ in range(3))).save(file, "JPEG")
    return file.getvalue()


def video_calls(count: int) -> list[JudgeCall]:
    rubric = Rubric("video", "1", "Judge this video.", video_fields(6))
    pictures = [tuple(picture(6 * n + k) for k in range(6)) for n in range(count)]
    return [JudgeCall(ROLE, rubric, f"video {n}", images) for n, images in enumerate(pictures)]


def step_calls(count: int) -> list[JudgeCall]:
    rubric = Rubric("step", "1", "Judge this step.", StepVerdict)
    return [JudgeCall(ROLE, rubric, f"step {n}") for n in range(count)]


@pytest.fixture(scope="module")
def video_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    folder = tmp_path_factory.mktemp("vllm") / "video"
    make_video_model(folder)
    with serving_vllm(folder, VIDEO) as port:
        yield port, folder


def environment(port: int, model: Path) -> dict[str, str]:
    return {"TEMPACT_JUDGE_BASE_URL": f"http://127.0.0.1:{port}/v1", "TEMPACT_JUDGE_MODEL": str(model)}


def test_a_random_model_under_a_schema_gives_what_was_asked_for(video_server: tuple[int, Path]) -> None:
    """64 calls at once, each with six pictures, at temperature 1: all are right in form, and they differ."""
    with client(*video_server, concurrency=64, temperature=1.0, max_tokens=512, deadline_s=300.0) as judge:
        results = [future.result(300) for future in judge.submit(video_calls(64))]
        stats = judge.stats()
    assert all(isinstance(result, video_fields(6)) for result in results), results
    assert len({result.model_dump_json() for result in results}) > 32
    assert stats[f"judge/{ROLE}/requests"] == 64 and stats[f"judge/{ROLE}/prompt_tokens"] >= 64 * 6
    with client(*video_server, max_tokens=512) as judge:
        steps = [future.result(60) for future in judge.submit(step_calls(4))]
    assert all(isinstance(result, StepVerdict) for result in steps), steps


def test_doctor_judges(video_server: tuple[int, Path]) -> None:
    found = list(findings(60.0, environment(*video_server)))
    assert len(found) == 3 and not [line for status, line in found if status == FAULT]


def test_a_run_of_shapeworld(video_server: tuple[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(*video_server).items():
        monkeypatch.setenv(name, value)
    given = {"judges.shapeworld": "true", "trainer.iterations": 2, "device": "cpu", "output": tmp_path / "run",
             "judges.cache": tmp_path / "judges.sqlite", "judges.temperature": 1}  # fmt: skip
    keys = [str(part) for key, value in given.items() for part in (f"--{key}", value)]
    assert train.main(["shapeworld-smoke", *keys]) == 0
    for row in read_metrics(tmp_path / "run"):
        for role in ("plan_quality", "temporal_following", "step_following"):
            assert row[f"judge/{role}/missing"] == 0 and row[f"judge/{role}/completion_tokens"] > 0
        assert math.isfinite(row["rewards/temporal_following/mean"])


def test_a_model_of_text_refuses_pictures_and_keeps_its_schema(tmp_path: Path, caplog) -> None:
    """And the server, killed under its calls and started again, answers all of them."""
    model = tmp_path / "text"
    make_text_model(model)
    port = free_port()
    with client(port, model, max_tokens=512, outage_s=300.0) as judge:
        with serving_vllm(model, TEXT, port):
            refused = judge.submit(video_calls(1))[0].result(60)
            assert isinstance(refused, Missing) and "multimodal" in refused.reason
            futures = judge.submit(step_calls(200))
            assert isinstance(futures[5].result(120), StepVerdict)
            assert "does not take" not in caplog.text
        assert not all(future.done() for future in futures)
        with serving_vllm(model, TEXT, port):
            results = [future.result(120) for future in futures]
    assert all(isinstance(result, StepVerdict) for result in results), results


VERDICT = {"faithfulness": 0.9, "coverage": 0.8, "temporal": 0.7, "hallucination": 0.0}
UNTHINKING = "--default-chat-template-kwargs"


def plan_calls(count: int) -> list[JudgeCall]:
    rubric = Rubric("plan", "1", "Judge this plan.", PlanVerdict)
    return [JudgeCall(ROLE, rubric, f"plan {n}") for n in range(count)]


def said(port: int, model: Path, **more) -> dict:
    """The message of a reply to a question of plans."""
    body = {"model": str(model), "messages": [{"role": "user", "content": "Judge this plan."}], "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body | {"max_tokens": 512} | more).encode(),
        {"content-type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["choices"][0]["message"]


@pytest.mark.parametrize("thinks", [True, False])
def test_a_judge_with_a_reasoning_parser(thinks: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With thoughts and without, with a schema and without: what is between their marks is not read."""
    model, flags = tmp_path / "text", [*documented_flags(TEXT), "--reasoning-parser", "qwen3"]
    answer = json.dumps(VERDICT, separators=(",", ":"))
    make_text_model(model, f"{THOUGHT[0]}\nIt fits.\n{THOUGHT[1]}{answer}", thinks=True)
    if thinks:
        at = flags.index(UNTHINKING)
        del flags[at : at + 2]
    with serving_vllm(model, TEXT, flags=flags) as port:
        for fields in (None, PlanVerdict, StepVerdict):  # a schema is that of what follows the thoughts
            message = said(port, model, **({"response_format": response_format(fields)} if fields else {}))
            thoughts = message.get("reasoning") or message.get("reasoning_content")
            assert (thoughts or "").strip() == ("It fits." if thinks else ""), message
            assert (fields or PlanVerdict).model_validate_json(message["content"])
        for schemas in (True, False):
            with client(port, model, max_tokens=512, schemas=schemas) as judge:
                results = [future.result(60) for future in judge.submit(plan_calls(8))]
            # the white space of a grammar may lead the model away from the numbers that it has learned
            assert all(isinstance(each, PlanVerdict) if schemas else each == PlanVerdict(**VERDICT) for each in results)
        with client(port, model, max_tokens=8, attempts=1) as judge:
            cut = judge.submit(plan_calls(1))[0].result(60)
        told = "the reply is empty and was cut off" if thinks else "the reply was cut off"
        assert isinstance(cut, Missing) and told in cut.reason and "larger judges.max_tokens" in cut.reason
        found = [line for line in findings(60.0, environment(port, model)) if "plan_quality" in line[1]]
        assert len(found) == 1 and found[0][0] != FAULT, found
    assert "does not take" not in caplog.text
