"""The judge client against `transformers serve`, a real server, alone and behind the fault proxy."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import pytest
from PIL import Image
from rewards.fault_proxy import Behaviour, running
from rewards.judge_cases import KEY, ROLE, Score, call
from rewards.tiny_server import make_text_model, make_video_model, serving

from tempact.rewards.judges.client import JudgeClient
from tempact.rewards.judges.config import EndpointConfig, JudgeConfig
from tempact.types import Missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("uvicorn", "fastapi")),
        reason="needs a server: pip install 'transformers[serving]'",
    ),
]
ANSWER = '{"score": 0.75}'


def client(port: int, model: Path, concurrency: int = 4, **limits) -> JudgeClient:
    endpoint = EndpointConfig(f"http://127.0.0.1:{port}/v1", str(model), KEY, concurrency)
    settings = {"deadline_s": 60.0, "attempt_s": 30.0, "outage_s": 120.0, "max_tokens": 40, "backoff_s": 0.05} | limits
    return JudgeClient(JudgeConfig({ROLE: (endpoint,)}, **settings))


def jpeg(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), color).save(file, "JPEG", quality=85)
    return file.getvalue()


def test_a_random_model_says_nothing_usable(tmp_path: Path) -> None:
    make_text_model(tmp_path / "text")
    with serving(tmp_path / "text") as port, client(port, tmp_path / "text", attempts=2) as judge:
        results = [future.result(60) for future in judge.submit([call(n) for n in range(4)])]
    assert all(isinstance(result, Missing) and "2 attempts" in result.reason for result in results)


def test_a_model_that_knows_the_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Alone; behind faults in 30% of the requests; and with the server killed and started again on the way."""
    model = tmp_path / "text"
    make_text_model(model, ANSWER)
    with serving(model) as port:
        with client(port, model) as judge:
            results = [future.result(60) for future in judge.submit([call(n) for n in range(20)])]
            stats = judge.stats()
        assert results == [Score(score=0.75)] * 20
        assert stats[f"judge/{ROLE}/requests"] == 20 and "does not take" not in caplog.text  # it leaves schemas alone
        assert min(stats[f"judge/{ROLE}/{name}"] for name in ("prompt_tokens", "completion_tokens")) >= 20
        with running(Behaviour(share=0.3, upstream=port, retry_after="0.1", seed=2)) as proxy:
            with client(proxy.proxy.port, model, attempt_s=3.0) as judge:
                results = [future.result(120) for future in judge.submit([call(n) for n in range(100)])]
        right, missing = results.count(Score(score=0.75)), sum(isinstance(each, Missing) for each in results)
        assert right + missing == 100 and missing <= 5
    with client(port, model) as judge:
        with serving(model, port):
            futures = judge.submit([call(n) for n in range(150)])
            futures[5].result(60)
        assert not all(future.done() for future in futures)
        with serving(model, port):
            results = [future.result(120) for future in futures]
    assert results == [Score(score=0.75)] * 150


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="Qwen3-VL's processor needs torchvision of torch's version"
)
def test_images_reach_a_video_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a random model says depends on the pictures, so they are seen; and it is no score."""
    calls = [call(1, images=(jpeg(color),) * 6) for color in ("red", "blue")]
    make_video_model(tmp_path / "random")
    with serving(tmp_path / "random") as port, client(port, tmp_path / "random", attempts=1) as judge:
        results = [future.result(60) for future in judge.submit(calls)]
    assert all(isinstance(result, Missing) and "HTTP" not in result.reason for result in results)
    said = [record.getMessage().rpartition("): ")[2] for record in caplog.records if "not as asked" in record.msg]
    assert len(said) == 2 and said[0] != said[1]
