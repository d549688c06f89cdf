"""The cost of a step in gradient equivalents, to compare contenders.

The unit is one gradient: for each layer three matrix products of the same size, one forward and two
backward. A measurement is counted the same way; docs/benchmarks.md has measured times.
"""

from __future__ import annotations

FORWARD = 1 / 3

CURVATURE = {
    ("jax", "auto"): 4 / 3,  # two tangents by forward over forward; the forward pass is shared
    ("jax", "gauss_newton"): 2 / 3,  # one tangent of the model
    ("torch", "auto"): 1.0,  # one tangent and the second-order terms, by replay of the graph
    ("torch", "gauss_newton"): 2 / 3,
    ("numpy", "auto"): 2.0,  # the gradient of <gradient, u>
    ("numpy", "gauss_newton"): 2.0,
}


def of_step(backend: str, *, curvature: str | None) -> float:
    """Return the cost of a step, excluding the trials of a line search.

    Parameters
    ----------
    backend : str
        "jax", "torch" or "numpy".
    curvature : str or None
        How the curvature is computed; None for a rule that does not use it.

    Returns
    -------
    float
        In gradients.
    """
    return 1.0 + (0.0 if curvature is None else CURVATURE[backend, curvature])


def of_trial(*, slope: bool) -> float:
    """Return the cost of a trial in gradients; `slope` says whether it needs the derivative."""
    return 1.0 if slope else FORWARD
