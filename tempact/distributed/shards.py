"""Frozen weights that processes of one machine share: FSDP2 of a transformer's blocks.

Each member of a group holds its part of every block. A block's weights are gathered for each of its calls and given up
after it, so every member must make the same calls: members work on the same plans, each on its own continuations
(`block_of`). What is trained, adapters and their frozen start, stays whole at every member, as do the parameters that
are read outside a block's calls. A sharded model has neither CUDA graphs, because its weights move, nor merged weights.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from functools import cache
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from tempact.errors import UserError

ADAPTERS = ".lora_"  # in the names of an adapter's parameters
READ_OUTSIDE = ("cross_attn.k.", "cross_attn.v.", "cross_attn.norm_k.")  # of a block, by `project_text`


def block_of(continuations: int, member: int, members: int) -> slice:
    """The continuations of a plan that a member of its group makes: N / S of them; UserError where S does not divide N.

    Each member makes the plan's context itself.
    """
    each, rest = divmod(continuations, members)
    if rest:
        accepted = f"a multiple of executor.shard ({members})"
        raise UserError(f"executor.continuations: found {continuations}; accepted: {accepted}")
    return slice(member * each, (member + 1) * each)


def group_of(members: int, device: torch.device) -> dist.ProcessGroup | None:
    """This process's group of so many consecutive ranks of one machine; None for a group of one.

    Every process must ask for it. UserError where the processes of a machine do not fall into such groups.
    """
    if members == 1:
        return None
    joined = dist.is_available() and dist.is_initialized()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())) if joined else 1
    check_processes(members, here)
    if device.type == "cuda" and torch.cuda.device_count() < here:
        found = f"{members}, with {here} processes on a machine of {torch.cuda.device_count()} GPUs"
        raise UserError(f"executor.shard: found {found}; accepted: a GPU for each process")
    assert dist.group.WORLD is not None
    return _group(dist.group.WORLD, members, "nccl" if device.type == "cuda" else "gloo")


def check_processes(members: int, here: int) -> None:
    """UserError unless the processes `here`, on one machine, fall into groups of `members`."""
    if here % members:
        found = f"{members}, with {here} process{'es' * (here > 1)} on a machine"
        raise UserError(f"executor.shard: found {found}; accepted: a divisor of the number of processes of a machine")


@cache
def _group(world: dist.ProcessGroup, members: int, backend: str) -> dist.ProcessGroup:
    firsts = range(0, world.size(), members)
    groups = [dist.new_group([*range(first, first + members)], backend=backend) for first in firsts]
    return cast(dist.ProcessGroup, groups[world.rank() // members])


def shard(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Shards the frozen weights of a `WanTransformer`'s blocks over the group, which all members must do alike.

    Blocks that `shard_block` has sharded stay so. Adapters may be there, or be added later. Weights that wait on the
    host go to the group's device, block by block.
    """
    blocks = [*cast(Iterable[nn.Module], model.blocks)]
    for block in blocks:
        if not isinstance(block, FSDPModule):
            shard_block(block, group)
    fully_shard(model, mesh=_mesh(group), ignored_params={*model.parameters()})  # the root: blocks' gathers overlap
    register_fsdp_forward_method(model, "write_context")
    # a backward gathers before each block the one that was called before it: before the first, one of another call
    cast(FSDPModule, blocks[0]).set_modules_to_backward_prefetch([cast(FSDPModule, blocks[0])])
    # an adapter's output is a view, to which nothing is added in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def shard_block(block: nn.Module, group: dist.ProcessGroup) -> None:
    """Shards one block's weights, which are frozen, but for adapters and READ_OUTSIDE."""
    base = {name: parameter for name, parameter in block.named_parameters() if ADAPTERS not in name}
    for parameter in base.values():
        parameter.requires_grad_(False)
    whole = {p for name, p in block.named_parameters() if name not in base or name.startswith(READ_OUTSIDE)}
    fully_shard(block, mesh=_mesh(group), reshard_after_forward=True, ignored_params=whole)
    register_fsdp_forward_method(block, "store")


@cache
def _mesh(group: dist.ProcessGroup) -> DeviceMesh:
    return DeviceMesh.from_group(group, "cuda" if dist.get_backend(group) == "nccl" else "cpu")


def sharded(model: nn.Module) -> bool:
    """Is `model`, or a part of it, sharded?"""
    return any(isinstance(module, FSDPModule) for module in model.modules())
