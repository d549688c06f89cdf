"""The array API in functions that HIPS autograd can differentiate; the module is the namespace.

A name is looked up here, then in ``autograd.numpy``, which uses NumPy's names and arguments, then
in ``array_api_compat.numpy`` for functions without a derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import array_api_compat.numpy
import autograd.numpy as anp
import numpy as np
from autograd.extend import defvjp, primitive

Array = Any

_NUMPY_NAMES = {
    "acos": "arccos",
    "acosh": "arccosh",
    "asin": "arcsin",
    "asinh": "arcsinh",
    "atan": "arctan",
    "atan2": "arctan2",
    "atanh": "arctanh",
    "permute_dims": "transpose",
    "pow": "power",
}


def __getattr__(name: str) -> Any:
    for module in (anp, array_api_compat.numpy):
        if hasattr(module, _NUMPY_NAMES.get(name, name)):
            return getattr(module, _NUMPY_NAMES.get(name, name))
    msg = (
        f"the numpy backend has no function {name!r}: autograd.numpy has none either; write the "
        "task with other functions of the array API, or run it under another backend"
    )
    raise AttributeError(msg)


def astype(x: Array, dtype: Any, /, *, copy: bool = True) -> Array:
    """Return x in another dtype."""
    return x.astype(dtype, copy=copy)


def concat(arrays: Sequence[Array], /, *, axis: int | None = 0) -> Array:
    """Join arrays along an axis; None flattens them first."""
    if axis is None:
        return anp.concatenate([anp.ravel(x) for x in arrays])
    return anp.concatenate(arrays, axis=axis)


def matrix_transpose(x: Array, /) -> Array:
    """Swap the last two axes."""
    return anp.swapaxes(x, -1, -2)


def std(x: Array, /, *, axis: Any = None, correction: float = 0.0, keepdims: bool = False) -> Array:
    """Return the standard deviation, with ``N - correction`` in the denominator."""
    return anp.std(x, axis=axis, ddof=correction, keepdims=keepdims)


def take(x: Array, indices: Array, /, *, axis: int = 0) -> Array:
    """Return the elements at the given indices along an axis."""
    return x[(slice(None),) * (axis % anp.ndim(x)) + (indices,)]


def _tanh(x: Array, /) -> Array:
    return np.tanh(x)


# The rule of autograd.numpy divides by the square of the hyperbolic cosine, which overflows for x
# above 355 and makes the second derivative NaN. Wrapping np.tanh leaves that rule in place.
tanh = primitive(_tanh)
defvjp(tanh, lambda ans, _: lambda g: g * (1 - ans * ans))


def var(x: Array, /, *, axis: Any = None, correction: float = 0.0, keepdims: bool = False) -> Array:
    """Return the variance, with ``N - correction`` in the denominator."""
    return anp.var(x, axis=axis, ddof=correction, keepdims=keepdims)
