"""A tuner with nothing to choose, for mini-batches."""

from __future__ import annotations

from typing import Any, NamedTuple

from cdat_core import _validation
from cdat_core._arrays import cast, counter, namespace
from cdat_core._types import Measurement, Scalar
from cdat_core.tuners._base import Tuner, from_rule
from cdat_core.tuners._cooldown import with_cooldown

# What the rate is tuned to.
EDGE_FRACTION = 0.7
"""The rate aims at this part of the edge of stability that a mini-batch sees."""
START_FRACTION = 0.01
"""The first rate, as a part of the greedy one: too low costs a few steps, too high the run."""
FIRST_GAIN, GAIN = 0.25, 0.2
"""Largest change of log(rate) per measurement, while searching and later."""
DENSE_STEPS = 16
"""The first steps are all measured: the search covers a factor e**4."""
SPARSE, SPARSE_STEPS = 8, 800
"""Then one step in 8, and half as often each time the number of steps doubles beyond 800."""

# The guard on the loss.
FAST, SLOW, LEAK = 0.2, 0.02, 0.001
"""Weights of the newest loss in the fast, the slow and the best average."""
GUARD_START = 20
"""The averages of fewer losses say too little."""
OUTLIER = 10.0
"""Standard deviations above the slow average at which a loss is clipped."""
ALARM = 0.7
"""Standard deviations of the fast average above the best one that raise the alarm."""
RETREAT, RECOVERY, LONGEST_RETREAT = 0.2, 0.0025, 2.5
"""Fall of log(rate) per step of alarm, its rise per quiet step, and the largest sum of falls."""
WINDOW_STEPS = 500
"""From this step on all windows of the guard grow in proportion to the number of steps."""

# The limit of growth.
GROWTH_START = 32
"""Until then the rate is still searched for, and its growth is free."""
GROWTH_MEMORY, GROWTH_ROOM = 3.0, 1.0
"""The rate grows at most like steps**3, and stays below e times its geometric average."""


class SelfTuningState(NamedTuple):
    """State of `self_tuning`; all fields are scalars.

    Attributes
    ----------
    rate : Scalar
        The last positive learning rate; 0 before the first.
    step : Scalar
        Steps seen, int32, without skipped ones.
    usual_rate : Scalar
        Geometric moving average of the rate.
    retreat : Scalar
        How far the guard has lowered log(rate), >= 0.
    fast_loss, slow_loss : Scalar
        Moving averages of the loss.
    spread : Scalar
        Standard deviation of the loss around the slow average.
    best_loss, best_spread : Scalar
        Slow average and spread at the best time; the memory leaks.
    skipped : Scalar
        Steps skipped because something was not finite, int32.
    """

    rate: Scalar
    step: Scalar
    usual_rate: Scalar
    retreat: Scalar
    fast_loss: Scalar
    slow_loss: Scalar
    spread: Scalar
    best_loss: Scalar
    best_spread: Scalar
    skipped: Scalar


def self_tuning(
    momentum: Any = 0.9, total_steps: Any = None, *, cooldown: Any = 0.3
) -> Tuner[SelfTuningState] | Tuner[Any]:
    """Tune the rate of a run on mini-batches, with nothing to choose.

    The target is the rate of CDAT, ``sigma n / d`` with n = -slope and d = abs(curvature) of the
    same mini-batch, and sigma = 0.7 * 2 / (1 + momentum). In each measurement the rate moves
    towards it by a bounded factor, ``exp(c e)`` with

        ``e = (sigma n - rate d) / (sigma |n| + rate d)``  in [-1, 1].

    So one bad batch changes the rate by 22 % at most, and no average of n and d, no first rate and
    no limit of the growth has to be chosen. Three guards surround this rule.

    - The loss: while its fast average exceeds the best slow average by 0.7 standard deviations, the
      rate falls by 18 % a step, to 8 % at most; afterwards it recovers by 0.25 % a step.
    - The growth: after 32 steps the rate stays below e times its geometric average, which itself
      grows at most like the third power of the number of steps. Falling is free.
    - Outliers: a loss more than 10 standard deviations above the slow average counts as that.

    The rate does not depend on an offset or the scale of the loss, and scales as 1/c if the update
    is scaled by c. If the first curvature is exactly zero, no rate follows from slope and
    curvature; the first rate then lowers the linear model by one percent of the loss.

    The first 16 steps are measured, then every 8th, and after 800 steps half as often each time
    their number doubles.

    Parameters
    ----------
    momentum : float
        The momentum of the base optimizer, or Adam's beta1, in [0, 1).
    total_steps : int, optional
        The length of the run. The rate then falls to zero over the last steps; see `with_cooldown`.
        Without it, evaluate an average of the weights; see `average_weight`.
    cooldown : float
        The part of `total_steps` over which the rate falls, in [0, 1).

    Returns
    -------
    Tuner
        It needs value, slope and curvature, and observes the loss of the steps between.

    Raises
    ------
    TypeError, ValueError
        If a hyperparameter is out of its range.

    Notes
    -----
    On a full batch, `cdat` with sigma 1.9 and no average, measured in every step, is much better:
    there a rate must follow the sharpness closely.

    The slope must be that of the batch on which the curvature is measured. It then contains the
    square of its own noise, and the rate has a fixed point where the noise dominates. With an
    independent batch it has none.

    The constants are attributes of the module, each with its reason. They were chosen on
    development tasks and judged on others.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import Measurement, tuners
    >>> tuner = tuners.self_tuning(momentum=0.0)
    >>> state = tuner.init(np.asarray(0.0))
    >>> w = 1.0
    >>> for step in range(100):
    ...     value, slope, curvature = w**2 / 2, -w * w, w * w
    ...     if tuner.measures(step):
    ...         rate, state = tuner.update(Measurement(value, slope, curvature), state)
    ...     else:
    ...         rate, state = tuner.observe(np.asarray(value), state)
    ...     w -= float(rate) * w
    >>> abs(w) < 1e-12
    True
    """
    momentum = _validation.fraction("momentum", momentum)
    sigma = 2 * EDGE_FRACTION / (1 + momentum)

    def init(like: Scalar) -> SelfTuningState:
        zero = namespace(like).zeros_like(like)
        return SelfTuningState(
            zero, counter(like), zero, zero, zero, zero, zero, zero, zero, counter(like)
        )

    def rule(measurement: Measurement, state: SelfTuningState) -> tuple[Scalar, SelfTuningState]:
        watched = _watch(measurement.value, state)
        return _finish(_towards_target(measurement, watched, sigma), watched)

    def observe(value: Scalar, state: SelfTuningState) -> tuple[Scalar, SelfTuningState]:
        watched = _watch(value, state)
        return _finish(watched.rate, watched)

    needs = ("value", "slope", "curvature")
    tuner = from_rule(init, rule, needs=needs, measures=_measures, observe=observe)
    if total_steps is None:
        return tuner
    return with_cooldown(tuner, total_steps, fraction=cooldown)


def _measures(step: Any) -> Any:
    """Return whether a step is measured: one in 8, and after 800 steps in ever fewer."""
    due = (step < DENSE_STEPS) | (step % SPARSE == 0)
    for doublings in range(21):  # as far as int32 counts
        early = step < SPARSE_STEPS * 2**doublings
        due = due & (early | (step % (2 * SPARSE * 2**doublings) == 0))
    return due


def _watch(value: Scalar, state: SelfTuningState) -> SelfTuningState:
    """Update the averages of the loss and let the guard change the rate."""
    xp = namespace(state.rate)
    zero = xp.zeros_like(state.rate)
    t = xp.astype(state.step, state.rate.dtype)
    pace = 1 / xp.maximum(zero + 1, t / WINDOW_STEPS)
    newest = 1 / (t + 1)  # removes the bias of the start
    fast_weight = xp.maximum(FAST * pace, newest)
    slow_weight = xp.maximum(SLOW * pace, newest)
    settled = state.step >= GUARD_START

    ceiling = state.slow_loss + OUTLIER * state.spread
    loss = xp.where(settled & (value > ceiling), ceiling, value)
    fast = _mixed(state.fast_loss, loss, fast_weight)
    slow = _mixed(state.slow_loss, loss, slow_weight)
    distance = xp.sqrt(slow_weight) * xp.abs(loss - state.slow_loss)
    spread = xp.sqrt(1 - slow_weight) * xp.hypot(state.spread, distance)
    # Losses near the largest number of the dtype overflow in here.
    spread = xp.where(xp.isfinite(spread), spread, state.spread)

    better = ~settled | (slow <= state.best_loss)
    leak = xp.where(better, zero + 1, LEAK * pace)
    best = _mixed(state.best_loss, slow, leak)
    best_spread = xp.hypot(xp.sqrt(1 - leak) * state.best_spread, xp.sqrt(leak) * spread)

    alarm = settled & (fast > best + ALARM * best_spread)
    retreat = state.retreat + pace * xp.where(alarm, zero + RETREAT, zero - RECOVERY)
    retreat = xp.minimum(xp.maximum(retreat, zero), zero + LONGEST_RETREAT)
    return state._replace(
        rate=state.rate * xp.exp(state.retreat - retreat),
        retreat=retreat,
        fast_loss=fast,
        slow_loss=slow,
        spread=spread,
        best_loss=best,
        best_spread=best_spread,
    )


def _mixed(old: Scalar, new: Scalar, weight: Scalar) -> Scalar:
    """Return the weighted mean, which lies between its arguments and so never overflows."""
    return (1 - weight) * old + weight * new


def _towards_target(measurement: Measurement, state: SelfTuningState, sigma: Any) -> Scalar:
    """Return the rate after a bounded step towards sigma n / d, or the first rate."""
    xp = namespace(state.rate)
    zero, one = xp.zeros_like(state.rate), xp.ones_like(state.rate)
    rate, slope = state.rate, measurement.slope
    descent = zero - slope
    magnitude = xp.abs(measurement.curvature)

    wanted = cast(sigma, rate) * xp.exp(-state.retreat) * descent
    present = rate * magnitude
    total = xp.abs(wanted) + present
    known = xp.isfinite(total) & (total > 0)
    error = xp.where(known, wanted - present, zero) / xp.where(known, total, one)
    # Where one of the two overflows, it is the larger one.
    overflow = xp.where(xp.isfinite(wanted), -one, xp.where(xp.isfinite(present), one, zero))
    error = xp.where(xp.isfinite(total), error, overflow)
    gain = xp.where(state.step < DENSE_STEPS, zero + FIRST_GAIN, zero + GAIN)
    moved = rate * xp.exp(gain * error)
    moved = xp.where(xp.isfinite(moved), moved, rate)

    curved = magnitude > 0
    usable = xp.where(descent > 0, descent, one)
    greedy = usable / xp.where(curved, magnitude, one)
    linear = xp.abs(measurement.value) / usable
    first = START_FRACTION * xp.where(curved, greedy, linear)
    first = xp.where((descent > 0) & xp.isfinite(first), first, zero)
    return xp.where(rate > 0, moved, first)


def _finish(rate: Scalar, state: SelfTuningState) -> tuple[Scalar, SelfTuningState]:
    """Limit the growth of the rate and count the step."""
    xp = namespace(rate)
    one = xp.ones_like(rate)
    t = xp.astype(state.step, rate.dtype)
    searching = (state.step < GROWTH_START) | ~(state.usual_rate > 0)
    weight = xp.where(searching, one, GROWTH_MEMORY / (t + 1))
    known, before = rate > 0, xp.where(state.usual_rate > 0, state.usual_rate, one)
    growth = xp.log(xp.where(known, rate, one)) - xp.log(before)
    usual = xp.where(searching, rate, before * xp.exp(weight * growth))
    usual = xp.where(known & xp.isfinite(usual), usual, state.usual_rate)
    bound = usual * xp.exp(one * GROWTH_ROOM)
    rate = xp.where(~searching & (rate > bound), bound, rate)
    return rate, state._replace(usual_rate=usual, step=state.step + 1)
