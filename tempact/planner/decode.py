"""Sampling of responses: each has random numbers of its own, and none depends on those sampled beside it.

A token is drawn by inverse CDF from a uniform of its response. On models with a plain K/V cache a step decodes a token
of each of a fixed number of rows: rows without a response idle, and a row whose response has ended takes the next one.
Rows do not see each other, and the arithmetic of a row depends neither on its place nor on the others: matrix products
are of one shape, and attention over a longer cache adds exact zeros, or does not read it (csrc_triton's kernel, on a
GPU, where a step is a CUDA graph). Other models go through transformers' `generate`, one prompt's responses at a time,
with the same draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import groupby, islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.generation import logits_process as scoring

from csrc_triton import decode_attention
from tempact.config import PlannerConfig
from tempact.distributed.watch import moved
from tempact.errors import UserError
from tempact.models.adapters import lean_adapters
from tempact.planner.language_model import one_kernel_norms, warpers

ATTENTION = "tempact_decode"
GPU_ROWS = 32  # of a step, where none are configured
CPU_ROWS = 16  # always: products of other numbers of rows round otherwise
BUCKET = 512  # lengths of the cache that a step attends to are multiples
SHORT = (128, 256)  # and these, on a CPU that rounds there as it does at the first multiple
STEPS = 16  # between two looks at which responses have ended, on a GPU
BLOCK = 128  # tokens of the vocabulary that are summed before the cumulative sums
ONE = 2.0**44  # weight of the likeliest token; 2^18 such weights are still an int64
MOVING_ROPES = ("dynamic", "longrope")  # their frequencies depend on the longest row


class Asked(NamedTuple):
    """A response to make: its number, and what it depends on."""

    number: int
    prompt: Sequence[int]
    seed: int


class Response(NamedTuple):
    """Token ids up to and with the end token, and their log-softmax (temperature 1) when they were drawn."""

    tokens: list[int]
    log_probs: list[float]


def uniforms(seed: int, count: int) -> Tensor:
    """[count] fp64 in [0, 1) of a seed; a longer row begins with a shorter one."""
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [R] int64 of softmax(scores) at the quantiles `uniform` [R] fp64; scores [R, V] fp32.

    Weights are whole numbers, whose sums are exact in any order: a probability below 2^-44 of the largest counts as 0,
    and a token of probability 0 is never drawn.
    """
    weights = ((scores - scores.amax(-1, keepdim=True)).exp() * ONE).long()
    blocks = F.pad(weights, (0, -weights.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    sums = blocks.sum(-1)
    total = sums.sum(-1, keepdim=True)
    target = (uniform[:, None] * total).long().clamp(max=total - 1)
    block, target = _first_above(sums, target)
    inner, _ = _first_above(blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1), target)
    return (block * BLOCK + inner).squeeze(1).clamp(max=scores.shape[1] - 1)  # NaN draws anything


def _first_above(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative sum of weights [R, n] first exceeds target [R, 1], and the target less the sum before."""
    sums = weights.cumsum(-1)
    place = (sums <= target).sum(-1, keepdim=True).clamp(max=weights.shape[1] - 1)
    return place, target - (sums - weights).gather(1, place)


def respond(
    model: PreTrainedModel, settings: GenerationConfig, prompts: Sequence[Sequence[int]], seeds: Sequence[int],
    *, rows: int, stepwise: bool,
) -> list[Response]:  # fmt: skip
    """A response to each prompt, which depends on the model, the prompt, its seed and `settings` alone.

    Args:
        model: a causal language model in eval mode, with or without PEFT's LoRA layers, whose active adapter acts.
        settings: temperature, top_k, top_p, max_new_tokens, eos_token_id (a list), pad_token_id.
        prompts, seeds: token ids and a seed for each response; none where a rank has no share.
        rows: responses decoded together, as `rows_of` gives them.
        stepwise: the model has been found to be one that `steps` accepts.

    Raises UserError for logits that are NaN or infinite.
    """
    if not prompts:
        return []
    on_gpu = model.device.type == "cuda"
    asked = [Asked(*each) for each in zip(range(len(seeds)), prompts, seeds, strict=True)]
    asked.sort(key=lambda each: list(each.prompt))  # equal ones are neighbours
    with (
        lean_adapters(model),
        one_kernel_norms(model),
        torch.no_grad(),
        _side_stream(model.device) if on_gpu else nullcontext(),
    ):
        if stepwise:
            longest = max(map(len, prompts)) + settings.max_new_tokens
            made = Decoder(model, settings, rows, longest).run(asked)
        else:
            made = _generate(model, settings, asked, rows)
    if on_gpu:
        torch.cuda.empty_cache()  # the side stream's memory, which others cannot use
    if not all(math.isfinite(value) for response in made.values() for value in response.log_probs):
        raise UserError("planner: found logits that are not finite; accepted: weights that give finite ones")
    return [made[i] for i in range(len(prompts))]


def rows_of(config: PlannerConfig, *, on_gpu: bool) -> int:
    """Rows of a decoding step."""
    return (config.sampled_together or GPU_ROWS) if on_gpu else CPU_ROWS


_cached_stream = cache(torch.cuda.Stream)  # by device: each stream has a workspace of cuBLAS


@contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Inside, work is queued on a stream that CUDA graphs can be recorded on."""
    stream, current = _cached_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None = None,
    lengths: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of one token a row: query [R, Hq, 1, D], key and value [R, Hkv, L, D], mask [R, 1, 1, L].

    lengths [R]: what the mask says, where the model hands it on; a GPU needs it. On a CPU query heads of a group stand
    in the place of queries: K and V are read once, and not copied for each head.
    """
    if query.is_cuda:
        lengths = (mask[:, 0, 0] == 0).sum(-1) if lengths is None else lengths
        return decode_attention(query[:, :, 0], key, value, lengths, softmax_scale=scaling)[:, None], None
    grouped = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(len(query), 1, query.shape[1], -1), None


AttentionInterface.register(ATTENTION, _attend)


def _short_lengths(config: PreTrainedConfig, dtype: torch.dtype) -> list[int]:
    """Those of SHORT at which this CPU's attention gives the bits of the first multiple."""
    heads = config.num_attention_heads
    shapes = (heads, 1), *[(getattr(config, "num_key_value_heads", None) or heads, BUCKET)] * 2
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, *own, head_dim, generator=generator).to(dtype) for own in shapes)
    found = []
    for length in SHORT:
        mask = torch.zeros(1, 1, 1, BUCKET, dtype=dtype)
        mask[..., length:] = -math.inf
        whole, _ = _attend(nn.Identity(), query, key, value, mask)
        short, _ = _attend(nn.Identity(), query, key[:, :, :length], value[:, :, :length], mask[..., :length])
        found += [length] if torch.equal(short, whole) else []
    return found


class _Place:
    """Where a step writes and reads the cache: `index` [R] of the flat (row, position), `length` positions are read."""

    index: Tensor
    length: int


class _Layer(StaticLayer):
    """K and V of a layer, [rows, positions, heads, head_dim]; a step writes each row at its own position."""

    def __init__(self, place: _Place, rows: int, positions: int):
        super().__init__(positions)
        self.place, self.rows = place, rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        sizes = ((self.rows, self.max_cache_len, *own.shape[1::2]) for own in (key_states, value_states))
        self.keys, self.values = (key_states.new_zeros(size) for size in sizes)
        self.is_initialized = True

    def fill(self, row: int, keys: Tensor, values: Tensor) -> None:
        """The row begins with the K and V of a prompt, [1, heads, n, head_dim]."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        for store, own in ((self.keys, keys), (self.values, values)):
            store[row, : own.shape[2]] = own[0].transpose(0, 1)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for store, own in ((self.keys, key_states), (self.values, value_states)):
            store.flatten(0, 1).index_copy_(0, self.place.index, own[:, :, 0])
        keys, values = (store[:, : self.place.length].transpose(1, 2) for store in (self.keys, self.values))
        return keys, values


class Decoder:
    """Decodes responses in `rows` rows, whose sequences have at most `longest` tokens.

    State of the rows, on the device: ids [R], the next input, at `position` [R]; `step` [R], number of tokens written;
    done [R] bool; uniforms, written, log_probs [R, T + 1], whose last column nothing reads.
    """

    def __init__(self, model: PreTrainedModel, settings: GenerationConfig, rows: int, longest: int):
        device, config, most = model.device, model.config, settings.max_new_tokens
        self.model, self.rows, self.most = model, rows, most
        self.body, self.head = model.base_model, model.get_output_embeddings()
        self.warp = warpers(settings)
        self.ends = torch.tensor(settings.eos_token_id, device=device)
        whole = [*range(BUCKET, longest + BUCKET, BUCKET)]  # what a step attends to
        self.lengths = whole[-1:] if device.type == "cuda" else _short_lengths(config, model.dtype) + whole
        self.length = self.lengths[-1]
        self.ids, self.position, self.step = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(3))
        self.done = torch.ones(rows, dtype=torch.bool, device=device)
        self.uniforms = torch.zeros(rows, most + 1, dtype=torch.float64, device=device)
        self.written = torch.zeros(rows, most + 1, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(rows, most + 1, device=device)
        self.first = torch.arange(rows, device=device) * self.length  # of a row in the flat cache
        self.columns = torch.arange(self.length, device=device)
        self.place = _Place()
        layers = len(DynamicCache(config=config).layers)
        self.cache = Cache(layers=[_Layer(self.place, rows, self.length) for _ in range(layers)])
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self, asked: Iterable[Asked]) -> dict[int, Response]:
        """Responses by number; equal prompts that follow each other are read once."""
        waiting, made = iter(asked), dict[int, Response]()
        held: dict[int, Asked] = {}  # by row
        needed: dict[int, int] = {}  # tokens of a row with the next step's
        prompt, prefilled = None, DynamicCache()
        while True:
            for row in (row for row in range(self.rows) if row not in held):
                if (following := next(waiting, None)) is None:
                    break
                if following.prompt != prompt:
                    prompt, prefilled = following.prompt, self.prefill(following.prompt)
                self.begin(row, following, prefilled)
                held[row], needed[row] = following, len(following.prompt)
            if not held:
                return made
            moved()
            for _ in range(STEPS if self.done.is_cuda else 1):
                longest = min(max(needed.values()), self.length)  # a row that has ended is counted on
                self.advance(next(length for length in self.lengths if length >= longest))
                needed = {row: count + 1 for row, count in needed.items()}
            done = self.done.tolist()
            for row in [row for row in held if done[row]]:
                count = int(self.step[row])
                response = Response(self.written[row, :count].tolist(), self.log_probs[row, :count].tolist())
                made[held.pop(row).number] = response
                del needed[row]

    def prefill(self, prompt: Sequence[int]) -> DynamicCache:
        """K and V of a prompt without its last token, which is the input of the first step."""
        cache = DynamicCache(config=self.model.config)
        if len(prompt) > 1:
            ids = torch.tensor([prompt[:-1]], device=self.ids.device)
            self.body(input_ids=ids, past_key_values=cache, use_cache=True)
        return cache

    def begin(self, row: int, asked: Asked, prefilled: DynamicCache) -> None:
        """The row takes another response."""
        prompt = asked.prompt
        for own, read in zip(self.cache.layers, prefilled.layers, strict=True):
            if read.is_initialized:
                own.fill(row, read.keys, read.values)
        self.uniforms[row, : self.most] = uniforms(asked.seed, self.most).to(self.ids.device)
        for state, value in ((self.ids, prompt[-1]), (self.position, len(prompt) - 1), (self.step, 0), (self.done, 0)):
            state[row] = value

    def advance(self, length: int) -> None:
        """One step of all rows; those that are not done have fewer than `length` tokens."""
        if not self.ids.is_cuda:
            self.decode(length)
        elif self.graph is not None:
            self.graph.replay()
        else:
            self.decode(length)  # as it is, which also loads what a recording cannot
            self.graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.decode(length)
            finally:
                self.graph.capture_end()

    def decode(self, length: int) -> None:
        """Draws the next token of every row and moves the rows that are not done."""
        logits = self.head(self.hidden(length)).float()
        at = self.step[:, None]
        token = draw(self.warp(self.ids[:, None], logits), self.uniforms.gather(1, at).squeeze(1))
        chosen = logits.gather(1, token[:, None]) - logits.logsumexp(1, keepdim=True)
        self.written.scatter_(1, at, token[:, None])
        self.log_probs.scatter_(1, at, chosen)
        self.step += ~self.done
        self.done |= (token[:, None] == self.ends).any(1) | (self.step >= self.most)
        self.position += ~self.done
        self.ids.copy_(torch.where(self.done, self.ids, token))

    def hidden(self, length: int) -> Tensor:
        """States before the head [R, width] of the rows' inputs, whose K and V are written."""
        self.place.index, self.place.length = self.first + self.position, length
        seen = self.columns[:length] <= self.position[:, None]
        mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=seen.device).masked_fill_(~seen, -math.inf)
        config = self.model.config
        usual, config._attn_implementation = config._attn_implementation, ATTENTION
        try:
            return self.body(
                input_ids=self.ids[:, None], position_ids=self.position[:, None], attention_mask=mask[:, None, None],
                past_key_values=self.cache, use_cache=True, lengths=self.position + 1,
            ).last_hidden_state[:, 0]  # fmt: skip
        finally:
            config._attn_implementation = usual


@torch.no_grad()
def steps(model: PreTrainedModel, settings: GenerationConfig) -> bool:
    """Whether `Decoder` serves a model: each layer keeps the K and V of all tokens, attends to them as PyTorch's fused
    attention does, and a token decoded so has the states that it has in a whole sequence."""
    config = model.config
    layers = DynamicCache(config=config).layers
    rope = getattr(config, "rope_parameters", None) or {}
    if not (
        model._can_compile_fullgraph
        and config._attn_implementation == "sdpa"
        and config.get_text_config() is config
        and layers and all(type(layer) is DynamicLayer for layer in layers)
        and rope.get("rope_type") not in MOVING_ROPES
    ):  # fmt: skip
        return False
    ids = list(range(min(8, config.vocab_size)))
    whole = model.base_model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).last_hidden_state
    decoder = Decoder(model, settings, 1, len(ids))
    decoder.begin(0, Asked(0, ids, 0), decoder.prefill(ids))
    with one_kernel_norms(model):
        off = (decoder.hidden(decoder.length) - whole[:, -1]).abs().max()
    return bool(off <= 0.05 * whole.abs().max())


class _Drawn(scoring.LogitsProcessor):
    """Leaves the token that is drawn from the scores alone; log_probs: those of the drawn tokens, a step each."""

    def __init__(self, warp: scoring.LogitsProcessorList, uniform: Tensor):
        self.warp, self.uniform = warp, uniform
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = self.uniform[:, len(self.log_probs)]
        token = draw(self.warp(input_ids, scores), uniform)[:, None]
        self.log_probs.append(scores.gather(1, token) - scores.logsumexp(1, keepdim=True))
        return torch.full_like(scores, -math.inf).scatter(1, token, 0.0)


def _generate(
    model: PreTrainedModel, settings: GenerationConfig, asked: Iterable[Asked], rows: int
) -> dict[int, Response]:
    """As `Decoder.run`, by `generate`: a call has `rows` rows of one prompt, the last response in those left over."""
    made = dict[int, Response]()
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=settings.max_new_tokens, eos_token_id=settings.eos_token_id,
        pad_token_id=settings.pad_token_id,
    )  # fmt: skip
    for prompt, own in groupby(asked, key=lambda each: each.prompt):
        while part := list(islice(own, rows)):
            each = [uniforms(one.seed, settings.max_new_tokens) for one in part]
            uniform = torch.stack(each + each[-1:] * (rows - len(each))).to(model.device)
            drawn = _Drawn(warpers(settings), uniform)
            ids = torch.tensor([prompt], device=model.device).expand(rows, -1)
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy,
                logits_processor=scoring.LogitsProcessorList([drawn]),
            )  # fmt: skip
            log_probs = torch.cat(drawn.log_probs, 1).tolist()
            for one, tokens, values in zip(part, out[:, len(prompt) :].tolist(), log_probs, strict=False):
                ends = (i for i, token in enumerate(tokens, 1) if token in settings.eos_token_id)
                count = next(ends, len(tokens))
                made[one.number] = Response(tokens[:count], values[:count])
    return made
