"""The UMT5 encoder's published layouts, the cache of its embeddings, and the collapse of padded keys."""

from __future__ import annotations

import logging
import math
import multiprocessing
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from tempact.errors import UserError
from tempact.files import writing
from tempact.models.wan import text
from tempact.models.wan.text import (
    CachedTextEncoder,
    TextEncoder,
    check_text_encoder,
    clean_prompt,
    load_cached_text_encoder,
    load_text_encoder,
    source_of,
)
from tempact.models.wan.text_padding import cut_length, padding_bias

CPU = torch.device("cpu")
LENGTH = 12  # rows of a text
DTYPES = {torch.float64: 1, torch.float32: 1, torch.float16: 3, torch.bfloat16: 4}  # padded keys that each adjusts
PROMPTS = ["a red circle moves", "the blue square vanishes and the circle turns green", ""]
WORDS = sorted({word for prompt in PROMPTS for word in prompt.split()})


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A unigram tokenizer as UMT5's: pad 0, end 1, unknown 2, words behind a metaspace."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS] + [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )  # fmt: skip


@cache
def make_model() -> UMT5EncoderModel:
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3, dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = UMT5EncoderModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def original_names(model: UMT5EncoderModel) -> dict[str, torch.Tensor]:
    """transformers' names to those of Wan's file, by the map of docs/backbones.md section 6."""
    parts = {
        "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
        "layer.0.SelfAttention": "attn", "layer.0.layer_norm": "norm1", "layer.1.layer_norm": "norm2",
        "layer.1.DenseReluDense.wi_0": "ffn.gate.0", "layer.1.DenseReluDense.wi_1": "ffn.fc1",
        "layer.1.DenseReluDense.wo": "ffn.fc2", "encoder.block": "blocks", "encoder.final_layer_norm": "norm",
        "shared": "token_embedding",
    }  # fmt: skip
    out = {}
    for name, tensor in model.state_dict().items():
        if name == "encoder.embed_tokens.weight":
            continue
        for theirs, wans in parts.items():
            name = name.replace(theirs, wans)
        out[name] = tensor.clone()
    return out


def save_layout(folder: Path, layout: str) -> Path:
    if layout == "release":
        tokenizer = folder / "google" / "umt5-xxl"
        torch.save(original_names(make_model()), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    elif layout == "pipeline":
        tokenizer = folder / "tokenizer"
        make_model().save_pretrained(folder / "text_encoder", max_shard_size="8KB")
        assert len(list((folder / "text_encoder").glob("*.safetensors"))) > 1
    else:
        tokenizer = folder
        make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(tokenizer)
    return folder


@torch.no_grad()
def expected_rows(prompt: str) -> torch.Tensor:
    """The model on the prompt's tokens alone, then zeros."""
    ids = make_tokenizer()(prompt)["input_ids"][:LENGTH]
    ids[-1] = 1
    hidden = make_model()(torch.tensor([ids])).last_hidden_state[0]
    return F.pad(hidden, (0, 0, 0, LENGTH - len(ids)))


@pytest.mark.parametrize("layout", ["release", "pipeline", "folder"])
def test_every_published_layout_encodes_alike(tmp_path: Path, layout: str) -> None:
    encoder = load_text_encoder(save_layout(tmp_path, layout), torch.float32, CPU, LENGTH)
    assert len(make_tokenizer()(PROMPTS[1])["input_ids"]) == 10
    prompts = [*PROMPTS, "a red circle moves " * 8]
    rows = encoder.encode(prompts)
    for prompt, row in zip(prompts, rows, strict=True):
        assert (row - expected_rows(prompt)).abs().max() < 1e-5
    assert [int(row.ne(0).any(-1).sum()) for row in rows] == [5, 10, 1, 12]
    half = load_text_encoder(tmp_path, torch.bfloat16, CPU, LENGTH).encode(PROMPTS)
    assert half.dtype == torch.bfloat16 and (half.float() - rows[:3]).abs().max() < 0.05 * rows.abs().max()


def test_the_words_past_the_rows_are_known(tmp_path: Path) -> None:
    encoder = TextEncoder(make_model(), make_tokenizer(), LENGTH)
    fits, longer = " ".join(["circle"] * (LENGTH - 1)), " ".join(["circle"] * (LENGTH - 1) + ["blue", "red"])
    assert (encoder.unseen(fits), encoder.unseen(longer), encoder.unseen("")) == ("", "blue red", "")
    assert torch.equal(encoder.encode([longer]), encoder.encode([fits]))
    loads: list[int] = []

    def load() -> TextEncoder:
        loads.append(1)
        return encoder

    for known in (False, True):  # known: from the cache, where only a prompt that may be cut asks for the encoder
        cached = CachedTextEncoder(load, "x", tmp_path, LENGTH)
        if not known:
            cached.encode(["circle", longer])
        assert (cached.unseen("circle"), cached.unseen(longer)) == ("", "blue red")
    assert len(loads) == 2


def test_prompts_are_cleaned_as_wan_cleans_them() -> None:
    # ftfy leaves HTML alone where it sees a tag: the unescaping is ours
    assert clean_prompt("  A cafÃ©&amp;amp;bar\n\t <b>opens  &lt;now&gt; ") == "A café&bar <b>opens <now>"


def test_bad_encoders_are_refused_in_one_line(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        """By loading, and before it."""
        for read in (lambda path: load_text_encoder(path, torch.float32, CPU, LENGTH), check_text_encoder):
            with pytest.raises(UserError, match=message) as error:
                read(tmp_path)
            assert "\n" not in str(error.value)

    refused("found no text encoder; accepted: config.json with model")
    weights = save_layout(tmp_path, "release") / "models_t5_umt5-xxl-enc-bf16.pth"
    state = original_names(make_model())
    del state["blocks.1.ffn.fc1.weight"]
    torch.save({**state, "blocks.0.norm1.weight": torch.ones(3)}, weights)
    refused(
        r"1 tensors missing \(encoder.block.1.layer.1.DenseReluDense.wi_1.weight\); 1 tensors of another shape "
        r"\(encoder.block.0.layer.0.layer_norm.weight \(3,\) for \(16,\)\)"
    )
    torch.save({"a": torch.ones(1)}, weights)
    refused("found no 'shared.weight'; accepted: the weights of UMT5's encoder")
    torch.save({**original_names(make_model()), "token_embedding.weight": torch.zeros(8, 16)}, weights)
    refused(f"found {len(make_tokenizer())} tokens; accepted: at most the encoder's 8")
    (tmp_path / "google" / "umt5-xxl" / "tokenizer.json").unlink()
    refused("found no tokenizer.json")
    weights.unlink()
    make_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"umt5"', '"t5"'))
    refused("found model_type 't5'; accepted: umt5")


@pytest.mark.parametrize("layout", ["release", "pipeline", "folder"])
def test_an_encoder_is_checked_without_its_weights(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, moved = save_layout(tmp_path, layout), list[object]()
    monkeypatch.setattr(text, "assign_weights", lambda *given: moved.append(given))
    monkeypatch.setattr(torch.Tensor, "to", lambda *given, **named: moved.append(given))
    check_text_encoder(path)
    assert not moved
    monkeypatch.undo()
    weights = next(file for file in path.rglob("*") if file.suffix in (".pth", ".safetensors"))
    whole = weights.read_bytes()
    for broken in (whole[:-100], b"version https://git-lfs.github.com/spec/v1", whole[:1], b""):
        weights.write_bytes(broken)
        with pytest.raises(UserError) as error:
            check_text_encoder(path)
        assert str(error.value).startswith(f"{weights}: found ") and "\n" not in str(error.value)


def test_an_old_pickle_is_not_read_to_be_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_layout(tmp_path, "release")
    weights = path / "models_t5_umt5-xxl-enc-bf16.pth"
    torch.save(original_names(make_model()), weights, _use_new_zipfile_serialization=False)
    monkeypatch.setattr(text, "read_tensors", None)
    check_text_encoder(path)
    for broken in ("{", "{}", "[]", '{"model": {"type": "Unigram"}}'):
        (path / "google" / "umt5-xxl" / "tokenizer.json").write_text(broken)
        with pytest.raises(UserError, match="umt5-xxl: cannot be read .*; accepted: UMT5's tokenizer folder") as error:
            check_text_encoder(path)
        assert "\n" not in str(error.value)


def test_a_process_that_finds_all_in_the_cache_reads_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for rows nor for the words that have no place in them, which are the tokenizer's alone to tell."""
    path = save_layout(tmp_path / "encoder", "pipeline")
    longer = " ".join(["circle"] * LENGTH + ["blue"])

    def cached() -> CachedTextEncoder:
        return load_cached_text_encoder(path, tmp_path / "cache", torch.float32, CPU, LENGTH)

    first = cached()
    rows = first.encode([*PROMPTS, longer])
    assert first.loaded is not None and first.unseen(longer) == "circle blue"
    monkeypatch.setattr(text, "read_tensors", None)
    other = cached()
    assert torch.equal(other.encode([*PROMPTS, longer]), rows)
    assert [other.unseen(prompt) for prompt in (*PROMPTS, longer, f"red {longer}")] == [
        "", "", "", "circle blue", "circle circle blue",
    ]  # fmt: skip
    assert other.loaded is None
    with pytest.raises(TypeError):
        other.encode(["another one"])


class Counting:
    """Loads the tiny encoder, and counts what it is asked for."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.loads, self.encoded, self.dtype = 0, [], dtype

    def __call__(self) -> TextEncoder:
        self.loads += 1
        encoder = TextEncoder(make_model(), make_tokenizer(), LENGTH)
        inner = encoder.encode

        def encode(prompts: list[str]) -> torch.Tensor:
            self.encoded += prompts
            return inner(prompts).to(self.dtype)

        encoder.encode = encode  # type: ignore[method-assign]
        return encoder


def test_prompts_are_encoded_once_for_all_runs(tmp_path: Path) -> None:
    load = Counting()
    cached = CachedTextEncoder(load, "model-a-float32", tmp_path, LENGTH)
    rows = cached.encode([PROMPTS[0], PROMPTS[1], f" {PROMPTS[0]}\n"])
    assert (rows[0] - expected_rows(PROMPTS[0])).abs().max() < 1e-5
    assert torch.equal(rows[0], rows[2])
    again = CachedTextEncoder(load, "model-a-float32", tmp_path, LENGTH)
    assert torch.equal(again.encode([PROMPTS[1], PROMPTS[0]]), rows[[1, 0]])
    assert load.loads == 1 and PROMPTS[1] in load.encoded and again.loaded is None
    # only rows that say something are kept, and nothing but whole files
    kept = load_file(again.path_of(PROMPTS[0]))["rows"]
    assert torch.equal(kept, rows[0, :5])
    assert all(path.suffix == ".safetensors" for path in tmp_path.rglob("*") if path.is_file())
    # another model, precision or length is another entry
    for source, length in (("model-b-float32", LENGTH), ("model-a-bfloat16", LENGTH), ("model-a-float32", 9)):
        assert CachedTextEncoder(load, source, tmp_path, length).path_of(PROMPTS[0]) != again.path_of(PROMPTS[0])


def test_the_source_names_weights_tokenizer_and_precision(tmp_path: Path) -> None:
    path = save_layout(tmp_path, "release")
    source = source_of(path, torch.bfloat16)
    assert source.endswith("-bfloat16") and source_of(path, torch.float16) != source
    assert source_of(path, torch.bfloat16) == source
    cached = load_cached_text_encoder(path, tmp_path / "cache", torch.float32, CPU, LENGTH)
    assert cached.loaded is None
    assert (cached.encode(PROMPTS[:1])[0] - expected_rows(PROMPTS[0])).abs().max() < 1e-5
    weights = path / "models_t5_umt5-xxl-enc-bf16.pth"
    state = original_names(make_model())
    torch.save({**state, "norm.weight": state["norm.weight"] + 1}, weights)
    assert source_of(path, torch.bfloat16) != source
    torch.save(state, weights)
    assert source_of(path, torch.bfloat16) == source
    tokenizer = path / "google" / "umt5-xxl" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert source_of(path, torch.bfloat16) != source


@pytest.mark.gpu
def test_weights_that_wait_on_the_host_visit_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, gpu = save_layout(tmp_path, "pipeline"), torch.device("cuda")
    cached = load_cached_text_encoder(path, tmp_path / "a", torch.float32, gpu, LENGTH, offload=True)
    stays = load_cached_text_encoder(path, tmp_path / "b", torch.float32, gpu, LENGTH)
    before = torch.cuda.memory_allocated()
    for prompts in (PROMPTS[:1], PROMPTS):
        seen: list[str] = []
        with cached._encoder() as encoder:
            encoder.model.register_forward_hook(lambda model, *_, seen=seen: seen.append(model.device.type))
        rows = cached.encode(prompts)
        assert rows.device == CPU and set(seen) == {"cuda"}
        assert torch.cuda.memory_allocated() <= before + 2**20 and cached.loaded.model.device == CPU
        assert torch.equal(rows, stays.encode(prompts).cpu())
    monkeypatch.setattr(cached.loaded, "tokenize", None)
    with pytest.raises(TypeError):
        cached.encode(["another one"])
    assert cached.loaded.model.device == CPU and torch.cuda.memory_allocated() <= before + 2**20


def test_a_damaged_entry_is_encoded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load = Counting()
    cached = CachedTextEncoder(load, "s", tmp_path, LENGTH)
    rows = cached.encode(PROMPTS[:1])
    path = cached.path_of(PROMPTS[0])
    path.write_bytes(path.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(CachedTextEncoder(load, "s", tmp_path, LENGTH).encode(PROMPTS[:1]), rows)
    assert "cannot be read" in caplog.text and len(load.encoded) == 2
    CachedTextEncoder(load, "s", tmp_path, LENGTH).encode(PROMPTS[:1])
    assert len(load.encoded) == 2


def test_a_full_disk_costs_the_cache_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text, "save_file", full)
    cached = CachedTextEncoder(Counting(), "s", tmp_path, LENGTH)
    rows = cached.encode(PROMPTS[:1])
    assert (rows[0] - expected_rows(PROMPTS[0])).abs().max() < 1e-5
    assert "cannot be written" in caplog.text
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="text cache: cannot write to .*file/cache .*; accepted: a writable folder"):
        CachedTextEncoder(Counting(), "s", tmp_path / "file" / "cache", LENGTH)


def _fill(folder: Path, source: str, seed: int, failures: multiprocessing.SimpleQueue) -> None:
    """A process that encodes the same prompts as others, in another order, over and over."""
    torch.manual_seed(seed)
    expected = {prompt: expected_rows(prompt) for prompt in PROMPTS}
    for _ in range(15):
        cached = CachedTextEncoder(Counting(), source, folder, LENGTH)
        for i in torch.randperm(len(PROMPTS)).tolist():
            if (cached.encode([PROMPTS[i]])[0] - expected[PROMPTS[i]]).abs().max() > 1e-5:
                failures.put(PROMPTS[i])
            if torch.rand(1) < 0.3:
                cached.path_of(PROMPTS[i]).unlink(missing_ok=True)
    failures.put("done")


def test_several_processes_share_a_cache(tmp_path: Path) -> None:
    expected_rows(PROMPTS[0])
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    workers = [context.Process(target=_fill, args=(tmp_path, "s", seed, failures)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert [failures.get() for _ in workers] == ["done"] * 3
    assert [path for path in tmp_path.rglob("*.partial*")] == []


def test_hosts_that_share_a_cache_write_under_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where process numbers are the same, as in containers."""
    names = set()
    for host, number in (("node-a", 7), ("node-b", 7), ("node-b", 8)):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        monkeypatch.setattr("os.getpid", lambda number=number: number)
        with writing(tmp_path / "rows.safetensors") as partial:
            assert partial.suffix == ".safetensors" and partial.parent == tmp_path
            names.add(partial.name)
            partial.write_text(host)
    assert len(names) == 3 and [path.name for path in tmp_path.iterdir()] == ["rows.safetensors"]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    mask = None if bias is None else bias.view(1, 1, 1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def collapse_padding(longest: int, size: int, dtype: torch.dtype, multiple: int = 1) -> tuple[int, torch.Tensor]:
    length = cut_length(longest, size, multiple)
    return length, padding_bias(length, size, dtype)


@pytest.mark.parametrize("multiple", [1, 16])
def test_collapsed_padding_is_exact(multiple: int) -> None:
    """Two texts of 3 and 20 rows among 64: outputs and the gradients of what makes keys and values."""
    lengths, size, width = (3, 20), 64, 8
    rows = torch.randn(2, size, width, dtype=torch.float64)
    for row, length in zip(rows, lengths, strict=True):
        row[length:] = 0.0
    query = torch.randn(2, 2, 5, width, dtype=torch.float64)
    weights = [torch.randn(2 * width, width, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    biases = [torch.randn(2 * width, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    length, bias = collapse_padding(max(lengths), size, torch.float64, multiple)
    assert length == (24 if multiple == 1 else 32) and float(bias[-1]) == math.log(size - length + 1)
    results = []
    for count, mask in ((size, None), (length, bias)):
        k, v = (
            F.linear(rows[:, :count], w, b).unflatten(-1, (2, width)).transpose(1, 2)
            for w, b in zip(weights, biases, strict=True)
        )
        out = attention(query, k, v, mask)
        results.append([out, *torch.autograd.grad(out.square().sum(), [*weights, *biases])])
    for plain, collapsed in zip(*results, strict=True):
        # a key's bias moves all logits alike: its gradient is zero but for rounding
        assert (plain - collapsed).abs().max() <= 1e-11 * plain.abs().max() + 1e-12


@given(st.integers(0, 512), st.sampled_from([1, 8, 64]), st.sampled_from(list(DTYPES)))
def test_padded_keys_weigh_what_they_stand_for(longest: int, multiple: int, dtype: torch.dtype) -> None:
    length, bias = collapse_padding(longest, 512, dtype, multiple)
    assert len(bias) == length <= 512 and bias.dtype == dtype
    assert (length % multiple == 0 and longest + 4 <= length < longest + 4 + multiple) or length == 512
    assert not bias[: max(longest, length - 4)].any()
    # in fp32 one key does it
    assert int(bias.ne(0).sum()) <= DTYPES[dtype]
    assert float(bias[longest:].double().exp().sum()) == pytest.approx(512 - longest, rel=1.1e-6)
    if length == 512:
        assert not bias.any()


def test_half_precision_logits_do_not_move_the_result() -> None:
    """ln 435 rounded to bf16 would be 6.0625 for 6.0753, a padded weight off by 1.3%."""
    q, pad = torch.randn(1, 2, 7, 16).double(), torch.randn(1, 2, 1, 16).double()
    own = torch.randn(2, 1, 2, 77, 16).double()
    k, v = (torch.cat([x, pad.expand(-1, -1, 435, -1)], dim=2) for x in own)
    length, bias = collapse_padding(77, 512, torch.bfloat16)
    got = attention(q, k[:, :, :length], v[:, :, :length], bias.double())
    assert (got - attention(q, k, v)).abs().max() < 2e-6
    rounded = torch.tensor([0.0] * 77 + [math.log(435)]).bfloat16().double()
    assert (attention(q, k[:, :, :78], v[:, :, :78], rounded) - attention(q, k, v)).abs().max() > 5e-4
