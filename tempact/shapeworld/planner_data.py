"""What ShapeWorld's planner starts from: a tokenizer, a small Qwen3 and supervised plans.

The plans are imperfect on purpose, so that learning has something to find: spans do not depend on how long
an event takes, some plans tell two events in one step, some tell two in the wrong order. What they say is
right, and so is their form.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from tempact.planner.prompting import plan_json
from tempact.shapeworld.grammar import describe_event, describe_scene, sample_story, write_instruction
from tempact.shapeworld.story import CHUNK, CHUNKS, Story, states
from tempact.types import Step

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


@dataclass(frozen=True)
class Example:
    """An instruction and the response that warm-starts the planner on it."""

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
    prompts = [describe_event(scene, event) for scene, event in zip(states(story)[:-1], story.events, strict=True)]
    draw = rng.random()
    if len(prompts) > 1 and draw < MERGED_SHARE + SWAPPED_SHARE:
        i = rng.randrange(len(prompts) - 1)
        first, second = prompts[i : i + 2]
        merged = [f"{first[:-1]} and {second[0].lower()}{second[1:]}"]
        prompts[i : i + 2] = merged if draw < MERGED_SHARE else [second, first]
    opening = 2 if len(prompts) <= CHUNKS - 2 and rng.random() < LONG_OPENING_SHARE else 1
    lengths = [opening, *split_chunks(rng, CHUNKS - opening, len(prompts))]
    bounds = [CHUNK * chunks for chunks in accumulate(lengths, initial=0)]
    prompts = [describe_scene(story.entities), *prompts]
    return [Step(a, b, prompt) for (a, b), prompt in zip(pairwise(bounds), prompts, strict=True)]


def draw_examples(seed: int, count: int, split: str = "train") -> list[Example]:
    """Examples of one split, the same for the same seed."""
    rng = random.Random(f"{seed}/{split}/plans")
    examples = []
    for events in rng.choices(list(EVENT_COUNTS), list(EVENT_COUNTS.values()), k=count):
        story = sample_story(rng, split, events)
        examples.append(Example(write_instruction(story, rng), plan_json(imperfect_plan(story, rng))))
    return examples


def fit_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (any text can be written) whose pieces are those of `texts`."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PAD, START, END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator(texts, trainer)
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
