"""Tuning a rate on a logarithmic grid that grows until its optimum is in the interior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """The rates that were tried, in increasing order, and the best of them.

    Attributes
    ----------
    rates, losses : tuple of float
        Each rate with its final loss; infinity where the run diverged.
    best : int
        Index of the lowest loss (of the smallest rate if tied).
    at_edge : bool
        Whether the best rate is the first or the last one, so that a better one may lie outside.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    best: int

    @property
    def at_edge(self) -> bool:
        """Whether a better rate may lie outside the grid."""
        return self.best in {0, len(self.rates) - 1}


def tune(
    final_loss: Callable[[float], float],
    exponents: Iterable[int],
    *,
    max_extensions: int = 16,
) -> Grid:
    """Try the rates ``2**k``, extend the grid until its best rate is interior, then refine it.

    Parameters
    ----------
    final_loss : callable
        ``rate -> loss``; infinity and NaN count as worst.
    exponents : iterable of int
        The first grid: consecutive k.
    max_extensions : int
        Maximum number of rates to add at the ends.

    Returns
    -------
    Grid
        Every rate that was tried: powers of 2, and the two at a factor of sqrt(2) from the best of
        them. If all runs diverge, the grid grows downwards.
    """
    losses: dict[float, float] = {}

    def try_rate(exponent: float) -> None:
        loss = final_loss(2.0**exponent)
        losses[exponent] = math.inf if math.isnan(loss) else loss

    def best() -> float:
        return min(losses, key=lambda k: (losses[k], k))

    for exponent in exponents:
        try_rate(exponent)
    for _ in range(max_extensions):
        lowest, highest = min(losses), max(losses)
        if best() == lowest:
            try_rate(lowest - 1)
        elif best() == highest:
            try_rate(highest + 1)
        else:
            break
    centre = best()
    if math.isfinite(losses[centre]):
        for half in (-0.5, 0.5):
            try_rate(centre + half)
    tried = sorted(losses)
    return Grid(
        rates=tuple(2.0**k for k in tried),
        losses=tuple(losses[k] for k in tried),
        best=tried.index(best()),
    )
