"""What a judge is shown and asked, and what its answer is worth."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rewards.reward_cases import data_of
from rewards.test_rubrics import PLANTED
from rewards.tiny_clip import tiny_clip
from torch import Tensor

from tempact.config import JudgeSettings
from tempact.errors import UserError
from tempact.evaluation import ROLES
from tempact.evaluation.judges import (
    PICKSCORE_FRAMES,
    JudgedVideo,
    ServedJudge,
    judged_frames,
    load_pickscore,
    picks,
    pickscore_judge,
    scores_of,
    served_judges,
    shapeworld_judges,
)
from tempact.evaluation.prompts import OrderPrompt
from tempact.evaluation.statistics import CLEARNESS, DUPLICATES, PICKSCORE, PICTURE_QUALITY
from tempact.rewards import media_hash
from tempact.rewards.judged import HELD_OUT, VideoVerdict, rubric_version, video_fields
from tempact.rewards.judges import JudgeCall, JudgeOutage, JudgeResult
from tempact.rewards.judges.replies import read_reply
from tempact.rewards.pickscore import PickScorer
from tempact.shapeworld.grammar import parse_instruction
from tempact.shapeworld.pretraining.clips import relaxed_cues, shape_indices, tell
from tempact.shapeworld.story import draw
from tempact.shapeworld.verifier import verify
from tempact.shapeworld.world import held_out_prompts
from tempact.types import Missing

MARKS = {"temporal_order": 5, "physical": 6, "consistency": 7.5, "alignment": 8, "final": 4}


def reply(*frame_scores: float, **changed: object) -> str:
    return json.dumps({"frame_scores": list(frame_scores), **MARKS, **changed})


class FakeClient:
    def __init__(self, result: JudgeResult | Exception):
        self.result, self.calls = result, list[JudgeCall]()

    def submit(self, calls: Sequence[JudgeCall]) -> list[Future[JudgeResult]]:
        self.calls += calls
        futures: list[Future[JudgeResult]] = [Future() for _ in calls]
        for future in futures:
            if isinstance(self.result, Exception):
                future.set_exception(self.result)
            else:
                future.set_result(self.result)
        return futures


def video(frames: int = 117, set_name: str = "simple", text: str = "A cat runs.") -> JudgedVideo:
    pictures = torch.arange(frames, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 16, 24)
    return JudgedVideo(OrderPrompt("p", set_name, "", text), pictures)


def verdict_of(text: str) -> VideoVerdict:
    found = read_reply(text, video_fields(6))
    assert isinstance(found, VideoVerdict)
    return found


@pytest.mark.parametrize("frames", [2, 5, 6, 24, 117, 141, 237])
@pytest.mark.parametrize("set_name", ["simple", "hard"])
def test_picks_hold_both_ends_and_are_evenly_spread(frames: int, set_name: str) -> None:
    for count in (judged_frames(set_name), PICKSCORE_FRAMES):
        seen = picks(frames, count)
        assert seen[0] == 0 and seen[-1] == frames - 1 and seen == sorted(set(seen))
        assert len(seen) == min(frames, count)
        exact = np.linspace(0, frames - 1, len(seen))
        assert np.abs(np.array(seen) - exact).max() <= 0.5


def test_the_registered_numbers_of_frames() -> None:
    assert [judged_frames(name) for name in ("simple", "hard", "vbench")] == [6, 10, 6]
    assert PICKSCORE_FRAMES == 8
    assert picks(141, 6) == [0, 28, 56, 84, 112, 140]
    assert picks(237, 10) == [0, 26, 52, 79, 105, 131, 157, 184, 210, 236]


def test_the_score_is_the_training_rewards_and_every_field_is_kept() -> None:
    found = scores_of(verdict_of(reply(0, 10, 5, 5, 10, 6)))
    # 0.2 * 6 + 0.3 * 4 + 0.2 * 5 + 0.1 * (6 + 7.5 + 8), over 10
    assert found["combined"] == pytest.approx(0.555) and found["temporal_order"] == pytest.approx(0.5)
    assert found["frame_scores"] == pytest.approx(0.6) and found["consistency"] == pytest.approx(0.75)
    assert set(found) == {"combined", "frame_scores", *MARKS}
    perfect = {name: 10 for name in MARKS}
    assert scores_of(verdict_of(reply(*[10] * 6, **perfect)))["combined"] == pytest.approx(1.0)


@pytest.mark.parametrize("planted", PLANTED)
def test_an_instruction_that_speaks_to_the_judge_stays_in_its_quotes(planted: str) -> None:
    client = FakeClient(Missing("no answer"))
    judge = ServedJudge("held-out", "m", client)
    judge.submit([video(text="A cat runs."), video(text=planted)])
    plain, other = client.calls
    assert data_of(other) == {"instruction": planted} and other.rubric == plain.rubric
    assert len(other.text.splitlines()) == len(plain.text.splitlines()) and other.media_hash == plain.media_hash


def test_a_judge_sees_the_picked_frames_as_jpeg_in_order() -> None:
    client = FakeClient(verdict_of(reply(*range(1, 7))))
    judge = ServedJudge("held-out", "some-model", client)
    verdict = judge.submit([video()])[0].result()
    call = client.calls[0]
    shown = [np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in call.images]
    seen = picks(117, 6)
    assert [round(float(picture.mean())) for picture in shown] == pytest.approx(seen, abs=2)
    assert shown[0].shape == (16, 24, 3) and call.role == ROLES["held-out"] == HELD_OUT
    assert call.media_hash == media_hash(call.images) and verdict.picks == tuple(seen)
    assert verdict.scores["frame_scores"] == pytest.approx(0.35) and not verdict.missing
    assert judge.version == f"some-model, temporal following {rubric_version()}"
    judge.submit([video(237, "hard")])
    assert len(client.calls[1].images) == 10


def test_missing_stays_missing_and_an_outage_is_raised() -> None:
    verdict = ServedJudge("in-domain", "m", FakeClient(Missing("timed out"))).submit([video()])[0].result()
    assert verdict.scores == {} and verdict.missing == "timed out"
    lost = ServedJudge("in-domain", "m", FakeClient(JudgeOutage("gone"))).submit([video()])[0]
    with pytest.raises(JudgeOutage, match="gone"):
        lost.result()


class FakeScorer:
    """Gives back a number, remembers the text and the frames, and finds texts with a z too long."""

    def __init__(self, score: float):
        self.found, self.asked = score, list[tuple[str, list[int]]]()

    def score(self, text: str, videos: Tensor) -> Tensor:
        assert videos.dtype == torch.uint8 and videos.shape[0] == 1 and videos.shape[2:] == (3, 16, 24)
        self.asked.append((text, videos[0, :, 0, 0, 0].tolist()))
        return torch.tensor([self.found])

    def cuts(self, text: str) -> bool:
        return "z" in text


def test_pickscore_sees_8_frames_and_the_whole_prompt_and_says_what_was_cut() -> None:
    scorer = FakeScorer(20.75)
    judge = pickscore_judge("weights", scorer)
    whole, cut = (one.result() for one in judge.submit([video(), video(text="A z.")]))
    assert whole.scores == {PICKSCORE: 20.75, "cut": 0.0} and cut.scores == {PICKSCORE: 20.75, "cut": 1.0}
    assert scorer.asked[0] == ("A cat runs.", [0, 17, 33, 50, 66, 83, 99, 116]) and not whole.missing
    assert whole.picks == tuple(scorer.asked[0][1]) and (judge.name, judge.version) == (PICKSCORE, "weights")


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_pickscore_that_is_not_finite_is_missing(score: float) -> None:
    verdict = pickscore_judge("weights", FakeScorer(score)).submit([video()])[0].result()
    assert verdict.scores == {} and verdict.missing == "not finite"


def test_pickscore_is_loaded_as_in_training(tmp_path: Path) -> None:
    clip, processor = tiny_clip()
    clip.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "processor")
    settings = JudgeSettings(
        aesthetics_weights=str(tmp_path / "model"), aesthetics_processor=str(tmp_path / "processor")
    )  # fmt: skip
    one = video(text="a b " * 40)
    found = load_pickscore(settings, torch.device("cpu"))[0].submit([one])[0].result()
    expected = PickScorer(clip, processor).score(one.prompt.text, one.frames[picks(117, 8)][None]).item()
    assert found.scores[PICKSCORE] == pytest.approx(expected, rel=1e-5) and found.scores["cut"] == 1
    with pytest.raises(UserError, match=r"^judges\.aesthetics_weights: .*accepted: a CLIP folder or name$"):
        load_pickscore(replace(settings, aesthetics_weights=str(tmp_path)), torch.device("cpu"))


def test_the_judges_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TEMPACT_JUDGE_BASE_URL", "TEMPACT_JUDGE_MODEL", "VLLM_BASE_URL", "TEMPACT_JUDGE_HELD_OUT_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    settings = JudgeSettings(cache=str(tmp_path / "j.sqlite"), deadline_s=7.0)
    with pytest.raises(UserError, match="found no address"), served_judges(["in-domain"], settings):
        pass
    monkeypatch.setenv("TEMPACT_JUDGE_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("TEMPACT_JUDGE_MODEL", "one")
    names = ["in-domain", "held-out"]
    with pytest.raises(UserError, match="found 'one' for all judges"), served_judges(names, settings):
        pass
    monkeypatch.setenv("TEMPACT_JUDGE_HELD_OUT_BASE_URL", "http://127.0.0.1:9/v2")
    monkeypatch.setenv("TEMPACT_JUDGE_HELD_OUT_MODEL", "two")
    with served_judges(names, settings) as judges:
        assert [judge.version.split(",")[0] for judge in judges] == ["one", "two"]
        assert judges[0].client.config.deadline_s == 7.0 and (tmp_path / "j.sqlite").is_file()


def test_shapeworlds_judges_score_renderings_high_and_noise_low() -> None:
    prompts = [OrderPrompt(p.prompt_id, "hard", p.category, p.text) for p in held_out_prompts("hard", 3, 5)]
    stories = [parse_instruction(prompt.text) for prompt in prompts]
    rng = random.Random(6)
    scenes = [(story.entities, relaxed_cues(story, rng)) for story in stories]
    tracks, shapes = tell(scenes), shape_indices(scenes)
    told = [(255 * one).round().to(torch.uint8) for one in draw(tracks, shapes[:, None].expand(tracks.shape[:3]))]
    noise = torch.randint(256, (24, 3, 24, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    videos = [JudgedVideo(prompt, frames) for prompt, frames in zip(prompts, told, strict=True)]
    judges = shapeworld_judges(torch.device("cpu"))
    assert [judge.name for judge in judges] == ["verifier", "matcher", PICTURE_QUALITY, CLEARNESS, DUPLICATES]
    pixels = torch.stack(told).float() / 255.0
    scores = {}
    for judge in judges:
        verdicts = [future.result() for future in judge.submit([*videos, JudgedVideo(prompts[0], noise)])]
        assert all(next(iter(verdict.scores)) == judge.name and not verdict.missing for verdict in verdicts)
        scores[judge.name] = [verdict.scores[judge.name] for verdict in verdicts]
    assert scores["verifier"][:3] == pytest.approx(verify(pixels, stories).score.tolist(), abs=1e-6)
    for name in ("verifier", "matcher", PICTURE_QUALITY, CLEARNESS):
        assert min(scores[name][:3]) > 0.8 > scores[name][3], name
    assert max(scores[DUPLICATES][:3]) < 0.2
