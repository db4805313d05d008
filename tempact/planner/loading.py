"""Chat models and their tokenizers from Hugging Face folders, and what a prompt looks like to them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tempact.errors import UserError
from tempact.planner.parsing import THINK_END, THINK_START

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of the frozen weights; adapters are always fp32


def dtype_of(precision: str) -> torch.dtype:
    """Of the frozen weights; UserError for a name that is none."""
    if precision not in PRECISIONS:
        raise UserError(f"planner.precision: found {precision!r}; accepted: {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def load_chat_model(
    folder: Path, precision: str, device: str | torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model on `device`, with PyTorch's fused attention, and its tokenizer.

    Reads nothing but the folder: names on the hub are turned into folders before (`tempact.build`).
    Raises UserError for an unknown precision and for a folder that holds no readable causal LM.
    """
    dtype = dtype_of(precision)
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: no config.json there; accepted: a Hugging Face folder with a causal LM")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
    except Exception as error:  # a damaged folder raises whatever its reader does
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{folder}: not readable ({lines[0][:200]}); accepted: a causal LM") from error
    return model.to(device), tokenizer


def thought_length(tokenizer: PreTrainedTokenizerBase, response: list[int], *, opened: bool = False) -> int:
    """Tokens of a response through its last `</think>`, which are not part of the answer.

    0 where nothing was thought: no tag at all. The whole response where a thought begins and never ends (it was
    cut off), because it holds no answer. `opened` says that the prompt already ends with `<think>`.
    What is left is what `parsing.answer_of` reads.
    """
    closing = _single_token(tokenizer, THINK_END)
    if closing is None:
        end = _end_in_text(tokenizer, response)
    else:
        end = next((i + 1 for i in range(len(response) - 1, -1, -1) if response[i] == closing), 0)
    if end:
        return end
    unfinished = opened or THINK_START in tokenizer.decode(response)
    return len(response) if unfinished else 0


def opens_thought(prompt: str) -> bool:
    """Does the prompt end inside a thought, as those of models that always think?"""
    return prompt.rstrip().endswith(THINK_START)


def _single_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The id of the one token that this text is (151668 for Qwen3's `</think>`), None if it is several."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[0] if len(ids) == 1 and tokenizer.decode(ids) == text else None


def _end_in_text(tokenizer: PreTrainedTokenizerBase, response: list[int]) -> int:
    """The same for tokenizers that write the tag in several tokens; one that holds more counts as thought."""
    total = tokenizer.decode(response).count(THINK_END)
    low, high = 0, len(response)
    while low < high:  # the shortest beginning that has all the tags
        middle = (low + high) // 2
        if tokenizer.decode(response[:middle]).count(THINK_END) < total:
            low = middle + 1
        else:
            high = middle
    return low if total else 0
