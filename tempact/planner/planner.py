"""The planner policy: a causal language model with a trainable adapter and a frozen copy of the adapter's start.

Log-probs are those of the distribution that plans are sampled from (docs/algorithm.md decision 8): temperature 1,
top-p 1, no top-k. A planner in training refuses other settings.

Sequences are sampled without padding (`decode`) and trained with padding on the right. The update goes by micro-batches
and never holds the logits of whole sequences.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from tempact.config import PlannerConfig
from tempact.distributed import Ranks
from tempact.distributed.reduction import Gradient, UpdateSum
from tempact.distributed.watch import moved
from tempact.errors import Aborted, UserError
from tempact.models.adapters import adapted, lean_adapters, load_adapter, reference_active, save_adapter
from tempact.models.wan.checkpoints.files import visiting
from tempact.planner import decode
from tempact.planner import language_model as liger
from tempact.planner.decode import Response
from tempact.planner.language_model import (
    check_head,
    chosen_log_probs,
    load_chat_model,
    one_kernel_norms,
    opens_thought,
    plain_head,
    sampling_settings,
    thought_length,
)
from tempact.planner.plans import THINK_START, parse_plan, plan_messages, uniform_spans
from tempact.rl.importance import importance_weights
from tempact.rl.planner_losses import LOSSES
from tempact.seeds import derive_seed
from tempact.types import Batch, PlanBatch, PlanTokens, Prompt

log = logging.getLogger(__name__)

Responder = Callable[[Sequence[Sequence[int]], Sequence[int]], list[Response]]  # to prompts, token ids, from seeds


class Planner:
    """A chat model with LoRA ("default" trainable, "ref" frozen) that answers instructions with plans."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: PlannerConfig,
        frames: int,
        chunk: int,
        adapter: Path | None = None,
    ):
        """Args:
            model, tokenizer: of a chat model, as `load_chat_model` gives them.
            frames, chunk: latent frames of a plan and of a chunk.
            adapter: PEFT folder of the start, also the reference. None: a fresh adapter without effect, drawn from
                torch's global generator.

        Raises UserError for a tokenizer without chat template and an adapter that does not fit.
        """
        if not tokenizer.chat_template:
            raise UserError("planner.weights: the tokenizer has no chat template; accepted: a chat model")
        self.config, self.tokenizer, self.frames, self.chunk = config, tokenizer, frames, chunk
        lora = PeftLoraConfig(
            r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=list(config.lora.targets),
            task_type="CAUSAL_LM",
        )  # fmt: skip
        self.generation = sampling_settings(model, tokenizer, config)
        serves = liger.choose(config.liger, plain_head(model, config.lora.targets), model.device)
        if serves != "off":
            kernels = liger.use_kernels(model)
            log.info("planner: Liger's kernels: %s, its fused loss: %s", kernels, serves == "all")
        self.peft = adapted(model, lora, "planner", adapter)
        self.peft.eval()  # no dropout: the policy that samples is the one that is trained
        check_head(model)
        self.stepwise = decode.steps(model, self.generation)
        self.head = model.get_output_embeddings()
        self.fused_loss = serves == "all" and config.loss == "gspo"
        self.waiting: list[Tensor] = []  # frozen weights, while the planner is not asked
        if config.offload and self.device.type == "cuda":
            self.waiting = [p for name, p in self.peft.named_parameters() if ".lora_" not in name]
        for weight in self.waiting:
            weight.data = weight.data.cpu().pin_memory()
        if config.checkpoint_activations:
            # early versions of transformers 5 have only the second name, later ones warn of it and v6 drops it
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    @classmethod
    def load(
        cls, folder: Path, config: PlannerConfig, frames: int, chunk: int, *, device: str | torch.device = "cpu",
    ) -> Planner:  # fmt: skip
        """A planner from a Hugging Face folder and the adapter `config.adapter`.

        Raises UserError as `load_chat_model` and the constructor do.
        """
        model, tokenizer = load_chat_model(folder, config.precision, device)
        return cls(model, tokenizer, config, frames, chunk, Path(config.adapter) if config.adapter else None)

    @property
    def device(self) -> torch.device:
        """Where it computes; weights may wait elsewhere."""
        return next(parameter.device for parameter in self.peft.parameters() if parameter.requires_grad)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name."""
        return {name: p for name, p in self.peft.named_parameters() if p.requires_grad}

    def save_adapter(self, folder: Path) -> None:
        """Writes the trained adapter as a PEFT folder."""
        save_adapter(self.peft, folder)

    def load_adapter(self, folder: Path) -> None:
        """Loads a PEFT folder into the trained adapter, not the reference. Raises UserError if it does not fit."""
        load_adapter(self.peft, folder)

    def prompt_text(self, instruction: str) -> str:
        """The model's input for an instruction: the chat as the tokenizer's template writes it."""
        messages = plan_messages(instruction, self.frames, self.chunk)
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=self.config.thinking
        )

    def prompt_ids(self, instruction: str) -> list[int]:
        """The tokens of `prompt_text`."""
        return self.tokenizer(self.prompt_text(instruction), add_special_tokens=False)["input_ids"]

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the head knows."""
        assert isinstance(self.head.weight, Tensor)
        return len(self.head.weight)

    @torch.no_grad()
    def sample(
        self,
        prompts: list[Prompt],
        plans_per_prompt: int,
        seed: int,
        *,
        reference: bool = False,
        ranks: Ranks | None = None,
        respond: Responder | None = None,
    ) -> PlanBatch:
        """Samples `plans_per_prompt` plans a prompt; plan m of prompts[b] depends on (seed, b, m) and its prompt alone.

        Leaves the global random state as it was. `reference` samples from the frozen start. ranks: each samples its
        share, and all of them get all plans. respond: samples in place of this planner's own `respond`.
        """
        ranks, respond = ranks or Ranks(), respond or partial(self.respond, reference=reference)
        opening = THINK_START if opens_thought(self.prompt_text(prompts[0].text)) else ""
        asked, seeds = self.requests(prompts, plans_per_prompt, seed)
        own = ranks.share(len(asked))
        mine = partial(respond, asked[own.start : own.stop], seeds[own.start : own.stop])
        responses = [response for of_rank in ranks.agreed(mine, Aborted) for response in of_rank]
        plans = []
        for p, (tokens, _) in enumerate(responses):
            bare = tokens[:-1] if tokens[-1] in self.generation.eos_token_id else tokens
            text = opening + self.tokenizer.decode(bare, clean_up_tokenization_spaces=False)
            plan = parse_plan(text, prompts[p // plans_per_prompt].text, self.frames, self.chunk)
            plans.append(uniform_spans(plan, self.chunk) if self.config.spans == "uniform" else plan)
        return PlanBatch(prompts, plans, plans_per_prompt, self.tokens(asked, responses))

    def requests(self, prompts: list[Prompt], plans_per_prompt: int, seed: int) -> tuple[list[list[int]], list[int]]:
        """Token ids and seeds of what `sample` asks for, by plan."""
        asked = [ids for ids in (self.prompt_ids(p.text) for p in prompts) for _ in range(plans_per_prompt)]
        places = ((b, m) for b in range(len(prompts)) for m in range(plans_per_prompt))
        return asked, [derive_seed(seed, b, "plan", m) for b, m in places]

    def respond(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, reference: bool = False
    ) -> list[Response]:
        """A response to each prompt, token ids; it depends on prompt and seed alone, on a CPU to the last bit."""
        if not prompts:  # of a process without a share
            return []
        rows = decode.rows_of(self.config, on_gpu=self.device.type == "cuda")
        with self._awake(), self._policy(reference), self._autocast():
            model = self.peft.get_base_model()
            return decode.respond(model, self.generation, prompts, seeds, rows=rows, stepwise=self.stepwise)

    def canary(self, instruction: str) -> tuple[Tensor, Tensor]:
        """States before the head for an instruction's first token, as plans are sampled: of the trained adapter and of
        its start, fp32 [width] on the host. They differ where the trained adapter is in effect."""
        asked = self.prompt_ids(instruction)
        with self._awake():
            return self._first_states(asked, reference=False), self._first_states(asked, reference=True)

    @torch.no_grad()
    def _first_states(self, prompt: Sequence[int], reference: bool) -> Tensor:
        model = self.peft.get_base_model()
        with self._policy(reference), self._autocast(), lean_adapters(model), one_kernel_norms(model):
            if not self.stepwise:
                ids = torch.tensor([prompt], device=self.device)
                return model.base_model(input_ids=ids).last_hidden_state[0, -1].float().cpu()
            decoder = decode.Decoder(model, self.generation, 1, len(prompt) + 1)
            decoder.begin(0, decode.Asked(0, prompt, 0), decoder.prefill(prompt))
            return decoder.hidden(decoder.length)[0].float().cpu()

    @torch.no_grad()
    def next_log_probs(self, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
        """Log-softmax [n, V] fp32 on the host at each token of a response, as an update computes it with the adapter
        that is active."""
        tokens = self.tokens([prompt], [Response([*response], [0.0] * len(response))])
        with self._awake():
            hidden = self._hidden(tokens, reference=False)[0, len(prompt) - 1 : -1]
            with self._autocast():
                return self.head(hidden).float().log_softmax(-1).cpu()

    def log_probs(self, tokens: PlanTokens, *, reference: bool = False) -> Tensor:
        """Log-softmax (temperature 1) of every counted token given the tokens before it: [P, L] fp32.

        Zero where `tokens.response_mask` is False. `reference` uses the frozen start. Goes by micro-batches without
        gradients; with gradients the caller splits.
        """
        size = self.config.micro_batch or len(tokens.input_ids)
        if not torch.is_grad_enabled() and size < len(tokens.input_ids):
            parts = torch.arange(len(tokens.input_ids)).split(size)
            return torch.cat([self.log_probs(tokens.select(part.tolist()), reference=reference) for part in parts])
        with self._awake():
            return self._head_log_probs(self._hidden(tokens, reference), tokens)

    def _awake(self) -> AbstractContextManager[None]:
        """Inside, weights that wait on the host (`config.offload`) are on the device."""
        return visiting(self.waiting, self.device)

    def _head_log_probs(self, hidden: Tensor, tokens: PlanTokens) -> Tensor:
        """Log-probs [P, L] of the counted tokens from hidden [P, L, width], zero elsewhere."""
        rows, columns = _counted(tokens, self.device)
        ids = tokens.input_ids.to(self.device)[rows, columns]
        with self._autocast():
            found = chosen_log_probs(self.head, hidden[rows, columns - 1], ids)
        return torch.zeros(tokens.input_ids.shape, device=self.device).index_put((rows, columns), found)

    def units(self, batch: Batch, plans: list[int]) -> list[list[int]]:
        """The micro-batches of an update of these plans: scored ones of like length, so that little is padding."""
        assert batch.tokens is not None
        scored = [plan for plan in plans if batch.plan_mask[plan]]
        size = self.config.micro_batch or max(1, len(scored))
        if size < len(scored):
            lengths = batch.tokens.attention_mask.sum(1).tolist()
            scored.sort(key=lambda plan: lengths[plan])
        return [scored[first : first + size] for first in range(0, len(scored), size)]

    def old_log_probs(self, batch: Batch, units: list[list[int]]) -> dict[int, Tensor]:
        """Log-probs of the plans of these units before the first of several updates, by plan."""
        assert batch.tokens is not None
        with torch.no_grad():
            rows = [row for unit in units for row in self.log_probs(trimmed(batch.tokens.select(unit)))]
        return dict(zip((plan for unit in units for plan in unit), rows, strict=True))

    def update(
        self, batch: Batch, plans: list[int], old: dict[int, Tensor] | None, total: UpdateSum | None = None
    ) -> dict[str, float]:
        """Adds the gradient of the loss `config.loss` (docs/algorithm.md 2.4) to the trained adapter's.

        Args:
            batch: an iteration's plans, advantages and mask of scored plans.
            plans: the batch's rows of this update.
            old: `old_log_probs` before the first of several updates; None in the first, whose ratio is 1.
            total: sum of the update, of whose `units` this process works on its own; None: on all.

        Returns the loss's metrics, none where no plan is scored. In the first update also the gap between the
        log-probs at sampling and those that are trained, a mean over tokens: sampling_gap |difference| in nats,
        sampling_k3 the estimate k3 of the divergence.
        """
        assert batch.tokens is not None
        units = self.units(batch, plans)
        scored = [plan for unit in units for plan in unit]
        if not scored:
            return {}
        total = total or UpdateSum(Gradient(self.parameters().values()), len(units), len(scored))
        counted = int(batch.tokens.response_mask[scored].sum())
        with self._awake():
            for unit in units[total.own.start : total.own.stop]:
                tokens, advantage = trimmed(batch.tokens.select(unit)), batch.plan_advantage[unit]
                before = None if old is None else torch.stack([old[plan] for plan in unit])
                loss, metrics = self._loss(tokens, advantage, before, total.terms, counted)
                loss.backward()
                moved()
                total.add(metrics)
        return total.finish()

    def _loss(
        self, tokens: PlanTokens, advantage: Tensor, old: Tensor | None, terms: int, counted: int
    ) -> tuple[Tensor, dict[str, float]]:
        """The share of a micro-batch in an update's loss and metrics; `terms` plans are in the update, with `counted`
        tokens in the loss.

        With Liger's fused loss the metrics come from log-probs all the same: Liger averages its own over tokens and
        shows no ratio.
        """
        config, every = self.config, torch.ones(len(advantage), dtype=torch.bool)
        clips = {"clip_low": config.clip_low, "clip_high": config.clip_high, "kl_weight": config.kl_weight}
        with torch.no_grad():
            start = self._hidden(tokens, reference=True)
            reference = self._head_log_probs(start, tokens)
        hidden = self._hidden(tokens, reference=False)
        with torch.set_grad_enabled(not self.fused_loss):
            log_probs = self._head_log_probs(hidden, tokens)
        before = log_probs.detach() if old is None else old
        weighed: dict[str, float] = {}
        if config.sampler == "served":
            sampled, counts = tokens.log_probs.to(self.device), tokens.response_mask.to(self.device)
            weights, cut = importance_weights(before, sampled, counts, config.max_importance)
            advantage = advantage * weights.to(advantage)
            weighed = {"importance": weights.sum().item() / terms, "importance_truncated": cut.sum().item() / terms}
        loss, metrics = LOSSES[config.loss](
            log_probs, before, reference, tokens.response_mask, advantage, every, **clips, terms=terms
        )
        metrics |= weighed
        if old is None:
            moves = (log_probs.detach() - tokens.log_probs.to(self.device))[tokens.response_mask.to(self.device)]
            gaps = {"sampling_gap": moves.abs(), "sampling_k3": moves.expm1() - moves}
            metrics |= {name: own.sum().item() / max(1, counted) for name, own in gaps.items()}
        if not self.fused_loss:
            return loss, metrics
        rows, columns = _counted(tokens, self.device)
        ids = tokens.input_ids.to(self.device)
        losses = []
        with self._autocast():
            for row, worth in enumerate(advantage.tolist()):
                own = columns[rows == row]
                states, first = (x[row, own - 1] for x in (hidden, start))
                was = None if old is None else old[row, own].float()
                losses.append(liger.fused_gspo_loss(states, self.head, ids[row, own], worth, was, first, **clips))
        loss = torch.stack(losses).sum() / terms
        return loss, metrics | {"loss": loss.item()}

    def _hidden(self, tokens: PlanTokens, reference: bool) -> Tensor:
        """States before the head, [P, L, width]."""
        ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
        body = self.peft.get_base_model().base_model
        where: dict[str, Tensor] = {}
        # a causal model never sees padding to its right, and flash attention takes no mask
        if body.dtype == torch.float32 or not bool(mask[:, 0].all()):
            positions = (mask.long().cumsum(1) - 1).clamp_min(0)  # a shift by left padding changes nothing
            where = {"attention_mask": mask.long(), "position_ids": positions}
        with self._policy(reference), self._autocast(), self._checkpointing():
            return body(input_ids=ids, use_cache=False, **where).last_hidden_state

    def _autocast(self) -> AbstractContextManager[None]:
        """Inside, the adapter's fp32 weights are used in the model's precision."""
        if self.peft.get_base_model().dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Inside, decoder layers are recomputed in the backward pass, if so configured."""
        # transformers recomputes in training mode only; modules inside the layers stay in eval mode, without dropout
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

    def tokens(self, prompts: Sequence[Sequence[int]], responses: Sequence[Response]) -> PlanTokens:
        """Prompts, token ids, and their responses as a right-padded batch; `config.loss_tokens` decides what counts."""
        shape = len(prompts), max(len(p) + len(r.tokens) for p, r in zip(prompts, responses, strict=True))
        ids, log_probs = torch.full(shape, self.generation.pad_token_id), torch.zeros(shape)
        attention, counted = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        for row, (prompt, (response, drawn_at)) in enumerate(zip(prompts, responses, strict=True)):
            end = len(prompt) + len(response)
            ids[row, :end] = torch.tensor([*prompt, *response])
            log_probs[row, len(prompt) : end] = torch.tensor(drawn_at)
            attention[row, :end] = True
            first = len(prompt)
            if self.config.loss_tokens == "json":
                opened = opens_thought(self.tokenizer.decode(prompt[-8:]))
                first += thought_length(self.tokenizer, response, opened=opened)
            counted[row, first:end] = True
        return PlanTokens(*(x.to(self.device) for x in (ids, attention, counted, log_probs * counted)))


def trimmed(tokens: PlanTokens) -> PlanTokens:
    """The same sequences without the columns at the right that are padding in all of them."""
    length = int(tokens.attention_mask.any(0).nonzero()[-1]) + 1
    return PlanTokens(*(own[:, :length] for own in vars(tokens).values()))


def _counted(tokens: PlanTokens, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of the counted tokens, without first tokens: nothing before them predicts them."""
    rows, columns = tokens.response_mask[:, 1:].nonzero(as_tuple=True)
    return rows.to(device), columns.to(device) + 1
