"""Checkpoints of every published layout to the same weights; what is not exactly such a checkpoint is refused."""

from __future__ import annotations

import gc
import json
import logging
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import synthesise
from safetensors.torch import save_file
from torch import Tensor, nn

from tempact.errors import UserError
from tempact.models.wan.checkpoints.convert import convert
from tempact.models.wan.checkpoints.files import listed
from tempact.models.wan.checkpoints.load import PRECISIONS, dtype_of, load_transformer, open_checkpoint, set_precision
from tempact.models.wan.checkpoints.names import (
    config_json,
    expected_tensors,
    in_layout,
    read_config,
    to_wan,
)
from tempact.models.wan.transformer import WAN_14B, WanConfig, WanTransformer

CPU = torch.device("cpu")
SMALL = WanConfig(dim=48, ffn_dim=80, freq_dim=32, text_dim=16, text_len=6, heads=2, layers=3, in_dim=4, out_dim=4)
TENSORS = 15 + 27 * SMALL.layers
Make = Callable[[Path, dict[str, Tensor]], Path]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return synthesise.random_state(SMALL)


def file_in(make: Callable[[Path, dict[str, Tensor]], Path]) -> Make:
    return lambda folder, state: make(folder / "weights.pt", state)


def flat(file: Path, state: dict[str, Tensor], prefix: str = "") -> Path:
    torch.save({f"{prefix}{name}": tensor for name, tensor in state.items()}, file)
    return file


def old_pickle(file: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"model": state, "step": 3}, file, _use_new_zipfile_serialization=False)
    return file


def averaged_first(file: Path, state: dict[str, Tensor]) -> Path:
    return synthesise.training_state(file, {name: tensor + 1 for name, tensor in state.items()}, state)


def unindexed(folder: Path, state: dict[str, Tensor]) -> Path:
    synthesise.wan_folder(folder / "wan", state, SMALL, shards=3)
    (folder / "wan" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    return folder / "wan"


LAYOUTS: dict[str, Make] = {
    "Wan's release": lambda folder, state: synthesise.wan_folder(folder / "wan", state, SMALL),
    "Wan's release in shards": lambda folder, state: synthesise.wan_folder(folder / "wan", state, SMALL, shards=3),
    "shards without an index": unindexed,
    "diffusers": lambda folder, state: synthesise.diffusers_folder(folder / "pipeline", state, SMALL),
    "diffusers in shards": lambda folder, state: synthesise.diffusers_folder(folder / "p", state, SMALL, shard="200KB"),
    "diffusers' transformer": lambda f, state: synthesise.diffusers_folder(f / "p", state, SMALL) / "transformer",
    "Self-Forcing": file_in(synthesise.self_forcing),
    "Causal-Forcing and LongLive": file_in(synthesise.causal_forcing),
    "a folder with one .pt": lambda folder, state: synthesise.causal_forcing(folder / "x.pt", state).parent,
    "a trainer's": file_in(averaged_first),
    "an old pickle": file_in(old_pickle),
    "compiled under DDP": file_in(lambda file, state: flat(file, state, "module._orig_mod.")),
    "packed for other tools": file_in(lambda file, state: flat(file, state, "model.diffusion_model.")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_weights(tmp_path: Path, state: dict[str, Tensor], layout: str) -> None:
    path = LAYOUTS[layout](tmp_path, state)
    if layout == "diffusers in shards":
        assert len(list((path / "transformer").glob("*.safetensors"))) > 1
    model = load_transformer(path, device=CPU, config=SMALL)
    loaded = model.state_dict()
    assert len(loaded) == TENSORS
    assert [name for name, tensor in state.items() if not torch.equal(loaded[name], tensor)] == []


def test_a_model_of_a_file_with_several_can_be_asked_for(
    tmp_path: Path, state: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    file = synthesise.training_state(tmp_path / "x.pt", state, {name: tensor + 1 for name, tensor in state.items()})
    bias = "blocks.1.ffn.0.bias"
    for entry, added in (("", 1.0), ("generator_ema", 1.0), ("generator", 0.0)):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            loaded = open_checkpoint(file, config=SMALL, entry=entry)
        assert loaded.entry == (entry or "generator_ema")
        assert torch.equal(loaded.tensors[bias], state[bias] + added)
        others = {"critic", "generator", "generator_ema", "step"} - {loaded.entry}
        told = f"{file}: entry {loaded.entry} is taken; the file also holds {', '.join(sorted(others))}"
        assert [record.getMessage() for record in caplog.records] == [told]
        model = load_transformer(file, device=CPU, config=SMALL, entry=entry)
        assert torch.equal(model.state_dict()[bias], state[bias] + added)
    for entry in ("critics", "step"):
        message = f"^{file}: found no entry '{entry}'; accepted: critic, generator, generator_ema$"
        with pytest.raises(UserError, match=message):
            load_transformer(file, device=CPU, config=SMALL, entry=entry)


def test_an_entry_does_not_matter_where_a_model_lies_alone(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """But a conversion remembers which entry it has read."""
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    alone = (flat(tmp_path / "flat.pt", state), synthesise.wan_folder(tmp_path / "wan", state, SMALL))
    for path in alone:
        assert open_checkpoint(path, config=SMALL, entry="generator").entry == ""
    convert(synthesise.training_state(tmp_path / "x.pt", state, averaged), tmp_path / "a", config=SMALL)
    convert(tmp_path / "a", tmp_path / "b", layout="diffusers")
    for folder in (tmp_path / "a", tmp_path / "b"):
        for entry in ("", "generator_ema"):
            assert open_checkpoint(folder, config=SMALL, entry=entry).entry == "generator_ema"
        found = f"^{folder}: found the conversion of entry 'generator_ema'; accepted: that of 'generator'$"
        with pytest.raises(UserError, match=found):
            load_transformer(folder, device=CPU, config=SMALL, entry="generator")
    with pytest.raises(UserError, match="found one model without entries; accepted: no entry"):
        convert(alone[1], tmp_path / "c", entry="generator")


def test_published_names_are_those_of_diffusers_own_converter() -> None:
    """All 825 of them at full size, and their shapes."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install -e '.[test]'")
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    shapes = {name: tensor.shape for name, tensor in expected_tensors(WanConfig()).items()}
    assert len(shapes) == 825
    theirs = convert_wan_transformer_to_diffusers({name: name for name in shapes})
    assert {in_layout(name, "diffusers"): name for name in shapes} == theirs
    assert [name for name in shapes if to_wan(in_layout(name, "diffusers")) != name] == []
    with torch.device("meta"):
        sizes = {key: value for key, value in config_json(WanConfig(), "diffusers").items() if key != "_class_name"}
        model = diffusers.WanTransformer3DModel(**sizes)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        in_layout(name, "diffusers"): shape for name, shape in shapes.items()
    }


def test_the_velocity_is_that_of_diffusers(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """A chunk under full attention in fp32, through the files of either; timesteps of one value and one a frame."""
    pytest.importorskip("diffusers", reason="needs diffusers: pip install -e '.[test]'")
    from diffusers import WanTransformer3DModel

    folder = synthesise.diffusers_folder(tmp_path / "pipeline", state, SMALL)
    theirs = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").eval()
    ours = load_transformer(folder, device=CPU, config=SMALL)
    x, text = torch.randn(2, 4, 3, 8, 12), torch.randn(2, 6, 16)
    text[1, 4:] = 0.0
    for sigmas in (torch.tensor([0.625, 0.625, 0.625]), torch.tensor([0.9375, 0.25, 0.0])):
        timestep = 1000.0 * sigmas.repeat_interleave(24).expand(2, -1)
        with torch.no_grad():
            found = ours(x, sigmas.expand(2, 3), ours.project_text(text), torch.arange(3))
            wanted = theirs(x, timestep if sigmas.unique().numel() > 1 else timestep[:, 0], text).sample
        assert wanted.std() > 0.5
        # diffusers takes its timestep's angles in fp32, which costs 3e-5 of a turn
        assert ((found - wanted).pow(2).mean() / wanted.pow(2).mean()).sqrt() < 2e-5


def test_precisions_choose_dtypes_by_what_a_tensor_is_for(tmp_path: Path, state: dict[str, Tensor]) -> None:
    folder = synthesise.wan_folder(tmp_path / "wan", state, SMALL)
    kept = {
        "time_embedding.0.bias", "time_embedding.2.weight", "time_projection.1.weight", "head.modulation",
        "blocks.0.modulation", "blocks.2.norm3.bias", "blocks.1.self_attn.norm_q.weight",
        "blocks.1.cross_attn.norm_k.weight",
    }  # fmt: skip
    cast = {"patch_embedding.weight", "text_embedding.0.bias", "blocks.0.ffn.0.weight", "blocks.2.self_attn.q.bias",
            "head.head.weight"}  # fmt: skip
    for precision in PRECISIONS:
        loaded = load_transformer(folder, device=CPU, precision=precision).state_dict()
        for name, tensor in loaded.items():
            assert tensor.dtype == dtype_of(name, precision)
            assert torch.equal(tensor, state[name].to(tensor.dtype))
        assert {loaded[name].dtype for name in cast} == {torch.float32 if precision == "fp32" else torch.bfloat16}
        assert {loaded[name].dtype for name in kept} == {torch.bfloat16 if precision == "bf16" else torch.float32}
        model = set_precision(WanTransformer(SMALL), precision)
        assert [n for n, p in model.named_parameters() if p.dtype != loaded[n].dtype] == []


def test_stored_half_precision_is_read_as_it_is(tmp_path: Path) -> None:
    state = synthesise.random_state(SMALL, dtype=torch.bfloat16)
    file = synthesise.causal_forcing(tmp_path / "x.pt", state)
    loaded = load_transformer(file, device=CPU, config=SMALL).state_dict()
    assert [name for name, tensor in state.items() if not torch.equal(loaded[name], tensor.float())] == []


@pytest.mark.parametrize("kind", ["x.pt", "wan/diffusion_pytorch_model.safetensors"])
def test_a_loaded_model_needs_its_files_no_more(tmp_path: Path, state: dict[str, Tensor], kind: str) -> None:
    """Tensors are mapped while they are read; afterwards a file may be overwritten, and the model be trained."""
    synthesise.causal_forcing(tmp_path / "x.pt", state)
    synthesise.wan_folder(tmp_path / "wan", state, SMALL)
    model = load_transformer(tmp_path / kind, device=CPU, config=SMALL)
    before = (tmp_path / kind).read_bytes()
    with torch.no_grad():
        model.head.head.weight.mul_(2.0)
    assert (tmp_path / kind).read_bytes() == before
    with (tmp_path / kind).open("r+b") as file:  # the same inode, as a mapping would see it
        file.write(bytes(len(before)))
    assert torch.equal(model.head.head.weight, 2.0 * state["head.head.weight"])
    assert torch.equal(model.blocks[0].ffn[0].weight, state["blocks.0.ffn.0.weight"])


def test_a_file_without_sizes_must_hold_the_published_model(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """And the config.json of something else that lies in the folder says nothing of it."""
    file = synthesise.self_forcing(tmp_path / "self_forcing_dmd.pt", state)
    (tmp_path / "config.json").write_text(json.dumps(config_json(SMALL, "wan")))
    with pytest.raises(UserError) as error:
        load_transformer(file, device=CPU)
    message = str(error.value)
    assert message.startswith(f"{file}: found 729 tensors missing (blocks.{{3-29}}.cross_attn.k.bias, ")
    assert "tensors of another shape (blocks.{0-2}.cross_attn.k.bias (48,) for (1536,), " in message
    assert message.endswith("accepted: the 825 tensors of a Wan transformer of 30 blocks, 1536 channels, FFN 8960")


def test_a_file_without_sizes_may_be_the_14b(tmp_path: Path) -> None:
    """By its width, here in the one tensor that the file has of it beside those of others."""
    with torch.device("meta"):
        names = [*WanTransformer(WAN_14B).state_dict()]
    assert len(names) == 1095 and WAN_14B.head_dim == 128
    tensors = {name: torch.zeros(1) for name in names} | {"patch_embedding.weight": torch.zeros(5120, 16, 1, 2, 2)}
    with pytest.raises(UserError, match="accepted: the 1095 tensors of a Wan transformer of 40 blocks, 5120 channels"):
        open_checkpoint(flat(tmp_path / "weights.pt", tensors))


def test_blocks_are_handed_over_one_by_one(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """Shards with an index, as the 14B's; before a block is handed over nothing is made of those behind it."""
    folder, made = synthesise.wan_folder(tmp_path / "wan", state, SMALL, shards=3), list[nn.Module]()

    def block_made(block: nn.Module) -> None:
        made.append(block)
        assert not any(p.is_meta for p in block.parameters())
        assert sum(p.is_meta for p in model().parameters()) == 27 * (SMALL.layers - len(made)) + 3  # and the head
        block.to(torch.float64)  # what is done to it stays

    def model() -> WanTransformer:
        return next(m for m in gc.get_objects() if type(m) is WanTransformer and made[0] in m.modules())

    loaded = load_transformer(folder, device=CPU, precision="bf16", block_made=block_made)
    assert made == [*loaded.blocks] and loaded.head.head.weight.dtype == torch.bfloat16
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == (torch.float64 if name.startswith("blocks.") else torch.bfloat16)
        assert torch.equal(tensor, state[name].bfloat16().to(tensor.dtype))


def test_sizes_survive_both_kinds_of_config(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    other = WanConfig(
        dim=96, ffn_dim=7, freq_dim=8, heads=4, layers=2, in_dim=48, out_dim=24, patch=(1, 4, 2), eps=1e-5
    )
    for layout in ("wan", "diffusers"):
        for config in (WanConfig(), other):
            file.write_text(json.dumps(config_json(config, layout)))
            assert read_config(file) == config
    published = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 1536, "eps": 1e-06, "ffn_dim": 8960,
                 "freq_dim": 256, "in_dim": 16, "model_type": "t2v", "num_heads": 12, "num_layers": 30, "out_dim": 16,
                 "text_len": 512}  # fmt: skip
    file.write_text(json.dumps(published))
    assert read_config(file) == WanConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_class_name": "HunyuanVideoTransformer3DModel"},
            "_class_name 'HunyuanVideoTransformer3DModel'; accepted: WanM",
        ),
        ({"model_type": "i2v"}, "model_type: found 'i2v'; accepted: 't2v'"),
        ({"qk_norm": False}, "qk_norm: found False; accepted: True"),
        ({"image_dim": 1280}, "image_dim: found 1280; accepted: None"),
        ({"dim": None}, "dim: found None, which is no size; accepted: sizes of a Wan transformer"),
        ({"num_layers": 0}, "layers: found 0, which is no size"),
        ({"dim": 50, "num_heads": 4}, "found 50 channels for 4 heads"),
        ({"patch_size": [2, 2]}, r"patch_size: found \(2, 2\)"),
        ({"ffn_dim": ...}, "ffn_dim is missing; accepted: all sizes"),
    ],
)
def test_sizes_of_other_models_are_refused(tmp_path: Path, state: dict, change: dict, message: str) -> None:
    folder = synthesise.wan_folder(tmp_path / "wan", state, SMALL)
    content = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    with pytest.raises(UserError, match=f"^{folder}/config.json: .*{message}") as error:
        load_transformer(folder, device=CPU)
    assert "\n" not in str(error.value)


def edited(state: dict[str, Tensor], drop: str = "^$", **add: Tensor) -> dict[str, Tensor]:
    kept = {name: tensor for name, tensor in state.items() if not re.search(drop, name)}
    return kept | {name.replace("__", "."): tensor for name, tensor in add.items()}


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        (r"norm3\.bias", {}, r"found 3 tensors missing \(blocks.\{0-2\}.norm3.bias\); accepted: the 96 tensors"),
        (r"[02]\.modul", {}, r"found 2 tensors missing \(blocks.\{0,2\}.modulation\);"),
        (r"head.mod", {"blocks__1__cross_attn__k_img__weight": torch.zeros(3)},
         r"found 1 tensors missing \(head.modulation\); 1 tensors extra \(blocks.1.cross_attn.k_img.weight\);"),
        ("^$", {"head__head__bias": torch.zeros(17)},
         r"found 1 tensors of another shape \(head.head.bias \(17,\) for \(16,\)\); accepted"),
        ("^$", {"blocks__1__norm3__bias": torch.zeros(48, dtype=torch.int8)},
         r"found 1 tensors of another kind \(blocks.1.norm3.bias torch.int8\); accepted"),
        ("^$", {"blocks__3__norm3__bias": torch.zeros(48)}, r"1 tensors extra \(blocks.3.norm3.bias\)"),
        (".", {"transformer_blocks__0__attn__to_q__weight": torch.zeros(3), "x_embedder__bias": torch.zeros(3)},
         r"found 2 tensors of another model \(transformer_blocks.\{?0.*, x_embedder.bias, ...\); accepted: the 96"),
        (".", {"base_model__model__blocks__0__ffn__0__lora_A__weight": torch.zeros(3)},
         "found a LoRA adapter; accepted: the 96 tensors"),
        ("^$", {"_fsdp_wrapped_module__head__modulation": torch.zeros(3)},
         "found head.modulation and _fsdp_wrapped_module.head.modulation; accepted: one tensor for head.modulation"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_listed(tmp_path: Path, state: dict, drop: str, add: dict, message: str) -> None:
    file = flat(tmp_path / "x.pt", edited(state, drop, **add))
    with pytest.raises(UserError, match=message) as error:
        load_transformer(file, device=CPU, config=SMALL)
    assert str(error.value).startswith(f"{file}: found ")
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_listed_by_its_name_in_the_file(tmp_path: Path, state: dict[str, Tensor]) -> None:
    folder = synthesise.diffusers_folder(tmp_path / "p", state, SMALL) / "transformer"
    names = {in_layout(name, "diffusers"): tensor for name, tensor in state.items()}
    save_file(edited(names, r"to_out\.0\.bias"), folder / "diffusion_pytorch_model.safetensors")
    lost = r"6 tensors missing \(blocks.\{0-2\}.attn1.to_out.0.bias, blocks.\{0-2\}.attn2.to_out.0.bias\)"
    with pytest.raises(UserError, match=lost):
        load_transformer(folder, device=CPU)


def test_many_names_are_told_in_one_line() -> None:
    names = [f"blocks.{i}.ffn.0.bias" for i in (0, 1, 2, 5, 7, 8)] + ["head.bias"]
    assert listed(names) == "blocks.{0-2,5,7-8}.ffn.0.bias, head.bias"
    assert listed(names, limit=1) == "blocks.{0-2,5,7-8}.ffn.0.bias and 1 more"


class Unsafe:
    """Unpickled without care, it makes a folder."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.file),)


def written(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def cut(file: Path, share: float) -> Path:
    return written(file, file.read_bytes()[: int(file.stat().st_size * share)])


BAD_FILES: dict[str, tuple[Make, str]] = {
    "missing": (lambda d, s: d / "x.pt", "found no file; accepted: weights in .safetensors, .pt, .pth, .bin, .ckpt"),
    "another kind": (lambda d, s: written(d / "x.gguf", b"GGUF"), "found .gguf; accepted: weights in"),
    "empty": (lambda d, s: written(d / "x.pt", b""), "found a damaged or cut-off file (EOFError)"),
    "empty safetensors": (lambda d, s: written(d / "x.safetensors", b""), "found a damaged or cut-off file"),
    "cut late": (lambda d, s: cut(synthesise.causal_forcing(d / "x.pt", s), 0.999), "found a damaged or cut-off file"),
    "cut early": (lambda d, s: cut(synthesise.causal_forcing(d / "x.pt", s), 0.01), "found a damaged or cut-off file"),
    "cut, old": (lambda d, s: cut(old_pickle(d / "x.pt", s), 0.7), "found a damaged or cut-off file"),
    "cut safetensors": (
        lambda d, s: cut(synthesise.wan_folder(d / "w", s, SMALL) / "diffusion_pytorch_model.safetensors", 0.9),
        "found a damaged or cut-off file",
    ),
    "Git LFS": (
        lambda d, s: written(d / "x.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "found Git LFS's note of where the file is; accepted: the file (git lfs pull)",
    ),
    "no pickle": (lambda d, s: written(d / "x.pt", b"<!DOCTYPE html>"), "found no pickle of tensors"),
    "a list": (lambda d, s: torch.save([1, 2], d / "x.pt") or d / "x.pt", "found list; accepted: tensors by name"),
    "an adapter": (
        lambda d, s: synthesise.longlive_lora(d / "lora.pt", SMALL, 2),
        "found entries critic_lora, generator_lora, step; accepted: one of generator_ema, ema, generator, ",
    ),
    "no tensors": (
        lambda d, s: torch.save({"generator": {**s, "epoch": 3}}, d / "x.pt") or d / "x.pt",
        "found epoch among the tensors; accepted: tensors only",
    ),
    "empty folder": (lambda d, s: d, "found none where weights should be; accepted: diffusion_pytorch_model.safe"),
    "two candidates": (
        lambda d, s: (synthesise.causal_forcing(d / "a.pt", s), synthesise.causal_forcing(d / "b.pt", s))[0].parent,
        "found several (a.pt, b.pt) where weights should be",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_one_line(tmp_path: Path, state: dict[str, Tensor], case: str) -> None:
    make, message = BAD_FILES[case]
    path = make(tmp_path, state)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_transformer(path, device=CPU, config=SMALL)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_runs_no_code(tmp_path: Path, state: dict[str, Tensor], old: bool) -> None:
    file, made = tmp_path / "x.pt", tmp_path / "made"
    torch.save({"generator": state, "step": Unsafe(made)}, file, _use_new_zipfile_serialization=not old)
    with pytest.raises(
        UserError, match=f"^{file}: found a pickle that is not plain tensors .it would run posix.mkdir.; acc"
    ):
        load_transformer(file, device=CPU, config=SMALL)
    assert not made.exists()
    pickle.loads(pickle.dumps(Unsafe(made)))
    assert made.exists(), "the test's pickle does what it should not be allowed to do"


def test_shards_must_all_be_there(tmp_path: Path, state: dict[str, Tensor]) -> None:
    folder = synthesise.wan_folder(tmp_path / "wan", state, SMALL, shards=3)
    second = folder / "diffusion_pytorch_model-00002-of-00003.safetensors"
    first, content, index = folder / second.name.replace("00002", "00001"), second.read_bytes(), folder / (
        "diffusion_pytorch_model.safetensors.index.json"
    )  # fmt: skip
    second.unlink()
    with pytest.raises(UserError, match=f"^{second}: found no such shard; accepted: all that {index.name} tells of"):
        load_transformer(folder, device=CPU)
    listing = index.read_text()
    index.unlink()
    with pytest.raises(UserError, match=f"^{second}: found no such shard; accepted: all that {first.name} tells of"):
        load_transformer(folder, device=CPU)
    second.write_bytes(content)
    stray = written(folder / "diffusion_pytorch_model-00001-of-00007.safetensors", content)
    with pytest.raises(UserError, match="accepted: shards of one set"):
        load_transformer(folder, device=CPU)
    stray.unlink()
    second.write_bytes(first.read_bytes())
    with pytest.raises(
        UserError, match=f"^{second}: found .*, which another shard holds too; accepted: each tensor once"
    ):
        load_transformer(folder, device=CPU)
    for broken in ("{", "[]", '{"weight_map": {"a": "../../secret.safetensors"}}', '{"metadata": {}}'):
        index.write_text(broken)
        with pytest.raises(UserError, match=f"^{index}: ") as error:
            load_transformer(folder, device=CPU)
        assert "\n" not in str(error.value)
    index.write_text(listing)
