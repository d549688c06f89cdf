"""Reference inner-product spaces for any array-API namespace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cdat_core._arrays import cast, namespace
from cdat_core._types import Scalar

Array = Any


@dataclass(frozen=True)
class ArraySpace:
    """Arrays of any shape with the Euclidean inner product.

    Complex arrays are taken as real vectors of twice the length: ``vdot`` is ``Re <x, y>``.
    The inner product is accumulated in the dtype of the arrays.
    """

    def vdot(self, x: Array, y: Array) -> Scalar:
        """Return ``Re <x, y>`` as a 0-d array.

        Raises
        ------
        ValueError
            If the shapes differ: broadcasting would silently give another number.
        """
        if x.shape != y.shape:
            msg = f"x and y must have the same shape, got {tuple(x.shape)} and {tuple(y.shape)}"
            raise ValueError(msg)
        xp = namespace(x, y)
        if xp.isdtype(x.dtype, "complex floating"):
            return xp.sum(xp.real(x) * xp.real(y) + xp.imag(x) * xp.imag(y))
        return xp.sum(x * y)

    def scale(self, a: Scalar, x: Array) -> Array:
        """Return ``a * x`` in the dtype of x."""
        return cast(a, x) * x

    def add_scale(self, x: Array, a: Scalar, y: Array) -> Array:
        """Return ``x + a * y`` in the dtype of x."""
        return x + cast(a, x) * y


@dataclass(frozen=True)
class TupleSpace:
    """Tuples of arrays, such as the weights of a network; inner products of the parts add up."""

    def vdot(self, x: tuple[Array, ...], y: tuple[Array, ...]) -> Scalar:
        """Return the sum over the parts of ``Re <x_i, y_i>`` as a 0-d array."""
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
