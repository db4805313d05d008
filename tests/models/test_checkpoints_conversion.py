"""Conversions: what comes out equals what went in, with hashes that tell; nothing is left of one that failed."""

from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import synthesise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tempact.errors import UserError
from tempact.models.wan.checkpoints import __main__ as checkpoints
from tempact.models.wan.checkpoints import convert as checkpoint_conversion
from tempact.models.wan.checkpoints import lora as checkpoint_adapters
from tempact.models.wan.checkpoints.convert import convert, verify
from tempact.models.wan.checkpoints.load import load_transformer
from tempact.models.wan.checkpoints.lora import open_adapter
from tempact.models.wan.checkpoints.names import config_json, in_layout, read_config
from tempact.models.wan.transformer import WanConfig

CPU = torch.device("cpu")
SMALL = WanConfig(dim=48, ffn_dim=80, freq_dim=32, text_dim=16, text_len=6, heads=2, layers=3, in_dim=4, out_dim=4)
RANK = 5
WEIGHTS = "diffusion_pytorch_model.safetensors"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def state() -> dict[str, Tensor]:
    return synthesise.random_state(SMALL)


@pytest.fixture
def source(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    return synthesise.self_forcing(tmp_path / "self_forcing_dmd.pt", state)


def different(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    assert found.keys() == wanted.keys()
    return [n for n, t in wanted.items() if found[n].dtype != t.dtype or not torch.equal(found[n], t)]


def by_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {in_layout(name, "diffusers"): tensor for name, tensor in state.items()}


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_weights_come_back_through_every_layout(tmp_path: Path, source: Path, state: dict[str, Tensor]) -> None:
    """.pt to Wan to diffusers to Wan: the same bits, the same sizes, the same file at both ends."""
    first, second, third = (tmp_path / name for name in ("a", "b", "c"))
    convert(source, first, config=SMALL)
    convert(first, second, layout="diffusers")
    convert(second, third, config=read_config(first / "config.json"))
    assert different(load_file(first / WEIGHTS), state) == []
    assert different(load_file(second / WEIGHTS), by_diffusers(state)) == []
    assert read_config(first / "config.json") == SMALL
    assert sha256(first / WEIGHTS) == sha256(third / WEIGHTS) != sha256(second / WEIGHTS)
    assert different(dict(load_transformer(third, device=CPU).state_dict()), state) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", source.name]


def test_diffusers_reads_its_layout(tmp_path: Path, source: Path, state: dict[str, Tensor]) -> None:
    pytest.importorskip("diffusers", reason="needs diffusers: pip install -e '.[test]'")
    from diffusers import WanTransformer3DModel

    convert(source, tmp_path / "transformer", config=SMALL, layout="diffusers")
    model, report = WanTransformer3DModel.from_pretrained(tmp_path, subfolder="transformer", output_loading_info=True)
    assert not any(report.values()), report
    assert different(dict(model.state_dict()), by_diffusers(state)) == []
    theirs, ours = dict(model.config), config_json(SMALL, "diffusers")
    assert {key: value for key, value in ours.items() if key != "_class_name" and theirs[key] != value} == {}


@pytest.mark.parametrize("dtype", ["stored", "fp32", "bf16"])
def test_the_manifest_tells_what_was_made_of_what(tmp_path: Path, source: Path, state: dict, dtype: str) -> None:
    manifest = convert(source, tmp_path / "new", config=SMALL, dtype=dtype)
    assert manifest == json.loads((tmp_path / "new" / "MANIFEST.json").read_text()) == verify(tmp_path / "new")
    assert manifest["tensors"] == len(state)
    assert manifest["parameters"] == sum(tensor.numel() for tensor in state.values())
    assert (manifest["entry"], manifest["layout"], manifest["dtype"]) == ("generator_ema", "wan", dtype)
    assert manifest["sources"] == {source.name: {"bytes": source.stat().st_size, "sha256": sha256(source)}}
    for name in (WEIGHTS, "config.json"):
        file = tmp_path / "new" / name
        assert manifest["files"][name] == {"bytes": file.stat().st_size, "sha256": sha256(file)}
    wanted = {name: tensor.bfloat16() if dtype == "bf16" else tensor for name, tensor in state.items()}
    assert different(load_file(tmp_path / "new" / WEIGHTS), wanted) == []
    with safe_open(tmp_path / "new" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_adapters_are_merged_into_what_is_written(tmp_path: Path, source: Path) -> None:
    """LongLive: base + lora.pt once and for all; the linears become fp32, the rest stays as it was stored."""
    base = synthesise.causal_forcing(
        tmp_path / "longlive_base.pt", synthesise.random_state(SMALL, dtype=torch.bfloat16)
    )
    lora = synthesise.longlive_lora(tmp_path / "lora.pt", SMALL, RANK)
    manifest = convert(base, tmp_path / "merged", adapters=[lora], config=SMALL)
    assert manifest["adapters"] == [{"lora.pt": {"bytes": lora.stat().st_size, "sha256": sha256(lora)}}]
    written = load_file(tmp_path / "merged" / WEIGHTS)
    assert written["blocks.0.ffn.0.weight"].dtype == torch.float32
    assert written["blocks.0.ffn.0.bias"].dtype == torch.bfloat16
    wanted = load_transformer(base, device=CPU, adapters=[lora], config=SMALL).state_dict()
    assert different(dict(load_transformer(tmp_path / "merged", device=CPU).state_dict()), dict(wanted)) == []


def test_longlives_lora_becomes_a_peft_folder(tmp_path: Path) -> None:
    """Which PEFT itself loads into the transformer, and which comes back through diffusers' layout."""
    from peft import PeftModel

    lora = synthesise.longlive_lora(tmp_path / "lora.pt", SMALL, RANK)
    manifest = convert(lora, tmp_path / "peft", config=SMALL)
    assert manifest["rank"] == RANK
    assert set(manifest["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert verify(tmp_path / "peft") == manifest
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(synthesise.ALL_LINEARS)
    pairs = synthesise.lora_pairs(SMALL, synthesise.ALL_LINEARS, RANK)
    assert different(load_file(tmp_path / "peft" / "adapter_model.safetensors"), pairs) == []
    convert(tmp_path / "peft", tmp_path / "diffusers", layout="diffusers", config=SMALL)
    convert(tmp_path / "diffusers", tmp_path / "again", config=SMALL)
    assert (
        sha256(tmp_path / "again" / "adapter_model.safetensors")
        == manifest["files"]["adapter_model.safetensors"]["sha256"]
    )
    base = synthesise.wan_folder(tmp_path / "wan", synthesise.random_state(SMALL), SMALL)
    merged = PeftModel.from_pretrained(load_transformer(base, device=CPU), str(tmp_path / "peft")).merge_and_unload()
    ours = load_transformer(base, device=CPU, adapters=[lora]).state_dict()
    for name, tensor in merged.state_dict().items():
        assert (ours[name] - tensor).abs().max() < 1e-6 * tensor.abs().max().clamp_min(1)


@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 2}, {"use_rslora": True}])
def test_diffusers_reads_the_adapters_written_for_it(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Also where their scale is not 1."""
    pytest.importorskip("diffusers", reason="needs diffusers: pip install -e '.[test]'")
    state = synthesise.random_state(SMALL)
    base = synthesise.wan_folder(tmp_path / "wan", state, SMALL)
    folder = synthesise.peft_folder(tmp_path / "peft", SMALL, synthesise.SELF_FORCING_TARGETS, RANK, **settings)
    convert(folder, tmp_path / "lora", layout="diffusers", config=SMALL)
    theirs = synthesise.diffusers_model(state, SMALL)
    x, text, sigma = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 6, 16), torch.full((1, 2), 0.5)
    ours = load_transformer(base, device=CPU, adapters=[folder])
    with torch.no_grad():
        without = theirs(x, torch.tensor([500.0]), text).sample
        theirs.load_lora_adapter(load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors"))
        wanted = theirs(x, torch.tensor([500.0]), text).sample
        found = ours(x, sigma, ours.project_text(text), torch.arange(2))
    assert (wanted - without).std() > 0.3 * without.std()
    assert ((found - wanted).pow(2).mean() / wanted.pow(2).mean()).sqrt() < 2e-5


def test_a_changed_file_is_found_by_its_hash(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "new"
    convert(source, folder, config=SMALL)
    file = folder / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"^{file}: found .* with SHA-256 .*; accepted: those that MANIFEST.json tells"):
        verify(folder)
    with pytest.raises(UserError, match=f"^{file}: found .* with SHA-256 "):
        convert(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    save_file({**load_file(file), "head.extra": torch.zeros(9)}, file)
    with pytest.raises(
        UserError, match=f"^{file}: found {file.stat().st_size} bytes; accepted: {len(content)}, as MANI"
    ):
        load_transformer(folder, device=CPU)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "found no MANIFEST.json; accepted: a folder that a conversion has written"),
        ("{}", "found no files; accepted: names, sizes and hashes"),
        ('{"files": {"gone.safetensors": {}}}', "found no gone.safetensors; accepted: all files"),
        ("[", "cannot be read"),
    ],
)
def test_a_folder_without_a_proper_manifest_is_not_verified(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "MANIFEST.json").write_text(content)
    with pytest.raises(UserError, match=message):
        verify(tmp_path)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, source: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for taken in (tmp_path / "full", source):
        with pytest.raises(UserError, match=f"^{taken}: found something there already; accepted: a new folder"):
            convert(source, taken, config=SMALL)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    convert(source, tmp_path / "empty", config=SMALL)
    verify(tmp_path / "empty")


def test_a_full_disk_leaves_nothing(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    lora = synthesise.longlive_lora(tmp_path / "lora.pt", SMALL, RANK)
    before = sorted(tmp_path.iterdir())
    for module, path in ((checkpoint_conversion, source), (checkpoint_adapters, lora)):
        monkeypatch.setattr(module, "save_file", half)
        with pytest.raises(
            UserError, match="new: cannot be written .*No space left on device.*; accepted: a place with"
        ):
            convert(path, tmp_path / "new", config=SMALL)
        assert sorted(tmp_path.iterdir()) == before


def test_values_that_are_not_finite_are_not_written(tmp_path: Path, state: dict[str, Tensor]) -> None:
    state["blocks.1.norm3.bias"][3] = float("nan")
    state["blocks.2.norm3.bias"][4] = float("inf")
    source = synthesise.causal_forcing(tmp_path / "x.pt", state)
    with pytest.raises(UserError, match=r"not finite in blocks.\{1-2\}.norm3.bias; accepted: numbers"):
        convert(source, tmp_path / "new", config=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_the_command_line_converts_and_verifies(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_json(SMALL, "wan")))
    lora, new = synthesise.longlive_lora(tmp_path / "lora.pt", SMALL, RANK), tmp_path / "new"
    config = ["--config", str(tmp_path / "config.json")]
    arguments = ["convert", str(source), str(new), "--adapter", str(lora), "--dtype", "bf16", "--layout", "diffusers"]
    assert checkpoints.main([*arguments, *config]) == 0
    written = capsys.readouterr().out
    assert sorted(written.splitlines()) == sorted(f"{sha256(new / n)}  {new / n}" for n in (WEIGHTS, "config.json"))
    assert checkpoints.main(["verify", str(new)]) == 0
    assert capsys.readouterr().out == written
    wanted = load_transformer(source, device=CPU, adapters=[lora], config=SMALL, precision="bf16").state_dict()
    assert different(load_file(new / WEIGHTS), by_diffusers(wanted)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "SRC"], "the following arguments are required: DST; accepted: python -m tempact.models.wan.check"),
        (["turn", "SRC", "DST"], "invalid choice: 'turn'"),
        ([], "the following arguments are required: verb"),
        (["convert", "SRC", "DST", "--dtype", "fp8"], "dtype: found 'fp8'; accepted: stored, fp32, bf16"),
        (["convert", "SRC", "DST", "--layout", "peft"], "layout: found 'peft'; accepted: wan, diffusers"),
        (["convert", "SRC", "DST", "--entry", "critic"], "found no entry 'critic'; accepted: generator_ema"),
        (["convert", "SRC", "DST", "--config", "gone.json"], "gone.json: cannot be read"),
        (["convert", "SRC", "DST"], "accepted: the 825 tensors of a Wan transformer of 30 blocks"),
        (["convert", "gone.pt", "DST"], "gone.pt: found no file"),
        (["convert", "LORA", "DST", "--adapter", "LORA"], "found an adapter, and an entry or adapters to merge"),
    ],
)
def test_wrong_commands_are_one_line_and_write_nothing(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    lora = synthesise.longlive_lora(tmp_path / "lora.pt", SMALL, RANK)
    before = sorted(tmp_path.iterdir())
    places = {"SRC": str(source), "DST": str(tmp_path / "deep" / "new"), "LORA": str(lora)}
    assert checkpoints.main([places.get(argument, argument) for argument in arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert message in told.err
    assert told.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_wrong_command_is_refused_before_torch_is_loaded() -> None:
    code = (
        "import sys; from tempact.models.wan.checkpoints.__main__ import main; code = main(['convert']); "
        "print(code, {'torch', 'peft', 'safetensors'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "2 set()\n"), done.stderr


def test_an_adapter_of_an_executor_keeps_its_scale(tmp_path: Path) -> None:
    folder = synthesise.peft_folder(tmp_path / "peft", SMALL, ["q", "ffn.2"], RANK, lora_alpha=3)
    convert(folder, tmp_path / "new", config=SMALL)
    before, after = (open_adapter(path, SMALL).factors for path in (folder, tmp_path / "new"))
    assert before.keys() == after.keys()
    for name, factor in before.items():
        assert after[name].scale == factor.scale == pytest.approx(3 / RANK)
        assert torch.equal(after[name].up, factor.up)
        assert torch.equal(after[name].down, factor.down)
