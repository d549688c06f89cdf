"""Line search for the strong Wolfe conditions."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

from cdat_core import _validation
from cdat_core._arrays import cast, counter, filled, namespace, require_floating
from cdat_core._types import Measurement, Scalar
from cdat_core.linesearch._base import LineSearch
from cdat_core.linesearch._interpolation import (
    REMAINDER,
    Bracket,
    Point,
    map_scalars,
    refine,
)


class ZoomState(NamedTuple):
    """State of `zoom`; all fields are scalars (or all have the shape of ``like``).

    Attributes
    ----------
    step_size : Scalar
        The next trial; once `done`, the step to take (0 if no trial lowered the loss enough).
    done, failed : Scalar
        Boolean: the search has ended; it ended without meeting the strong Wolfe conditions.
    value, slope : Scalar
        The loss and the directional derivative at step 0.
    best_step_size, best_value : Scalar
        The trial of lowest loss so far among those that lowered the loss enough (step 0 if none).
    bracket : Bracket
        The interval to search.
    tilted : Scalar
        Boolean: whether losses are still compared after subtracting the required decrease.
    width, previous_width : Scalar
        Width of the bracket at the last two trials, to check that it shrinks.
    trials : Scalar
        Trials told so far, int32.
    """

    step_size: Scalar
    done: Scalar
    failed: Scalar
    value: Scalar
    slope: Scalar
    best_step_size: Scalar
    best_value: Scalar
    bracket: Bracket
    tilted: Scalar
    width: Scalar
    previous_width: Scalar
    trials: Scalar


def zoom(
    *,
    initial_step_size: Any = 1.0,
    increase_factor: Any = 1.0,
    sufficient_decrease: Any = 1e-4,
    curvature_condition: Any = 0.9,
    value_rtol: Any = None,
    max_step_size: Any = None,
    max_trials: int = 30,
) -> LineSearch:
    """Find a step that lowers the loss enough and flattens it enough (strong Wolfe).

    A trial eta is accepted when both hold::

        f(w + eta u) <= f(w) + sufficient_decrease * eta * slope + value_rtol * |f(w)|
        |slope at eta| <= curvature_condition * |slope|

    The last term of the first line allows for rounding of the loss, as in `backtracking`; smaller
    differences of the loss are not interpolated either. Unlike backtracking, the search also
    lengthens a step that is too short. A trial costs the loss and its derivative along the update.

    Trials follow Moré and Thuente [More1994]_: as long as the loss keeps descending they grow by a
    factor of up to 5; once a minimum is bracketed, they are minimisers of cubics and parabolas
    through the known points, and a bracket that shrinks too slowly is halved. The first guess is
    `increase_factor` times the step accepted at the last training step. With the default of 1 a
    step that is still acceptable costs only one trial; since `curvature_condition` = 0.9 is
    lenient, it may stay well below the minimiser along the update.

    The search fails at once with step 0 if the slope is not negative or not finite. It fails, with
    the trial of lowest loss among those that satisfy the first condition (0 if none does), if the
    trials run out, if the bracket has shrunk to the resolution of the dtype (4 eps of the step, or
    sqrt(eps) of it where the loss is the same at both ends up to rounding), or if the loss still
    descends too steeply at `max_step_size`. A trial where loss or slope is not finite counts as too
    long.

    Parameters
    ----------
    initial_step_size : float
        First guess if no step has been accepted before, > 0.
    increase_factor : float or None
        Factor from the last accepted step to the first guess, > 0. None starts each search at
        `initial_step_size`, which suits quasi-Newton methods, whose natural step is 1.
    sufficient_decrease : float
        The Armijo constant, in (0, 1).
    curvature_condition : float
        Largest fraction of the slope that may remain, in (0, 1) and above `sufficient_decrease`;
        smaller values find the minimiser along the update more exactly.
    value_rtol : float, optional
        Relative rounding error of the loss, >= 0; by default twice the machine epsilon of the
        dtype.
    max_step_size : float, optional
        Largest trial, > 0.
    max_trials : int
        Largest number of trials, >= 1.

    Returns
    -------
    LineSearch
        It needs value and slope, also at each trial: ``tell(state, value, slope)``. If `like` has a
        shape, its elements are independent searches.

    Raises
    ------
    ValueError
        If a hyperparameter is out of its range.
    TypeError
        Raised by ``tell`` if the slope is missing.

    References
    ----------
    .. [More1994] J. J. Moré and D. J. Thuente, "Line search algorithms with guaranteed sufficient
       decrease", ACM Trans. Math. Softw. 20 (1994).

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import Measurement, linesearch
    >>> loss, derivative = lambda eta: (1 - eta) ** 4, lambda eta: -4 * (1 - eta) ** 3
    >>> search = linesearch.zoom(initial_step_size=4.0, curvature_condition=0.1)
    >>> state = search.init(Measurement(np.asarray(1.0), np.asarray(-4.0), None), np.asarray(0.0))
    >>> while not state.done:
    ...     state = search.tell(state, loss(state.step_size), derivative(state.step_size))
    >>> bool(state.failed), int(state.trials), bool(abs(derivative(state.step_size)) <= 0.4)
    (False, 2, True)
    """
    initial_step_size = _validation.positive("initial_step_size", initial_step_size)
    increase_factor = _validation.optional(_validation.positive, "increase_factor", increase_factor)
    sufficient_decrease = _validation.open_fraction("sufficient_decrease", sufficient_decrease)
    curvature_condition = _validation.open_fraction("curvature_condition", curvature_condition)
    known = (sufficient_decrease, curvature_condition)
    if all(isinstance(x, numbers.Real) for x in known) and known[1] <= known[0]:
        msg = (
            "curvature_condition must be greater than sufficient_decrease, "
            f"got {curvature_condition!r} and {sufficient_decrease!r}"
        )
        raise ValueError(msg)
    value_rtol = _validation.optional(_validation.nonnegative, "value_rtol", value_rtol)
    max_step_size = _validation.optional(_validation.positive, "max_step_size", max_step_size)
    max_trials = _validation.count("max_trials", max_trials)

    options = _Options(
        sufficient_decrease, curvature_condition, value_rtol, max_step_size, max_trials
    )

    def init(
        measurement: Measurement, like: Scalar, previous_step_size: Scalar | None = None
    ) -> ZoomState:
        require_floating(like, "like")
        if measurement.value is None or measurement.slope is None:
            msg = f"zoom needs Measurement.value and .slope, got {measurement!r}"
            raise ValueError(msg)
        xp = namespace(like)
        guess = filled(like, initial_step_size)
        if previous_step_size is not None and increase_factor is not None:
            grown = cast(increase_factor, like) * filled(like, previous_step_size)
            guess = xp.where((grown > 0) & xp.isfinite(grown), grown, guess)
        value, slope = filled(like, measurement.value), filled(like, measurement.slope)
        return _started(options, guess, value, slope)

    def tell(state: ZoomState, value: Scalar, slope: Scalar | None = None) -> ZoomState:
        if slope is None:
            msg = "zoom needs the slope at the trial: tell(state, value, slope), got None"
            raise TypeError(msg)
        like, done = state.step_size, state.done
        xp = namespace(like)

        def unless_done(field: Scalar) -> Scalar:
            return xp.where(done, xp.zeros_like(field), field)

        # A search that is done is computed with zeros, which raise no warning, and kept as it was.
        told = _told(
            options,
            map_scalars(unless_done, state),
            unless_done(filled(like, value)),
            unless_done(filled(like, slope)),
        )
        return map_scalars(lambda old, new: xp.where(done, old, new), state, told)

    needs = frozenset({"value", "slope"})
    return LineSearch(init, tell, needs, trial_needs=needs)


class _Options(NamedTuple):
    sufficient_decrease: Any
    curvature_condition: Any
    value_rtol: Any
    max_step_size: Any
    max_trials: int

    def largest(self, like: Scalar) -> Scalar:
        """Return the largest trial; without a bound, one that may still be divided by eps."""
        limits = namespace(like).finfo(like.dtype)
        unbounded = float(limits.max) * float(limits.eps) / 64
        return filled(like, unbounded if self.max_step_size is None else self.max_step_size)


def _started(options: _Options, guess: Scalar, value: Scalar, slope: Scalar) -> ZoomState:
    """Return the state that asks for the first trial, or fails if the slope is no descent."""
    xp = namespace(guess)
    zero, largest = xp.zeros_like(guess), options.largest(guess)
    start = Point(zero, value, slope)
    descends = xp.isfinite(value) & xp.isfinite(slope) & (slope < 0)
    return ZoomState(
        step_size=xp.where(descends, xp.where(guess > largest, largest, guess), zero),
        done=~descends,
        failed=~descends,
        value=value,
        slope=slope,
        best_step_size=zero,
        best_value=value,
        bracket=Bracket(start, start, closed=xp.zeros_like(descends)),
        tilted=xp.ones_like(descends),
        width=largest,
        previous_width=largest,
        trials=counter(guess),
    )


def _told(options: _Options, state: ZoomState, value: Scalar, slope: Scalar) -> ZoomState:
    """Return the state after a trial; the caller discards it if the search was already done."""
    like = state.step_size
    xp = namespace(like)
    eps = float(xp.finfo(like.dtype).eps)
    rtol = 2 * eps if options.value_rtol is None else options.value_rtol
    rounding = cast(rtol, like) * xp.abs(state.value)

    demanded = cast(options.sufficient_decrease, like) * state.slope
    finite = xp.isfinite(value) & xp.isfinite(slope)
    decreased = finite & (value <= state.value + demanded * like + rounding)
    flat = xp.abs(slope) <= cast(options.curvature_condition, like) * xp.abs(state.slope)
    accepted = decreased & flat
    better = decreased & ((state.best_step_size == 0) | (value < state.best_value))
    best_step_size = xp.where(better, like, state.best_step_size)

    # Until a trial has both the required decrease and an ascending slope, losses are compared after
    # subtracting the line of that decrease: the minimum of the difference satisfies both
    # conditions.
    tilted = state.tilted & ~(decreased & (slope >= 0))
    infinite = xp.full_like(like, math.inf)
    trial = Point(like, xp.where(finite, value, infinite), xp.where(finite, slope, infinite))
    bracket, following = refine(
        state.bracket,
        trial,
        tilt=xp.where(tilted, demanded, xp.zeros_like(demanded)),
        rounding=rounding,
        largest=options.largest(like),
    )
    low, high, closed = bracket

    width, middle = xp.abs(high.step - low.step), low.step + (high.step - low.step) / 2
    left, right = xp.minimum(low.step, high.step), xp.maximum(low.step, high.step)
    slow = finite & (width >= REMAINDER * state.previous_width)
    inside = (left < following) & (following < right)
    following = xp.where(closed & (slow | ~inside), middle, following)
    # Once the loss is the same at both ends up to rounding, the slopes will soon be noise too.
    level = xp.abs(high.value - low.value) <= rounding
    resolution = xp.where(level, eps**0.5 * right, 4 * eps * right)
    narrow = (width <= resolution) | (middle == left) | (middle == right)
    stuck = xp.where(closed, narrow, following <= like)

    trials = state.trials + 1
    failed = ~accepted & (stuck | (trials >= options.max_trials))
    following = xp.where(failed, best_step_size, following)
    return state._replace(
        step_size=xp.where(accepted, like, following),
        done=accepted | failed,
        failed=failed,
        best_step_size=best_step_size,
        best_value=xp.where(better, value, state.best_value),
        bracket=bracket,
        tilted=tilted,
        width=xp.where(closed, width, state.width),
        previous_width=xp.where(closed, state.width, state.previous_width),
        trials=trials,
    )
