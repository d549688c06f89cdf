"""A running average of the weights, to evaluate instead of the last, noisy ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cdat_core.tuners import average_weight
from cdat_torch.distributed.dtensor import local
from cdat_torch.side_effects import restore_values, temporary_values


class WeightAverage:
    """The average of the weights after each step that was taken; see `average_weight`.

    It is kept in float32 at least: in lower precision the small weight of a new iterate would round
    to no change.

    Parameters
    ----------
    device : torch.device
        Where the count of the steps lives.

    Attributes
    ----------
    vector : dict
        Maps each parameter to its average; empty before the first step.
    in_use : bool
        Whether the parameters have their averaged values at present.
    """

    def __init__(self, device: torch.device) -> None:
        self.vector: dict[Tensor, Tensor] = {}
        self.in_use = False
        self._taken = torch.zeros((), dtype=torch.int32, device=device)

    @property
    def taken(self) -> int:
        """How many steps are in the average; this waits for the device."""
        return int(self._taken)

    def add(self, params: Sequence[Tensor], *, skip: Tensor) -> None:
        """Add the weights after a step; nothing if `skip`, a 0-d tensor, is true."""
        on_host = skip.device.type == "cpu"
        if on_host and bool(skip):
            return
        weight = average_weight(self._taken.to(torch.float32))
        weight = torch.where(skip, 0.0, weight)
        for p in params:
            if p not in self.vector:
                self.vector[p] = _zeros_like(p).copy_(p.detach())
        averages = [local(self.vector[p]) for p in params]
        values = [local(p).to(a.dtype) for p, a in zip(params, averages, strict=True)]
        if on_host:
            torch._foreach_lerp_(averages, values, float(weight))
        else:
            for average, value in zip(averages, values, strict=True):
                average.lerp_(value, weight.to(average.device, average.dtype))
        self._taken = self._taken + ~skip

    @contextmanager
    def swapped_in(self, params: Sequence[Tensor], buffers: Sequence[Tensor]) -> Iterator[None]:
        """Give `params` their averages inside the block; then restore them, and `buffers`."""
        if self.in_use:
            msg = "averaged() was called inside another averaged() block"
            raise RuntimeError(msg)
        averages = [self.vector.get(p, p.detach()) for p in params]
        with (
            restore_values(buffers, [b.detach().clone() for b in buffers]),
            temporary_values(params, averages),
        ):
            self.in_use = True
            try:
                yield
            finally:
                self.in_use = False

    def saved(self, params: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """Return the average for a checkpoint; zeros where it is not known yet."""
        return {p: self.vector[p] if p in self.vector else _zeros_like(p) for p in params}

    def load(self, vector: dict[Tensor, Tensor], taken: int) -> None:
        """Continue from a checkpoint."""
        self.vector = {p: _zeros_like(p).copy_(part) for p, part in vector.items()}
        self._taken = torch.full_like(self._taken, taken if vector else 0)


def _zeros_like(p: Tensor) -> Tensor:
    dtype = torch.promote_types(p.dtype, torch.float32)
    return torch.zeros_like(p, dtype=dtype, requires_grad=False)
