"""How checkpoints are stored: several models in a file, fp8 with and without scales, notes of Git LFS, pickles."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import synthesise
from models.test_checkpoints import Unsafe
from models.test_text import save_layout
from safetensors.torch import load_file, save_file
from torch import Tensor

from tempact.cli import parse_run
from tempact.errors import UserError
from tempact.models.wan.checkpoints.convert import convert, verify
from tempact.models.wan.checkpoints.load import load_transformer, open_checkpoint
from tempact.models.wan.checkpoints.lora import open_adapter
from tempact.models.wan.checkpoints.names import in_layout
from tempact.models.wan.text import ORIGINAL_FILE, load_text_encoder
from tempact.models.wan.transformer import WanConfig
from tempact.models.wan.vae import load_tiny_decoder, load_vae

CPU = torch.device("cpu")
SMALL = WanConfig(dim=48, ffn_dim=80, freq_dim=32, text_dim=16, text_len=6, heads=2, layers=3, in_dim=4, out_dim=4)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
STATE = synthesise.random_state(SMALL)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def shifted(by: float) -> dict[str, Tensor]:
    return {f"model.{name}": tensor + by for name, tensor in STATE.items()}


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("ema",), "ema"),
        (("module",), "module"),
        (("module", "ema"), "ema"),
        (("state_dict", "module", "model", "generator", "generator_ema"), "generator_ema"),
        (("model", "ema"), "ema"),
        (("averaged_weights",), "averaged_weights"),  # the only one there is
    ],
)
def test_the_entry_that_was_taken_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: tuple[str, ...], taken: str
) -> None:
    content = {name: shifted(i) for i, name in enumerate(names)}
    torch.save(content | {"optimizer": {"state": {0: {"step": 3}}}, "step": 3}, tmp_path / "x.pt")
    with caplog.at_level(logging.INFO):
        found = open_checkpoint(tmp_path / "x.pt", config=SMALL)
    assert found.entry == taken
    assert torch.equal(found.tensors["head.head.bias"], STATE["head.head.bias"] + names.index(taken))
    others = ", ".join(sorted({*names, "optimizer", "step"} - {taken}))
    told = f"{tmp_path / 'x.pt'}: entry {taken} is taken; the file also holds {others}"
    assert told in [record.getMessage() for record in caplog.records]


def test_entries_that_are_no_models_are_passed_over(tmp_path: Path) -> None:
    torch.save({"ema": {}, "generator": None, "model": shifted(2), 0: shifted(3)}, tmp_path / "x.pt")
    found = open_checkpoint(tmp_path / "x.pt", config=SMALL)
    assert found.entry == "model" and torch.equal(found.tensors["head.head.bias"], STATE["head.head.bias"] + 2)
    torch.save({0: shifted(3)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="found entries 0; accepted: one of generator_ema"):
        open_checkpoint(tmp_path / "x.pt", config=SMALL)


def test_a_run_chooses_any_entry(tmp_path: Path) -> None:
    """Names that nobody knows are chosen by hand, and every name that a refusal tells of is accepted."""
    file = tmp_path / "x.pt"
    torch.save({"student": shifted(0), "teacher": shifted(1), "optimizer": {"lr": 0.1}, "step": 3}, file)
    with pytest.raises(UserError, match="found entries optimizer, step, student, teacher; accepted: one of") as error:
        open_checkpoint(file, config=SMALL)
    assert str(error.value).endswith("state_dict, or the name of another: student, teacher")
    with pytest.raises(UserError, match="found no entry 'ema'; accepted: student, teacher$"):
        open_checkpoint(file, config=SMALL, entry="ema")
    for i, name in enumerate(("student", "teacher")):
        entry = parse_run(["longlive", "--executor.entry", name], "program")[0].executor.entry
        model = load_transformer(file, device=CPU, config=SMALL, entry=entry)
        assert torch.equal(model.head.head.bias, STATE["head.head.bias"] + i)
        convert(file, tmp_path / name, entry=name, config=SMALL)
        assert open_checkpoint(tmp_path / name).entry == name


def is_linear(name: str) -> bool:
    return name.startswith("blocks.") and STATE[name].ndim == 2


def scaled(kind: torch.dtype, rows: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Linears in fp8 as quantisers make them, with the largest value at the end of the range; and their scales."""
    state, scales = {}, {}
    for name, tensor in STATE.items():
        state[name] = tensor.half()
        if is_linear(name):
            largest = tensor.abs().amax(dim=1) if rows else tensor.abs().max()
            scales[name] = largest / torch.finfo(kind).max
            state[name] = (tensor / (scales[name][:, None] if rows else scales[name])).to(kind)
    return state, scales


@pytest.mark.parametrize("kind", FP8)
def test_fp8_is_loaded_and_converted_as_it_is(tmp_path: Path, kind: torch.dtype) -> None:
    state = {name: tensor.to(kind) if is_linear(name) else tensor for name, tensor in STATE.items()}
    folder = synthesise.wan_folder(tmp_path / "wan", state, SMALL)
    loaded = load_transformer(folder, device=CPU).state_dict()
    assert [name for name, tensor in state.items() if not torch.equal(loaded[name], tensor.float())] == []
    for dtype, wanted in (("stored", None), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        convert(folder, tmp_path / dtype, dtype=dtype)
        verify(tmp_path / dtype)
        for name, tensor in load_file(tmp_path / dtype / WEIGHTS).items():
            right = state[name] if wanted is None else state[name].to(wanted)
            assert tensor.dtype == right.dtype and torch.equal(tensor.float(), right.float())
    state["blocks.1.ffn.0.weight"].view(torch.uint8)[2, 3] = 0x7F  # NaN in both
    with pytest.raises(UserError, match="values that are not finite in blocks.1.ffn.0.weight; accepted: numbers"):
        convert(synthesise.wan_folder(tmp_path / "nan", state, SMALL), tmp_path / "new")


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("ending", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("layout", ["wan", "diffusers"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_fp8_with_scales(tmp_path: Path, rows: bool, ending: str, layout: str, prefix: str) -> None:
    state, scales = scaled(FP8[0], rows)
    content = {prefix + in_layout(name, layout): tensor for name, tensor in state.items()}
    for name, scale in scales.items():
        key = (prefix + in_layout(name, layout)).removesuffix("weight")
        content |= {f"{key}{ending}": scale[:, None] if rows else scale, f"{key}scale_input": torch.ones(())}
    content["scaled_fp8"] = torch.empty(0, dtype=FP8[0])
    file = tmp_path / "wan_fp8_scaled.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in content.items()}, file)
    lora = synthesise.longlive_lora(tmp_path / "lora.pt", SMALL, 3)
    found = load_transformer(file, device=CPU, config=SMALL).state_dict()
    convert(file, tmp_path / "new", config=SMALL)
    written, merged = load_file(tmp_path / "new" / WEIGHTS), load_transformer(
        file, device=CPU, config=SMALL, adapters=[lora]
    ).state_dict()  # fmt: skip
    factors = open_adapter(lora, SMALL).factors
    for name, tensor in state.items():
        wanted = tensor.float()
        if name in scales:
            wanted = wanted * (scales[name][:, None] if rows else scales[name])
            assert (wanted - STATE[name]).abs().max() < 0.07 * STATE[name].abs().max()
        assert torch.equal(found[name], wanted)
        assert written[name].dtype == (torch.float32 if name in scales else torch.float16)
        assert torch.equal(written[name].float(), wanted)
        own = factors.get(name.removesuffix(".weight")) if is_linear(name) else None
        product = 0.0 if own is None else own.up.double() @ own.down.double()
        assert torch.allclose(merged[name], (wanted.double() + product).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.ffn.0.scale_weight": torch.ones(3)}, r"found a scale \(3,\) for blocks.0.ffn.0.weight; acc"),
        ({"blocks.0.fnn.0.scale_weight": torch.ones(())}, r"found a scale \(\) for blocks.0.fnn.0.weight; acc"),
        ({"blocks.0.ffn.0.scale_weight": torch.tensor(torch.inf)}, "that are not finite in blocks.0.ffn.0.weight"),
        ({"blocks.0.ffn.0.weight_scale_inv": torch.ones(1, 1)}, r"1 tensors extra \(blocks.0.ffn.0.weight_scale_inv\)"),
    ],
)  # fmt: skip
def test_scales_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Tensor], message: str) -> None:
    save_file(STATE | change, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=f"^{tmp_path}/x.safetensors: .*{message}") as error:
        load_transformer(tmp_path / "x.safetensors", device=CPU, config=SMALL)
    assert "\n" not in str(error.value)


def text_encoder_of(file: Path) -> object:
    file.with_name("t5").mkdir()
    folder = save_layout(file.with_name("t5"), "release")
    file.replace(folder / ORIGINAL_FILE)
    try:
        return load_text_encoder(folder, torch.float32, CPU)
    except UserError as error:
        raise UserError(str(error).replace(str(folder / ORIGINAL_FILE), str(file))) from error


Read = Callable[[Path], Any]
READERS: dict[str, Read] = {
    "transformer": lambda file: load_transformer(file, device=CPU, config=SMALL),
    "adapter": lambda file: open_adapter(file, SMALL),
    "conversion": lambda file: convert(file, file.with_name("new"), config=SMALL),
    "VAE": lambda file: load_vae(file, torch.float32, CPU),
    "text encoder": text_encoder_of,
    "tiny decoder": lambda file: load_tiny_decoder(file, torch.float32, CPU),
}


@pytest.mark.parametrize("name", ["taew2_1.pt", "taew2_1.safetensors", "taew2_1.bin"])
@pytest.mark.parametrize("reader", READERS)
def test_a_note_of_git_lfs_is_told_once(tmp_path: Path, reader: str, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError) as error:
        READERS[reader](file)
    told = "found Git LFS's note of where the file is; accepted: the file (git lfs pull)"
    assert str(error.value) == f"{file}: {told}"


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_runs_the_code_of_a_pickle(tmp_path: Path, reader: str, raw: bool) -> None:
    """The entry beside a model's tensors would make a folder, did anybody unpickle it."""
    file, made = tmp_path / "taew2_1.pth", tmp_path / "made"
    content = {**STATE, "step": Unsafe(made)}
    file.write_bytes(pickle.dumps(content, protocol=2)) if raw else torch.save(content, file)
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: found a pickle that is not plain tensors") as error:
        READERS[reader](file)
    assert "\n" not in str(error.value) and not made.exists()
