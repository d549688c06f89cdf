"""How many steps were skipped because something was not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from cdat_core.extend import validation


class SkipCount:
    """Counts skipped steps on the device, in all and in a row.

    Parameters
    ----------
    device : torch.device
        Where the counts live.
    limit : int or None
        How many in a row are too many.
    """

    def __init__(self, device: torch.device, limit: int | None) -> None:
        if limit is not None:
            validation.count("max_consecutive_skips", limit)
        self._limit = limit
        self.total = torch.zeros((), dtype=torch.int32, device=device)
        self._in_a_row = torch.zeros_like(self.total)

    def add(self, skip: Tensor | bool) -> None:
        """Take note of a step."""
        self.total = self.total + skip
        self._in_a_row = (self._in_a_row + 1) * skip

    def load(self, total: int) -> None:
        """Go on from the count of a checkpoint."""
        self.total = torch.full_like(self.total, total)

    def refuse_many(self) -> None:
        """Raise a RuntimeError after too many in a row; without a limit nothing is read."""
        if self._limit is not None and int(self._in_a_row) >= self._limit:
            msg = (
                f"{self._limit} steps in a row were skipped because loss, gradient or curvature "
                "was not finite; the parameters are those of the last good step "
                "(max_consecutive_skips)"
            )
            raise RuntimeError(msg)
