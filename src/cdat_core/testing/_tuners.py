"""Checks of tuners."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from cdat_core._arrays import namespace
from cdat_core._types import Measurement, Scalar
from cdat_core.testing._assertions import number, require, require_close
from cdat_core.tuners import Tuner


def check_tuner(
    tuner: Tuner[Any],
    like: Scalar,
    *,
    loss_scale_invariant: bool = True,
    direction_scale_inverse: bool = True,
) -> None:
    """Check the laws of a tuner on the scalars of a framework.

    The laws: rates are finite and not negative; the state keeps its type, shapes and dtypes; the
    arguments are not modified; a measurement that is not finite gives rate 0, leaves the averages
    unchanged and is counted; and, unless switched off, scaling the loss does not change the rate
    and scaling the direction by c scales the rate by 1/c. A tuner that observes the loss between
    measurements is checked there too.

    Parameters
    ----------
    tuner : Tuner
        The tuner to check.
    like : Scalar
        A real floating 0-d array of the framework; see ``Tuner.init``.
    loss_scale_invariant, direction_scale_inverse : bool
        Whether these two laws are meant to hold. They do not for eps > 0, absolute guards, fixed
        rates and tuners on the sharpness.

    Raises
    ------
    AssertionError
        If a law fails; the message names it.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import tuners
    >>> from cdat_core.testing import check_tuner
    >>> check_tuner(tuners.cdat(), np.asarray(0.0, dtype=np.float32))
    """
    history = [(3.0, -1.0, 2.0), (2.0, -0.5, -1.0), (2.5, 0.25, 0.5), (2.0, -2.0, 1.0)]
    eps = float(namespace(like).finfo(like.dtype).eps)
    plain = _follow(tuner, like, history)
    for step, rate in enumerate(plain):
        require(
            0 <= rate < math.inf,
            f"tuner: rates must be finite and not negative, got {rate!r} in step {step}",
        )
    tolerance = 100 * eps
    if loss_scale_invariant:
        scaled = _follow(tuner, like, [(7 * f, 7 * s, 7 * c) for f, s, c in history])
        for left, right in zip(scaled, plain, strict=True):
            require_close("tuner: scaling the loss leaves the rate", left, right, right, tolerance)
    if direction_scale_inverse:
        scaled = _follow(tuner, like, [(f, 3 * s, 9 * c) for f, s, c in history])
        for left, right in zip(scaled, plain, strict=True):
            law = "tuner: scaling the direction by 3 scales the rate by 1/3"
            require_close(law, left, right / 3, right, tolerance)
    for bad in (math.nan, math.inf, -math.inf):
        for field in sorted(tuner.needs):
            _check_skip(tuner, like, history[0], field, bad)
        if tuner.observe is not None:
            _check_skip(tuner, like, history[0], None, bad)


def _follow(tuner: Tuner[Any], like: Scalar, history: Sequence[tuple[float, ...]]) -> list[float]:
    """Return the rates along measurements; check that updates are pure and keep the dtypes.

    If the tuner observes the loss, every measurement is followed by an observation.
    """
    state, rates = tuner.init(like), []
    for numbers in history:
        measurement = _measurement(like, numbers)
        rate, state = _applied("update", tuner.update, measurement, state, like)
        rates.append(rate)
        if tuner.observe is not None:
            rate, state = _applied("observe", tuner.observe, measurement.value, state, like)
            rates.append(rate)
    return rates


def _applied(
    name: str, function: Callable[..., Any], seen: Any, state: Any, like: Scalar
) -> tuple[float, Any]:
    """Return rate and state after one call; check that it is pure and keeps the dtypes."""
    before = [number(field) for field in _fields(state).values()]
    rate, following = function(seen, state)
    again, _ = function(seen, state)
    same = before == [number(field) for field in _fields(state).values()]
    require(
        number(rate) == number(again) and same,
        f"tuner: {name} must be pure: the same {'measurement' if name == 'update' else 'loss'} and "
        "state gave another rate, or the state was changed in place",
    )
    wanted, found = (
        [(name, field.dtype, tuple(field.shape)) for name, field in _fields(s).items()]
        for s in (state, following)
    )
    require(
        type(following) is type(state) and found == wanted,
        f"tuner: the state must keep its type, dtypes and shapes: {wanted} became {found}",
    )
    require(
        rate.dtype == like.dtype,
        f"tuner: the rate must have the dtype of the state, got {rate.dtype}",
    )
    return number(rate), following


def _fields(state: Any) -> dict[str, Scalar]:
    """Return the scalars of a state by name; those of a state inside it as ``outer.inner``."""
    fields = {}
    for name, field in state._asdict().items():
        if hasattr(field, "_asdict"):
            fields.update({f"{name}.{inner}": x for inner, x in _fields(field).items()})
        else:
            fields[name] = field
    return fields


def _check_skip(
    tuner: Tuner[Any], like: Scalar, numbers: tuple[float, ...], field: str | None, bad: float
) -> None:
    """Check the response to one bad field after a good measurement; None is the observed loss."""
    good = _measurement(like, numbers)
    _, state = tuner.update(good, tuner.init(like))
    if field is None:
        assert tuner.observe is not None
        rate, after = tuner.observe(like * 0 + bad, state)
    else:
        rate, after = tuner.update(good._replace(**{field: like * 0 + bad}), state)
    law = f"tuner: a {field or 'observed loss'} of {bad!r} must"
    require(number(rate) == 0, f"{law} give the rate 0, got {number(rate)!r}")
    counted = number(after.skipped) - number(state.skipped)
    require(counted == 1, f"{law} add 1 to skipped, it added {counted:g}")
    old = _fields(state)
    for name, new in _fields(after).items():
        same = number(new) == number(old[name])
        # Around another tuner, as in a cooldown, a skipped step is a step of the run.
        counts = name.endswith("skipped") or (name == "step" and "tuner_state.rate" in old)
        require(same or counts, f"{law} leave state.{name}")


def _measurement(like: Scalar, numbers: tuple[float, ...]) -> Measurement:
    value, slope, curvature = numbers
    return Measurement(*(like * 0 + number for number in (value, slope, curvature, abs(curvature))))
