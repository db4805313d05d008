"""Prompts to the text rows that the transformer cross-attends to: a UMT5 encoder, and its rows kept on disk.

Source: docs/backbones.md section 6.
"""

from __future__ import annotations

import hashlib
import html
import logging
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache as once
from functools import partial
from pathlib import Path
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from tempact.errors import UserError
from tempact.files import writing
from tempact.models.wan.checkpoints.files import (
    assign_weights,
    fingerprint,
    read_json,
    read_tensors,
    require_weights,
    visiting,
)

log = logging.getLogger(__name__)

TEXT_LEN = 512  # rows that Wan2.1's transformer attends to
ORIGINAL_FILE = "models_t5_umt5-xxl-enc-bf16.pth"  # in the folder of Wan's own release, beside its tokenizer:
ORIGINAL_TOKENIZER = "google/umt5-xxl"
OLD_PICKLE = b"\x80"  # first byte of a pickle that is not in a zip file, as torch has written it before 1.6
BATCH = 16  # prompts encoded together
RENAMED = {  # parts of a name in Wan's own file, and in transformers
    "norm1": "layer.0.layer_norm",
    "attn": "layer.0.SelfAttention",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
OUTSIDE = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}


class PromptEncoder(Protocol):
    """A text encoder as the executor calls it."""

    def encode(self, prompts: list[str]) -> Tensor:
        """Text rows [n, text_len, text_dim], zero past each prompt's end."""

    def unseen(self, prompt: str) -> str:
        """The words at a prompt's end that have no place in its rows."""

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...


class TextEncoder(nn.Module):
    """UMT5 encoder; rows past a prompt's end are exactly zero, as the transformer expects."""

    def __init__(self, model: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast, text_len: int):
        super().__init__()
        self.model, self.tokenizer, self.text_len = model, tokenizer, text_len

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """ids [n, text_len] int64 and mask [n, text_len] bool; every prompt ends with EOS, also when cut."""
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        ids = torch.full((len(prompts), self.text_len), pad)
        encoded = self.tokenizer(prompts, add_special_tokens=False)["input_ids"] if prompts else []
        for row, tokens in zip(ids, encoded, strict=True):
            tokens = [*tokens[: self.text_len - 1], eos]
            row[: len(tokens)] = torch.tensor(tokens)
        # EOS closes every row and pad differs from it, so the mask follows from the ids
        return ids, ids != pad

    def unseen(self, prompt: str) -> str:
        return unseen(self.tokenizer, prompt, self.text_len)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Text rows [n, text_len, text_dim], zero past each prompt's end, of the ids and mask of `tokenize`."""
        hidden = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return hidden * mask[..., None].to(hidden.dtype)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        ids, mask = self.tokenize(prompts)
        device = self.model.device
        return self(ids.to(device), mask.to(device))

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, folder: Path, text_len: int) -> TextEncoder:
        model = UMT5EncoderModel.from_pretrained(folder, local_files_only=True)
        return cls(model, PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True), text_len)


def clean_prompt(text: str) -> str:
    """The prompt as Wan's authors clean it: mis-decoded characters mended, HTML unescaped twice, white space joined."""
    import ftfy  # late: of the extra "wan", and ShapeWorld's text encoder stands in this module too

    unescaped = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", unescaped).strip()


def unseen(tokenizer: PreTrainedTokenizerFast, prompt: str, text_len: int) -> str:
    """The words at a prompt's end that have no place in `text_len` rows, the last of which is the end token's."""
    places = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    rest = places[text_len - 1 :]
    return prompt[rest[0][0] :].strip() if rest else ""


def load_text_encoder(
    path: Path, dtype: torch.dtype, device: torch.device, text_len: int = TEXT_LEN,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> TextEncoder:  # fmt: skip
    """UMT5's encoder and tokenizer; the latter may have been loaded before.

    `path`: a diffusers folder (text_encoder/ and tokenizer/ in it), the folder of Wan's own release, or a folder that
    holds a transformers encoder and its tokenizer. UserError names the file or key that is missing or does not fit.
    """
    tokenizer = tokenizer or load_tokenizer(path)
    model, state, file = _opened(path, tokenizer)
    assign_weights(model, state, file, dtype, device)
    model.tie_weights()
    return TextEncoder(model.eval().requires_grad_(False), tokenizer, text_len)


def check_text_encoder(path: Path) -> None:
    """UserError, as of `load_text_encoder`, for files that are no encoder with its tokenizer; no weight is read.

    Weights in a pickle of an old torch version are not looked into, since they could not be left on the disk.
    """
    tokenizer, (weights, *_) = load_tokenizer(path), _layout(path)[0]
    with weights.open("rb") as file:
        old = weights.name == ORIGINAL_FILE and file.read(1) == OLD_PICKLE
    if not old:
        _opened(path, tokenizer)


def _opened(path: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[UMT5EncoderModel, dict[str, Tensor], Path]:
    """The encoder at `path` without memory, its weights, mapped where possible, which fit it, and their first file."""
    files, tokenizer_folder = _layout(path)
    state = read_tensors(files)[1]
    if files == [path / ORIGINAL_FILE]:
        state = _renamed(state)
        config = _config_of(state, files[0])
    else:
        settings = read_json(files[0].with_name("config.json"))
        found = settings.get("model_type")
        if found != UMT5Config.model_type:
            raise UserError(f"{files[0].parent / 'config.json'}: found model_type {found!r}; accepted: umt5")
        config = UMT5Config.from_dict(settings)
    # one tensor under two names, of which a file may hold either
    embedding = state.get("shared.weight", state.get("encoder.embed_tokens.weight"))
    if embedding is not None:
        state["shared.weight"] = state["encoder.embed_tokens.weight"] = embedding
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    require_weights(model, state, files[0])
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{tokenizer_folder}: found {len(tokenizer)} tokens; accepted: at most the encoder's {config.vocab_size}"
        )
    return model, state, files[0]


def _layout(path: Path) -> tuple[list[Path], Path]:
    """Weight files and tokenizer folder of an encoder at `path`."""
    if (path / ORIGINAL_FILE).is_file():
        return [path / ORIGINAL_FILE], path / ORIGINAL_TOKENIZER
    split = (path / "text_encoder").is_dir()
    weights, tokenizer = (path / "text_encoder", path / "tokenizer") if split else (path, path)
    files = sorted(weights.glob("model*.safetensors")) if (weights / "config.json").is_file() else []
    if not files:
        accepted = f"config.json with model*.safetensors, here or in text_encoder/, or {ORIGINAL_FILE}"
        raise UserError(f"{path}: found no text encoder; accepted: {accepted}")
    return files, tokenizer


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of the encoder at `path`; UserError as of `load_text_encoder`."""
    folder = _layout(path)[1]
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: found no tokenizer.json; accepted: UMT5's tokenizer folder")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library of tokenizers knows no other
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: cannot be read ({reason}); accepted: UMT5's tokenizer folder") from error
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        found = f"pad {tokenizer.pad_token!r}, end {tokenizer.eos_token!r}"
        raise UserError(f"{folder}: found a tokenizer with {found}; accepted: one that has both")
    return tokenizer


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Wan's own names of UMT5's encoder to those of transformers."""
    out = {}
    for name, tensor in state.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+?)\.((?:[qkvo]\.)?weight)", name)
        if block and block[2] in RENAMED:
            name = f"encoder.block.{block[1]}.{RENAMED[block[2]]}.{block[3]}"
        out[OUTSIDE.get(name, name)] = tensor
    return out


def _config_of(state: dict[str, Tensor], source: Path) -> UMT5Config:
    """Settings of an encoder without a config.json: sizes from its tensors, everything else as in UMT5-XXL."""
    attention = "encoder.block.0.layer.0.SelfAttention"
    try:
        vocabulary, width = state["shared.weight"].shape
        buckets, heads = state[f"{attention}.relative_attention_bias.weight"].shape
        inner = state[f"{attention}.q.weight"].shape[0]
        hidden = state["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise UserError(f"{source}: found no {error}; accepted: the weights of UMT5's encoder") from error
    layers = len({name.split(".")[2] for name in state if name.startswith("encoder.block.")})
    return UMT5Config(
        vocab_size=vocabulary, d_model=width, d_kv=inner // heads, d_ff=hidden, num_layers=layers, num_heads=heads,
        relative_attention_num_buckets=buckets, relative_attention_max_distance=128, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", layer_norm_epsilon=1e-6, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip


class CachedTextEncoder(nn.Module):
    """A text encoder that is loaded for the first new prompt; the rows of every prompt are kept on disk.

    load: makes the encoder. source: identifies its weights, tokenizer and precision, see `source_of`. folder: of the
    cache, shared by any number of processes; UserError if it cannot be written. visits: the device to encode on, if the
    weights wait elsewhere: they are copied there for the new prompts of one `encode` and the copy is dropped; None:
    prompts are encoded where the encoder was loaded. tokenizer: makes the encoder's tokenizer, so that a process that
    finds all prompts in the cache never reads the weights; None: the encoder is loaded for it.
    """

    def __init__(
        self,
        load: Callable[[], TextEncoder],
        source: str,
        folder: Path,
        text_len: int = TEXT_LEN,
        *,
        visits: torch.device | None = None,
        tokenizer: Callable[[], PreTrainedTokenizerFast] | None = None,
    ):
        super().__init__()
        self.load, self.source, self.folder, self.text_len, self.visits = load, source, folder, text_len, visits
        self.tokenizer = tokenizer
        self.loaded: TextEncoder | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            reason = error.strerror
            raise UserError(f"text cache: cannot write to {folder} ({reason}); accepted: a writable folder") from error

    def path_of(self, prompt: str) -> Path:
        """The file with the rows of a prompt."""
        key = "\0".join((self.source, str(self.text_len), clean_prompt(prompt)))
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / digest[:2] / f"{digest}.safetensors"

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Text rows [n, text_len, text_dim], zero past each prompt's end, on the device of the encoder's weights."""
        rows = {prompt: self._read(self.path_of(prompt)) for prompt in dict.fromkeys(prompts)}
        new = [prompt for prompt, found in rows.items() if found is None]
        if new:
            with self._encoder() as encoder:
                for first in range(0, len(new), BATCH):
                    rows |= self._encoded(encoder, new[first : first + BATCH])
        device = None if self.loaded is None else self.loaded.model.device
        padded = {n: F.pad(own, (0, 0, 0, self.text_len - len(own))) for n, own in rows.items() if own is not None}
        return torch.stack([padded[prompt] for prompt in prompts]).to(device)

    def unseen(self, prompt: str) -> str:
        kept = self._read(self.path_of(prompt))
        if kept is not None and len(kept) < self.text_len:
            return ""
        if self.tokenizer is not None:
            return unseen(self.tokenizer(), clean_prompt(prompt), self.text_len)
        self.loaded = self.loaded or self.load()
        return self.loaded.unseen(clean_prompt(prompt))

    def _encoded(self, encoder: TextEncoder, prompts: list[str]) -> dict[str, Tensor]:
        """The rows of each prompt without padding, on the host; they are also written to disk."""
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        lengths = encoder.tokenize(cleaned)[1].sum(dim=1).tolist()
        hidden = encoder.encode(cleaned)
        kept = {prompt: own[:length].cpu() for prompt, own, length in zip(prompts, hidden, lengths, strict=True)}
        for prompt, own in kept.items():
            self._write(self.path_of(prompt), own)
        return kept

    @contextmanager
    def _encoder(self) -> Iterator[TextEncoder]:
        """The encoder, loaded and on the device to encode on."""
        if self.loaded is None:
            self.loaded = self.load()
            assert self.loaded.text_len == self.text_len, (self.loaded.text_len, self.text_len)
        with visiting([*self.loaded.model.parameters(), *self.loaded.model.buffers()], self.visits):
            yield self.loaded

    def _read(self, path: Path) -> Tensor | None:
        """The rows in a file; None if there is none, or the disk has damaged it."""
        if not path.is_file():
            return None
        try:
            return load_file(path)["rows"]
        except (SafetensorError, KeyError, OSError, RuntimeError) as error:  # the last one from torch's own opening
            log.warning("%s: cannot be read (%s); the prompt is encoded again", path, error)
            return None

    def _write(self, path: Path, rows: Tensor) -> None:
        try:
            path.parent.mkdir(exist_ok=True)
            with writing(path) as partial:
                save_file({"rows": rows.contiguous()}, partial)
        except (OSError, SafetensorError, UserError) as error:
            # the rows are at hand: a full disk costs the next run time, not this one its result
            log.warning("%s: cannot be written (%s); the prompt will be encoded again", path, error)


def source_of(path: Path, dtype: torch.dtype) -> str:
    """Identity of the encoder and tokenizer at `path` and of the precision, which decide a prompt's rows."""
    files, tokenizer = _layout(path)
    return f"{fingerprint([*files, tokenizer / 'tokenizer.json'])}-{str(dtype).removeprefix('torch.')}"


def load_cached_text_encoder(
    path: Path,
    cache: Path,
    dtype: torch.dtype,
    device: torch.device,
    text_len: int = TEXT_LEN,
    *,
    offload: bool = False,
) -> CachedTextEncoder:
    """The encoder at `path` behind a cache in the folder `cache`; its files are looked for now, its weights read when
    a prompt is not in the cache.

    It encodes on `device`. offload: its weights wait on the host until there is a new prompt.
    """
    home, visits = (torch.device("cpu"), device) if offload else (device, None)
    tokenizer = once(partial(load_tokenizer, path))

    def load() -> TextEncoder:
        return load_text_encoder(path, dtype, home, text_len, tokenizer())

    return CachedTextEncoder(load, source_of(path, dtype), cache, text_len, visits=visits, tokenizer=tokenizer)
