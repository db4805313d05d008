"""Supervised warm start of ShapeWorld's planner on the imperfect plans of `planner_data.py`."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from tempact.config import LoraConfig, OptimConfig, PlannerConfig
from tempact.planner.parsing import UNUSABLE
from tempact.planner.policy import Planner
from tempact.planner.prompting import plan_messages
from tempact.shapeworld.grammar import reference_plan
from tempact.shapeworld.planner_data import Example, draw_examples, fit_tokenizer, planner_config
from tempact.shapeworld.story import CHUNK, FRAMES
from tempact.shapeworld.training import Course, train
from tempact.types import Prompt

EXAMPLES = 120_000
TOKENIZER_EXAMPLES = 4_000
PARTS = 60  # seeds the examples are drawn from, whatever the number of workers
VALIDATION_EXAMPLES = 512
IGNORED = -100  # label of a token that is not learned


def examples(seed: int, count: int, workers: int) -> list[Example]:
    """`count` training examples; the same for the same seed and count, whatever the number of workers."""
    draw = partial(draw_examples, count=-(-count // PARTS))
    seeds = [seed * 1_000_003 + part for part in range(PARTS)]
    if workers < 2:
        parts = list(map(draw, seeds))
    else:
        with ProcessPoolExecutor(workers) as pool:
            parts = list(pool.map(draw, seeds))
    return [example for part in parts for example in part][:count]


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
    """What the shared training loop needs to know about the planner."""

    name, batch, learning_rate, ema = "planner", 256, 2e-3, 0.0
    modules: Qwen3ForCausalLM

    def __init__(self, seed: int, device: str, workers: int = 1, count: int = EXAMPLES):
        self.seed, self.device = seed, device
        rows = examples(seed, count, workers)
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

    def compile(self) -> None:
        """Nothing: at this size compiling takes longer than it saves."""

    def save(self, folder: Path) -> None:
        """Writes a Hugging Face folder."""
        self.modules.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def cross_entropy(model: Qwen3ForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled tokens of ids, labels [n, L]; padding is on the right."""
    # no attention mask: what is causal never sees padding to its right
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def train_planner(
    out: Path, steps: int, seed: int, device: str, resume: bool, workers: int = 1, count: int = EXAMPLES
) -> dict[str, float]:
    """Trains the planner into the Hugging Face folder `out`.

    Returns what the training loop tells, and of held-out instructions: `validation_loss`; `usable_as_written`,
    the share of sampled plans that need no repair; `unusable`; `as_told`, the share that tells all events
    one by one in order (the supervised plans: about 0.75).
    """
    course = PlannerCourse(seed, device, workers, count)
    told = train(course, out, steps, resume=resume)
    held_out = draw_examples(seed, VALIDATION_EXAMPLES, "validation")
    ids, labels = token_table(course.tokenizer, held_out)
    with torch.no_grad():
        told["validation_loss"] = cross_entropy(course.modules, ids.to(device), labels.to(device)).item()
    return told | sample_shares(out, [row.instruction for row in held_out], seed, device)


def sample_shares(folder: Path, instructions: list[str], seed: int, device: str) -> dict[str, float]:
    """How the planner in `folder` answers: shares of plans usable as written, unusable, and as told."""
    settings = PlannerConfig(str(folder), LoraConfig(1, 1, ("q_proj",)), OptimConfig(lr=0.0), train=False)
    planner = Planner.load(folder, settings, FRAMES, CHUNK, device=device)
    prompts = [Prompt(str(i), text) for i, text in enumerate(instructions)]
    plans = planner.sample(prompts, 1, seed).plans
    as_told = [
        [s.prompt for s in plan.steps] == [s.prompt for s in reference_plan(plan.instruction).steps] for plan in plans
    ]
    return {
        "usable_as_written": sum(plan.format_score == 1.0 for plan in plans) / len(plans),
        "unusable": sum(UNUSABLE in plan.repairs for plan in plans) / len(plans),
        "as_told": sum(as_told) / len(plans),
    }
