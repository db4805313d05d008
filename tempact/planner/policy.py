"""The planner policy: a causal language model with a trainable adapter and its frozen start.

Plans are sampled from the very distribution that log-probs are computed under (ALGORITHM.md decision 8):
temperature 1, top-p 1, no top-k; a planner that is trained refuses anything else.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tempact.config import PlannerConfig
from tempact.errors import UserError
from tempact.infra.adapters import freeze_reference, load_adapter, reference_active, save_adapter
from tempact.planner.parsing import THINK_END, parse_plan
from tempact.planner.prompting import plan_messages
from tempact.types import PlanBatch, PlanTokens, Prompt

LOSS_TOKENS = ("all", "json")


class Planner:
    """A chat model + LoRA ("default" trainable, "ref" frozen) that answers instructions with plans."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: PlannerConfig,
        frames: int,
        chunk: int,
        adapter: Path | None = None,
    ):
        """Plans of `frames` latent frames in chunks of `chunk`.

        `adapter` is a PEFT folder to start from; without it a fresh adapter, which changes nothing yet, is
        drawn from torch's global generator. The start is also the reference. Raises UserError for sampling
        settings that do not fit, a tokenizer without chat template or an adapter that does not fit.
        """
        _check(config, tokenizer)
        self.config, self.tokenizer, self.frames, self.chunk = config, tokenizer, frames, chunk
        lora = PeftLoraConfig(
            r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=list(config.lora.targets),
            task_type="CAUSAL_LM",
        )  # fmt: skip
        self.generation = _generation(model, tokenizer, config)
        try:
            self.peft = get_peft_model(model.requires_grad_(False), lora)
        except ValueError as error:
            targets = list(config.lora.targets)
            raise UserError(f"planner.lora.targets: found {targets}; accepted: module names of the planner") from error
        if adapter is not None:
            load_adapter(self.peft, adapter)
        freeze_reference(self.peft, lora)
        self.peft.eval()  # no dropout: the policy that samples is the one that is trained

    @classmethod
    def load(
        cls, folder: Path, config: PlannerConfig, frames: int, chunk: int, *, device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32, adapter: Path | None = None,
    ) -> Planner:  # fmt: skip
        """Reads model and tokenizer from a Hugging Face folder. Raises UserError if that cannot be read."""
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"{folder}: no config.json there; accepted: a Hugging Face folder with a causal LM")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: not readable ({str(error).splitlines()[0]}); accepted: a causal LM") from error
        return cls(model.to(device), tokenizer, config, frames, chunk, adapter)

    @property
    def device(self) -> torch.device:
        return self.peft.device

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable ones by name."""
        return {name: p for name, p in self.peft.named_parameters() if p.requires_grad}

    def save_adapter(self, folder: Path) -> None:
        """Writes the trained adapter as a PEFT folder."""
        save_adapter(self.peft, folder)

    def load_adapter(self, folder: Path) -> None:
        """Loads a PEFT folder into the trained adapter; the reference stays. Raises UserError if it does not fit."""
        load_adapter(self.peft, folder)

    def prompt_text(self, instruction: str) -> str:
        """What the model reads before it answers."""
        messages = plan_messages(instruction, self.frames, self.chunk)
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    @torch.no_grad()
    def sample(self, prompts: list[Prompt], plans_per_prompt: int, seed: int, *, reference: bool = False) -> PlanBatch:
        """`plans_per_prompt` plans for every prompt, all in one batch, the same for the same seed.

        Leaves the global random state as it was. `reference` samples from the frozen start.
        """
        ids = self.tokenizer([self.prompt_text(p.text) for p in prompts], add_special_tokens=False)["input_ids"]
        ids = [row for row in ids for _ in range(plans_per_prompt)]
        longest = max(map(len, ids))
        inputs = torch.full((len(ids), longest), self.generation.pad_token_id)
        mask = torch.zeros_like(inputs)
        for row, own in enumerate(ids):
            inputs[row, longest - len(own) :] = torch.tensor(own)
            mask[row, longest - len(own) :] = 1
        with _seeded(seed, self.device), self._policy(reference):
            out = self.peft.generate(
                input_ids=inputs.to(self.device), attention_mask=mask.to(self.device), generation_config=self.generation
            )
        responses = [self._until_end(row) for row in out[:, longest:].tolist()]
        ends = self.generation.eos_token_id
        bare = [response[:-1] if response[-1] in ends else response for response in responses]
        texts = [self.tokenizer.decode(response, clean_up_tokenization_spaces=False) for response in bare]
        asked = [prompt.text for prompt in prompts for _ in range(plans_per_prompt)]
        plans = [parse_plan(text, own, self.frames, self.chunk) for text, own in zip(texts, asked, strict=True)]
        return PlanBatch(prompts, plans, plans_per_prompt, self.tokens(ids, responses))

    def log_probs(self, tokens: PlanTokens, *, reference: bool = False) -> Tensor:
        """Log-softmax (temperature 1) of every counted token given what precedes it: [P, L] fp32.

        Zero where `tokens.response_mask` is False. `reference` computes the frozen start's.
        Logits are made from the first counted token on only, and their fp32 copies are made row by row
        and again in the backward pass, because [P, L, vocabulary] in fp32 would be most of the memory.
        """
        ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
        counted = tokens.response_mask.to(self.device)
        length = ids.shape[1]
        used = counted.any(0).nonzero()
        first = max(1, int(used[0])) if len(used) else length - 1
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)  # a shift by left padding changes nothing
        with self._policy(reference):
            logits = self.peft(
                input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False,
                logits_to_keep=length - first + 1,
            ).logits[:, -(length - first + 1) : -1]  # fmt: skip
        rows = [
            checkpoint(_chosen_log_probs, *pair, use_reentrant=False, preserve_rng_state=False)
            for pair in zip(logits, ids[:, first:], strict=True)
        ]
        log_probs = torch.cat([logits.new_zeros(len(ids), first, dtype=torch.float32), torch.stack(rows)], dim=1)
        return log_probs.masked_fill(~counted, 0.0)

    def _policy(self, reference: bool) -> AbstractContextManager[None]:
        return reference_active(self.peft) if reference else nullcontext()

    def _until_end(self, response: list[int]) -> list[int]:
        """The response up to and with its end token; all of it when it was cut off."""
        ends = self.generation.eos_token_id
        stop = next((i for i, token in enumerate(response) if token in ends), len(response) - 1)
        return response[: stop + 1]

    def tokens(self, prompts: list[list[int]], responses: list[list[int]]) -> PlanTokens:
        """Token ids of prompts and their responses as a right-padded batch; `config.loss_tokens` says what counts."""
        shape = len(prompts), max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
        ids = torch.full(shape, self.generation.pad_token_id)
        attention, counted = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            end = len(prompt) + len(response)
            ids[row, :end] = torch.tensor([*prompt, *response])
            attention[row, :end] = True
            thought = thought_length(self.tokenizer, response) if self.config.loss_tokens == "json" else 0
            counted[row, len(prompt) + thought : end] = True
        return PlanTokens(*(x.to(self.device) for x in (ids, attention, counted)))


def thought_length(tokenizer: PreTrainedTokenizerBase, response: list[int]) -> int:
    """Tokens of a response through its last `</think>`; 0 without that tag: then there is nothing to leave out.

    Found in the decoded text, so it holds for tokenizers that write the tag in several tokens; a token that
    holds the tag's end and more counts as thought.
    """

    def tags(length: int) -> int:
        return tokenizer.decode(response[:length]).count(THINK_END)

    total = tags(len(response))
    return bisect_left(range(len(response) + 1), total, key=tags)


def _chosen_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """logits [L, vocabulary], ids [L]; fp32 [L]."""
    logits = logits.float()
    return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Global generators start from `seed` inside and are put back afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: PlannerConfig) -> GenerationConfig:
    """Sampling settings that inherit nothing but the end tokens: shipped ones cut the distribution (top-k 20)."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = tokenizer.eos_token_id if ends is None else ends
    if ends is None:
        raise UserError("planner.weights: no end token is named; accepted: a chat model that has one")
    ends = [ends] if isinstance(ends, int) else list(ends)
    pad = tokenizer.pad_token_id
    own = GenerationConfig(
        do_sample=True, temperature=config.temperature, top_p=config.top_p, top_k=config.top_k,
        max_new_tokens=config.max_new_tokens, eos_token_id=ends, pad_token_id=ends[0] if pad is None else pad,
    )  # fmt: skip
    model.generation_config = own  # generate() fills what it finds unset from there
    return own


def _check(config: PlannerConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    full = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    for key, value in full.items():
        found = getattr(config, key)
        if config.train and found != value:
            raise UserError(
                f"planner.{key}: found {found}; accepted: {value} where the planner is trained, because log-probs are"
                " those of the full distribution"
            )
    ranges = {"temperature": config.temperature > 0, "top_p": 0 < config.top_p <= 1, "top_k": config.top_k >= 0}
    accepted = {"temperature": "above 0", "top_p": "above 0, at most 1", "top_k": "0 (off) or more"}
    for key, good in ranges.items():
        if not good:
            raise UserError(f"planner.{key}: found {getattr(config, key)}; accepted: {accepted[key]}")
    if config.loss_tokens not in LOSS_TOKENS:
        raise UserError(f"planner.loss_tokens: found {config.loss_tokens!r}; accepted: {', '.join(LOSS_TOKENS)}")
    if not tokenizer.chat_template:
        raise UserError("planner.weights: the tokenizer has no chat template; accepted: a chat model")
