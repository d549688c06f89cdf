"""Checks of hyperparameters, as ``check(name, value)``.

Each check returns the value to use. A Python number is checked and comes back as a float. Of an
array (an array of hyperparameters, or a value traced by ``jax.jit`` or ``jax.vmap``) only the dtype
is checked, because its value is not known when the tuner is built.

Each check raises ValueError if a number is out of its range, and TypeError if the value is neither
a real number nor an array of real numbers. The message gives the name and the value.

Examples
--------
>>> from cdat_core.extend import validation
>>> validation.fraction("decay", 0)
0.0
>>> validation.fraction("decay", 1.0)
Traceback (most recent call last):
    ...
ValueError: decay must be in [0, 1), got 1.0
"""

from cdat_core._validation import (
    at_least_one,
    count,
    finite,
    fraction,
    nonnegative,
    open_fraction,
    optional,
    positive,
)

__all__ = [
    "at_least_one",
    "count",
    "finite",
    "fraction",
    "nonnegative",
    "open_fraction",
    "optional",
    "positive",
]
