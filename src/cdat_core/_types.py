"""The vocabulary of the core: scalars, measurements, vector spaces, Hessian-vector products."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

Scalar: TypeAlias = Any
"""A 0-d array of the caller's framework (a Python float is accepted as a multiplier)."""

V = TypeVar("V")
"""A vector, opaque to the core: an array, a pytree, a list of sharded tensors."""


class Measurement(NamedTuple):
    """The loss along the update direction u, to second order.

    The quadratic model is ``q(eta) = value + eta * slope + eta**2 / 2 * curvature``. All fields are
    0-d arrays; a field that no tuner in use needs may be None (see ``Tuner.needs``).

    Attributes
    ----------
    value : Scalar or None
        The loss f(w), in units of the loss.
    slope : Scalar or None
        The directional derivative <g, u>; negative when u descends.
    curvature : Scalar or None
        The directional curvature <u, H u>, with H the Hessian of the same loss on the same batch.
    sharpness : Scalar or None
        The largest eigenvalue of H (of ``P^-1/2 H P^-1/2`` under a preconditioner P).

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import Measurement
    >>> model = Measurement(np.asarray(1.0), np.asarray(-2.0), np.asarray(4.0))
    >>> along = lambda eta: model.value + eta * model.slope + eta**2 / 2 * model.curvature
    >>> float(along(0.5)), float(along(1.0))
    (0.5, 1.0)
    """

    value: Scalar | None
    slope: Scalar | None
    curvature: Scalar | None
    sharpness: Scalar | None = None


class InnerProductSpace(Protocol[V]):
    """The operations on vectors that the estimators use: an inner product and two linear ones.

    The implementation owns layout, accumulation dtype, sharding and collectives. Vectors are never
    flattened and never modified in place.

    Examples
    --------
    Dictionaries of arrays:

    >>> import numpy as np
    >>> from cdat_core.testing import check_space
    >>> class DictSpace:
    ...     def vdot(self, x, y):
    ...         return sum(np.vdot(x[name], y[name]) for name in x)
    ...     def scale(self, a, x):
    ...         return {name: a * x[name] for name in x}
    ...     def add_scale(self, x, a, y):
    ...         return {name: x[name] + a * y[name] for name in x}
    >>> check_space(DictSpace(), [{"w": np.array([1.0, k])} for k in (2.0, 3.0, -1.0)])
    """

    def vdot(self, x: V, y: V) -> Scalar:
        """Return the real inner product <x, y> as a 0-d array."""
        ...

    def scale(self, a: Scalar, x: V) -> V:
        """Return ``a * x`` in the dtype of x."""
        ...

    def add_scale(self, x: V, a: Scalar, y: V) -> V:
        """Return ``x + a * y`` in the dtype of x."""
        ...


class HessianVectorProduct(Protocol[V]):
    """A linear, symmetric operator on vectors: ``v -> H v``.

    Examples
    --------
    Any callable works, here for the Hessian of ``sum(w**4)`` at w:

    >>> import numpy as np
    >>> from cdat_core import ArraySpace, directional_curvature
    >>> w, u = np.array([1.0, 2.0]), np.array([1.0, 0.0])
    >>> hvp = lambda v: 12 * w**2 * v
    >>> float(directional_curvature(hvp, u, space=ArraySpace()))
    12.0
    """

    def __call__(self, v: V, /) -> V:
        """Return H v, a vector like v."""
        ...
