"""Helpers of the checks: scalars as Python floats, and errors that name the law and both sides."""

from __future__ import annotations

from typing import Any


def number(x: Any) -> float:
    """Return a scalar of any framework as a Python float."""
    return float(x)


def require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def require_close(law: str, left: Any, right: Any, scale: float, rtol: float) -> None:
    """Require two numbers to agree up to `rtol` times the size of the terms behind them."""
    first, second = number(left), number(right)
    error, allowed = abs(first - second), rtol * scale
    require(
        error <= allowed,
        f"{law} fails: {first!r} is not {second!r} (error {error:.3g}, tolerance {allowed:.3g})",
    )
