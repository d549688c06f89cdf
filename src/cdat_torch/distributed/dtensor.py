"""Parameters that are distributed over processes as DTensors.

Tensor parallel models compute with DTensors, and PyTorch differentiates through them. Modules under
``fully_shard`` unshard their parameters while they run; see `cdat_torch.distributed.fsdp`. In both
cases optimizer states, directions and gradients in ``p.grad`` have the placements of the parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Any) -> bool:
    """Return whether this is a DTensor; by name, because importing the class is slow."""
    return type(tensor).__name__ == "DTensor"


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor; writing to it changes the tensor."""
    if not is_dtensor(tensor):
        return tensor
    part: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


def locals_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this process's parts of tensors."""
    return [local(t) for t in tensors]


def match_placements(tensor: Any, like: Any) -> Tensor:
    """Return a DTensor with the placements of `like`, differentiably; plain tensors unchanged."""
    if is_dtensor(tensor) and tensor.placements != like.placements:
        tensor = tensor.redistribute(placements=like.placements)
    result: Tensor = tensor
    return result


def shard_like(whole: Tensor, like: Any) -> Tensor:
    """Return `whole`, which each process holds in full, with the placements of `like`."""
    if not is_dtensor(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    copies = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    result: Tensor = copies.redistribute(placements=like.placements)
    return result


def from_local_like(part: Tensor, like: Any) -> Tensor:
    """Return a tensor with the placements of `like`; `part` is this process's part of it."""
    if not is_dtensor(like):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def resolve_partial(tensor: Any) -> Tensor:
    """Return a DTensor with its partial placements summed; other tensors unchanged."""
    if is_dtensor(tensor) and any(p.is_partial() for p in tensor.placements):
        from torch.distributed.tensor import Replicate

        placements = [Replicate() if p.is_partial() else p for p in tensor.placements]
        tensor = tensor.redistribute(placements=placements)
    result: Tensor = tensor
    return result


def sum_over_mesh(tensor: Tensor, mesh: Any, dims: Iterable[int] | None = None) -> None:
    """Sum a tensor in place over the processes of a mesh, or over some of its dimensions."""
    for dim in range(mesh.ndim) if dims is None else dims:
        torch.distributed.all_reduce(tensor, group=mesh.get_group(dim))


def sum_over_shards(parts: Sequence[Tensor], tensors: Sequence[Any]) -> Tensor:
    """Return the sum of 0-d `parts`, each computed from this process's part of a tensor.

    The parts of a sharded tensor are summed over the processes that hold its shards, with one
    all-reduce for all tensors with the same mesh and sharded dimensions.
    """
    total = torch.zeros_like(parts[0])
    sharded: dict[Any, tuple[Any, Tensor]] = {}
    for part, tensor in zip(parts, tensors, strict=True):
        if not is_dtensor(tensor):
            total = total + part
            continue
        # Not is_shard, which is false for the strided shards of FSDP with tensor parallelism.
        dims = tuple(i for i, placed in enumerate(tensor.placements) if not placed.is_replicate())
        mesh = tensor.device_mesh
        _, before = sharded.get((mesh, dims), (mesh, torch.zeros_like(part)))
        sharded[mesh, dims] = mesh, before + part
    for (_, dims), (mesh, part) in sharded.items():
        sum_over_mesh(part, mesh, dims)
        total = total + part
    return total


def all_agree(flag: bool, tensors: Iterable[Any]) -> bool:
    """Return whether `flag` is true in all processes that share DTensors with this one."""
    # Not a set, whose order differs between processes.
    meshes = dict.fromkeys(t.device_mesh for t in tensors if is_dtensor(t))
    if not meshes:
        return flag
    against = torch.tensor(float(not flag), device=next(iter(meshes)).device_type)
    for mesh in meshes:
        sum_over_mesh(against, mesh)
    return not bool(against)
