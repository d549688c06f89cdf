"""Checks of inner-product spaces, Hessian-vector products and oracles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from cdat_core._arrays import namespace, sqrt_nonnegative
from cdat_core._curvature import directional_curvature
from cdat_core._types import HessianVectorProduct, InnerProductSpace, Scalar, V
from cdat_core.testing._assertions import number, require, require_close


def check_space(
    space: InnerProductSpace[V], vectors: Sequence[V], *, rtol: float | None = None
) -> None:
    """Check that a space has a real inner product and two linear operations.

    The laws: `vdot` returns a real floating 0-d array and is symmetric, positive and linear;
    `scale` and `add_scale` are linear, accept Python floats and 0-d arrays, propagate NaN, and do
    not modify their arguments.

    Parameters
    ----------
    space : InnerProductSpace
        The space to check.
    vectors : sequence of V
        At least three vectors of the same layout, none of them zero.
    rtol : float, optional
        Allowed error, relative to the product of the norms; by default 1000 times the machine
        epsilon of the dtype of `vdot`. Vectors in half precision need a larger one.

    Raises
    ------
    AssertionError
        If a law fails; the message names it, with both sides.
    ValueError
        If there are fewer than three vectors.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import ArraySpace
    >>> from cdat_core.testing import check_space
    >>> check_space(ArraySpace(), [np.arange(1.0, 4.0), np.ones(3), np.array([2.0, -1.0, 0.0])])
    """
    _at_least(vectors, 3)
    x, y, z = vectors[:3]
    tolerance = _tolerance(space, x, rtol)
    before = [_norm(space, v) for v in vectors]

    def close(law: str, left: Any, right: Any, *scale: V) -> None:
        require_close(
            f"space: {law}", left, right, math.prod(_norm(space, v) for v in scale), tolerance
        )

    for v, length in zip(vectors, before, strict=True):
        require(
            math.isfinite(length) and length > 0,
            f"space: vdot(x, x) must be positive and finite for a vector that is not zero, "
            f"got {length**2!r}",
        )
        close("vdot(-x, x) = -vdot(x, x)", space.vdot(space.scale(-1.0, v), v), -(length**2), v, v)
    close("vdot(x, y) = vdot(y, x)", space.vdot(x, y), space.vdot(y, x), x, y)
    multipliers = {"a Python float": 0.75, "a 0-d array": _like(space, x, 0.75)}
    for kind, a in multipliers.items():
        close(
            f"vdot(scale(a, x), y) = a vdot(x, y) with a as {kind}",
            space.vdot(space.scale(a, x), y),
            0.75 * number(space.vdot(x, y)),
            x,
            y,
        )
        close(
            f"vdot(add_scale(x, a, y), z) = vdot(x, z) + a vdot(y, z) with a as {kind}",
            space.vdot(space.add_scale(x, a, y), z),
            number(space.vdot(x, z)) + 0.75 * number(space.vdot(y, z)),
            space.add_scale(x, 1.0, y),
            z,
        )
    zero = space.scale(0.0, x)
    close("scale(0, x) is the zero vector", space.vdot(zero, zero), 0.0, x, x)
    difference = space.add_scale(x, -1.0, x)
    close("add_scale(x, -1, x) is zero", space.vdot(difference, difference), 0.0, x, x)
    for name, spoilt in (
        ("scale", space.scale(math.nan, x)),
        ("add_scale", space.add_scale(x, math.nan, y)),
    ):
        require(
            math.isnan(number(space.vdot(spoilt, spoilt))),
            f"space: {name} with the multiplier NaN must give NaN: a step that is not finite "
            "must be detected",
        )
    after = [_norm(space, v) for v in vectors]
    require(
        before == after,
        f"space: the operations changed their arguments: norms {before} became {after}",
    )


def check_hvp(
    hvp: HessianVectorProduct[V],
    vectors: Sequence[V],
    *,
    space: InnerProductSpace[V],
    rtol: float | None = None,
) -> None:
    """Check that a Hessian-vector product is a linear, symmetric, repeatable operator.

    Parameters
    ----------
    hvp : HessianVectorProduct
        The product to check.
    vectors : sequence of V
        At least two vectors, none of them zero.
    space : InnerProductSpace
        Their inner product; check it first with `check_space`.
    rtol : float, optional
        Allowed error, relative to the size of the terms; by default 1000 times the machine epsilon
        of the dtype of `vdot`. A product by finite differences needs a larger one.

    Raises
    ------
    AssertionError
        If a law fails; the message names it, with both sides.
    ValueError
        If there are fewer than two vectors.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import ArraySpace
    >>> from cdat_core.testing import check_hvp
    >>> vectors = [np.array([1.0, 2.0]), np.array([3.0, -1.0])]
    >>> check_hvp(lambda v: v[::-1], vectors, space=ArraySpace())
    >>> check_hvp(lambda v: np.array([v[1], 0.0]), vectors, space=ArraySpace())
    Traceback (most recent call last):
        ...
    AssertionError: hvp: <x, H y> = <y, H x> fails: -1.0 is not 6.0 (error 7, tolerance 1.4e-12)
    """
    _at_least(vectors, 2)
    tolerance = _tolerance(space, vectors[0], rtol)
    before = [_norm(space, v) for v in vectors]
    products = [hvp(v) for v in vectors]
    for v, product in zip(vectors, products, strict=True):
        try:
            space.add_scale(v, 1.0, product)
            number(space.vdot(v, product))
        except Exception as error:
            msg = f"hvp: H v must be a vector of the layout of v, but the space refuses it: {error}"
            raise AssertionError(msg) from error
    largest = max(_norm(space, p) / n for p, n in zip(products, before, strict=True))
    x, y = vectors[:2]
    hx, hy = products[:2]
    scale = _norm(space, x) * _norm(space, y) * largest

    require_close(
        "hvp: <x, H y> = <y, H x>", space.vdot(x, hy), space.vdot(y, hx), scale, tolerance
    )
    again = space.add_scale(hvp(x), -1.0, hx)
    require_close("hvp: H x is the same each time", _norm(space, again), 0.0, scale, tolerance)
    zero = hvp(space.scale(0.0, x))
    require_close("hvp: H 0 = 0", _norm(space, zero), 0.0, scale, tolerance)
    for a in (-2.0, 1e-3):
        together = hvp(space.add_scale(x, a, y))
        rest = space.add_scale(space.add_scale(together, -1.0, hx), -a, hy)
        size = largest * (_norm(space, x) + abs(a) * _norm(space, y))
        law = f"hvp: H(x + {a:g} y) = H x + {a:g} H y"
        require_close(law, _norm(space, rest), 0.0, size, tolerance)
    after = [_norm(space, v) for v in vectors]
    require(before == after, f"hvp: it changed its argument: norms {before} became {after}")


def check_oracle(
    value_fn: Callable[[V], Scalar],
    grad_fn: Callable[[V], V],
    hvp_fn: Callable[[V], HessianVectorProduct[V]],
    params: V,
    direction: V,
    *,
    space: InnerProductSpace[V],
    rtol: float | None = None,
) -> None:
    """Check slope and curvature along a direction against differences of the loss and its gradient.

    Central differences with several steps are tried, and the best one counts, because the best step
    is not known in advance.

    Parameters
    ----------
    value_fn, grad_fn, hvp_fn : callable
        ``params -> loss`` (0-d), ``params -> gradient`` and ``params -> (v -> H v)``, all of the
        same loss on the same batch, smooth near `params`.
    params, direction : V
        The point w and the direction u, not zero.
    space : InnerProductSpace
        The inner product of the vectors.
    rtol : float, optional
        Allowed error, relative to the larger side; by default 100 times the machine epsilon of the
        dtype of `vdot` to the power 2/3, which is what a central difference can reach.

    Raises
    ------
    AssertionError
        If slope or curvature disagree with their differences.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import ArraySpace
    >>> from cdat_core.testing import check_oracle
    >>> check_oracle(
    ...     lambda w: np.sum(w**4), lambda w: 4 * w**3, lambda w: lambda v: 12 * w**2 * v,
    ...     np.array([1.0, 2.0]), np.array([-1.0, 1.0]), space=ArraySpace(),
    ... )
    """
    eps = _eps(space, direction)
    tolerance = 100 * eps ** (2 / 3) if rtol is None else rtol
    length = _norm(space, direction)
    require(length > 0, "oracle: direction must not be zero")
    slope = number(space.vdot(grad_fn(params), direction))
    curvature = number(directional_curvature(hvp_fn(params), direction, space=space))

    def differences(fn: Callable[[V], Any]) -> list[float]:
        found = []
        for exponent in (0.25, 0.33, 0.4, 0.5):
            h = max(_norm(space, params), 1.0) / length * eps**exponent
            ahead, behind = (fn(space.add_scale(params, s * h, direction)) for s in (1.0, -1.0))
            found.append((number(ahead) - number(behind)) / (2 * h))
        return found

    by_value = differences(value_fn)
    by_grad = differences(lambda w: space.vdot(grad_fn(w), direction))
    for law, exact, candidates in (
        ("<g, u> is the derivative of the loss along u", slope, by_value),
        ("<u, H u> is the derivative of <g, u> along u", curvature, by_grad),
    ):
        best = min(candidates, key=lambda c: abs(c - exact))
        require_close(f"oracle: {law}", exact, best, max(abs(exact), abs(best)), tolerance)


def _norm(space: InnerProductSpace[V], x: V) -> float:
    return number(sqrt_nonnegative(space.vdot(x, x)))


def _like(space: InnerProductSpace[V], x: V, number: float) -> Scalar:
    """Return a 0-d array like those that `vdot` returns."""
    return space.vdot(x, x) * 0 + number


def _eps(space: InnerProductSpace[V], x: V) -> float:
    """Return the machine epsilon of the result of `vdot`; check that it is a scalar."""
    product = space.vdot(x, x)
    try:
        xp = namespace(product)
        real = xp.isdtype(product.dtype, "real floating")
    except (AttributeError, TypeError) as error:
        msg = f"space: vdot must return a 0-d array of an array-API namespace, got {product!r}"
        raise AssertionError(msg) from error
    require(real, f"space: vdot must return a real floating dtype, got {product.dtype}")
    shape = tuple(product.shape)
    require(shape == (), f"space: vdot must return a 0-d array, got the shape {shape}")
    return float(xp.finfo(product.dtype).eps)


def _tolerance(space: InnerProductSpace[V], x: V, rtol: float | None) -> float:
    eps = _eps(space, x)
    return 1000 * eps if rtol is None else rtol


def _at_least(vectors: Sequence[Any], number: int) -> None:
    if len(vectors) < number:
        msg = f"vectors must hold at least {number} vectors, got {len(vectors)}"
        raise ValueError(msg)
