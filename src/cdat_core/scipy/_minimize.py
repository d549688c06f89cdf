"""Tuners and line searches as methods of `scipy.optimize.minimize`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.optimize
from numpy.typing import ArrayLike

from cdat_core import _validation
from cdat_core._curvature import directional_curvature
from cdat_core._eigenvalues import TopEigenvalues, top_eigenvalues
from cdat_core._spaces import ArraySpace
from cdat_core._types import Measurement
from cdat_core.linesearch import LineSearch
from cdat_core.scipy._problem import Problem, Vector, start_vector
from cdat_core.tuners import Tuner

_SPACE = ArraySpace()
_SHARPNESS_MATVECS = 8

_MESSAGES = {
    0: "Optimization terminated successfully.",
    1: "Maximum number of iterations has been exceeded.",
    2: "The line search found no lower value.",
    3: "The loss, its gradient or its curvature is not finite.",
    4: "The learning rate is 0 and will stay 0; try a tuner with an initial_learning_rate.",
    99: "`callback` raised `StopIteration`.",
}


def tuned(tuner_or_search: Tuner[Any] | LineSearch) -> Callable[..., scipy.optimize.OptimizeResult]:
    """Return a ``method`` for `scipy.optimize.minimize`: gradient descent at a tuned rate.

    Parameters
    ----------
    tuner_or_search : Tuner or LineSearch
        The tuner or line search that chooses the rate.

    Returns
    -------
    callable
        Its options are ``maxiter`` (default 1000), ``gtol`` (default 1e-5: stop when the largest
        component of the gradient is below it; ``tol`` of `minimize` sets it too) and ``disp``.
        `jac` is required. The curvature comes from `hessp`, else from `hess`, else from central
        differences of `jac`; the sharpness is the largest Ritz value after at most 8 Lanczos steps,
        each with one such product and started from the last eigenvector and the direction. Bounds
        and constraints raise a ValueError.

    Examples
    --------
    >>> import scipy.optimize
    >>> from cdat_core import tuners
    >>> from cdat_core.scipy import tuned
    >>> result = scipy.optimize.minimize(
    ...     lambda x: float(x @ x), [3.0, 4.0], jac=lambda x: 2 * x, method=tuned(tuners.cdat(1.0))
    ... )
    >>> result.success, result.nit
    (True, 1)
    """
    if not isinstance(tuner_or_search, Tuner | LineSearch):
        msg = f"tuner_or_search must be a Tuner or a LineSearch, got {tuner_or_search!r}"
        raise TypeError(msg)

    def method(
        fun: Callable[..., Any],
        x0: ArrayLike,
        args: tuple[Any, ...] = (),
        *,
        jac: Callable[..., Any] | None = None,
        hess: Callable[..., Any] | None = None,
        hessp: Callable[..., Any] | None = None,
        bounds: Any = None,
        constraints: Any = (),
        callback: Callable[..., Any] | None = None,
        maxiter: int = 1000,
        gtol: float = 1e-5,
        tol: float | None = None,
        disp: bool = False,
    ) -> scipy.optimize.OptimizeResult:
        if bounds is not None:
            msg = f"bounds are not supported by a tuned gradient descent, got {bounds!r}"
            raise ValueError(msg)
        if np.any(constraints):
            msg = f"constraints are not supported by a tuned gradient descent, got {constraints!r}"
            raise ValueError(msg)
        maxiter = _validation.count("maxiter", maxiter, minimum=0)
        name, tolerance = ("gtol", gtol) if tol is None else ("tol", tol)
        tolerance = _validation.nonnegative(name, tolerance)
        start = start_vector(x0)
        problem = Problem(fun, args, jac, hess, hessp)
        result = _descend(problem, start, tuner_or_search, callback, maxiter, tolerance)
        if disp:
            summary = f"fun={result.fun:.6g} nit={result.nit} nfev={result.nfev}"
            print(result.message, summary)  # noqa: T201
        return result

    return method


def minimize(
    fun: Callable[..., Any],
    x0: ArrayLike,
    args: tuple[Any, ...] = (),
    *,
    tuner: Tuner[Any] | LineSearch,
    jac: Any = None,
    hess: Callable[..., Any] | None = None,
    hessp: Callable[..., Any] | None = None,
    tol: float | None = None,
    callback: Callable[..., Any] | None = None,
    options: dict[str, Any] | None = None,
) -> scipy.optimize.OptimizeResult:
    """Minimise `fun` by gradient descent at a tuned rate.

    The same as ``scipy.optimize.minimize(..., method=tuned(tuner))``; see `tuned` for the options.

    Parameters
    ----------
    fun : callable
        ``fun(x, *args) -> float``.
    x0 : array_like, shape (n,)
        The start.
    args : tuple
        Further arguments of `fun` and its derivatives.
    tuner : Tuner or LineSearch
        The tuner or line search that chooses the rate.
    jac : callable or True
        ``jac(x, *args) -> array of shape (n,)``; True if `fun` returns value and gradient.
    hess, hessp : callable, optional
        The Hessian ``hess(x, *args)``, or the product ``hessp(x, v, *args)``.
    tol : float, optional
        Tolerance on the largest component of the gradient.
    callback : callable, optional
        ``callback(xk)`` or ``callback(intermediate_result)``, as in SciPy; StopIteration ends the
        run.
    options : dict, optional
        See `tuned`.

    Returns
    -------
    scipy.optimize.OptimizeResult
        With x, fun, jac, nit, nfev, njev, nhev, learning_rate (the last one), status, success and
        message.

    Examples
    --------
    >>> from scipy.optimize import rosen, rosen_der, rosen_hess_prod
    >>> from cdat_core import tuners
    >>> from cdat_core.scipy import minimize
    >>> result = minimize(
    ...     rosen, [0.5, 0.5], tuner=tuners.cdat(1.0, 0.0),
    ...     jac=rosen_der, hessp=rosen_hess_prod, options={"maxiter": 20_000},
    ... )
    >>> result.success
    True
    """
    return scipy.optimize.minimize(
        fun,
        x0,
        args,
        method=tuned(tuner),
        jac=jac,
        hess=hess,
        hessp=hessp,
        tol=tol,
        callback=callback,
        options=options,
    )


def _descend(
    problem: Problem,
    x: Vector,
    tuner_or_search: Tuner[Any] | LineSearch,
    callback: Callable[..., Any] | None,
    maxiter: int,
    gtol: float,
) -> scipy.optimize.OptimizeResult:
    like = np.zeros((), dtype=x.dtype)
    tuner = tuner_or_search if isinstance(tuner_or_search, Tuner) else None
    state: Any = None if tuner is None else tuner.init(like)
    model = _Model(problem)
    rate = like
    value, grad = problem.value(x), problem.grad(x)
    nit = 0
    while True:
        if not (np.isfinite(value) and np.all(np.isfinite(grad))):
            status = 3
            break
        if np.max(np.abs(grad)) <= gtol:
            status = 0
            break
        if nit >= maxiter:
            status = 1
            break
        direction = -grad
        measurement = Measurement(value, _SPACE.vdot(grad, direction), None)
        if tuner is not None:
            before = state
            measurement = model.complete(measurement, tuner.needs, x, direction)
            rate, state = tuner.update(measurement, state)
            if state.skipped > before.skipped:
                status = 3
                break
            if rate == 0 and state == before:  # nothing will ever change
                status = 4
                break
        else:
            assert isinstance(tuner_or_search, LineSearch)
            rate, found = _search(problem, tuner_or_search, x, direction, measurement, rate)
            if not found:
                status = 2
                break
        x = _SPACE.add_scale(x, rate, direction)
        value, grad = problem.value(x), problem.grad(x)
        nit += 1
        if callback is not None and _stops(callback, x, value):
            status = 99
            break
    return scipy.optimize.OptimizeResult(
        x=x,
        fun=float(value),
        jac=grad,
        nit=nit,
        nfev=problem.nfev,
        njev=problem.njev,
        nhev=problem.nhev,
        learning_rate=float(rate),
        status=status,
        success=status == 0,
        message=_MESSAGES[status],
    )


def _search(
    problem: Problem,
    search: LineSearch,
    x: Vector,
    direction: Vector,
    measurement: Measurement,
    previous: Any,
) -> tuple[Any, bool]:
    """Return the step and whether it is positive; `previous` is the last step, or 0."""
    trial = search.init(measurement, np.zeros_like(previous), previous)
    while not trial.done:
        there = _SPACE.add_scale(x, trial.step_size, direction)
        slope = None
        if "slope" in search.trial_needs:
            slope = _SPACE.vdot(problem.grad(there), direction)
        trial = search.tell(trial, problem.value(there), slope)
    return trial.step_size, bool(trial.step_size > 0)


class _Model:
    """The second-order part of a measurement; keeps the sharpest direction as a warm start."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._sharpest: TopEigenvalues[Vector] | None = None

    def complete(
        self, measurement: Measurement, needs: frozenset[str], x: Vector, direction: Vector
    ) -> Measurement:
        """Return the measurement with curvature and sharpness, each if it is needed."""
        hvp = self._problem.hvp(x, _SPACE)
        if "curvature" in needs:
            curvature = directional_curvature(hvp, direction, space=_SPACE)
            measurement = measurement._replace(curvature=curvature)
        if "sharpness" in needs:
            start = direction / np.linalg.norm(direction)
            if self._sharpest is not None:
                # The last eigenvector alone would hide another one that has become sharper.
                start = start + self._sharpest.vectors[0]
            matvecs = min(direction.size, _SHARPNESS_MATVECS)
            self._sharpest = top_eigenvalues(hvp, start, num_matvecs=matvecs, space=_SPACE)
            measurement = measurement._replace(sharpness=self._sharpest.values[0])
        return measurement


def _stops(callback: Callable[..., Any], x: Vector, value: Any) -> bool:
    """Call the callback in the form it accepts, of SciPy's two; return whether it stops the run."""
    try:
        names = set(inspect.signature(callback).parameters)
    except (TypeError, ValueError):  # builtins have no signature; SciPy then passes x
        names = set()
    try:
        if names == {"intermediate_result"}:
            callback(
                intermediate_result=scipy.optimize.OptimizeResult(x=np.copy(x), fun=float(value))
            )
        else:
            callback(np.copy(x))
    except StopIteration:
        return True
    return False
