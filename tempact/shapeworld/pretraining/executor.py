"""Pretraining of ShapeWorld's executor and text encoder: teacher forcing on clips of one or two events.

One sequence holds all clean chunks and all noisy ones. A noisy chunk attends to the clean chunks before it and to
itself, as in a rollout; clean chunks carry a little noise, so that the model forgives its own imperfect history. Most
noise levels are the sampler's, which makes four denoising steps enough.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from tempact.errors import UserError
from tempact.executor.sampler import Schedule
from tempact.models.wan.text import TextEncoder
from tempact.models.wan.transformer import ChunkAttention, TextKV, WanConfig, WanTransformer
from tempact.shapeworld.pretraining import Course, draw_parts, fit_bpe
from tempact.shapeworld.pretraining.clips import Clip, sample_clip, shape_indices, tell
from tempact.shapeworld.story import CHUNK, CHUNKS, FRAMES, draw

WAN = WanConfig(
    dim=128, ffn_dim=512, freq_dim=64, text_dim=96, text_len=64, heads=4, layers=4, in_dim=3, out_dim=3,
    patch=(1, 6, 6), prediction="x0",
)  # fmt: skip
TEXT_VOCABULARY = 512
CAPTIONS = 3  # at most that many different captions a clip
CLIPS = 80_000
PARTS = 64  # of the clips, each with its own seed
CONTEXT_NOISE = 0.1  # largest noise level of the clean context in training
SAMPLER_SHARE = 0.8  # share of noise levels drawn from the sampler's own
LEVEL_SHARES = (0.4, 0.25, 0.2, 0.15)  # of those, the noisiest most: there the text alone decides
# the first chunk alone is drawn from the text without history: what is where is learned from it
OPENING_WEIGHT = 4.0  # of the first chunk in the loss
OPENING_LEVEL_SHARES = (0.6, 0.4, 0.0, 0.0)
BATCH = 256


class ClipTable(NamedTuple):
    """Pre-drawn clips: tracks [n, F, 2, TRACK], shapes [n, 2], texts [u, text_len] token ids of all
    different captions, captions [n, CAPTIONS] rows of texts, slots [n, CHUNKS] columns of captions."""

    tracks: Tensor
    shapes: Tensor
    texts: Tensor
    captions: Tensor
    slots: Tensor

    def to(self, device: str) -> ClipTable:
        return ClipTable(*(values.to(device) for values in self))


def build_text_encoder(texts: list[str]) -> TextEncoder:
    """A small UMT5 encoder with a byte-level BPE tokenizer fitted to `texts`."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw = fit_bpe(texts, pieces, TEXT_VOCABULARY, ["<pad>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")
    config = UMT5Config(
        vocab_size=raw.get_vocab_size(), d_model=WAN.text_dim, d_kv=24, d_ff=192, num_layers=2, num_heads=4,
        pad_token_id=0, eos_token_id=1, dropout_rate=0.0, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return TextEncoder(UMT5EncoderModel(config), tokenizer, WAN.text_len)


def draw_clips(seed: int, count: int) -> list[Clip]:
    """`count` clips from `seed`."""
    rng = random.Random(seed)
    return [sample_clip(rng) for _ in range(count)]


def clip_table(seed: int, count: int, workers: int) -> tuple[ClipTable, TextEncoder]:
    """`count` clips and a text encoder whose tokenizer is fitted to their captions."""
    clips = draw_parts(draw_clips, seed, count, PARTS, workers)
    unique = {text: i for i, text in enumerate(dict.fromkeys(text for clip in clips for text in clip.captions))}
    encoder = build_text_encoder(list(unique)[:20_000])
    captions = torch.zeros(count, CAPTIONS, dtype=torch.int64)
    slots = torch.zeros(count, CHUNKS, dtype=torch.int64)
    for i, clip in enumerate(clips):
        own = {text: slot for slot, text in enumerate(dict.fromkeys(clip.captions))}
        captions[i, : len(own)] = torch.tensor([unique[text] for text in own])
        slots[i] = torch.tensor([own[text] for text in clip.captions])
    texts, _ = encoder.tokenize(list(unique))
    scenes = [clip.scene for clip in clips]
    return ClipTable(tell(scenes), shape_indices(scenes), texts, captions, slots), encoder


def teacher_forcing_mask(chunks: int, chunk_tokens: int, device: str) -> Tensor:
    """Attention mask over the tokens of [clean chunks | noisy chunks]: bool [L, L], True where attended."""
    index = torch.arange(chunks, device=device).repeat_interleave(chunk_tokens)
    clean_clean = index[:, None] >= index
    noisy_clean = index[:, None] > index
    noisy_noisy = index[:, None] == index
    top = torch.cat([clean_clean, torch.zeros_like(clean_clean)], dim=1)
    return torch.cat([top, torch.cat([noisy_clean, noisy_noisy], dim=1)])


def draw_sigmas(count: int, schedule: Schedule, generator: torch.Generator, device: str) -> Tensor:
    """Noise levels [count, CHUNKS], one a chunk."""
    levels = torch.tensor(schedule.sigmas[:-1], device=device, dtype=torch.float32)
    shape = (count, CHUNKS)
    shares = torch.tensor([OPENING_LEVEL_SHARES] + [LEVEL_SHARES] * (CHUNKS - 1), device=device)
    own = levels[torch.multinomial(shares, count, replacement=True, generator=generator)].T
    uniform = torch.rand(shape, generator=generator, device=device).clamp_min(0.02)
    chosen = torch.rand(shape, generator=generator, device=device) < SAMPLER_SHARE
    return torch.where(chosen, own, uniform)


def mix(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) clean + sigma noise; sigma [n, F], one a frame."""
    levels = sigma[:, None, :, None, None]
    return (1 - levels) * clean + levels * noise


class TeacherForcing(ChunkAttention):
    """Attention of all clean and noisy chunks at once, under `teacher_forcing_mask`."""

    def __init__(self, mask: Tensor):
        self.mask = mask

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).transpose(1, 2)


class ExecutorCourse(Course):
    """Executor and text encoder, for the shared training loop."""

    name, batch, learning_rate, ema = "executor", BATCH, 1.5e-3, 0.999

    def __init__(self, seed: int, device: str, workers: int = 1, clips: int = CLIPS):
        self.device, self.seed = device, seed
        torch.manual_seed(seed)
        table, encoder = clip_table(seed, clips, workers)
        self.table, self.encoder = table.to(device), encoder.to(device)
        self.longest = int((table.texts != encoder.tokenizer.pad_token_id).sum(1).max())
        torch.manual_seed(seed)
        self.model = WanTransformer(WAN)
        self.model.initialise()
        self.model.to(device)
        self.modules = torch.nn.ModuleDict({"transformer": self.model, "text_encoder": self.encoder})
        self.schedule = Schedule.from_timesteps((1000, 750, 500, 250), shift=5.0)
        tokens = CHUNK * (24 // WAN.patch[1]) ** 2
        self.attend = TeacherForcing(teacher_forcing_mask(CHUNKS, tokens, device))
        weights = torch.tensor([OPENING_WEIGHT] + [1.0] * (CHUNKS - 1), device=device)
        self.chunk_weights = weights / weights.sum()
        self.positions = torch.arange(FRAMES, device=device).repeat(2)

    def compile(self) -> None:
        for block in self.model.blocks:
            block.compile()

    def text(self, rows: Tensor) -> TextKV:
        """Text K/V of clips, one a chunk, for the clean and the noisy half: 2 * CHUNKS a clip."""
        ids = self.table.texts[self.table.captions[rows].flatten()]
        ids = ids[:, : self.longest]  # the encoder need not run over padding that all captions share
        hidden = self.encoder(ids, ids != self.encoder.tokenizer.pad_token_id)
        kv = self.model.project_text(F.pad(hidden, (0, 0, 0, WAN.text_len - self.longest)))
        own = torch.arange(len(rows), device=self.device)[:, None] * CAPTIONS + self.table.slots[rows]
        return kv.select(torch.cat([own, own], dim=1).flatten())

    def loss(self, generator: torch.Generator) -> Tensor:
        """Weighted mean squared error of the predicted clean frames."""
        rows = torch.randint(len(self.table.tracks), (self.batch,), generator=generator, device=self.device)
        frames = draw(self.table.tracks[rows], self.table.shapes[rows, None].expand(-1, FRAMES, -1))
        clean = (frames * 2.0 - 1.0).transpose(1, 2)
        sigma = draw_sigmas(self.batch, self.schedule, generator, self.device).repeat_interleave(CHUNK, dim=1)
        noise = torch.randn(2, *clean.shape, generator=generator, device=self.device)
        level = torch.rand(self.batch, 1, generator=generator, device=self.device) * CONTEXT_NOISE
        context, noisy = mix(clean, noise[0], level.expand(-1, FRAMES)), mix(clean, noise[1], sigma)
        sigmas = torch.cat([torch.zeros_like(sigma), sigma], dim=1)
        x = torch.cat([context, noisy], dim=2)
        velocity = self.model(x, sigmas, self.text(rows), self.positions, self.attend)
        predicted = noisy - sigma[:, None, :, None, None] * velocity[:, :, FRAMES:].float()
        error = (predicted - clean).square().mean((0, 1, 3, 4)).unflatten(0, (CHUNKS, CHUNK)).mean(1)
        return (error * self.chunk_weights).sum()

    def save(self, folder: Path) -> None:
        """Writes transformer.safetensors, transformer.json and text_encoder/ from the current weights."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.contiguous().cpu() for k, v in self.model.state_dict().items()}, folder / "transformer.safetensors"
        )
        (folder / "transformer.json").write_text(json.dumps(asdict(WAN), indent=1) + "\n", encoding="utf-8")
        self.encoder.save(folder / "text_encoder")


def load_executor(folder: Path) -> tuple[WanTransformer, TextEncoder]:
    """Reads the weights that `ExecutorCourse.save` wrote. Raises UserError for a missing or unreadable file."""
    for name in ("transformer.json", "transformer.safetensors", "text_encoder/model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: not found; accepted: a folder with an executor's weights")
    sizes = json.loads((folder / "transformer.json").read_text(encoding="utf-8"))
    config = WanConfig(**{**sizes, "patch": tuple(sizes["patch"])})
    model = WanTransformer(config)
    try:
        model.load_state_dict(load_file(folder / "transformer.safetensors"))
        return model, TextEncoder.load(folder / "text_encoder", config.text_len)
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: the tensors of another model
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: not readable ({reason}); accepted: a folder with an executor's weights") from error
