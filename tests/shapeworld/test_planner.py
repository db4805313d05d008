"""The planner's tokenizer, its supervised plans and their training."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest
import torch
from transformers import Qwen3ForCausalLM

from tempact.config import LoraConfig, OptimConfig, PlannerConfig
from tempact.planner.planner import Planner
from tempact.planner.plans import parse_plan
from tempact.shapeworld import pretraining as training
from tempact.shapeworld.grammar import describe_event, parse_instruction, sample_story, split_of
from tempact.shapeworld.pretraining import planner as planner_training
from tempact.shapeworld.pretraining.planner import (
    CONTEXT,
    IGNORED,
    MERGED_SHARE,
    SWAPPED_SHARE,
    VOCABULARY,
    PlannerCourse,
    draw_examples,
    fit_tokenizer,
    imperfect_plan,
    planner_config,
    token_table,
)
from tempact.shapeworld.story import CHUNK, FRAMES, states
from tempact.types import Prompt


@pytest.fixture(scope="module")
def examples():
    return draw_examples(0, 1500)


@pytest.fixture(scope="module")
def tokenizer(examples):
    return fit_tokenizer([text for row in examples for text in (row.instruction, row.response)])


def test_supervised_plans_are_well_formed_and_come_from_their_split(examples):
    for row in examples:
        plan = parse_plan(row.response, row.instruction, FRAMES, CHUNK)
        assert plan.format_score == 1.0
        assert plan.steps[0].end in (CHUNK, 2 * CHUNK)
        assert split_of(parse_instruction(row.instruction)) == "train"
    assert draw_examples(0, len(examples)) == examples
    assert draw_examples(1, 50) != draw_examples(0, 50)


def test_supervised_plans_leave_order_division_and_timing_to_learn():
    """Of stories with several events about 15% are merged and 15% swapped; slow events get no longer spans."""
    rng, kinds, lengths = random.Random(0), Counter(), defaultdict(list)
    for _ in range(3000):
        story = sample_story(rng, "train", 3)
        told = [describe_event(scene, event) for scene, event in zip(states(story)[:-1], story.events, strict=True)]
        steps = imperfect_plan(story, rng)[1:]
        prompts = [step.prompt for step in steps]
        kind = "as told" if prompts == told else "merged" if len(prompts) == 2 else "swapped"
        kinds[kind] += 1
        if kind == "swapped":
            assert sorted(prompts) == sorted(told)
        if kind == "as told":
            for step, event in zip(steps, story.events, strict=True):
                lengths[event.slow].append((step.end - step.start) // CHUNK)
    assert abs(kinds["merged"] / 3000 - MERGED_SHARE) < 0.025
    assert abs(kinds["swapped"] / 3000 - SWAPPED_SHARE) < 0.025
    quick, slow = (sum(lengths[pace]) / len(lengths[pace]) for pace in (False, True))
    assert abs(quick - slow) < 0.15
    assert set(lengths[True]) == {1, 2, 3, 4, 5}  # every timing is tried
    assert sum(length >= 3 for length in lengths[True]) / len(lengths[True]) < 0.5  # most cut a slow event short


def test_tokens_are_whole_words_and_any_text_survives(examples, tokenizer):
    assert len(tokenizer) <= VOCABULARY
    ids = tokenizer('[{"start":0,"end":12,"prompt":"The red circle slowly moves to the right."}]')["input_ids"]
    assert len(ids) == 14
    assert max(len(row) for row in tokenizer([row.response for row in examples])["input_ids"]) < 96
    for text in ['héllo  "x" \n 𝄞 </think>', "  ", examples[0].response, "<|im_end|>"]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_chat_shows_the_instruction_alone(tokenizer):
    messages = [{"role": "system", "content": "Rules"}, {"role": "user", "content": "A red circle."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nA red circle.<|im_end|>\n<|im_start|>assistant\n"


def test_labels_are_the_response_and_its_end(examples, tokenizer):
    ids, labels = token_table(tokenizer, examples[:40])
    assert ids.shape[1] < CONTEXT
    for row, own, label in zip(examples, ids, labels, strict=False):
        learned = label != IGNORED
        assert tokenizer.decode(own[learned]) == f"{row.response}<|im_end|>"
        start = int(learned.nonzero()[0])
        assert tokenizer.decode(own[:start]).endswith(f"{row.instruction}<|im_end|>\n<|im_start|>assistant\n")
        assert (own[start + int(learned.sum()) :] == tokenizer.pad_token_id).all()


def test_the_model_has_about_a_million_parameters(tokenizer):
    count = sum(p.numel() for p in Qwen3ForCausalLM(planner_config(tokenizer)).parameters())
    assert 0.7e6 < count < 1.1e6


@pytest.fixture
def quick_course(monkeypatch):
    monkeypatch.setattr(PlannerCourse, "batch", 4)
    monkeypatch.setattr(planner_training, "VALIDATION_EXAMPLES", 4)
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)


def test_training_lowers_the_loss_and_writes_a_planner(quick_course, tmp_path):
    told = training.train(PlannerCourse(0, "cpu", count=200), tmp_path, 12, resume=False)
    assert told["validation_loss"] < 4.5  # a uniform guess costs 6.1
    assert 0.0 <= told["unusable"] <= 1.0 and told["usable_as_written"] + told["unusable"] <= 1.0
    config = PlannerConfig("x", LoraConfig(2, 2, ("q_proj", "v_proj")), OptimConfig(lr=1e-3), max_new_tokens=5)
    planner = Planner.load(tmp_path, config, FRAMES, CHUNK)
    batch = planner.sample([Prompt("0", "A red circle is at the top left. The red circle blinks.")], 2, 0)
    assert batch.tokens.response_mask.sum(1).max() <= 5
    assert planner.generation.eos_token_id == [planner.tokenizer.eos_token_id]


def test_an_interrupted_training_ends_as_an_unbroken_one(quick_course, tmp_path, monkeypatch):
    def stop(self, generator):
        if generator.initial_seed() % 1_000_003 == 3:
            raise KeyboardInterrupt
        return original(self, generator)

    whole = PlannerCourse(3, "cpu", count=60)
    training.train(whole, tmp_path / "whole", 5)
    original = PlannerCourse.loss
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PlannerCourse, "loss", stop)
        training.train(PlannerCourse(3, "cpu", count=60), tmp_path / "broken", 5)
    resumed = PlannerCourse(3, "cpu", count=60)
    training.train(resumed, tmp_path / "broken", 5)
    for (name, expected), found in zip(whole.modules.named_parameters(), resumed.modules.parameters(), strict=True):
        assert torch.equal(found, expected), name
