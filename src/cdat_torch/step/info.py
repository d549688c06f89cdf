"""What a step decides and reports, and when it is skipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cdat_core.extend import StepInfo, validation
from cdat_torch.distributed.dtensor import all_agree, locals_of
from cdat_torch.spaces import scalar_dtype


class Decision(NamedTuple):
    """The rate of a step and the numbers it was computed from, means over all processes.

    Attributes
    ----------
    rate : Tensor
        The tuned rate; 0 if the step is skipped.
    skip : Tensor
        Boolean; whether something was not finite.
    slope, curvature, sharpness : Tensor or None
        What was measured.
    method : str or None
        How the curvature was computed.
    """

    rate: Tensor
    skip: Tensor
    slope: Tensor | None = None
    curvature: Tensor | None = None
    sharpness: Tensor | None = None
    method: str | None = None

    @classmethod
    def skipped(cls, like: Tensor) -> Decision:
        """Return the decision to skip a step before anything is measured."""
        return cls(torch.zeros_like(like), torch.ones_like(like, dtype=torch.bool))

    @classmethod
    def held(cls, rate: Tensor) -> Decision:
        """Return the decision to step at the rate in use, without a measurement."""
        return cls(rate, torch.zeros_like(rate, dtype=torch.bool))

    def info(self, value: Tensor | None, skipped: Tensor) -> StepInfo:
        """Return what `TunedOptimizer.last` reports, given the loss and the skips so far."""
        return StepInfo(
            value, self.slope, self.curvature, self.sharpness, self.rate, skipped, self.method
        )


class SkipCount:
    """The number of skipped steps, in all and in a row, on the device.

    Parameters
    ----------
    device : torch.device
        Where the counts live.
    limit : int or None
        How many in a row raise an error.
    """

    def __init__(self, device: torch.device, limit: int | None) -> None:
        if limit is not None:
            validation.count("max_consecutive_skips", limit)
        self._limit = limit
        self.total = torch.zeros((), dtype=torch.int32, device=device)
        self._in_a_row = torch.zeros_like(self.total)

    def add(self, skip: Tensor) -> None:
        """Count a step, skipped or not."""
        self.total = self.total + skip
        self._in_a_row = (self._in_a_row + 1) * skip

    def load(self, total: int) -> None:
        """Continue from the count of a checkpoint."""
        self.total = torch.full_like(self.total, total)
        self._in_a_row = torch.zeros_like(self.total)

    def raise_if_too_many(self) -> None:
        """Raise a RuntimeError after too many in a row; without a limit nothing is read."""
        if self._limit is not None and int(self._in_a_row) >= self._limit:
            msg = (
                f"{self._limit} steps in a row were skipped because loss, gradient or curvature "
                "was not finite; the parameters are those of the last good step "
                "(max_consecutive_skips)"
            )
            raise RuntimeError(msg)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether all entries are finite; this waits for the device.

    The entries of a sharded tensor in other processes count as well.
    """
    return all_agree(not tensors or _finite(locals_of(tensors)), tensors)


def _finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether all entries are finite.

    The sums are tested first: finite sums have finite terms. Another sum may just have overflowed.
    """
    first = tensors[0]
    sums = [t.sum(dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    total = torch.stack([s.detach().to(first.device, scalar_dtype(first.device)) for s in sums])
    if bool(torch.isfinite(total).all()):
        return True
    finite = [torch.isfinite(t).all().to(first.device) for t in tensors]
    return bool(torch.stack(finite).all())
