"""Checks of hyperparameters; `cdat_core.extend.validation` makes them public."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

from cdat_core._arrays import namespace

Hyperparameter = Any


def _checked(
    name: str, value: Any, holds: Callable[[float], bool], requirement: str
) -> Hyperparameter:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an integer beyond the largest float
            number = math.inf
        if not (math.isfinite(number) and holds(number)):
            msg = f"{name} must be {requirement}, got {value!r}"
            raise ValueError(msg)
        return number
    if hasattr(value, "dtype") and namespace(value).isdtype(
        value.dtype, ("integral", "real floating")
    ):
        return value
    msg = f"{name} must be a real number or a 0-d array, got {value!r}"
    raise TypeError(msg)


def finite(name: str, value: Any) -> Hyperparameter:
    """Require a finite number."""
    return _checked(name, value, lambda _: True, "a finite number")


def positive(name: str, value: Any) -> Hyperparameter:
    """Require a finite number > 0."""
    return _checked(name, value, lambda x: x > 0, "a finite number > 0")


def nonnegative(name: str, value: Any) -> Hyperparameter:
    """Require a finite number >= 0."""
    return _checked(name, value, lambda x: x >= 0, "a finite number >= 0")


def at_least_one(name: str, value: Any) -> Hyperparameter:
    """Require a finite number >= 1."""
    return _checked(name, value, lambda x: x >= 1, "a finite number >= 1")


def fraction(name: str, value: Any) -> Hyperparameter:
    """Require a number in the half-open interval [0, 1)."""
    return _checked(name, value, lambda x: 0 <= x < 1, "in [0, 1)")


def open_fraction(name: str, value: Any) -> Hyperparameter:
    """Require a number in the open interval (0, 1)."""
    return _checked(name, value, lambda x: 0 < x < 1, "in (0, 1)")


def optional(
    check: Callable[[str, Any], Hyperparameter], name: str, value: Any
) -> Hyperparameter | None:
    """Apply `check`, unless the value is None: ``optional(positive, "bound", bound)``."""
    return None if value is None else check(name, value)


def count(name: str, value: Any, *, minimum: int = 1) -> int:
    """Require a Python integer >= `minimum`.

    An array is refused: the length of a computation must be known before it is traced.
    """
    msg = f"{name} must be an integer >= {minimum}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(msg)
    if value < minimum:
        raise ValueError(msg)
    return int(value)


def whole(name: str, value: Any, *, minimum: int = 1) -> Hyperparameter:
    """Require a Python integer >= `minimum`, or an array of integers, which may be traced."""
    if hasattr(value, "dtype") and namespace(value).isdtype(value.dtype, "integral"):
        return value
    return count(name, value, minimum=minimum)
