"""Parameters that are spread over processes as DTensors.

Tensor parallel models compute with them, and PyTorch differentiates through that. Modules under
``fully_shard`` gather theirs while they run: `cdat_torch.distributed.fsdp`. Either way optimizer
states, directions and gradients in ``p.grad`` are DTensors laid out like the parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Any) -> bool:
    """Return whether this is a DTensor; by name, because importing the class takes its time."""
    return type(tensor).__name__ == "DTensor"


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies in this process; changes in place reach the whole."""
    if not is_dtensor(tensor):
        return tensor
    part: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


def locals_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the parts of tensors that lie in this process."""
    return [local(t) for t in tensors]


def match_placements(tensor: Any, like: Any) -> Tensor:
    """Return a DTensor in the placements of another one, differentiably; others as they are."""
    if is_dtensor(tensor) and tensor.placements != like.placements:
        tensor = tensor.redistribute(placements=like.placements)
    result: Tensor = tensor
    return result


def shard_like(whole: Tensor, like: Any) -> Tensor:
    """Return a tensor that each process holds as a whole, laid out like another one."""
    if not is_dtensor(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    copies = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    result: Tensor = copies.redistribute(placements=like.placements)
    return result


def from_local_like(part: Tensor, like: Any) -> Tensor:
    """Return a tensor laid out like another one, whose part in this process is `part`."""
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
    """Return a DTensor whose parts still have to be summed as that sum; others as they are."""
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
    """Return the sum of 0-d `parts`, each computed from this process's share of a tensor.

    What belongs to a sharded tensor is summed over the processes that hold its shards, with one
    reduction for all tensors that are spread in the same way.
    """
    total = torch.zeros_like(parts[0])
    spread: dict[Any, tuple[Any, Tensor]] = {}
    for part, tensor in zip(parts, tensors, strict=True):
        if not is_dtensor(tensor):
            total = total + part
            continue
        # Not is_shard, which is false for the strided shards of FSDP with tensor parallelism.
        dims = tuple(i for i, placed in enumerate(tensor.placements) if not placed.is_replicate())
        mesh = tensor.device_mesh
        _, before = spread.get((mesh, dims), (mesh, torch.zeros_like(part)))
        spread[mesh, dims] = mesh, before + part
    for (_, dims), (mesh, part) in spread.items():
        sum_over_mesh(part, mesh, dims)
        total = total + part
    return total


def all_agree(flag: bool, tensors: Iterable[Any]) -> bool:
    """Return whether `flag` holds in all processes that share sharded tensors with this one."""
    # Not a set, whose order differs between processes.
    meshes = dict.fromkeys(t.device_mesh for t in tensors if is_dtensor(t))
    if not meshes:
        return flag
    against = torch.tensor(float(not flag), device=next(iter(meshes)).device_type)
    for mesh in meshes:
        sum_over_mesh(against, mesh)
    return not bool(against)
