"""The cost of a step in gradient equivalents, to compare contenders.

The unit is one gradient: for each layer three matrix products of the same size, one forward and two
backward. A measurement is counted the same way; docs/benchmarks.md has measured times.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdat_core.linesearch import LineSearch
from cdat_core.tuners import Tuner

FORWARD = 1 / 3

CURVATURE = {
    ("jax", "auto"): 4 / 3,  # two tangents by forward over forward; the forward pass is shared
    ("jax", "gauss_newton"): 2 / 3,  # one tangent of the model
    ("torch", "auto"): 1.0,  # one tangent and the second-order terms, by replay of the graph
    ("torch", "gauss_newton"): 2 / 3,
    ("numpy", "auto"): 2.0,  # the gradient of <gradient, u>
    ("numpy", "gauss_newton"): 2.0,
}


def of_steps(
    backend: str, steps: int, rule: Tuner[Any] | LineSearch | None, *, curvature: str
) -> NDArray[np.float64]:
    """Return the cost of each step of a run, excluding the trials of a line search.

    Parameters
    ----------
    backend : str
        "jax", "torch" or "numpy".
    steps : int
        Length of the run.
    rule : Tuner, LineSearch or None
        The rule; None for a complete optimizer.
    curvature : str
        How the curvature is computed, in the steps that measure it.

    Returns
    -------
    ndarray of float64, shape (steps,)
        In gradients.
    """
    found = np.ones(steps)
    if rule is not None and "curvature" in rule.needs:
        measures = getattr(rule, "measures", None)
        measured = np.ones(steps) if measures is None else measures(np.arange(steps))
        found += CURVATURE[backend, curvature] * measured
    return found


def of_trial(*, slope: bool) -> float:
    """Return the cost of a trial in gradients; `slope` says whether it needs the derivative."""
    return 1.0 if slope else FORWARD
