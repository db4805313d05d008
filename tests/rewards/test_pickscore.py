"""PickScore on a tiny CLIP against the plain formula in fp64; preprocessing, long prompts, what is no number."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rewards.reward_cases import STEPS, plan_batch, rollout_of, scores_of
from rewards.tiny_clip import SIDE, tiny_clip
from torch import Tensor

from tempact.config import JudgeSettings
from tempact.errors import UserError
from tempact.rewards.pickscore import Aesthetics, PickScorer
from tempact.types import Step


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


@pytest.fixture
def scorer(clip) -> PickScorer:
    return PickScorer(*clip, batch_frames=5)


def videos(count: int = 3, frames: int = 4, height: int = 40, width: int = 71) -> Tensor:
    """Smooth random pictures."""
    coarse = torch.rand(count * frames, 3, 6, 9, generator=torch.Generator().manual_seed(3))
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return fine.mul(255).to(torch.uint8).unflatten(0, (count, frames))


def plain_score(clip, text: str, frames: Tensor) -> float:
    """e^{logit_scale} cos(text, renormalised mean of normalised frame embeddings) in fp64, frame by frame."""
    model, processor = clip[0].double(), clip[1]
    embedded = []
    for frame in frames:
        picture = Image.fromarray(frame.permute(1, 2, 0).numpy())
        pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"].double()
        vision = model.vision_model(pixel_values=pixels).pooler_output @ model.visual_projection.weight.T
        embedded.append((vision[0] / vision[0].norm()).detach())
    mean = torch.stack(embedded).mean(0)
    tokens = processor.tokenizer(text, truncation=True, max_length=77, return_tensors="pt")
    words = (model.text_model(**tokens).pooler_output @ model.text_projection.weight.T)[0].detach()
    cosine = (mean / mean.norm()) @ (words / words.norm())
    score = (model.logit_scale.exp() * cosine).item()
    clip[0].float()
    return score


def test_scores_are_those_of_the_formula(clip, scorer: PickScorer) -> None:
    made = videos()
    text = "a red cat jumps over 2 dogs."
    expected = [plain_score(clip, text, video) for video in made]
    assert np.std(expected) > 1e-3  # the videos differ
    scores = scorer.score(text, made)
    assert scores.dtype == torch.float32 and scores.shape == (3,)
    # PIL rounds to whole numbers in each of two passes, tensors once at the end: pictures differ by up to 1/255
    np.testing.assert_allclose(scores.numpy(), expected, atol=2e-2)
    one = math.exp(clip[0].logit_scale.item())
    assert all(abs(score) < one for score in scores.tolist())


def test_the_formula_alone_to_the_last_digits(clip, scorer: PickScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pictures that need no resizing nothing is left but arithmetic."""
    made = videos(height=SIDE, width=SIDE)
    expected = [plain_score(clip, "a cat", video) for video in made]
    np.testing.assert_allclose(scorer.score("a cat", made).numpy(), expected, atol=1e-4)


def test_pictures_are_resized_and_cropped_as_the_processor_does(clip, scorer: PickScorer) -> None:
    stripes = torch.zeros(1, 3, 40, 71, dtype=torch.uint8)
    stripes[..., 20:50] = 255  # hard edges, which bicubic weights overshoot
    smooth = [videos(1, 1, *size)[0] for size in ((40, 71), (71, 40), (33, 100), (480, 832))]
    for frame in (*smooth, stripes):
        picture = Image.fromarray(frame[0].permute(1, 2, 0).numpy())
        expected = clip[1].image_processor(picture, return_tensors="pt")["pixel_values"]
        found = scorer._pixels(frame)
        assert found.shape == expected.shape == (1, 3, SIDE, SIDE)
        step = 1 / 255 / min(clip[1].image_processor.image_std)
        apart = (found - expected).abs() / step
        assert apart.max() <= 1.01 and (apart < 0.1).float().mean() > 0.6, frame.shape  # whole numbers in both


def test_batches_make_no_difference_and_videos_do_not_touch(clip) -> None:
    made = videos(4, 3)
    scores = [PickScorer(*clip, batch_frames=size).score("a cat", made) for size in (1, 5, 64)]
    alone = torch.cat([PickScorer(*clip).score("a cat", video[None]) for video in made])
    for other in (*scores[1:], alone):
        torch.testing.assert_close(scores[0], other, atol=1e-5, rtol=0)


def test_a_prompt_beyond_77_tokens_is_cut_and_counted(scorer: PickScorer, caplog: pytest.LogCaptureFixture) -> None:
    made = videos(1, 2)
    fits, long = "a" * 75, "a" * 76  # a token a letter, and a start and an end
    scores = {text: scorer.score(text, made).item() for text in (fits, long, long + "b c d")}
    assert scores[long] == scores[long + "b c d"] and math.isfinite(scores[long])
    with caplog.at_level(logging.INFO):
        assert scorer.stats() == {"rewards/aesthetics/truncated": pytest.approx(2 / 3)}
    assert [r.getMessage() for r in caplog.records] == ["aesthetics: 2 of 3 prompts have more than CLIP's 77 tokens"]
    assert scorer.stats() == {}


@pytest.mark.parametrize("text", ["", "\ud800 half a pair", "一只猫", "\x00", "a " * 5000])
def test_any_text_gets_a_score(scorer: PickScorer, text: str) -> None:
    assert torch.isfinite(scorer.score(text, videos(1, 2))).all()


def test_a_prompt_cannot_end_itself(scorer: PickScorer) -> None:
    """What follows a planted end of text counts as any other text does."""
    made = videos(1, 2)
    planted = [scorer.score(f"cat <|endoftext|> {rest}", made).item() for rest in ("dogs", "12345")]
    assert abs(planted[0] - planted[1]) > 1e-4


class Fixed:
    """A scorer that gives back numbers and remembers what it was asked."""

    def __init__(self, *scores: float):
        self.scores, self.asked = torch.tensor(scores), list[tuple[str, list[int]]]()

    def score(self, text: str, made: Tensor) -> Tensor:
        self.asked.append((text, made[0, :, 0, 0, 0].div(2).int().tolist()))
        return self.scores


def test_the_reward_is_the_score_of_the_switched_step_over_26() -> None:
    plans = plan_batch(STEPS, [Step(0, 30, "all")], STEPS)
    fixed = Fixed(20.8, 27.0, -1.0, float("nan"))
    scores = scores_of(Aesthetics(fixed), plans, rollout_of(plans, [6, 3, 15], continuations=4))
    expected = torch.tensor([0.8, 1.0, 0.0, float("nan")])
    torch.testing.assert_close(scores, torch.stack([expected, expected * float("nan"), expected]), equal_nan=True)
    assert fixed.asked == [
        ("the cat jumps", [21, 26, 31, 36, 41, 46, 51, 56]),
        ("the cat sleeps", [57, 65, 74, 82, 91, 99, 108, 116]),
    ]


def test_what_the_model_cannot_score_is_missing(clip) -> None:
    model, processor = tiny_clip()
    with torch.no_grad():
        model.text_projection.weight.fill_(float("inf"))
    assert torch.isnan(PickScorer(model, processor).score("a cat", videos(2, 2))).all()


def test_weights_are_read_from_a_folder_and_their_absence_is_told(clip, scorer: PickScorer, tmp_path: Path) -> None:
    clip[0].save_pretrained(tmp_path / "model")
    clip[1].save_pretrained(tmp_path / "processor")

    def load(model: str, processor: str) -> PickScorer:
        weights = {"aesthetics_weights": str(tmp_path / model), "aesthetics_processor": str(tmp_path / processor)}
        return PickScorer.load(JudgeSettings(**weights), torch.device("cpu"))

    loaded = load("model", "processor")
    made = videos(2, 2)
    torch.testing.assert_close(loaded.score("a cat", made), scorer.score("a cat", made), atol=1e-5, rtol=0)
    for folders, key in ((("none", "processor"), "weights"), (("model", "none"), "processor")):
        with pytest.raises(UserError, match=f"^judges.aesthetics_{key}: .*none.*; accepted: a CLIP folder or name$"):
            load(*folders)
