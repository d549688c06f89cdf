"""Tracking of the sharpness from record to record, under every framework."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from cdat_core import TopEigenvalues

MATVECS = 8
"""Hessian-vector products per measurement, by Lanczos from the last eigenvector."""

FIRST_RESTARTS = 5
"""Lanczos runs of the first measurement, which starts from a random vector."""


class SharpnessTracker:
    """The largest eigenvalue of a Hessian that changes little from one measurement to the next.

    Parameters
    ----------
    probe : vector
        Start vector of the first measurement.
    """

    def __init__(self, probe: Any) -> None:
        self._vector = probe
        self._restarts = FIRST_RESTARTS

    def measure(self, top_eigenvalues: Callable[[Any], TopEigenvalues[Any]]) -> float:
        """Return the largest eigenvalue; NaN if it is not finite.

        Parameters
        ----------
        top_eigenvalues : callable
            ``top_eigenvalues(start) -> TopEigenvalues``, with `MATVECS` products.
        """
        value = math.nan
        for _ in range(self._restarts):
            found = top_eigenvalues(self._vector)
            value = float(found.values[0])
            if not math.isfinite(value):
                return math.nan
            self._vector = found.vectors[0]
        self._restarts = 1
        return value
