"""A compiled diffusers Wan transformer, whole or block by block, chunk by chunk: bits, and how often it is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs diffusers: pip install -e '.[diffusers]'")

from diffusers import WanTransformer3DModel
from integrations.test_diffusers import CHUNK, FRAME_TOKENS, NOISY, call, draw, transformer  # noqa: F401

from csrc_triton.integrations.diffusers import ForkedWan

Model = Callable[..., object]


@pytest.fixture(autouse=True)
def graphs() -> Iterator[list[int]]:
    """One number for each graph that is compiled: its nodes."""
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


def rollout(wan: ForkedWan, model: Model, chunks: int) -> list[Tensor]:
    """Velocities of chunks of one branch, each committed; the last one also of two forks of it."""
    torch.manual_seed(1)
    x, text = draw(chunks * CHUNK)
    branch, found = wan.cache.new_branch(), []
    with torch.no_grad():
        for chunk in x.split(CHUNK, dim=2):
            with wan.chunk([branch], CHUNK):
                found += [call(model, chunk, text, timestep) for timestep in (NOISY, 300.0)]
            with wan.chunk([branch], CHUNK, commit=True):
                call(model, chunk, text, 0.0)
    return found


@pytest.mark.parametrize("how", ["blocks", "wrapped before"])
def test_layers_and_chunks_share_four_graphs(
    transformer: WanTransformer3DModel,  # noqa: F811
    graphs: list[int],
    how: str,
) -> None:
    """With a context and without, committed and not: no more, for any layer and any length of the context."""

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(len(module.graph.nodes))
        return module.forward

    if how != "blocks":
        transformer.blocks = transformer.blocks[:1]  # compiled with all of their layers
    plain = ForkedWan(transformer, frame_tokens=FRAME_TOKENS, frames=4)  # smaller than the roll-out: it grows
    expected = rollout(plain, transformer, 5)
    plain.remove()
    model: Model = transformer
    if how == "blocks":
        transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    else:
        model = torch.compile(transformer, backend=backend, fullgraph=True)
    wan = ForkedWan(model if how == "wrapped before" else transformer, frame_tokens=FRAME_TOKENS, frames=4)
    found = rollout(wan, model, 5)
    assert len(graphs) == 4
    for own, plain_one in zip(found, expected, strict=True):
        assert torch.equal(own, plain_one)


def test_gradients_come_through_compiled_blocks(transformer: WanTransformer3DModel) -> None:  # noqa: F811
    x, text = draw(2 * CHUNK)
    gradients = []
    for compiled in (False, True):
        if compiled:
            transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        wan = ForkedWan(transformer, frame_tokens=FRAME_TOKENS, frames=4)
        branch = wan.cache.new_branch()
        with wan.chunk([branch], CHUNK, commit=True):
            call(transformer, x[:, :, :CHUNK], text, 0.0)
        transformer.zero_grad()
        with wan.chunk([branch], CHUNK):
            call(transformer, x[:, :, CHUNK:], text, NOISY).square().mean().backward()
        gradients.append([p.grad.clone() for p in transformer.parameters() if p.grad is not None])
        wan.remove()
    assert len(gradients[0]) == len(gradients[1]) > 20
    for plain, own in zip(*gradients, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-6)
