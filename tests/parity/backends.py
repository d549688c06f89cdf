"""The array frameworks under test, behind one small surface."""

from collections.abc import Callable
from typing import Any, NamedTuple

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import torch

DTYPES = ("float32", "float64")


def _unchanged(function):
    return function


class Backend(NamedTuple):
    """How to make an array, and how this framework wants a pure function to be run."""

    asarray: Callable[[Any, str], Any]
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = _unchanged


BACKENDS = {
    "numpy": Backend(lambda value, dtype: np.asarray(value, dtype=dtype)),
    "strict": Backend(
        lambda value, dtype: array_api_strict.asarray(
            np.asarray(value, dtype=dtype), dtype=getattr(array_api_strict, dtype)
        )
    ),
    "jax": Backend(lambda value, dtype: jnp.asarray(value, dtype=dtype), jax.jit),
    "torch": Backend(
        lambda value, dtype: torch.as_tensor(np.array(value, dtype=dtype)),
    ),
}
