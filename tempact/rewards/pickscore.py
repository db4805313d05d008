"""Aesthetics P: PickScore of the step that begins at the switch, against that step's prompt (docs/algorithm.md 2.6).

CLIP reads 77 tokens, start and end token included; longer prompts are cut off and counted
(`rewards/aesthetics/truncated`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from tempact.config import JudgeSettings
from tempact.errors import UserError
from tempact.rewards import RewardSet, Span, spread, unasked
from tempact.rewards.judged import judged_rewards
from tempact.rewards.judges import Judges
from tempact.types import Plan

log = logging.getLogger(__name__)

SCALE = 26.0  # brings usual PickScores (about 20.8) to 0.8
BICUBIC = 3  # PIL's number, as it stands in preprocessor_config.json


class PickScorer:
    """PickScore of videos, by a frozen CLIP model."""

    def __init__(self, model: CLIPModel, processor: CLIPProcessor, batch_frames: int = 64):
        """batch_frames: frames that the vision model takes at a time. UserError for a processor that is not bicubic."""
        self.model = model.eval().requires_grad_(False)
        self.batch_frames = batch_frames
        self._tokenizer, images = processor.tokenizer, processor.image_processor
        self._tokens = model.config.text_config.max_position_embeddings
        self._shorter_side = images.size["shortest_edge"]
        self._crop = images.crop_size["height"], images.crop_size["width"]
        if int(images.resample) != BICUBIC:
            raise UserError(
                f"judges.aesthetics_processor: found resampling {images.resample} in the processor; accepted: bicubic"
            )
        self._mean = torch.tensor(images.image_mean, device=model.device).view(3, 1, 1)
        self._std = torch.tensor(images.image_std, device=model.device).view(3, 1, 1)
        self._texts = self._truncated = 0

    @classmethod
    def load(cls, settings: JudgeSettings, device: torch.device) -> PickScorer:
        """From the folders or names on the Hugging Face hub that `judges.aesthetics_weights` and `_processor` give;
        fp16 on a GPU, else fp32. UserError if one is not there."""
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        model = _loaded(CLIPModel, "judges.aesthetics_weights", settings.aesthetics_weights, dtype=dtype)
        processor = _loaded(CLIPProcessor, "judges.aesthetics_processor", settings.aesthetics_processor)
        return cls(model.to(device), processor, settings.aesthetics_batch)

    def cuts(self, text: str) -> bool:
        """True for a text of more tokens than the model reads."""
        return len(self._tokenizer(_plain(text), verbose=False)["input_ids"]) > self._tokens

    @torch.inference_mode()
    def score(self, text: str, videos: Tensor) -> Tensor:
        """PickScore of videos uint8 [V, k, 3, height, width], on any device.

        exp(logit_scale) times the cosine between the text's embedding and the renormalised mean of the frames'
        normalised embeddings: fp32 [V] on the CPU, about 15 to 25 with PickScore's weights; NaN where the model gives
        no finite number.
        """
        assert videos.dtype == torch.uint8 and videos.ndim == 5 and videos.shape[2] == 3, (videos.dtype, videos.shape)
        frames = torch.cat([self._embed(part) for part in videos.flatten(0, 1).split(self.batch_frames)])
        mean = F.normalize(frames.unflatten(0, videos.shape[:2]).mean(1), dim=-1)
        score = self.model.logit_scale.float().exp() * (mean @ self._embed_text(text))
        return score.masked_fill(~torch.isfinite(score), float("nan")).cpu()

    def stats(self) -> dict[str, float]:
        """Share of the texts since the last call of this method that were cut off; {} if there were none."""
        texts, truncated, self._texts, self._truncated = self._texts, self._truncated, 0, 0
        if truncated:
            log.info("aesthetics: %d of %d prompts have more than CLIP's %d tokens", truncated, texts, self._tokens)
        return {"rewards/aesthetics/truncated": truncated / texts} if texts else {}

    def _embed(self, frames: Tensor) -> Tensor:
        """Normalised fp32 embeddings [n, d] of uint8 [n, 3, height, width]."""
        pixels = self._pixels(frames.to(self.model.device))
        outputs = self.model.get_image_features(pixel_values=pixels.to(self.model.dtype))
        return F.normalize(outputs.pooler_output.float(), dim=-1)

    def _pixels(self, frames: Tensor) -> Tensor:
        """CLIP's preprocessing, on the model's device: shorter side resized, centre cropped, normalised."""
        height, width = frames.shape[2:]
        short = min(height, width)
        size = [int(self._shorter_side * side / short) for side in (height, width)]
        pixels = F.interpolate(frames.float(), size=size, mode="bicubic", antialias=True)
        pixels = pixels.round().clamp(0, 255) / 255  # PIL keeps whole numbers
        top, left = ((side - crop) // 2 for side, crop in zip(size, self._crop, strict=True))
        pixels = pixels[:, :, top : top + self._crop[0], left : left + self._crop[1]]
        return (pixels - self._mean) / self._std

    def _embed_text(self, text: str) -> Tensor:
        """Normalised fp32 embedding [d]."""
        self._texts, self._truncated = self._texts + 1, self._truncated + self.cuts(text)
        tokens = self._tokenizer(
            _plain(text), padding="max_length", truncation=True, max_length=self._tokens, return_tensors="pt"
        ).to(self.model.device)
        outputs = self.model.get_text_features(**tokens)
        return F.normalize(outputs.pooler_output[0].float(), dim=-1)


def _plain(text: str) -> str:
    """The text without lone surrogates, which no tokenizer takes, and without special tokens, which would let a planner
    end the text early."""
    return text.encode("utf-8", "replace").decode().replace("<|", "< |")


def _loaded(kind: Any, key: str, name: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:150]
        raise UserError(f"{key}: {name} cannot be loaded ({reason}); accepted: a CLIP folder or name") from error


@dataclass(frozen=True)
class Aesthetics:
    """The reward P, a `RewardFunction`. frames: frames of a step that the model sees, at least 2."""

    scorer: PickScorer
    frames: int = 8

    def __call__(self, prompts: list[str], plans: list[Plan], frames: Tensor, spans: list[Span | None]) -> Tensor:
        """[P, N]: PickScore over SCALE, cut to [0, 1]; NaN where missing or where no step begins at the switch."""
        scores = torch.full(frames.shape[:2], float("nan"))
        for p, span in enumerate(spans):
            if span is not None:
                picks = spread(span.first, span.last, self.frames)
                scores[p] = self.scorer.score(span.step.prompt, frames[p][:, picks]) / SCALE
        return scores.clamp(0, 1)


def real_rewards(client: Judges | None, scorer: PickScorer | None, settings: JudgeSettings) -> RewardSet:
    """The four rewards for real video: three judges and PickScore, which runs while they work. Closing them closes the
    client; waiting for their scores may raise JudgeOutage. None: what needs it is not going to be asked."""
    aesthetics = unasked if scorer is None else Aesthetics(scorer, settings.aesthetics_frames)
    stats = dict if scorer is None else scorer.stats
    if client is None:
        return RewardSet(unasked, unasked, unasked, aesthetics, metrics=stats)
    return judged_rewards(client, aesthetics, settings, stats)
