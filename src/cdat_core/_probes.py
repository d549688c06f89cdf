"""The check of random vectors handed to an estimator."""

from __future__ import annotations

from collections.abc import Sequence

from cdat_core._types import V


def checked_probes(probes: Sequence[V], *, at_least: int) -> Sequence[V]:
    """Require a sequence of `at_least` vectors; its length is static.

    A single array is refused: only the caller knows whether its rows or its entries are the
    vectors.
    """
    if not isinstance(probes, Sequence):
        msg = (
            f"probes must be a list or tuple of vectors, got {type(probes).__name__}; "
            "make a list of the rows of an array with list(array)"
        )
        raise TypeError(msg)
    if len(probes) < at_least:
        plural = "s" if at_least > 1 else ""
        msg = f"probes must hold at least {at_least} vector{plural}, got {len(probes)}"
        raise ValueError(msg)
    return probes
