"""Reference inner-product spaces for any array-API namespace.

Both share one policy for dtypes. Vectors keep theirs. Half precision (float16, bfloat16) is widened
to float32 for each operation: inner products are float32, other results are rounded once. Wider
floating dtypes are used as they are. The inner product refuses integers and booleans, because all
results would be rounded to integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cdat_core._arrays import cast, namespace
from cdat_core._types import Scalar

Array = Any


@dataclass(frozen=True)
class ArraySpace:
    """Arrays of any shape with the Euclidean inner product.

    Complex arrays are treated as real vectors of twice the length: ``vdot`` is ``Re <x, y>``. The
    inner product is accumulated in the dtype of the arrays, or in float32 if that is narrower.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import ArraySpace
    >>> x, y = np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]])
    >>> float(ArraySpace().vdot(x, y)), ArraySpace().add_scale(x, 2.0, y).tolist()
    (11.0, [[7.0, 10.0]])
    """

    def vdot(self, x: Array, y: Array) -> Scalar:
        """Return ``Re <x, y>`` as a 0-d array, of float32 or wider.

        Raises
        ------
        ValueError
            If the shapes differ: broadcasting would silently give another number.
        TypeError
            If the dtype of x or y is neither real nor complex floating.
        """
        if x.shape != y.shape:
            msg = f"x and y must have the same shape, got {tuple(x.shape)} and {tuple(y.shape)}"
            raise ValueError(msg)
        xp = namespace(x, y)
        x, y = _widened(_floating("x", x)), _widened(_floating("y", y))
        if xp.isdtype(x.dtype, "complex floating"):
            return xp.sum(xp.real(x) * xp.real(y) + xp.imag(x) * xp.imag(y))
        return xp.sum(x * y)

    def scale(self, a: Scalar, x: Array) -> Array:
        """Return ``a * x`` in the dtype of x."""
        wide = _widened(x)
        return cast(cast(a, wide) * wide, x)

    def add_scale(self, x: Array, a: Scalar, y: Array) -> Array:
        """Return ``x + a * y`` in the dtype of x."""
        wide = _widened(x)
        return cast(wide + cast(a, wide) * cast(y, wide), x)


@dataclass(frozen=True)
class TupleSpace:
    """Tuples of arrays, such as the weights of a network; inner products of the parts add up.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import TupleSpace
    >>> weights_and_bias = (np.ones((2, 2)), np.asarray(3.0))
    >>> float(TupleSpace().vdot(weights_and_bias, weights_and_bias))
    13.0
    """

    def vdot(self, x: tuple[Array, ...], y: tuple[Array, ...]) -> Scalar:
        """Return the sum over the parts of ``Re <x_i, y_i>`` as a 0-d array.

        Raises
        ------
        ValueError
            If the tuples are empty or differ in length or shapes.
        TypeError
            If a dtype is neither real nor complex floating.
        """
        if not x:
            msg = "x must hold at least one array, got an empty tuple"
            raise ValueError(msg)
        part = ArraySpace()
        products = [part.vdot(a, b) for a, b in zip(x, y, strict=True)]
        return sum(products[1:], start=products[0])

    def scale(self, a: Scalar, x: tuple[Array, ...]) -> tuple[Array, ...]:
        """Return ``a * x`` part by part."""
        part = ArraySpace()
        return tuple(part.scale(a, b) for b in x)

    def add_scale(self, x: tuple[Array, ...], a: Scalar, y: tuple[Array, ...]) -> tuple[Array, ...]:
        """Return ``x + a * y`` part by part."""
        part = ArraySpace()
        return tuple(part.add_scale(b, a, c) for b, c in zip(x, y, strict=True))


def _floating(argument: str, x: Array) -> Array:
    """Return `x` if its dtype is real or complex floating."""
    if not namespace(x).isdtype(x.dtype, ("real floating", "complex floating")):
        msg = f"{argument} must have a floating dtype, got {x.dtype}; cast it first"
        raise TypeError(msg)
    return x


def _widened(x: Array) -> Array:
    """Return half-precision `x` as float32: its products need more digits than it has."""
    xp = namespace(x)
    if xp.isdtype(x.dtype, "real floating") and xp.finfo(x.dtype).bits < 32:
        return xp.astype(x, xp.float32)
    return x
