"""The few array-API helpers that every part of the core shares.

Nothing here knows a framework: the namespace always comes from the arguments.
"""

from __future__ import annotations

from typing import Any

import array_api_compat

from cdat_core._types import Scalar


def namespace(*arrays: Any) -> Any:
    """Return the array-API namespace of the given arrays.

    Parameters
    ----------
    *arrays : array or None
        Arrays of one framework; None is ignored.

    Returns
    -------
    module
        The namespace, wrapped by array-api-compat where the framework needs it.

    Raises
    ------
    TypeError
        If no array is given, or arrays of several frameworks.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core.extend import namespace
    >>> xp = namespace(np.asarray(1.0), None)
    >>> float(xp.sqrt(np.asarray(4.0)))
    2.0
    """
    return array_api_compat.array_namespace(*(a for a in arrays if a is not None))


def require_floating(like: Scalar, argument: str) -> None:
    """Require an array of a real floating dtype.

    Parameters
    ----------
    like : Scalar
        The array to check.
    argument : str
        Its name, for the message.

    Raises
    ------
    TypeError
        If the dtype of `like` is not real floating.
    """
    xp = namespace(like)
    if not xp.isdtype(like.dtype, "real floating"):
        msg = (
            f"{argument} must have a real floating dtype, got {like.dtype}; "
            "pass a 0-d array of the dtype in which the scalars should be kept"
        )
        raise TypeError(msg)


def cast(value: Any, like: Scalar) -> Any:
    """Return `value` in the dtype of `like`.

    Use it wherever a hyperparameter or a measurement meets the scalars of a state, whose dtype must
    not change.

    Parameters
    ----------
    value : array or float
        An array of any dtype. A Python number is returned unchanged, because it takes on the dtype
        of what it meets.
    like : Scalar
        An array of the wanted dtype.

    Returns
    -------
    array or float

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core.extend import cast
    >>> like = np.asarray(0.0, dtype=np.float32)
    >>> cast(np.asarray(0.5), like).dtype.name, cast(0.5, like)
    ('float32', 0.5)
    """
    if not hasattr(value, "dtype") or value.dtype == like.dtype:
        return value
    return namespace(value).astype(value, like.dtype)


def filled(like: Scalar, value: Any) -> Scalar:
    """Return an array that holds `value`, in the shape, dtype and device of `like`.

    Parameters
    ----------
    like : Scalar
        The array to copy shape, dtype and device from.
    value : array or float
        Broadcast to the shape of `like`; it may be traced.

    Returns
    -------
    Scalar

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core.extend import filled
    >>> filled(np.zeros(2, dtype=np.float32), 0.5)
    array([0.5, 0.5], dtype=float32)
    """
    xp = namespace(like)
    return xp.zeros_like(like) + cast(value, like)


def counter(like: Scalar) -> Scalar:
    """Return a counter at zero.

    Parameters
    ----------
    like : Scalar
        The array to copy namespace, shape and device from.

    Returns
    -------
    Scalar
        Zero, int32.
    """
    xp = namespace(like)
    return xp.zeros_like(like, dtype=xp.int32)


def increment(count: Scalar, condition: Scalar) -> Scalar:
    """Return `count` plus one where `condition` holds.

    Parameters
    ----------
    count : Scalar
        A counter.
    condition : Scalar
        Boolean.

    Returns
    -------
    Scalar
        In the dtype of `count`.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core.extend import counter, increment
    >>> count = counter(np.asarray(0.0))
    >>> int(increment(increment(count, np.asarray(True)), np.asarray(False)))
    1
    """
    xp = namespace(count)
    return count + xp.astype(condition, count.dtype)


def sqrt_nonnegative(square: Scalar) -> Scalar:
    """Return the square root of a sum of squares, with 0 where rounding left less than zero.

    NaN stays NaN.
    """
    xp = namespace(square)
    return xp.sqrt(xp.where(square < 0, xp.zeros_like(square), square))


def safe_reciprocal(x: Scalar) -> Scalar:
    """Return 1/x, and 0 where x is 0 or not finite, or where 1/x would not be finite.

    Parameters
    ----------
    x : Scalar
        An array of a real floating dtype.

    Returns
    -------
    Scalar
        Finite in any case.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core.extend import safe_reciprocal
    >>> safe_reciprocal(np.asarray([4.0, 0.0, np.inf, np.nan])).tolist()
    [0.25, 0.0, 0.0, 0.0]
    """
    xp = namespace(x)
    tiny = float(xp.finfo(x.dtype).smallest_normal)
    usable = xp.isfinite(x) & (xp.abs(x) > tiny)
    return xp.where(usable, 1 / xp.where(usable, x, xp.ones_like(x)), xp.zeros_like(x))
