"""Replicas: several processes that train one model; means of gradients and scalars over them.

Each process differentiates the loss of its part of the batch. Gradients, loss, slope and curvature
are then averaged, so all processes take the same step, bit for bit. All of them are linear in the
loss, so the mean over the parts is the value of the whole batch; absolute values and maxima are
taken after the mean. If a value is not finite in one process, the mean is not either, and all
processes skip.

If a parameter is sharded over all processes of the group, its gradient is a mean already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cdat_torch.distributed.dtensor import from_local_like, is_dtensor, local
from cdat_torch.distributed.fsdp import modules_of


def several_processes() -> bool:
    """Return whether there are several processes; a forward pass may then involve all of them."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_world_size() > 1


class Replicas:
    """The processes of a group; with a single one nothing is averaged.

    Parameters
    ----------
    process_group : torch.distributed.ProcessGroup, False or None
        None is the default group if there is one; False means this process alone.
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
        """Return the means of 0-d tensors over all processes, with one all-reduce."""
        if self.size == 1:
            return list(scalars)
        together = torch.stack([s.to(torch.float64) for s in scalars])
        torch.distributed.all_reduce(together, group=self._group)
        return list((together / self.size).unbind())

    def average_gradients(self, params: Sequence[Tensor], value: Tensor) -> Tensor:
        """Replace each ``p.grad`` by its mean and return the mean loss.

        A missing gradient counts as zero, unless it is missing in all processes.
        """
        if self.size == 1:
            return value
        params = [p for p in params if not self._spans_group(p)]
        present = torch.tensor([float(p.grad is not None) for p in params], dtype=torch.float64)
        numbers = torch.cat([value.reshape(1), present.to(value.device)])
        torch.distributed.all_reduce(numbers, group=self._group)
        used = [p for p, n in zip(params, numbers[1:].tolist(), strict=True) if n > 0]
        # New tensors: the graph of the curvature still needs the present ones.
        means = self.mean_vector([torch.zeros_like(p) if p.grad is None else p.grad for p in used])
        for p, mean in zip(used, means, strict=True):
            p.grad = mean
        return numbers[0] / self.size

    def mean_vector(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """Return the means of tensors over all processes, with one all-reduce per dtype."""
        means = list(vector)
        if self.size == 1:
            return means
        shared = [i for i, t in enumerate(vector) if not self._spans_group(t)]
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
        """Raise a ValueError if the mesh of a parameter does not fit the group."""
        if self.size > 1:
            for p in params:
                self._spans_group(p)
        elif modules_of(params) and torch.distributed.get_world_size() > 1:
            msg = (
                "process_group must be the processes over which fully_shard shards the params, got "
                f"{self._group!r}: each process would take a different step"
            )
            raise ValueError(msg)

    def _spans_group(self, p: Tensor) -> bool:
        """Return whether all processes of the group hold a part of the parameter.

        Its gradient is then the mean over the group already.
        """
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
            "process_group must be the processes that hold replicas of the model: one of the "
            f"params is sharded over ranks {sorted(holders)}, which the group {sorted(group)} "
            "overlaps; "
            "for tensor and data parallel together pass the group of the data parallel mesh"
        )
        raise ValueError(msg)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the group, which exists in this process only."""
        group = None if self._group is not False else False
        return {"size": self.size, "_group": group, "_covering": {}}
