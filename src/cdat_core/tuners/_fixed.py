"""Tuners that ignore the loss: constants and schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cdat_core import _validation
from cdat_core._arrays import filled, namespace
from cdat_core._types import Measurement, Scalar
from cdat_core.tuners._base import RateState, Tuner, from_rule
from cdat_core.tuners._guards import Guards


def scheduled(schedule: Callable[[Scalar], Scalar]) -> Tuner[RateState]:
    """Follow a schedule of the step number.

    Parameters
    ----------
    schedule : callable
        ``step -> learning_rate``. The step, from 0, comes as a 0-d array in the dtype of the state,
        so array functions, comparisons and Optax schedules work on it. A rate that is not finite
        counts as a skip and does not advance the step; a negative one becomes 0.

    Returns
    -------
    Tuner
        It needs nothing; a field that is given must still be finite.

    Raises
    ------
    TypeError
        If `schedule` is not callable.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import Measurement, tuners
    >>> tuner = tuners.scheduled(lambda step: 0.1 / (1 + step))
    >>> state = tuner.init(np.asarray(0.0))
    >>> for _ in range(2):
    ...     rate, state = tuner.update(Measurement(None, None, None), state)
    >>> float(rate)
    0.05
    """
    if not callable(schedule):
        msg = f"schedule must be callable (step -> learning rate), got {schedule!r}"
        raise TypeError(msg)

    def rule(measurement: Measurement, state: RateState) -> tuple[Scalar, RateState]:
        del measurement
        step = namespace(state.rate).astype(state.step, state.rate.dtype)
        return filled(state.rate, schedule(step)), state._replace(step=state.step + 1)

    return from_rule(Guards().start_state, rule, needs=())


def constant(learning_rate: Any) -> Tuner[RateState]:
    """Return the same rate at every step.

    Parameters
    ----------
    learning_rate : float
        The rate, >= 0.

    Returns
    -------
    Tuner
        It needs nothing; a field that is given must still be finite.

    Raises
    ------
    ValueError
        If `learning_rate` is negative or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import Measurement, tuners
    >>> tuner = tuners.constant(0.1)
    >>> rate, _ = tuner.update(Measurement(None, None, None), tuner.init(np.asarray(0.0)))
    >>> float(rate)
    0.1
    """
    learning_rate = _validation.nonnegative("learning_rate", learning_rate)
    return scheduled(lambda _: learning_rate)
