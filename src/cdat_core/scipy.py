"""Tuners as methods of `scipy.optimize.minimize`.

The direction is steepest descent; the tuner or line search chooses the length of the step. This is
the only module of the core that imports numpy and scipy.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.optimize
from numpy.typing import ArrayLike, NDArray

from cdat_core._types import HessianVectorProduct, Measurement
from cdat_core.curvature import finite_difference_hvp
from cdat_core.curvature import measure as measure_along
from cdat_core.linesearch import LineSearch
from cdat_core.spaces import ArraySpace
from cdat_core.tuners import Tuner

Vector = NDArray[np.floating[Any]]

_MESSAGES = {
    0: "Optimization terminated successfully.",
    1: "Maximum number of iterations has been exceeded.",
    2: "The line search found no lower value.",
    3: "The loss, its gradient or its curvature is not finite.",
    99: "`callback` raised `StopIteration`.",
}


class _Problem:
    """The objective with its derivatives, each call counted."""

    def __init__(
        self,
        fun: Callable[..., Any],
        args: tuple[Any, ...],
        jac: Callable[..., Any] | None,
        hess: Callable[..., Any] | None,
        hessp: Callable[..., Any] | None,
    ) -> None:
        if not callable(jac):
            msg = (
                f"jac must be the gradient function (or True if fun returns it), got {jac!r}; "
                "for a numerical one pass jac=lambda x, *args: "
                "scipy.optimize.approx_fprime(x, fun, 1.5e-8, *args)"
            )
            raise ValueError(msg)
        for name, function in (("hess", hess), ("hessp", hessp)):
            if function is not None and not callable(function):
                msg = f"{name} must be callable or None, got {function!r}"
                raise ValueError(msg)
        self._fun, self._args, self._jac, self._hess, self._hessp = fun, args, jac, hess, hessp
        self.nfev = self.njev = self.nhev = 0

    def value(self, x: Vector) -> Any:
        self.nfev += 1
        result = np.asarray(self._fun(np.copy(x), *self._args))
        if result.size != 1:
            msg = f"fun must return a scalar, got an array of shape {result.shape}"
            raise ValueError(msg)
        return result.reshape(()).astype(x.dtype)

    def grad(self, x: Vector) -> Vector:
        self.njev += 1
        assert callable(self._jac)
        result = np.asarray(self._jac(np.copy(x), *self._args), dtype=x.dtype)
        if result.shape != x.shape:
            msg = f"jac must return an array of shape {x.shape}, got {result.shape}"
            raise ValueError(msg)
        return result

    def hvp(self, x: Vector, space: ArraySpace) -> HessianVectorProduct[Vector]:
        """Return ``v -> H(x) v`` from hessp, hess or, failing both, differences of gradients."""
        if self._hessp is None and self._hess is None:
            return finite_difference_hvp(self.grad, x, space=space)

        def product(v: Vector, /) -> Vector:
            self.nhev += 1
            if self._hessp is not None:
                return np.asarray(self._hessp(np.copy(x), v, *self._args), dtype=x.dtype)
            assert self._hess is not None
            return np.asarray(self._hess(np.copy(x), *self._args) @ v, dtype=x.dtype)

        return product


def tuned(tuner_or_search: Tuner[Any] | LineSearch) -> Callable[..., scipy.optimize.OptimizeResult]:
    """Return a ``method`` for `scipy.optimize.minimize`: gradient descent at a tuned rate.

    Parameters
    ----------
    tuner_or_search : Tuner or LineSearch
        The rule for the rate.

    Returns
    -------
    callable
        Its options are ``maxiter`` (default 1000), ``gtol`` (default 1e-5: stop when the largest
        component of the gradient is below it; ``tol`` of `minimize` sets it too) and ``disp``.
        `jac` is required. The curvature comes from `hessp`, else from `hess`, else from central
        differences of `jac`. Bounds and constraints are refused.

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
        start = np.array(x0, dtype=np.result_type(np.asarray(x0).dtype, np.float32), ndmin=1)
        if np.asarray(x0).dtype.kind in "iub":
            start = np.array(x0, dtype=np.float64, ndmin=1)
        if start.ndim != 1 or start.size == 0:
            msg = f"x0 must be a non-empty vector, got an array of shape {np.shape(x0)}"
            raise ValueError(msg)
        problem = _Problem(fun, args, jac, hess, hessp)
        result = _descend(
            problem, start, tuner_or_search, callback, maxiter, gtol if tol is None else tol
        )
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
        The rule for the rate.
    jac : callable or True
        ``jac(x, *args) -> array of shape (n,)``; True if `fun` returns value and gradient.
    hess, hessp : callable, optional
        The Hessian, or its product ``hessp(x, v, *args)``.
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
    problem: _Problem,
    x: Vector,
    tuner_or_search: Tuner[Any] | LineSearch,
    callback: Callable[..., Any] | None,
    maxiter: int,
    gtol: float,
) -> scipy.optimize.OptimizeResult:
    space = ArraySpace()
    like = np.zeros((), dtype=x.dtype)
    state: Any = tuner_or_search.init(like) if isinstance(tuner_or_search, Tuner) else None
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
        if isinstance(tuner_or_search, Tuner):
            if "curvature" in tuner_or_search.needs:
                hvp = problem.hvp(x, space)
                measurement = measure_along(value, grad, hvp, direction, space=space)
            else:
                measurement = Measurement(value, space.vdot(grad, direction), None)
            skipped = state.skipped
            rate, state = tuner_or_search.update(measurement, state)
            if state.skipped > skipped:
                status = 3
                break
        else:
            measurement = Measurement(value, space.vdot(grad, direction), None)
            trial = tuner_or_search.init(measurement, like, rate if nit else None)
            while not trial.done:
                trial = tuner_or_search.tell(trial, problem.value(x + trial.step_size * direction))
            if trial.failed and not trial.step_size > 0:
                status = 2
                break
            rate = trial.step_size
        x = space.add_scale(x, rate, direction)
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


def _stops(callback: Callable[..., Any], x: Vector, value: Any) -> bool:
    """Call the callback in whichever of SciPy's two forms it has; report a StopIteration."""
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
