"""Pretraining of ShapeWorld's planner: a tokenizer, a small Qwen3 and a supervised warm start.

The supervised plans are imperfect on purpose, so that RL has something to find: spans do not depend on the length of
an event, some plans tell two events in one step, some tell two in the wrong order. Their words are right, and so is
their form.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Regex, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tempact.config import LoraConfig, OptimConfig, PlannerConfig
from tempact.planner.planner import Planner
from tempact.planner.plans import UNUSABLE, plan_json, plan_messages
from tempact.shapeworld.grammar import describe_story, reference_plan, sample_story, write_instruction
from tempact.shapeworld.pretraining import Course, draw_parts, fit_bpe
from tempact.shapeworld.story import CHUNK, CHUNKS, FRAMES, Story
from tempact.types import Prompt, Step

EXAMPLES = 120_000
TOKENIZER_EXAMPLES = 4_000
PARTS = 60  # of the examples, each with its own seed
VALIDATION_EXAMPLES = 512
IGNORED = -100  # label of a token that is not learned
VOCABULARY = 640
CONTEXT = 512  # tokens of prompt and response
EVENT_COUNTS = {1: 0.15, 2: 0.25, 3: 0.35, 4: 0.25}  # shares of stories by number of events
LONG_OPENING_SHARE = 0.5  # openings of two chunks instead of one, where the events leave room
UNIFORM_SHARE = 0.6  # plans with near-equal spans; the others are random compositions
MERGED_SHARE = 0.15  # plans that tell two neighbouring events in one step
SWAPPED_SHARE = 0.15  # plans that tell two neighbouring events in the wrong order

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# the planner knows its only task, so system messages are left out
CHAT_TEMPLATE = (
    "{% for m in messages if m.role != 'system' %}"
    f"{START}{{{{ m.role }}}}\n{{{{ m.content }}}}{END}\n"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{START}assistant\n{{% endif %}}"
)
# the frame of the JSON in few pieces, then words with their space, numbers, marks
PIECES = (
    r"""\[\{"start":|,"end":|,"prompt":"|\.?"\},\{"start":|\.?"\}\]|[Aa]ssistant\n|"""
    r""" ?\p{L}+| ?\p{N}+|[^\s\p{L}\p{N}]|\s"""
)


class Example(NamedTuple):
    """An instruction and its supervised response."""

    instruction: str
    response: str


def split_chunks(rng: random.Random, chunks: int, parts: int) -> list[int]:
    """`chunks` in `parts` spans of at least one: near-equal ones, remainder anywhere, or a random composition."""
    if rng.random() < UNIFORM_SHARE:
        lengths = [chunks // parts + (i < chunks % parts) for i in range(parts)]
        rng.shuffle(lengths)
        return lengths
    cuts = sorted(rng.sample(range(1, chunks), parts - 1))
    return [b - a for a, b in pairwise([0, *cuts, chunks])]


def imperfect_plan(story: Story, rng: random.Random) -> list[Step]:
    """A well-formed plan whose timing, and sometimes order or division, is wrong."""
    opening, *prompts = describe_story(story)
    draw = rng.random()
    if len(prompts) > 1 and draw < MERGED_SHARE + SWAPPED_SHARE:
        i = rng.randrange(len(prompts) - 1)
        first, second = prompts[i : i + 2]
        merged = [f"{first[:-1]} and {second[0].lower()}{second[1:]}"]
        prompts[i : i + 2] = merged if draw < MERGED_SHARE else [second, first]
    head = 2 if len(prompts) <= CHUNKS - 2 and rng.random() < LONG_OPENING_SHARE else 1
    lengths = [head, *split_chunks(rng, CHUNKS - head, len(prompts))]
    bounds = [CHUNK * chunks for chunks in accumulate(lengths, initial=0)]
    return [Step(a, b, prompt) for (a, b), prompt in zip(pairwise(bounds), [opening, *prompts], strict=True)]


def draw_examples(seed: int, count: int, split: str = "train") -> list[Example]:
    """Examples of one split, the same for the same seed."""
    rng = random.Random(f"{seed}/{split}/plans")
    examples = []
    for events in rng.choices(list(EVENT_COUNTS), list(EVENT_COUNTS.values()), k=count):
        story = sample_story(rng, split, events)
        examples.append(Example(write_instruction(story, rng), plan_json(imperfect_plan(story, rng))))
    return examples


def fit_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer fitted to `texts`, with the chat template."""
    pieces = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw = fit_bpe(texts, pre_tokenizers.Sequence([pieces, letters]), VOCABULARY, [PAD, START, END])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=PAD, eos_token=END, additional_special_tokens=[START],
        model_max_length=CONTEXT, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def planner_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """A Qwen3 of about 0.9 M parameters."""
    return Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, attention_dropout=0.0,
    )  # fmt: skip


def token_table(
    tokenizer: PreTrainedTokenizerFast, rows: list[Example], length: int | None = None
) -> tuple[Tensor, Tensor]:
    """ids and labels [n, L] of prompt + response + end token, right-padded to the longest (or to `length`).

    Labels are IGNORED but on the response and its end token.
    """
    asked = [
        tokenizer.apply_chat_template(
            plan_messages(row.instruction, FRAMES, CHUNK), tokenize=False, add_generation_prompt=True
        )
        for row in rows
    ]
    prompts = tokenizer(asked, add_special_tokens=False)["input_ids"]
    responses = tokenizer([row.response for row in rows], add_special_tokens=False)["input_ids"]
    length = length or max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True)) + 1
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full_like(ids, IGNORED)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        learned = torch.tensor([*response, tokenizer.eos_token_id])
        end = len(prompt) + len(learned)
        ids[i, : len(prompt)] = torch.tensor(prompt)
        ids[i, len(prompt) : end] = labels[i, len(prompt) : end] = learned
    return ids, labels


class PlannerCourse(Course):
    """The planner's warm start, for the shared training loop; at this size compiling takes longer than it saves."""

    name, batch, learning_rate, ema = "planner", 256, 2e-3, 0.0
    modules: Qwen3ForCausalLM

    def __init__(self, seed: int, device: str, workers: int = 1, count: int = EXAMPLES):
        self.seed, self.device = seed, device
        rows = draw_parts(draw_examples, seed, count, PARTS, workers)
        fitted = rows[:TOKENIZER_EXAMPLES]
        chats = [f"{message['role']}\n" for message in plan_messages("", FRAMES, CHUNK)]
        self.tokenizer = fit_tokenizer([*chats, *(text for row in fitted for text in (row.instruction, row.response))])
        ids, labels = token_table(self.tokenizer, rows)
        self.ids, self.labels = ids.to(device), labels.to(device)
        torch.manual_seed(seed)
        self.modules = Qwen3ForCausalLM(planner_config(self.tokenizer)).to(device)

    def loss(self, generator: torch.Generator) -> Tensor:
        """Mean cross-entropy of response tokens."""
        rows = torch.randint(len(self.ids), (self.batch,), generator=generator, device=self.device)
        return cross_entropy(self.modules, self.ids[rows], self.labels[rows])

    def save(self, folder: Path) -> None:
        """Writes a Hugging Face folder."""
        self.modules.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def figures(self, folder: Path) -> dict[str, float]:
        """Figures on held-out instructions: `validation_loss`; shares of sampled plans that need no repair
        (`usable_as_written`), that are `unusable`, and that tell all events one by one in order (`as_told`; about 0.75
        of the supervised plans do)."""
        held_out = draw_examples(self.seed, VALIDATION_EXAMPLES, "validation")
        ids, labels = token_table(self.tokenizer, held_out)
        with torch.no_grad():
            loss = cross_entropy(self.modules, ids.to(self.device), labels.to(self.device)).item()
        settings = PlannerConfig(str(folder), LoraConfig(1, 1, ("q_proj",)), OptimConfig(lr=0.0), train=False)
        planner = Planner.load(folder, settings, FRAMES, CHUNK, device=self.device)
        prompts = [Prompt(str(i), row.instruction) for i, row in enumerate(held_out)]
        plans = planner.sample(prompts, 1, self.seed).plans
        told = [reference_plan(plan.instruction) for plan in plans]
        same = [[s.prompt for s in a.steps] == [s.prompt for s in b.steps] for a, b in zip(plans, told, strict=True)]
        return {
            "validation_loss": loss,
            "usable_as_written": sum(plan.format_score == 1.0 for plan in plans) / len(plans),
            "unusable": sum(UNUSABLE in plan.repairs for plan in plans) / len(plans),
            "as_told": sum(same) / len(plans),
        }


def cross_entropy(model: Qwen3ForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled tokens of ids, labels [n, L]; padding is on the right."""
    # no attention mask: a causal model never sees padding to its right
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
