"""What a run would miss, as a dry run tells it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rewards.tiny_clip import tiny_clip

from tempact.diagnostics.dry_run import missing
from tempact.presets import get_preset

pytestmark = pytest.mark.usefixtures("no_judges")


def test_every_missing_path_is_told(tmp_path: Path) -> None:
    base = get_preset("longlive")
    executor = replace(
        base.executor, weights=str(tmp_path / "gone.pt"), adapters=(str(tmp_path / "lora.pt"),),
        wan_folder=str(tmp_path), text_cache="/proc/text",
    )  # fmt: skip
    data = replace(base.data, prompts=str(tmp_path / "prompts.csv"))
    planner = replace(base.planner, weights=str(tmp_path / "qwen"))
    judges = replace(base.judges, cache="/proc/judges.sqlite", aesthetics_weights=str(tmp_path / "pickscore"))
    config = replace(base, executor=executor, data=data, planner=planner, judges=judges, output="/proc/run")
    lines = missing(config)
    keys = [line.split(":")[0] for line in lines]
    assert keys == [
        "executor.weights", "executor.adapters", "executor.wan_folder", "executor.wan_folder",
        "data.prompts", "judges", "judges", "judges", "judges.aesthetics_weights", "judges.aesthetics_processor",
        "planner.weights", "output", "judges.cache", "executor.text_cache",
    ]  # fmt: skip
    assert all("accepted: " in line for line in lines), lines
    nothing = missing(replace(base, output=str(tmp_path)))
    assert nothing[0].startswith(
        "executor.weights: found nothing, and the preset longlive has none of its own; accepted: "
    )


def test_own_rewards_that_are_not_there_are_told(tmp_path: Path) -> None:
    base = get_preset("shapeworld-smoke")
    config = replace(base, rewards=replace(base.rewards, custom=("no_such_module:f",)), output=str(tmp_path))
    (line,) = missing(config)
    assert line.startswith("rewards.custom: no_such_module:f: No module named 'no_such_module'; accepted: ")


def test_judges_and_pickscore_that_are_there_are_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip, processor = tiny_clip()
    clip.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    folder = str(tmp_path)
    base = get_preset("longlive")
    judges = replace(
        base.judges, aesthetics_weights=folder, aesthetics_processor=folder, cache=f"{folder}/judges.sqlite"
    )

    def missed() -> list[str]:
        lines = missing(replace(base, judges=judges))
        return [line for line in lines if line.startswith("judges")]

    lines = missed()
    assert [line.startswith("judges: environment: found no address of the judge ") for line in lines] == [True] * 3
    monkeypatch.setenv("TEMPACT_JUDGE_BASE_URL", "http://127.0.0.1:8001/v1")
    assert [line[:29] for line in missed()] == ["judges: TEMPACT_JUDGE_MODEL: "] * 3
    monkeypatch.setenv("TEMPACT_JUDGE_MODEL", "m")
    assert missed() == []
    (tmp_path / "tokenizer_config.json").unlink()
    assert [line.split(":")[0] for line in missed()] == ["judges.aesthetics_processor"]
