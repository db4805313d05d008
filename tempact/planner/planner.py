"""The planner policy: a causal language model with a trainable adapter and its frozen start.

Plans are sampled from the very distribution that log-probs are computed under (ALGORITHM.md decision 8):
temperature 1, top-p 1, no top-k; a planner that is trained refuses anything else.

Sequences are sampled with padding on the left and trained with padding on the right. The update goes through
them a micro-batch at a time and never holds the logits of whole sequences.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from tempact.config import PlannerConfig
from tempact.errors import UserError
from tempact.models.adapters import freeze_reference, load_adapter, reference_active, save_adapter
from tempact.planner import liger
from tempact.planner.language_model import check_head, chosen_log_probs, load_chat_model, opens_thought, thought_length
from tempact.planner.plans import THINK_START, parse_plan, plan_messages
from tempact.rl.gspo import gspo_loss
from tempact.types import Batch, PlanBatch, PlanTokens, Prompt

log = logging.getLogger(__name__)


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
        drawn from torch's global generator. The start is also the reference. Raises UserError for a tokenizer without
        chat template and for an adapter that does not fit.
        """
        if not tokenizer.chat_template:
            raise UserError("planner.weights: the tokenizer has no chat template; accepted: a chat model")
        self.config, self.tokenizer, self.frames, self.chunk = config, tokenizer, frames, chunk
        lora = PeftLoraConfig(
            r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=list(config.lora.targets),
            task_type="CAUSAL_LM",
        )  # fmt: skip
        self.generation = _generation(model, tokenizer, config)
        serves = liger.choose(config.liger, _plain_head(model, config.lora.targets), model.device)
        if serves != "off":
            kernels = liger.use_kernels(model)
            log.info("planner: Liger's kernels: %s, its fused loss: %s", kernels, serves == "all")
        try:
            self.peft = get_peft_model(model.requires_grad_(False), lora)
        except ValueError as error:
            targets = list(config.lora.targets)
            raise UserError(f"planner.lora.targets: found {targets}; accepted: module names of the planner") from error
        if adapter is not None:
            load_adapter(self.peft, adapter)
        freeze_reference(self.peft, lora)
        self.peft.eval()  # no dropout: the policy that samples is the one that is trained
        check_head(model)
        self.head = model.get_output_embeddings()
        self.fused_loss = serves == "all"
        if config.checkpoint_activations:
            # early versions of transformers 5 have only the second name, later ones warn of it and v6 drops it
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    @classmethod
    def load(
        cls, folder: Path, config: PlannerConfig, frames: int, chunk: int, *, device: str | torch.device = "cpu",
    ) -> Planner:  # fmt: skip
        """Model and tokenizer from a Hugging Face folder, `config.adapter` on top.

        Raises UserError as `load_chat_model` and the constructor do.
        """
        model, tokenizer = load_chat_model(folder, config.precision, device)
        return cls(model, tokenizer, config, frames, chunk, Path(config.adapter) if config.adapter else None)

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
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=self.config.thinking
        )

    @torch.no_grad()
    def sample(self, prompts: list[Prompt], plans_per_prompt: int, seed: int, *, reference: bool = False) -> PlanBatch:
        """`plans_per_prompt` plans for every prompt, the same for the same seed and `sampled_together`.

        Leaves the global random state as it was. `reference` samples from the frozen start.
        """
        asking = [self.prompt_text(p.text) for p in prompts]
        opening = THINK_START if opens_thought(asking[0]) else ""
        ids = self.tokenizer(asking, add_special_tokens=False)["input_ids"]
        ids = [row for row in ids for _ in range(plans_per_prompt)]
        longest = max(map(len, ids))
        inputs = torch.full((len(ids), longest), self.generation.pad_token_id)
        mask = torch.zeros_like(inputs)
        for row, own in enumerate(ids):
            inputs[row, longest - len(own) :] = torch.tensor(own)
            mask[row, longest - len(own) :] = 1
        size = self.config.sampled_together or len(ids)
        responses: list[list[int]] = []
        with _seeded(seed, self.device), self._policy(reference), self._autocast():
            for own, seen in zip(inputs.to(self.device).split(size), mask.to(self.device).split(size), strict=True):
                out = self.peft.generate(input_ids=own, attention_mask=seen, generation_config=self.generation)
                responses += [self._until_end(row) for row in out[:, longest:].tolist()]
        ends = self.generation.eos_token_id
        bare = [response[:-1] if response[-1] in ends else response for response in responses]
        texts = [opening + self.tokenizer.decode(response, clean_up_tokenization_spaces=False) for response in bare]
        asked = [prompt.text for prompt in prompts for _ in range(plans_per_prompt)]
        plans = [parse_plan(text, own, self.frames, self.chunk) for text, own in zip(texts, asked, strict=True)]
        return PlanBatch(prompts, plans, plans_per_prompt, self.tokens(ids, responses))

    def log_probs(self, tokens: PlanTokens, *, reference: bool = False) -> Tensor:
        """Log-softmax (temperature 1) of every counted token given what precedes it: [P, L] fp32.

        Zero where `tokens.response_mask` is False. `reference` computes the frozen start's. Without gradients
        this goes by micro-batches; what needs gradients is split by its caller.
        """
        size = self.config.micro_batch or len(tokens.input_ids)
        if not torch.is_grad_enabled() and size < len(tokens.input_ids):
            parts = torch.arange(len(tokens.input_ids)).split(size)
            return torch.cat([self.log_probs(tokens.select(part.tolist()), reference=reference) for part in parts])
        return self._head_log_probs(self._hidden(tokens, reference), tokens)

    def _head_log_probs(self, hidden: Tensor, tokens: PlanTokens) -> Tensor:
        """Of the counted tokens, from hidden [P, L, width]; zero elsewhere."""
        rows, columns = _counted(tokens, self.device)
        ids = tokens.input_ids.to(self.device)[rows, columns]
        with self._autocast():
            found = chosen_log_probs(self.head, hidden[rows, columns - 1], ids)
        return torch.zeros(tokens.input_ids.shape, device=self.device).index_put((rows, columns), found)

    def update(self, batch: Batch, plans: list[int], old: Tensor | None) -> dict[str, float]:
        """Adds the gradient of the GSPO loss over `plans` (rows of the batch) to the trained adapter's.

        `old` [len(plans), L] are log-probs before the first of several updates; None says that this is the first,
        and the ratio is exactly 1. Returns the metrics of `gspo_loss`, or none where no plan could be scored.
        """
        assert batch.tokens is not None
        config, scored = self.config, [i for i, plan in enumerate(plans) if batch.plan_mask[plan]]
        if not scored:
            return {}
        size = config.micro_batch or len(scored)
        if size < len(scored):  # plans of like length, so that little is padding
            lengths = batch.tokens.attention_mask.sum(1).tolist()
            scored.sort(key=lambda i: lengths[plans[i]])
        shares: list[dict[str, float]] = []
        for first in range(0, len(scored), size):
            rows = scored[first : first + size]
            tokens = trimmed(batch.tokens.select([plans[i] for i in rows]))
            advantage = batch.plan_advantage[[plans[i] for i in rows]]
            before = None if old is None else old[rows, : tokens.input_ids.shape[1]]
            loss, metrics = (self._fused if self.fused_loss else self._eager)(tokens, advantage, before, len(scored))
            loss.backward()
            shares.append(metrics)
        return {name: math.fsum(share[name] for share in shares) for share in shares[:1] for name in share}

    def _eager(
        self, tokens: PlanTokens, advantage: Tensor, old: Tensor | None, terms: int
    ) -> tuple[Tensor, dict[str, float]]:
        """The share of a micro-batch in the update's loss and metrics."""
        with torch.no_grad():
            reference = self.log_probs(tokens, reference=True)
        log_probs = self.log_probs(tokens)
        return self._gspo(log_probs, log_probs.detach() if old is None else old, reference, tokens, advantage, terms)

    def _fused(
        self, tokens: PlanTokens, advantage: Tensor, old: Tensor | None, terms: int
    ) -> tuple[Tensor, dict[str, float]]:
        """The same with Liger's fused loss, whose ratios and divergences the metrics are not taken from.

        It averages them over tokens, and has no ratio to show.
        """
        with torch.no_grad():
            start = self._hidden(tokens, reference=True)
        hidden = self._hidden(tokens, reference=False)
        rows, columns = _counted(tokens, self.device)
        ids = tokens.input_ids.to(self.device)
        settings = {key: getattr(self.config, key) for key in ("clip_low", "clip_high", "kl_weight")}
        losses = []
        with self._autocast():
            for row, worth in enumerate(advantage.tolist()):
                own = columns[rows == row]
                states, first = (x[row, own - 1] for x in (hidden, start))
                was = None if old is None else old[row, own].float()
                losses.append(liger.fused_gspo_loss(states, self.head, ids[row, own], worth, was, first, **settings))
        loss = torch.stack(losses).sum() / terms
        with torch.no_grad():
            new, reference = (self._head_log_probs(states, tokens) for states in (hidden, start))
            _, metrics = self._gspo(new, new if old is None else old, reference, tokens, advantage, terms)
        return loss, metrics | {"loss": loss.item()}

    def _gspo(
        self, log_probs: Tensor, old: Tensor, reference: Tensor, tokens: PlanTokens, advantage: Tensor, terms: int
    ) -> tuple[Tensor, dict[str, float]]:
        config, every = self.config, torch.ones(len(advantage), dtype=torch.bool)
        return gspo_loss(
            log_probs, old, reference, tokens.response_mask, advantage, every, clip_low=config.clip_low,
            clip_high=config.clip_high, kl_weight=config.kl_weight, terms=terms,
        )  # fmt: skip

    def _hidden(self, tokens: PlanTokens, reference: bool) -> Tensor:
        """States before the head, [P, L, width]."""
        ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
        body = self.peft.get_base_model().base_model
        where: dict[str, Tensor] = {}
        # what is causal never sees padding to its right, and flash attention takes no mask
        if body.dtype == torch.float32 or not bool(mask[:, 0].all()):
            positions = (mask.long().cumsum(1) - 1).clamp_min(0)  # a shift by left padding changes nothing
            where = {"attention_mask": mask.long(), "position_ids": positions}
        with self._policy(reference), self._autocast(), self._checkpointing():
            return body(input_ids=ids, use_cache=False, **where).last_hidden_state

    def _autocast(self) -> AbstractContextManager[None]:
        """The adapter's fp32 weights are used in the precision of the model's."""
        if self.peft.get_base_model().dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Inside, decoder layers are recomputed in the backward pass, if so configured."""
        # transformers does so in training mode only, but all that lies inside the layers stays without dropout
        layers = [m for m in self.peft.modules() if isinstance(m, GradientCheckpointingLayer)]
        active = self.config.checkpoint_activations and torch.is_grad_enabled()
        for layer in layers:
            layer.training = active
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    def _policy(self, reference: bool) -> AbstractContextManager[None]:
        return reference_active(self.peft) if reference else nullcontext()

    def _until_end(self, response: list[int]) -> list[int]:
        """The response up to and with its end token; all of it when it was cut off."""
        ends = self.generation.eos_token_id
        stop = next((i for i, token in enumerate(response) if token in ends), len(response) - 1)
        return response[: stop + 1]

    def _thought(self, prompt: list[int], response: list[int]) -> int:
        opened = opens_thought(self.tokenizer.decode(prompt[-8:]))
        return thought_length(self.tokenizer, response, opened=opened)

    def tokens(self, prompts: list[list[int]], responses: list[list[int]]) -> PlanTokens:
        """Token ids of prompts and their responses as a right-padded batch; `config.loss_tokens` says what counts."""
        shape = len(prompts), max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
        ids = torch.full(shape, self.generation.pad_token_id)
        attention, counted = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            end = len(prompt) + len(response)
            ids[row, :end] = torch.tensor([*prompt, *response])
            attention[row, :end] = True
            thought = self._thought(prompt, response) if self.config.loss_tokens == "json" else 0
            counted[row, len(prompt) + thought : end] = True
        return PlanTokens(*(x.to(self.device) for x in (ids, attention, counted)))


def _plain_head(model: PreTrainedModel, targets: Sequence[str]) -> bool:
    """Is the head a linear layer that none of the adapter's targets (suffixes of module names) reaches?"""
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    reached = any(name == target or name.endswith(f".{target}") for name in names for target in targets)
    return type(head) is nn.Linear and not reached


def trimmed(tokens: PlanTokens) -> PlanTokens:
    """The same sequences without columns that are padding in all of them, at the right."""
    length = int(tokens.attention_mask.any(0).nonzero()[-1]) + 1
    return PlanTokens(tokens.input_ids[:, :length], tokens.attention_mask[:, :length], tokens.response_mask[:, :length])


def _counted(tokens: PlanTokens, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of the counted tokens; the first token of a sequence has nothing before it to predict it."""
    rows, columns = tokens.response_mask[:, 1:].nonzero(as_tuple=True)
    return rows.to(device), columns.to(device) + 1


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
