"""PickScore on a tiny CLIP against its formula in fp64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

from tempact.errors import UserError
from tempact.temporal_order.frames import pick_frames
from tempact.temporal_order.judging import JudgedVideo
from tempact.temporal_order.pickscore import PickScore
from tempact.temporal_order.prompts import OrderPrompt
from tempact.temporal_order.protocol import PICKSCORE

LONGEST = 12
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {
        "vocab_size": len(WORDS), "max_position_embeddings": LONGEST, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=small | {"image_size": 16, "patch_size": 8}, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)
    tokenizer = CLIPTokenizerFast(vocab=vocabulary, merges=[])
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def video(text: str) -> JudgedVideo:
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8, generator=generator)
    frames[::2] //= torch.arange(1, 11, dtype=torch.uint8)[:, None, None, None]  # unlike each other, also in norm
    frames[1::3, :2] = 0
    return JudgedVideo(OrderPrompt("p", "simple", "", text), frames, "")


def test_the_score_is_the_formula(weights: Path) -> None:
    scorer = PickScore(str(weights), torch.device("cpu"))
    one = video("a b c")
    verdict = scorer.submit([one])[0].result()
    model = CLIPModel.from_pretrained(weights).double().eval()
    processor = CLIPProcessor.from_pretrained(weights)
    picks = pick_frames(20, 8)
    with torch.no_grad():
        pixels = processor.image_processor(list(one.frames[picks].numpy()), return_tensors="pt")["pixel_values"]
        pictures = model.visual_projection(model.vision_model(pixels.double()).pooler_output)
        tokens = processor.tokenizer("a b c", return_tensors="pt")
        words = model.text_projection(model.text_model(**tokens).pooler_output)[0]
        mean = (pictures / pictures.norm(dim=-1, keepdim=True)).mean(0)
        expected = model.logit_scale.exp() * (words / words.norm()) @ (mean / mean.norm())
    assert verdict.scores[PICKSCORE] == pytest.approx(float(expected), rel=1e-4) and verdict.picks == tuple(picks)
    assert abs(float(expected)) > 0.05 and scorer.name == PICKSCORE and scorer.cut_prompts == 0


def test_a_prompt_that_is_too_long_is_cut_at_its_end_and_counted(weights: Path) -> None:
    scorer = PickScore(str(weights), torch.device("cpu"))
    start = "a b c d e f g h i j"  # with both end marks as long as the model reads
    full, longer, other = (scorer.submit([video(text)])[0].result() for text in (start, f"{start} k l m", f"z {start}"))
    assert longer.scores == full.scores != other.scores and scorer.cut_prompts == 2


def test_weights_that_are_not_finite_give_no_score(weights: Path) -> None:
    scorer = PickScore(str(weights), torch.device("cpu"))
    scorer.model.logit_scale.data.fill_(float("nan"))
    verdict = scorer.submit([video("a")])[0].result()
    assert verdict.scores == {} and verdict.missing == "not finite"


def test_weights_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--pickscore: .*accepted: a folder or name"):
        PickScore(str(tmp_path), torch.device("cpu"))
