"""Frozen weights sharded over two processes: bits of the unsharded model, at small widths of the published 14B."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import synthesise
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from csrc_triton import runtime
from tempact.config import ExecutorConfig, LoraConfig, OptimConfig
from tempact.distributed import shards
from tempact.distributed.shards import block_of, group_of, shard, shard_block, sharded
from tempact.errors import UserError
from tempact.executor.executor import Executor
from tempact.executor.lora import merged
from tempact.executor.sampler import NoiseSource, gaussian_noise
from tempact.models.wan.checkpoints.load import set_precision
from tempact.models.wan.codec import PixelCodec
from tempact.models.wan.random_weights import RandomText
from tempact.models.wan.transformer import OWN_CHUNK, WanConfig, WanTransformer
from tempact.policies import build_executor
from tempact.presets import EXECUTOR_TARGETS, SELF_FORCING_TARGETS, get_preset
from tempact.types import Batch, Plan, Step

MEMBERS = 2
LATENT = (4, 4)  # few tokens: it is the weights that are shared
SMALL = WanConfig(  # 40 heads, FFN of 2.7 widths as in the 14B; a width of 5,120 for 240 and 40 blocks for 3
    dim=240, ffn_dim=648, freq_dim=16, text_dim=16, text_len=64, heads=40, layers=3, in_dim=3, out_dim=3
)
PLAN = Plan("i", (Step(0, 6, "a cat sits"), Step(6, 15, "the cat jumps")))
LORA = LoraConfig(4, 4, SELF_FORCING_TARGETS)
PLAN_OF_9 = Plan("i", (Step(0, 3, "a circle"), Step(3, 9, "a square")))
CASES = [  # precision, adapted linears, blocks are recomputed, sharded before the adapters are there
    ("fp32", EXECUTOR_TARGETS, False, True),
    ("bf16", SELF_FORCING_TARGETS, True, True),
    ("bf16-fp32-gates", EXECUTOR_TARGETS, True, True),
    ("bf16-fp32-gates", SELF_FORCING_TARGETS, False, False),
]


def make_model(precision: str) -> WanTransformer:
    torch.manual_seed(0)
    model = WanTransformer(SMALL)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return set_precision(model, precision)


def make_executor(model: WanTransformer, precision: str, targets: tuple[str, ...], again: bool) -> Executor:
    config = ExecutorConfig(
        weights="", lora=LoraConfig(4, 4, targets), optim=OptimConfig(1e-3), precision=precision, frames=15,
        continuations=4, micro_batch=3, window="tempact-self-forcing", checkpoint_activations=again,
    )  # fmt: skip
    torch.manual_seed(1)
    return Executor(model, RandomText("random-tiny", torch.device("cpu")), PixelCodec(), config, LATENT)


def own_part(noise: NoiseSource, own: slice) -> NoiseSource:
    """The noise of a member's continuations; until the fork all follow that of the plan's first one."""
    first = own.start

    def draw(plan: int, continuation: int, chunk: int) -> Tensor:
        return noise.draw(plan, continuation + first if chunk * 3 >= PLAN.steps[0].end else 0, chunk)

    return NoiseSource((noise.shape[0], own.stop - first, *noise.shape[2:]), draw)


def trained(executor: Executor, own: slice) -> dict[str, Tensor]:
    """What a roll-out (contexts, a fork, denoising calls) and an update of these continuations give."""
    noise = own_part(gaussian_noise(7, executor.noise_shape(1, 4), executor.device), own)
    latents, transition = executor.roll_out([PLAN], [6], noise)
    masks, advantages = torch.ones(1, 4, dtype=torch.bool)[:, own], torch.tensor([[1.0, -1.0, 0.5, -2.0]])[:, own]
    batch = Batch(torch.zeros(1), masks[:, 0], advantages, masks, None, transition)
    optimiser = torch.optim.SGD(executor.parameters().values(), lr=1.0)
    metrics = [executor.update(batch, [0])]
    optimiser.step()  # the second update's adapter is no longer its reference
    metrics.append(executor.update(batch, [0], torch.zeros_like(transition.noises)))
    gradients = {name: p.grad for name, p in executor.parameters().items()}
    numbers = torch.tensor([value for own in metrics for _, value in sorted(own.items())], dtype=torch.float64)
    return {"latents": latents, "states": transition.states, "metrics": numbers} | gradients


@contextmanager
def counted() -> Iterator[list[int]]:
    """The sizes of what is gathered inside."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    plain, sizes = getattr(dist, name), list[int]()

    def gather(output: Tensor, *rest: Any, **more: Any) -> Any:
        sizes.append(output.nbytes)
        return plain(output, *rest, **more)

    setattr(dist, name, gather)
    try:
        yield sizes
    finally:
        setattr(dist, name, plain)


def check_gathers(executor: Executor) -> None:
    """A call gathers every block once, a backward once more, whatever was called before; `project_text` none."""
    model = executor.model
    x, sigma, positions = torch.randn(1, 3, 3, *LATENT), torch.full((1, 3), 0.5), torch.arange(3)
    words = executor.encode(["a cat sits"])
    frozen = sum(p.numel() * p.element_size() for p in model.blocks[0].parameters() if isinstance(p, DTensor))
    with executor.precision():
        with counted() as sizes, torch.no_grad():
            model.write_context(x, sigma, model.project_text(words), positions, OWN_CHUNK)
        assert len(sizes) == SMALL.layers
        with counted() as sizes, torch.no_grad():
            model(x, sigma, model.project_text(words), positions)
        assert len(sizes) == SMALL.layers and all(frozen <= size <= 1.01 * frozen + 4096 for size in sizes)
        with counted() as sizes:
            out = executor.runner.policy_velocity(x, sigma, words, torch.zeros(1, dtype=torch.int64), positions, None)
            out.square().mean().backward()
        assert len(sizes) == 2 * SMALL.layers
    executor.peft.zero_grad()


def compare(rank: int, port: int, folder: str, backend: str) -> None:
    """One member: all cases, sharded and whole. A file of its own says that it came to the end."""
    torch.set_num_threads(1)
    runtime.set_backend("torch")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(MEMBERS), "LOCAL_WORLD_SIZE": str(MEMBERS)}
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=MEMBERS)
    group = group_of(MEMBERS, torch.device("cpu"))
    assert group is group_of(MEMBERS, torch.device("cpu")) and dist.get_process_group_ranks(group) == [0, 1]
    if backend == "lora":  # the executor's own products, as on a GPU
        plain = runtime.choose
        runtime.choose = lambda op, *rest, **more: "triton" if op == "lora_linear" else plain(op, *rest, **more)
    for precision, targets, again, early in CASES if backend == "torch" else CASES[2:]:
        own = block_of(4, rank, MEMBERS)
        model = make_model(precision)
        if early:
            shard_block(model.blocks[1], group)  # as loading does
            shard(model, group)
        executor = make_executor(model, precision, targets, again)
        if not early:
            shard(model, group)
        check_parts(executor)
        check_gathers(executor)  # a context pass is the very first call
        found = trained(executor, own)
        expected = trained(make_executor(make_model(precision), precision, targets, again), own)
        assert found.keys() == expected.keys() and len(found) > 3 + 2 * len(targets)
        different = [name for name in found if not torch.equal(found[name], expected[name])]
        assert not different, (precision, again, early, different)
        moved = [name for name in found if found[name] is not None and found[name].abs().max() > 0]
        assert len(moved) == len(found)
        if rank == 0:  # alone: a checkpoint is written by one
            executor.save_adapter(Path(folder) / f"{precision}-{again}")
            executor.load_adapter(Path(folder) / f"{precision}-{again}")
        check_parts(executor)
        check_gathers(executor)
    if backend == "torch":
        check_loading(Path(folder) / "wan")
    dist.barrier()
    dist.destroy_process_group()
    (Path(folder) / f"done-{rank}").touch()


def check_loading(folder: Path) -> None:
    """The preset from a checkpoint in shards: each member's parts make up what one process loads, adapters included."""
    base = get_preset("wan-14b")
    settings = {"weights": str(folder), "video_size": (32, 48), "frames": 9, "text_cache": str(folder / "text")}
    both, alone = (
        build_executor(
            replace(base, executor=replace(base.executor, **settings, shard=shard, lora=LORA)), torch.device("cpu")
        )
        for shard in (base.executor.shard, 1)
    )
    assert sharded(both.model) and not sharded(alone.model)
    expected = alone.model.state_dict()
    for name, tensor in both.model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert whole.dtype == expected.pop(name).dtype and torch.equal(whole, alone.model.state_dict()[name]), name
    assert not expected
    noise = gaussian_noise(7, both.noise_shape(1, 1), both.device)
    found, right = (own.roll_out([PLAN_OF_9], [0], noise)[0] for own in (both, alone))
    assert torch.equal(found, right) and found.isfinite().all()


def check_parts(executor: Executor) -> None:
    """Between calls a member holds its part of a block's frozen weights, and all of what is trained or read outside."""
    model = executor.model
    assert sharded(model) and not executor.runner.graphs
    for name, parameter in model.named_parameters():
        whole = ".lora_" in name or not name.startswith("blocks.") or any(n in name for n in shards.READ_OUTSIDE)
        assert isinstance(parameter, DTensor) != whole, name
    linear = next(p for name, p in model.named_parameters() if name.startswith("blocks.1.ffn.0.") and p.ndim == 2)
    assert linear.to_local().shape[0] * MEMBERS == linear.shape[0] == SMALL.ffn_dim
    assert not any(isinstance(p, DTensor) for p in executor.parameters().values())
    with runtime.backend("auto"), merged(model):
        assert not any(getattr(module, "_merged", None) for module in model.modules())


@pytest.mark.parametrize("backend", [pytest.param("torch", marks=pytest.mark.slow), "lora"])
def test_two_processes_compute_the_bits_of_one(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # where the processes find this module
    if backend == "torch":
        sizes = replace(SMALL, in_dim=16, out_dim=16)
        wan = synthesise.wan_folder(tmp_path / "wan", synthesise.random_state(sizes), sizes, shards=3)
        synthesise.release_folder(wan, synthesise.SMALL_UMT5 | {"d_model": sizes.text_dim}, 8)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(compare, (port, str(tmp_path), backend), nprocs=MEMBERS)
    assert all((tmp_path / f"done-{rank}").is_file() for rank in range(MEMBERS))


@pytest.mark.parametrize(("continuations", "members"), [(8, 1), (8, 2), (6, 3), (4, 4)])
def test_every_continuation_has_one_member(continuations: int, members: int) -> None:
    parts = [range(continuations)[block_of(continuations, member, members)] for member in range(members)]
    assert [n for part in parts for n in part] == [*range(continuations)]
    assert {len(part) for part in parts} == {continuations // members}


@pytest.mark.parametrize(("continuations", "members"), [(8, 3), (2, 4), (5, 2)])
def test_continuations_that_cannot_be_split_evenly(continuations: int, members: int) -> None:
    with pytest.raises(UserError) as error:
        block_of(continuations, 0, members)
    accepted = f"a multiple of executor.shard ({members})"
    assert str(error.value) == f"executor.continuations: found {continuations}; accepted: {accepted}"


def test_a_group_needs_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert group_of(1, cpu) is None
    accepted = "; accepted: a divisor of the number of processes of a machine"
    with pytest.raises(UserError) as error:
        group_of(2, cpu)
    assert str(error.value) == f"executor.shard: found 2, with 1 process on a machine{accepted}"
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 6)
    for here, found in ((None, 6), ("3", 3)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here) if here else monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        with pytest.raises(UserError) as error:
            group_of(4, cpu)
        assert str(error.value) == f"executor.shard: found 4, with {found} processes on a machine{accepted}"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="found 3, with 3 processes on a machine of 2 GPUs; accepted: a GPU for each"):
        group_of(3, torch.device("cuda"))


def test_one_process_has_no_shards() -> None:
    executor = make_executor(make_model("fp32"), "fp32", SELF_FORCING_TARGETS, False)
    assert not sharded(executor.model) and not sharded(executor.peft)
