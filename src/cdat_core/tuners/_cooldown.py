"""The end of a run, for any tuner: a cooldown of the rate, or an average of the weights."""

from __future__ import annotations

from typing import Any, NamedTuple

from cdat_core import _validation
from cdat_core._arrays import cast, counter, namespace
from cdat_core._types import Measurement, Scalar
from cdat_core.tuners._base import StateT, Tuner, observe_or_hold

_MEMORY = 9
"""The average remembers about the last ninth of the steps."""


class CooldownState(NamedTuple):
    """State of `with_cooldown`; all fields but `tuner_state` are scalars.

    Attributes
    ----------
    rate : Scalar
        The last positive rate of the tuner, before the factor of the cooldown.
    step : Scalar
        Steps seen, int32. Skipped steps count, so the cooldown ends on time.
    skipped : Scalar
        Steps skipped because something was not finite, int32.
    tuner_state : NamedTuple
        The state of the tuner.
    """

    rate: Scalar
    step: Scalar
    skipped: Scalar
    tuner_state: Any


def with_cooldown(
    tuner: Tuner[StateT], total_steps: Any, *, fraction: Any = 0.3
) -> Tuner[CooldownState]:
    """Let the rate of a tuner fall to zero, linearly, over the last part of a run.

    In the cooldown nothing is measured, so it costs what plain steps cost. The tuner's rate may
    fall there but not rise: a tuner that observes the loss can still lower it. Schedules of this
    shape, with a long constant part, come close to a cosine [Hagele2024]_. With a momentum or a
    noisy gradient the last steps at a small rate average the noise away.

    Parameters
    ----------
    tuner : Tuner
        Any tuner.
    total_steps : int
        The length of the run, >= 1, skipped steps included. From then on the rate is 0. It may be a
        traced array. A state continues under another `total_steps`: the cooldown moves.
    fraction : float
        The part of the run that the cooldown takes, in [0, 1).

    Returns
    -------
    Tuner

    Raises
    ------
    TypeError, ValueError
        If `total_steps` is not an integer >= 1, or `fraction` is out of its range.

    References
    ----------
    .. [Hagele2024] A. Hagele, E. Bakouch, A. Kosson, L. Ben Allal, L. Von Werra, M. Jaggi,
       "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", NeurIPS 2024,
       arXiv:2405.18392.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import Measurement, tuners
    >>> tuner = tuners.with_cooldown(tuners.constant(1.0), 10, fraction=0.4)
    >>> state, rates = tuner.init(np.asarray(0.0)), []
    >>> for _ in range(11):
    ...     rate, state = tuner.update(Measurement(None, None, None), state)
    ...     rates.append(float(rate))
    >>> rates
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    total_steps = _validation.whole("total_steps", total_steps)
    fraction = _validation.fraction("fraction", fraction)
    start = total_steps * (1 - fraction)

    def init(like: Scalar) -> CooldownState:
        state = tuner.init(like)
        return CooldownState(state.rate, counter(like), counter(like), state)

    def finish(
        rate: Scalar, tuner_state: StateT, state: CooldownState
    ) -> tuple[Scalar, CooldownState]:
        xp = namespace(state.rate)
        zero, one = xp.zeros_like(rate), xp.ones_like(rate)
        left = xp.astype(total_steps - state.step, rate.dtype)
        length = cast(total_steps * fraction, rate) + zero
        factor = xp.where(left < length, left / xp.where(length > 0, length, one), one)
        factor = xp.where(left > 0, factor, zero)
        rises = (rate > state.rate) & (state.rate > 0)
        rate = xp.where((left <= length) & rises, state.rate, rate)
        return factor * rate, CooldownState(
            xp.where(rate > 0, rate, state.rate), state.step + 1, tuner_state.skipped, tuner_state
        )

    def update(measurement: Measurement, state: CooldownState) -> tuple[Scalar, CooldownState]:
        return finish(*tuner.update(measurement, state.tuner_state), state)

    def observe(value: Scalar, state: CooldownState) -> tuple[Scalar, CooldownState]:
        return finish(*observe_or_hold(tuner, value, state.tuner_state), state)

    def measures(step: Any) -> Any:
        before = step < start
        return before if tuner.measures is None else before & tuner.measures(step)

    return Tuner(init, update, tuner.needs, measures, observe)


def average_weight(step: Any) -> Any:
    """Return the weight of the newest iterate in an average of the weights.

    The polynomial-decay average of [Shamir2013]_, ``average += weight * (w - average)`` with weight
    ``min(1, 9 / (step + 9))``. It remembers about the last ninth of the run, whatever its length,
    so it needs no horizon.

    Parameters
    ----------
    step : int or array
        Steps taken before, from 0: the first iterate has the weight 1.

    Returns
    -------
    float or array

    References
    ----------
    .. [Shamir2013] O. Shamir, T. Zhang, "Stochastic Gradient Descent for Non-smooth Optimization:
       Convergence Results and Optimal Averaging Schemes", ICML 2013, arXiv:1212.1824.

    Examples
    --------
    >>> from cdat_core import tuners
    >>> tuners.average_weight(0), tuners.average_weight(81)
    (1.0, 0.1)
    """
    return _MEMORY / (step + _MEMORY)
