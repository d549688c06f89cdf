"""Several processes that train copies of one model: means of gradients and scalars.

Each process differentiates the loss of its own part of the batch. Gradients, loss, slope and
curvature are then averaged, so that all processes take the same step bit for bit. Everything is
linear in the loss, so means of the parts are those of the whole; absolute values and maxima come
after the mean. A value that is not finite in one process is not finite in the mean, and all skip.

Gradients of parameters that are sharded over the very processes of the group are means already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cdat_torch.distributed.dtensor import from_local_like, is_dtensor, local
from cdat_torch.distributed.fsdp import modules_of


def several_processes() -> bool:
    """Return whether this process is one of several, which may take part in a forward pass."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_world_size() > 1


class Replicas:
    """The processes of a group; a single process has nothing to do.

    Parameters
    ----------
    process_group : torch.distributed.ProcessGroup, False or None
        None is the default group if there is one; False keeps this process to itself.
    """

    def __init__(self, process_group: Any = None) -> None:
        distributed = torch.distributed
        alone = process_group is False or not (
            distributed.is_available() and distributed.is_initialized()
        )
        self._group = process_group
        self._covering: dict[Any, bool] = {}
        self.size = 1 if alone else distributed.get_world_size(process_group)

    def mean(self, scalars: Sequence[Tensor]) -> list[Tensor]:
        """Return the means of 0-d tensors over all processes, with one reduction."""
        if self.size == 1:
            return list(scalars)
        together = torch.stack([s.to(torch.float64) for s in scalars])
        torch.distributed.all_reduce(together, group=self._group)
        return list((together / self.size).unbind())

    def average_gradients(self, params: Sequence[Tensor], value: Tensor) -> Tensor:
        """Replace each ``p.grad`` by its mean and return the mean loss.

        A parameter without a gradient here counts as zero, unless it has none anywhere.
        """
        if self.size == 1:
            return value
        params = [p for p in params if not self._holds_all_of(p)]
        present = torch.tensor([float(p.grad is not None) for p in params], dtype=torch.float64)
        numbers = torch.cat([value.reshape(1), present.to(value.device)])
        torch.distributed.all_reduce(numbers, group=self._group)
        used = [p for p, n in zip(params, numbers[1:].tolist(), strict=True) if n > 0]
        # New tensors: the present ones belong to the graph of the curvature.
        means = self.mean_vector([torch.zeros_like(p) if p.grad is None else p.grad for p in used])
        for p, mean in zip(used, means, strict=True):
            p.grad = mean
        return numbers[0] / self.size

    def mean_vector(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """Return the mean of a list of tensors over all processes: one reduction for each dtype."""
        means = list(vector)
        if self.size == 1:
            return means
        shared = [i for i, t in enumerate(vector) if not self._holds_all_of(t)]
        for dtype in dict.fromkeys(vector[i].dtype for i in shared):
            part = [i for i in shared if vector[i].dtype == dtype]
            flat = torch.cat([local(vector[i]).reshape(-1) for i in part])
            torch.distributed.all_reduce(flat, group=self._group)
            flat.div_(self.size)
            sizes = [local(vector[i]).numel() for i in part]
            for i, piece in zip(part, torch.split(flat, sizes), strict=True):
                means[i] = from_local_like(piece.view_as(local(vector[i])), vector[i])
        return means

    def check(self, params: Sequence[Tensor]) -> None:
        """Raise a ValueError if a sharded parameter does not suit the group."""
        if self.size > 1:
            for p in params:
                self._holds_all_of(p)
        elif modules_of(params) and torch.distributed.get_world_size() > 1:
            msg = (
                "process_group must be the processes that fully_shard spreads the params over, got "
                f"{self._group!r}: each would take a step of its own"
            )
            raise ValueError(msg)

    def _holds_all_of(self, p: Tensor) -> bool:
        """Return whether what is to be averaged over the group is shared by the parameter."""
        if not is_dtensor(p):
            return False
        sharded: Any = p
        mesh = sharded.device_mesh
        if mesh not in self._covering:
            self._covering[mesh] = self._covers(set(mesh.mesh.flatten().tolist()))
        return self._covering[mesh]

    def _covers(self, holders: set[int]) -> bool:
        group = set(torch.distributed.get_process_group_ranks(self._group))
        if group <= holders:
            return True
        if len(group & holders) == 1:
            return False
        msg = (
            "process_group must be the processes that hold copies of the model: one of the params "
            f"is spread over ranks {sorted(holders)}, which the group {sorted(group)} overlaps; "
            "for tensor and data parallel together pass the group of the data parallel mesh"
        )
        raise ValueError(msg)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the group, which no other process knows."""
        group = None if self._group is not False else False
        return {"size": self.size, "_group": group, "_covering": {}}
