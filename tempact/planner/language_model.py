"""Log-probs of chosen tokens from hidden states, without the logits of a whole sequence.

Qwen3 has 151,936 tokens: the fp32 logits of 2,024 positions are 1.2 GB a sequence, and their softmax and
gradient as much again. Here they exist for a chunk of positions at a time, in the forward and in the backward pass.

Chat models and their tokenizers from Hugging Face folders, and what a prompt looks like to them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tempact.errors import UserError
from tempact.planner.plans import THINK_END, THINK_START

LOGITS_AT_ONCE = 2**27  # fp32 numbers, 0.5 GiB


def chosen_log_probs(head: nn.Module, hidden: Tensor, ids: Tensor, at_once: int = LOGITS_AT_ONCE) -> Tensor:
    """Log-softmax (temperature 1) at `ids`: fp32 [n].

    hidden [n, width], ids [n]; `head` maps hidden states to logits. The softmax is in fp32; at most
    `at_once` logits (one position's at the least) exist at a time, and they are computed again for the gradient.
    """
    rows = max(1, at_once // vocabulary(head))
    chunks = [
        checkpoint(_chunk, head, *pair, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else _chunk(head, *pair)
        for pair in zip(hidden.split(rows), ids.split(rows), strict=True)
    ]
    return torch.cat(chunks)


def _chunk(head: nn.Module, hidden: Tensor, ids: Tensor) -> Tensor:
    logits = head(hidden).float()
    return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)


def vocabulary(head: nn.Module) -> int:
    """Number of logits a position has."""
    weight = head.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raises UserError for a model that does more to its logits than its head (scales or caps them)."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    own = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(logits.float(), own.float(), rtol=1e-2, atol=1e-3):
        raise UserError(
            f"planner.weights: found {model.config.model_type}, whose logits are more than its head of its hidden "
            "states; accepted: models without scaled or capped logits, as Qwen3"
        )


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of the frozen weights; adapters are always fp32


def load_chat_model(
    folder: Path, precision: str, device: str | torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model on `device`, with PyTorch's fused attention, and its tokenizer.

    Reads nothing but the folder: names on the hub are turned into folders before (`tempact.worlds`).
    Raises UserError for a folder that holds no readable causal LM.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: no config.json there; accepted: a Hugging Face folder with a causal LM")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[precision], attn_implementation="sdpa", local_files_only=True
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
