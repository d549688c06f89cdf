"""The few array-API helpers that every part of the core shares.

Nothing here knows a framework: the namespace always comes from the arrays at hand.
"""

from __future__ import annotations

from typing import Any

import array_api_compat

from cdat_core._types import Scalar


def namespace(*arrays: Any) -> Any:
    """Return the array-API namespace of the given arrays; ``None`` entries are ignored."""
    return array_api_compat.array_namespace(*(a for a in arrays if a is not None))


def require_floating(like: Scalar, argument: str) -> None:
    """Raise a TypeError unless `like` is an array of a real floating dtype."""
    xp = namespace(like)
    if not xp.isdtype(like.dtype, "real floating"):
        msg = (
            f"{argument} must have a real floating dtype, got {like.dtype}; "
            "pass a 0-d array of the dtype in which the scalars should be kept"
        )
        raise TypeError(msg)


def cast(value: Any, like: Scalar) -> Any:
    """Return `value` in the dtype of `like`; a Python number is returned unchanged."""
    if not hasattr(value, "dtype") or value.dtype == like.dtype:
        return value
    return namespace(value).astype(value, like.dtype)


def filled(like: Scalar, value: Any) -> Scalar:
    """Return an array shaped like `like` that holds `value` in the dtype and device of `like`."""
    xp = namespace(like)
    return xp.zeros_like(like) + cast(value, like)


def counter(like: Scalar) -> Scalar:
    """Return an int32 zero in the namespace, shape and device of `like`."""
    xp = namespace(like)
    return xp.zeros_like(like, dtype=xp.int32)


def increment(count: Scalar, condition: Scalar) -> Scalar:
    """Return `count` plus one where `condition` holds."""
    xp = namespace(count)
    return count + xp.astype(condition, count.dtype)


def sqrt_nonnegative(square: Scalar) -> Scalar:
    """Return the square root of a sum of squares, clipping what rounding left below zero.

    NaN stays NaN.
    """
    xp = namespace(square)
    return xp.sqrt(xp.where(square < 0, xp.zeros_like(square), square))


def safe_reciprocal(x: Scalar) -> Scalar:
    """Return 1/x, and 0 where x is 0 or its reciprocal would not be finite."""
    xp = namespace(x)
    tiny = float(xp.finfo(x.dtype).smallest_normal)
    usable = xp.isfinite(x) & (xp.abs(x) > tiny)
    return xp.where(usable, 1 / xp.where(usable, x, xp.ones_like(x)), xp.zeros_like(x))
