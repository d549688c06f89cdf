"""Print a table: tuned gradient descent against the methods of SciPy on test functions.

Everything counts evaluations, not seconds, so the table is the same on every machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
from numpy.typing import NDArray
from scipy.optimize import rosen, rosen_der, rosen_hess_prod

from cdat_core import linesearch, tuners
from cdat_core.scipy import tuned

Vector = NDArray[np.float64]


class TestFunction(NamedTuple):
    fun: Callable[..., float]
    jac: Callable[..., Vector]
    hessp: Callable[..., Vector]
    start: Vector


def quadratic(condition: float, n: int = 50) -> TestFunction:
    eigenvalues = np.geomspace(1.0, condition, n)
    return TestFunction(
        lambda x: 0.5 * float(x @ (eigenvalues * x)),
        lambda x: eigenvalues * x,
        lambda _, v: eigenvalues * v,
        np.ones(n),
    )


def logistic(n: int = 20) -> TestFunction:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, n))
    y = (x[:, 0] + rng.normal(size=200) > 0).astype(float)

    def probability(w: Vector) -> Vector:
        return 0.5 * (1 + np.tanh(x @ w / 2))

    return TestFunction(
        lambda w: float(np.mean(np.logaddexp(0, x @ w) - y * (x @ w)) + 0.005 * w @ w),
        lambda w: x.T @ (probability(w) - y) / 200 + 0.01 * w,
        lambda w, v: x.T @ (probability(w) * (1 - probability(w)) * (x @ v)) / 200 + 0.01 * v,
        np.zeros(n),
    )


FUNCTIONS = {
    "Rosenbrock, n = 2": TestFunction(rosen, rosen_der, rosen_hess_prod, np.array([-1.2, 1.0])),
    "Rosenbrock, n = 10": TestFunction(rosen, rosen_der, rosen_hess_prod, np.full(10, 0.5)),
    "quadratic, condition 100": quadratic(1e2),
    "logistic regression, n = 20": logistic(),
}
METHODS: dict[str, Any] = {
    "quadratically greedy": tuned(tuners.quadratically_greedy()),
    "cdat(0.9, decay=0)": tuned(tuners.cdat(0.9, decay=0.0)),
    "cdat(1.9, decay=0)": tuned(tuners.cdat(1.9, decay=0.0)),
    "cdat(1.9, decay=0.9)": tuned(tuners.cdat(1.9, decay=0.9)),
    "polyak(f_min=0)": tuned(tuners.polyak()),
    "hypergradient(0.1)": tuned(tuners.hypergradient(0.1)),
    "sharpness_edge(1.0)": tuned(tuners.sharpness_edge(1.0)),
    "backtracking": tuned(linesearch.backtracking()),
    "zoom": tuned(linesearch.zoom()),
    "SciPy CG": "CG",
    "SciPy BFGS": "BFGS",
    "SciPy L-BFGS-B": "L-BFGS-B",
    "SciPy Newton-CG": "Newton-CG",
    "SciPy trust-ncg": "trust-ncg",
}
CURVATURE = {"Newton-CG", "trust-ncg"}


def cell(method: Any, function: TestFunction, tolerance: float, maxiter: int) -> str:
    """Minimise until the largest entry of the gradient is below `tolerance`; count the calls."""
    keywords: dict[str, Any] = {"jac": function.jac, "method": method}
    if callable(method) or method in CURVATURE:
        keywords["hessp"] = function.hessp
    options: dict[str, Any] = {"maxiter": maxiter, "gtol": tolerance}
    if method == "Newton-CG":
        options = {"maxiter": maxiter, "xtol": 1e-8}
    elif method == "L-BFGS-B":
        options |= {"ftol": 0.0}
    with np.errstate(all="ignore"):
        result = scipy.optimize.minimize(function.fun, function.start, options=options, **keywords)
    if not np.max(np.abs(function.jac(result.x))) <= tolerance:
        return "not reached"
    return f"{result.nfev} / {result.njev} / {result.get('nhev', 0)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--maxiter", type=int, default=20_000)
    arguments = parser.parse_args()
    print("| losses / gradients / Hessian products |", " | ".join(FUNCTIONS), "|")
    print("|---|" + "---|" * len(FUNCTIONS))
    for name, method in METHODS.items():
        cells = (
            cell(method, function, arguments.tolerance, arguments.maxiter)
            for function in FUNCTIONS.values()
        )
        print(f"| {name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
