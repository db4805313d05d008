"""Chat models for the planner: loading, log-probs from hidden states, and the extent of a thought in a response.

Qwen3 has 151,936 tokens: the fp32 logits of 2,024 positions take 1.2 GB a sequence, and their softmax and gradient
as much again. `chosen_log_probs` therefore makes logits for a chunk of positions at a time, in the forward and in the
backward pass.
"""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tempact.errors import UserError
from tempact.planner.plans import THINK_END, THINK_START

LOGITS_AT_ONCE = 2**27  # fp32 numbers, 0.5 GiB
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of the frozen weights; adapters are always fp32


def load_chat_model(
    folder: Path, precision: str, device: str | torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model on `device`, with PyTorch's fused attention, and its tokenizer.

    Reads local files only; `tempact.worlds` resolves names on the hub to folders. Raises UserError for a folder without
    a readable causal language model.
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


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raises UserError for a model whose logits are not its output layer's output (scaled or capped logits)."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    own = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(logits.float(), own.float(), rtol=1e-2, atol=1e-3):
        raise UserError(
            f"planner.weights: found {model.config.model_type}, whose logits are more than its head of its hidden "
            "states; accepted: models without scaled or capped logits, as Qwen3"
        )


def chosen_log_probs(head: nn.Module, hidden: Tensor, ids: Tensor, at_once: int = LOGITS_AT_ONCE) -> Tensor:
    """Log-softmax (temperature 1, computed in fp32) at the tokens `ids`: [n] fp32.

    Args:
        head: the output layer, from hidden states to logits.
        hidden: [n, width], states before the output layer.
        ids: [n] int64.
        at_once: logits that exist at a time, at least those of one position. The backward pass recomputes them.
    """
    assert isinstance(head.weight, Tensor)
    rows = max(1, at_once // len(head.weight))
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


def opens_thought(prompt: str) -> bool:
    """True where the prompt ends inside a thought, as the templates of models that always think do."""
    return prompt.rstrip().endswith(THINK_START)


def thought_length(tokenizer: PreTrainedTokenizerBase, response: list[int], *, opened: bool = False) -> int:
    """Number of tokens of `response` up to and including its last `</think>`; `plans.answer_of` reads the rest.

    0 for a response without a thought, all of the response for a thought without end (cut off, so without an answer).
    `opened`: the prompt already ends with `<think>`.
    """
    closing = tokenizer(THINK_END, add_special_tokens=False)["input_ids"]
    if len(closing) == 1 and tokenizer.decode(closing) == THINK_END:  # Qwen3 has a token of its own, 151668
        end = next((i for i in range(len(response), 0, -1) if response[i - 1] == closing[0]), 0)
    else:  # the tag in several tokens: the shortest beginning with all tags; a token that holds more counts as thought
        total = tokenizer.decode(response).count(THINK_END)
        beginnings = range(len(response))
        end = bisect_left(beginnings, total, key=lambda n: tokenizer.decode(response[:n]).count(THINK_END))
    if end:
        return end
    return len(response) if opened or THINK_START in tokenizer.decode(response) else 0
