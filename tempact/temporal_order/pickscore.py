"""PickScore of a video (ALGORITHM.md sections 2.6 and 7), as the table shows it: about 20.8 for the published models.

e^{logit_scale} * cos(text, mean of the frames), where frames are normalised, averaged and normalised again; 8 frames
from the first to the last against the whole instruction. CLIP reads 77 tokens: what is longer is cut at its end, as in
the reference, and counted in `cut_prompts`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoProcessor, CLIPModel
from transformers.utils import logging as transformers_logging

from tempact.errors import UserError
from tempact.temporal_order.frames import PICKSCORE_FRAMES, pick_frames
from tempact.temporal_order.judging import JudgedVideo, Verdict
from tempact.temporal_order.options import PICKSCORE_WEIGHTS
from tempact.temporal_order.protocol import PICKSCORE

log = logging.getLogger(__name__)

PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the weights are published without one


class PickScore:
    """A judge (`judging.VideoJudge`) that runs here."""

    name = PICKSCORE

    def __init__(self, weights: str, device: torch.device):
        """weights: a folder or a name on the Hugging Face hub. UserError if they cannot be had."""
        transformers_logging.disable_progress_bar()
        self.version, self.device = weights, device
        try:
            self.model = CLIPModel.from_pretrained(weights).eval().requires_grad_(False).to(device)
            self.processor = AutoProcessor.from_pretrained(PROCESSOR if weights == PICKSCORE_WEIGHTS else weights)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0][:150]
            raise UserError(
                f"--pickscore: {weights}: cannot be had ({reason}); accepted: a folder or name with a CLIP model and "
                "its processor, or none"
            ) from error
        self.longest = self.model.config.text_config.max_position_embeddings
        self.cut_prompts = 0

    def submit(self, videos: Sequence[JudgedVideo]) -> list[Future[Verdict]]:
        """Scores at once; a number that is not finite is missing."""
        futures = []
        for video in videos:
            picks = pick_frames(len(video.frames), PICKSCORE_FRAMES)
            score = self.score(video.prompt.text, video.frames[picks])
            finite = score == score and abs(score) != float("inf")
            future: Future[Verdict] = Future()
            found = Verdict({PICKSCORE: score}, "", tuple(picks)) if finite else Verdict({}, "not finite", tuple(picks))
            future.set_result(found)
            futures.append(future)
        return futures

    @torch.inference_mode()
    def score(self, text: str, frames: Tensor) -> float:
        """frames uint8 [n, 3, height, width]."""
        tokens = self.processor.tokenizer(text, return_tensors="pt", truncation=True, max_length=self.longest)
        if len(self.processor.tokenizer(text)["input_ids"]) > self.longest:
            self.cut_prompts += 1
            log.log(
                logging.INFO if self.cut_prompts == 1 else logging.DEBUG,
                "PickScore reads the first %d tokens of a prompt; cut: %s", self.longest, text[:80],
            )  # fmt: skip
        pictures = self.processor.image_processor(list(frames.cpu().numpy()), return_tensors="pt")
        text_rows = self._features(self.model.get_text_features(**tokens.to(self.device)))
        frame_rows = self._features(self.model.get_image_features(pictures["pixel_values"].to(self.device)))
        mean = F.normalize(frame_rows, dim=-1).mean(0, keepdim=True)
        cosine = F.cosine_similarity(text_rows, mean, dim=-1)
        return float(self.model.logit_scale.exp() * cosine)

    @staticmethod
    def _features(found: Tensor | object) -> Tensor:
        """transformers 5 wraps the features, 4 did not."""
        return found if isinstance(found, Tensor) else found.pooler_output  # type: ignore[attr-defined]
