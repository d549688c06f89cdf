"""The objective of a minimisation with its derivatives, each call counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cdat_core._curvature import finite_difference_hvp
from cdat_core._spaces import ArraySpace
from cdat_core._types import HessianVectorProduct

Vector = NDArray[np.floating[Any]]


def start_vector(x0: ArrayLike) -> Vector:
    """Return a copy of `x0` as a vector of a floating dtype that NumPy computes in.

    Raises
    ------
    TypeError
        If `x0` does not hold real numbers.
    ValueError
        If it is empty or has more than one axis.
    """
    given = np.asarray(x0)
    if given.dtype.kind not in "iubf":
        msg = f"x0 must hold real numbers, got {x0!r}"
        raise TypeError(msg)
    # Half precision and integers are widened: gradients and curvatures need more digits.
    dtype = np.float64 if given.dtype.kind in "iub" else np.result_type(given.dtype, np.float32)
    start = np.array(given, dtype=dtype, ndmin=1)
    if start.ndim != 1 or start.size == 0:
        msg = f"x0 must be a non-empty vector, got an array of shape {given.shape}"
        raise ValueError(msg)
    return start


class Problem:
    """The objective with its derivatives, each call counted.

    The last value and gradient are kept, so that a line search and the step after it do not
    evaluate the same point twice.
    """

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
        self._last_value: tuple[Vector, Any] | None = None
        self._last_grad: tuple[Vector, Vector] | None = None

    def value(self, x: Vector) -> Any:
        """Return the loss as a 0-d array in the dtype of x."""
        if self._last_value is not None and np.array_equal(self._last_value[0], x):
            return self._last_value[1]
        value = self._value(x)
        self._last_value = np.copy(x), value
        return value

    def grad(self, x: Vector) -> Vector:
        """Return the gradient, shaped like x."""
        if self._last_grad is not None and np.array_equal(self._last_grad[0], x):
            return self._last_grad[1]
        grad = self._grad(x)
        self._last_grad = np.copy(x), grad
        return grad

    def _value(self, x: Vector) -> Any:
        self.nfev += 1
        result = np.asarray(self._fun(np.copy(x), *self._args))
        if result.size != 1:
            msg = f"fun must return a scalar, got an array of shape {result.shape}"
            raise ValueError(msg)
        return result.reshape(()).astype(x.dtype)

    def _grad(self, x: Vector) -> Vector:
        self.njev += 1
        assert callable(self._jac)
        result = np.asarray(self._jac(np.copy(x), *self._args), dtype=x.dtype)
        if result.shape != x.shape:
            msg = f"jac must return an array of shape {x.shape}, got {result.shape}"
            raise ValueError(msg)
        return result

    def hvp(self, x: Vector, space: ArraySpace) -> HessianVectorProduct[Vector]:
        """Return ``v -> H(x) v`` from hessp, else from hess, else from differences of gradients."""
        if self._hessp is None and self._hess is None:
            return finite_difference_hvp(self.grad, x, space=space)

        def product(v: Vector, /) -> Vector:
            self.nhev += 1
            if self._hessp is not None:
                return np.asarray(self._hessp(np.copy(x), v, *self._args), dtype=x.dtype)
            assert self._hess is not None
            return np.asarray(self._hess(np.copy(x), *self._args) @ v, dtype=x.dtype)

        return product
