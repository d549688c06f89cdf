"""Unit vectors and Gram-Schmidt on opaque vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cdat_core._arrays import namespace, safe_reciprocal, sqrt_nonnegative
from cdat_core._types import InnerProductSpace, Scalar, V


def norm(x: V, *, space: InnerProductSpace[V]) -> Scalar:
    """Return the length of `x`."""
    return sqrt_nonnegative(space.vdot(x, x))


def normalized(x: V, *, space: InnerProductSpace[V]) -> V:
    """Return x/|x|, or zeros where |x| is zero or its square leaves the range of the scalars."""
    return space.scale(safe_reciprocal(norm(x, space=space)), x)


def remove(x: V, basis: Sequence[V], *, space: InnerProductSpace[V]) -> V:
    """Subtract from `x` its projection on the orthonormal `basis`: one classical Gram-Schmidt pass.

    Zero vectors in the basis change nothing.
    """
    coefficients = [space.vdot(q, x) for q in basis]
    for a, q in zip(coefficients, basis, strict=True):
        x = space.add_scale(x, -a, q)
    return x


def remainder(
    x: V, remove_all: Callable[[V], V], *, space: InnerProductSpace[V]
) -> tuple[V, Scalar, Scalar]:
    """Return what two Gram-Schmidt passes leave of `x`, its length, and whether it collapsed.

    `remove_all` makes one pass: like `remove`, it subtracts the projection on the basis. The vector
    has collapsed if the second pass removes more than half of what the first one left. It then lies
    in the span up to rounding, and the remainder is noise.

    Two passes give orthogonality up to rounding unless the second still removes much, which happens
    only when the first left nothing but rounding errors (Parlett, The Symmetric Eigenvalue Problem,
    section 6.9: twice is enough). The test needs no machine epsilon, so it works for vectors of any
    precision.
    """
    x = remove_all(x)
    before = norm(x, space=space)
    x = remove_all(x)
    length = norm(x, space=space)
    return x, length, length < 0.5 * before


def rounding_unit(unit: V, *, space: InnerProductSpace[V]) -> Scalar:
    """Return the relative rounding error of arithmetic on vectors like the unit vector `unit`.

    Scalars may be wider than the entries of the vectors, whose dtype the core cannot ask for, so
    the error is measured: ``unit - 3 * ((unit + unit / 3) - unit)`` is zero but for the rounding of
    the sum. The result is at least the machine epsilon of the scalars.
    """
    shifted = space.add_scale(unit, 1 / 3, unit)
    third = space.add_scale(shifted, -1.0, unit)
    defect = norm(space.add_scale(unit, -3.0, third), space=space)
    xp = namespace(defect)
    eps = float(xp.finfo(defect.dtype).eps)
    return xp.where(defect < eps, xp.zeros_like(defect) + eps, defect)
