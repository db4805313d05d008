"""The code of docs/foreign-models.md, as it stands there, with small models in place of the published ones."""

from __future__ import annotations

import re
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from integrations.causal_wan import CHANNELS, FRAME_TOKENS, HEIGHT, TEXT_DIM, WIDTH, CausalModel, empty_cache, turned
from torch import Tensor, nn

from csrc_triton import ForkableKVCache
from csrc_triton.integrations.wan_causal import ForkedCausalWan

PAGE = Path(__file__).parents[2] / "docs" / "foreign-models.md"
FRAMES, TIMESTEPS = 9, (1000.0, 500.0)


def code(name: str) -> str:
    """The block below the comment `run: NAME`."""
    found = re.findall(rf"<!-- run: {name} -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(found) == 1, name
    block: str = found[0]
    return block


class RollOut:
    """What the page's loops call: `denoise` and `clean` note the velocities that the model gave."""

    def __init__(self) -> None:
        self.noise, self.text = torch.randn(1, CHANNELS, FRAMES, HEIGHT, WIDTH), torch.randn(1, 5, TEXT_DIM)
        self.found: list[Tensor] = []

    def denoise(self, model: nn.Module, start: int, t: float, **more: Any) -> Tensor:
        x = self.noise[:, :, start : start + 3]
        self.found.append(self.call(model, x, t, **more))
        return x - self.found[-1]

    def clean(self, model: nn.Module, start: int, x: Tensor, **more: Any) -> None:
        self.call(model, x, 0.0, **more)

    def call(self, model: nn.Module, x: Tensor, t: float, **more: Any) -> Tensor:
        out = model(x, torch.full((1, 3), t), self.text, **more)
        assert isinstance(out, Tensor)
        return out

    def run(self, source: str, **names: Any) -> list[Tensor]:
        self.found = []
        scope = {"frames": FRAMES, "frame_tokens": FRAME_TOKENS, "timesteps": TIMESTEPS, **names}
        with torch.no_grad():
            exec(compile(source, str(PAGE), "exec"), scope | {"denoise": self.denoise, "clean": self.clean})
        return self.found


BEFORE = """
for start in range(0, frames, 3):
    for t in timesteps:
        x = denoise(model, start, t, kv_cache=caches, current_start=start * frame_tokens)
    clean(model, start, x, kv_cache=caches, current_start=start * frame_tokens)
"""


def rope(x: Tensor, grid_sizes: Tensor, freqs: Tensor, start_frame: int) -> Tensor:
    return turned(x, grid_sizes[0].tolist(), freqs, start_frame)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_patch_by_hand_has_the_models_bits_in_under_30_lines(dtype: torch.dtype) -> None:
    source = code("by hand")
    assert len([line for line in source.splitlines() if line.strip()]) < 30
    model, roll_out = CausalModel().to(dtype), RollOut()
    roll_out.noise, roll_out.text = roll_out.noise.to(dtype), roll_out.text.to(dtype)
    expected = roll_out.run(BEFORE, model=model, caches=empty_cache(FRAMES, dtype=dtype))
    names = {"MethodType": MethodType, "ForkableKVCache": ForkableKVCache, "causal_rope_apply": rope}
    found = roll_out.run(source, model=model, **names)
    assert len(found) == len(expected) == 6
    assert all(torch.equal(own, plain) for own, plain in zip(found, expected, strict=True))


def test_the_integration_as_it_is_shown() -> None:
    model, roll_out = CausalModel(), RollOut()
    expected = roll_out.run(BEFORE, model=model, caches=empty_cache(FRAMES))
    found = roll_out.run(code("wan_causal"), generator=model, ForkedCausalWan=ForkedCausalWan)
    assert len(found) == len(expected) == 6
    for own, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(own, plain, atol=2e-5, rtol=1e-5)


def test_diffusers_as_it_is_shown() -> None:
    pytest.importorskip("diffusers", reason="needs diffusers: pip install -e '.[diffusers]'")
    from diffusers import WanTransformer3DModel

    from csrc_triton.integrations.diffusers import ForkedWan

    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=CHANNELS, out_channels=CHANNELS, text_dim=TEXT_DIM,
        freq_dim=16, ffn_dim=48, num_layers=2, rope_max_seq_len=12,
    )  # fmt: skip
    roll_out = RollOut()
    roll_out.call = lambda model, x, t: model(x, torch.full((1,), t), roll_out.text).sample  # type: ignore[method-assign]
    held: dict[str, Any] = {}

    def kept(*given: Any, **more: Any) -> ForkedWan:
        held["wan"] = ForkedWan(*given, **more)
        return held["wan"]

    found = roll_out.run(code("diffusers"), transformer=transformer, ForkedWan=kept)
    assert len(found) == 6 and all(each.isfinite().all() for each in found)
    assert held["wan"].cache.length(0) == FRAMES * FRAME_TOKENS
