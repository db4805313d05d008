"""Aesthetics P: PickScore of the step that starts at the switch, against that step's prompt (ALGORITHM.md 2.6).

CLIP reads 77 tokens, its start and end among them; what a prompt has beyond is cut off and counted
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

from tempact.errors import UserError
from tempact.rewards.judged import switched_steps
from tempact.types import PlanBatch, Rollout

log = logging.getLogger(__name__)

SCALE = 26.0  # brings usual PickScores (about 20.8) to 0.8
BICUBIC = 3  # PIL's number, as it stands in preprocessor_config.json


class PickScorer:
    """PickScore of videos. Not trained: frozen, without gradients."""

    def __init__(self, model: CLIPModel, processor: CLIPProcessor, batch_frames: int = 64):
        """batch_frames: frames that the vision model takes at a time."""
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
    def load(cls, weights: str, processor: str, device: torch.device, batch_frames: int = 64) -> PickScorer:
        """From folders or names on the Hugging Face hub; fp16 on a GPU, else fp32. UserError if one is not there."""
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        model = _loaded(CLIPModel, "judges.aesthetics_weights", weights, dtype=dtype)
        made = _loaded(CLIPProcessor, "judges.aesthetics_processor", processor)
        return cls(model.to(device), made, batch_frames)

    def cuts(self, text: str) -> bool:
        """Has a text more tokens than the model reads, so that its end is not?"""
        return len(self._tokenizer(_plain(text), verbose=False)["input_ids"]) > self._tokens

    @torch.inference_mode()
    def score(self, text: str, videos: Tensor) -> Tensor:
        """exp(logit_scale) times the cosine between the text and the renormalised mean of the frames' normalised
        embeddings.

        videos: uint8 [V, k, 3, height, width] on any device. Returns fp32 [V] on the CPU, about 15 to 25 with
        PickScore's weights; NaN where the model gives no finite number.
        """
        assert videos.dtype == torch.uint8 and videos.ndim == 5 and videos.shape[2] == 3, (videos.dtype, videos.shape)
        frames = torch.cat([self._embed(part) for part in videos.flatten(0, 1).split(self.batch_frames)])
        mean = F.normalize(frames.unflatten(0, videos.shape[:2]).mean(1), dim=-1)
        score = self.model.logit_scale.float().exp() * (mean @ self._embed_text(text))
        return score.masked_fill(~torch.isfinite(score), float("nan")).cpu()

    def stats(self) -> dict[str, float]:
        """Share of the texts since the last call of this that were cut off; nothing if there were none."""
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
    """The text without half a surrogate pair, which no tokenizer takes, and without special tokens, with which a
    planner could end it where it likes."""
    return text.encode("utf-8", "replace").decode().replace("<|", "< |")


def _loaded(kind: Any, key: str, name: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:150]
        raise UserError(f"{key}: {name} cannot be loaded ({reason}); accepted: a CLIP folder or name") from error


@dataclass(frozen=True)
class Aesthetics:
    scorer: PickScorer
    frames: int = 8  # of a step

    def score(self, plans: PlanBatch, rollout: Rollout) -> Tensor:
        """[P, N]: PickScore over SCALE, cut to [0, 1]; NaN where missing or where no step starts at the switch."""
        scores = torch.full(rollout.frames.shape[:2], float("nan"))
        for p, step, picks in switched_steps(plans, rollout, self.frames):
            scores[p] = self.scorer.score(step.prompt, rollout.frames[p][:, picks]) / SCALE
        return scores.clamp(0, 1)
