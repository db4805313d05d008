"""Chat models for the planner: loading, log-probs from hidden states, and the extent of a thought in a response.

Qwen3 has 151,936 tokens: the fp32 logits of 2,024 positions take 1.2 GB a sequence, and their softmax and gradient
as much again. `chosen_log_probs` therefore makes logits for a chunk of positions at a time, in the forward and in the
backward pass.

Optional Liger kernels for the planner (`pip install -e '.[liger]'`): RMSNorm, SwiGLU, RoPE, fused GRPO loss.

The fused loss makes logits a block of the vocabulary at a time and computes its gradient in the forward pass. With
sequence-level importance sampling and a mean over each sequence it is GSPO (docs/algorithm.md 2.4).
`check_fused_loss` refuses versions of Liger that compute something else.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation import logits_process as scoring

from tempact.config import PlannerConfig
from tempact.errors import UserError
from tempact.planner.plans import THINK_END, THINK_START

log = logging.getLogger(__name__)

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


def plain_head(model: PreTrainedModel, targets: Sequence[str]) -> bool:
    """True where the head is a linear layer outside the adapter's targets (suffixes of module names)."""
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    reached = any(name == target or name.endswith(f".{target}") for name in names for target in targets)
    return type(head) is nn.Linear and not reached


def sampling_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: PlannerConfig
) -> GenerationConfig:
    """Sampling settings that inherit the end tokens alone: shipped settings cut the distribution (top-k 20)."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = tokenizer.eos_token_id if ends is None else ends
    if ends is None:
        raise UserError("planner.weights: no end token is named; accepted: a chat model that has one")
    ends = [ends] if isinstance(ends, int) else list(ends)
    pad = tokenizer.pad_token_id
    shipped = model.generation_config.to_diff_dict() if model.generation_config else {}
    ignored = {key: shipped[key] for key in ("temperature", "top_p", "top_k", "repetition_penalty") if key in shipped}
    if ignored:
        log.info("planner: shipped sampling settings are not used: %s", ignored)
    own = GenerationConfig(
        do_sample=True, temperature=config.temperature, top_p=config.top_p, top_k=config.top_k,
        max_new_tokens=config.max_new_tokens, eos_token_id=ends, pad_token_id=ends[0] if pad is None else pad,
    )  # fmt: skip
    model.generation_config = own  # generate() fills what it finds unset from there
    return own


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


def warpers(settings: GenerationConfig) -> scoring.LogitsProcessorList:
    """What temperature, top-k and top-p do to scores, in the order of `generate`; empty for the full distribution."""
    found = scoring.LogitsProcessorList()
    if settings.temperature != 1.0:
        found.append(scoring.TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        found.append(scoring.TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        found.append(scoring.TopPLogitsWarper(settings.top_p))
    return found


@contextmanager
def one_kernel_norms(model: PreTrainedModel) -> Iterator[None]:
    """Inside, on a GPU, a model's root-mean-square norms are torch's, a kernel each; transformers' are seven."""
    norms = [module for module in model.modules() if model.device.type == "cuda" and _plain_norm(module)]
    for module in norms:
        own: dict[str, Any] = {"weight": module.weight, "eps": module.variance_epsilon}
        module.forward = partial(F.rms_norm, normalized_shape=own["weight"].shape, **own)
    try:
        yield
    finally:
        for module in norms:
            del module.forward


def _plain_norm(module: nn.Module) -> bool:
    """Whether a module, by its names and by what it computes, is x / rms(x) * weight, and nothing has replaced it."""
    weight, eps = (getattr(module, name, None) for name in ("weight", "variance_epsilon"))
    named = type(module).__name__.endswith("RMSNorm") and eps is not None and "forward" not in vars(module)
    if not named or not isinstance(weight, Tensor) or weight.ndim != 1:
        return False
    x = torch.linspace(-2, 3, 2 * len(weight), device=weight.device, dtype=weight.dtype).view(2, -1)
    own, other = module(x), F.rms_norm(x, weight.shape, weight, eps)
    return bool((own - other).abs().max() <= 0.02 * own.abs().max())


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


NEEDED = ("beta", "epsilon_low", "epsilon_high", "loss_type", "importance_sampling_level", "use_ref_model", "compiled")


def choose(asked: str, plain: bool, device: torch.device) -> str:
    """The part of Liger in use: "off", "model" (kernels in the layers) or "all" (also the fused loss).

    Args:
        asked: `planner.liger`. "auto" is "off" without Liger or a CUDA device, else "all", or "model" with an adapter
            on the head.
        plain: the head is a linear layer without an adapter.
        device: the model's.

    Raises UserError for an unknown choice, a missing or unfit liger-kernel, and "all" with an adapter on the head.
    """
    installed = importlib.util.find_spec("liger_kernel") is not None
    if asked == "auto":
        asked = ("all" if plain else "model") if installed and device.type == "cuda" else "off"
    if asked == "off":
        return asked
    if not installed:
        raise UserError(
            f"planner.liger: found {asked!r} without liger-kernel; accepted here: auto, off, or any after "
            "pip install -e '.[liger]'"
        )
    if asked == "all":
        if not plain:
            raise UserError("planner.liger: found 'all' with an adapter on the head; accepted: auto, off, model")
        check_fused_loss()
    return asked


def use_kernels(model: PreTrainedModel) -> bool:
    """Puts Liger's RMSNorm, SwiGLU and RoPE into a Qwen3 on a CUDA device; returns False elsewhere."""
    if model.config.model_type != "qwen3" or model.device.type != "cuda":
        return False
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3
    from transformers.models.qwen3 import modeling_qwen3

    names = ("Qwen3RMSNorm", "Qwen3MLP", "apply_rotary_pos_emb")
    before = {name: getattr(modeling_qwen3, name) for name in names}
    apply_liger_kernel_to_qwen3(
        rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=model
    )
    fused_rope = modeling_qwen3.apply_rotary_pos_emb
    # Liger changes the module for the whole process; later models, and those on the CPU, keep their own
    for name in names:
        setattr(modeling_qwen3, name, before[name])
    modeling_qwen3.apply_rotary_pos_emb = _by_device(fused_rope, before["apply_rotary_pos_emb"])
    return True


def _by_device(fused: Callable, plain: Callable) -> Callable:
    if getattr(plain, "by_device", False):  # a second model in this process
        return plain

    def apply_rotary_pos_emb(q: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        return (fused if q.is_cuda else plain)(q, *args, **kwargs)

    apply_rotary_pos_emb.by_device = True  # type: ignore[attr-defined]
    return apply_rotary_pos_emb


def fused_gspo_loss(
    hidden: Tensor,
    head: nn.Linear,
    ids: Tensor,
    advantage: float,
    old: Tensor | None,
    reference_hidden: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_weight: float,
) -> Tensor:
    """GSPO loss of one sequence, a scalar with a gradient for `hidden` and none for the head.

    Args:
        hidden, reference_hidden: [n, width], states before the head at n counted tokens, of policy and reference.
        ids: [n] int64, the counted tokens. No token gives -advantage, the loss of ratio 1.
        old: [n] fp32 log-probs before the first update; None stands for the log-probs of `hidden`.
        clip_low, clip_high, kl_weight: as in `tempact.rl.gspo.gspo_loss`.
    """
    if not len(ids):
        return hidden.float().sum() - advantage  # an empty sum keeps the graph whole
    loss, _ = _loss_class()(
        beta=kl_weight, epsilon_low=clip_low, epsilon_high=clip_high, loss_type="grpo",
        importance_sampling_level="sequence", use_ref_model=kl_weight != 0, compiled=False,
    )(
        hidden[None], head.weight, ids[None], torch.ones(1, len(ids), device=hidden.device),
        torch.tensor([advantage], device=hidden.device), head.bias,
        old_per_token_logps=None if old is None else old[None],
        ref_input=reference_hidden[None] if kl_weight else None,
        ref_weight=head.weight if kl_weight else None,
        ref_bias=head.bias if kl_weight else None,
    )  # fmt: skip
    return loss


def _loss_class() -> type[nn.Module]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    return LigerFusedLinearGRPOLoss


def check_fused_loss() -> None:
    """Raises UserError if the installed fused loss lacks the sequence-level ratio, or takes the option and drops it.

    Older versions did one or the other. The test case is one sequence whose tokens' log-probs moved by different
    amounts: its loss is -advantage * exp(mean move).
    """
    found = f"planner.liger: found liger-kernel {version('liger-kernel')}, whose fused GRPO loss"
    accepted = "accepted: a newer liger-kernel, or --planner.liger model"
    missing = set(NEEDED) - inspect.signature(_loss_class().__init__).parameters.keys()
    if missing:
        raise UserError(f"{found} has no {', '.join(sorted(missing))}; {accepted}")
    generator = torch.Generator().manual_seed(0)
    head = nn.utils.skip_init(nn.Linear, 4, 8, bias=False).requires_grad_(False)  # draws nothing of the run's
    head.weight.copy_(torch.randn(8, 4, generator=generator))
    hidden, ids = torch.randn(3, 4, generator=generator), torch.tensor([1, 5, 2])
    log_probs = head(hidden).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    moves = torch.tensor([0.9, -0.2, -0.1])
    loss = fused_gspo_loss(
        hidden.requires_grad_(), head, ids, 1.0, log_probs - moves, hidden, clip_low=0.9, clip_high=0.9, kl_weight=0.0
    )
    if not math.isclose(loss.item(), -math.exp(moves.mean().item()), rel_tol=1e-4):
        raise UserError(f"{found} drops the sequence-level ratio; {accepted}")
