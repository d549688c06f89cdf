"""Backtracking line search for the Armijo condition."""

from __future__ import annotations

from typing import Any, NamedTuple

from cdat_core import _validation
from cdat_core._arrays import cast, counter, filled, increment, namespace, require_floating
from cdat_core._types import Measurement, Scalar
from cdat_core.linesearch._base import LineSearch


class BacktrackingState(NamedTuple):
    """State of `backtracking`; all fields are scalars.

    Attributes
    ----------
    step_size : Scalar
        The next trial; once `done`, the step to take (0 if no trial lowered the loss).
    done, failed : Scalar
        Boolean: the search has ended; it ended without meeting the Armijo condition.
    value, slope : Scalar
        The loss and the directional derivative at step 0.
    best_step_size, best_value : Scalar
        The trial of lowest loss so far (step 0 to begin with).
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
    trials: Scalar


def backtracking(
    *,
    initial_step_size: Any = 1.0,
    decrease_factor: Any = 0.8,
    increase_factor: Any = 1.5,
    sufficient_decrease: Any = 1e-4,
    value_rtol: Any = None,
    max_step_size: Any = None,
    max_trials: int = 50,
) -> LineSearch:
    """Shrink the step until the loss falls enough (Armijo).

    A trial eta is accepted [Armijo1966]_ when ``f(w + eta u) <= f(w) + sufficient_decrease * eta *
    slope + value_rtol * |f(w)|``. The last term allows for rounding of the loss: without it a
    search in float32 cannot succeed near a minimum. The first guess is `increase_factor` times the
    step accepted at the last training step. A trial that is not finite counts as too long.

    If the slope is not negative or not finite, the search fails at once with step 0. If the trials
    run out, it fails with the trial of lowest loss, or 0 if none lowered the loss.

    Parameters
    ----------
    initial_step_size : float
        First guess if no step has been accepted before, > 0.
    decrease_factor : float
        Factor from one trial to the next, in (0, 1).
    increase_factor : float or None
        Growth of the first guess from one training step to the next, >= 1. None starts each search
        at `initial_step_size`.
    sufficient_decrease : float
        The Armijo constant, in (0, 1).
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
        It needs value and slope.

    Raises
    ------
    ValueError
        If a hyperparameter is out of its range.

    References
    ----------
    .. [Armijo1966] L. Armijo, "Minimization of functions having Lipschitz continuous first partial
       derivatives", Pacific J. Math. 16 (1966).

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import Measurement, linesearch
    >>> loss = lambda eta: (1 - eta) ** 2
    >>> search = linesearch.backtracking(initial_step_size=4.0, decrease_factor=0.5)
    >>> start = Measurement(np.asarray(1.0), np.asarray(-2.0), None)
    >>> state = search.init(start, np.asarray(0.0))
    >>> while not state.done:
    ...     state = search.tell(state, loss(state.step_size))
    >>> float(state.step_size), bool(state.failed), int(state.trials)
    (1.0, False, 3)
    """
    initial_step_size = _validation.positive("initial_step_size", initial_step_size)
    decrease_factor = _validation.open_fraction("decrease_factor", decrease_factor)
    increase_factor = _validation.optional(
        _validation.at_least_one, "increase_factor", increase_factor
    )
    sufficient_decrease = _validation.open_fraction("sufficient_decrease", sufficient_decrease)
    value_rtol = _validation.optional(_validation.nonnegative, "value_rtol", value_rtol)
    max_step_size = _validation.optional(_validation.positive, "max_step_size", max_step_size)
    max_trials = _validation.count("max_trials", max_trials)

    def init(
        measurement: Measurement, like: Scalar, previous_step_size: Scalar | None = None
    ) -> BacktrackingState:
        require_floating(like, "like")
        if measurement.value is None or measurement.slope is None:
            msg = f"backtracking needs Measurement.value and .slope, got {measurement!r}"
            raise ValueError(msg)
        xp = namespace(like)
        zero = xp.zeros_like(like)
        value, slope = filled(like, measurement.value), filled(like, measurement.slope)
        guess = filled(like, initial_step_size)
        if previous_step_size is not None and increase_factor is not None:
            previous = filled(like, previous_step_size)
            grown = cast(increase_factor, like) * previous
            guess = xp.where((previous > 0) & xp.isfinite(grown), grown, guess)
        if max_step_size is not None:
            ceiling = filled(like, max_step_size)
            guess = xp.where(guess > ceiling, ceiling, guess)
        descends = xp.isfinite(value) & xp.isfinite(slope) & (slope < 0)
        return BacktrackingState(
            step_size=xp.where(descends, guess, zero),
            done=~descends,
            failed=~descends,
            value=value,
            slope=slope,
            best_step_size=zero,
            best_value=value,
            trials=counter(like),
        )

    def tell(
        state: BacktrackingState, value: Scalar, slope: Scalar | None = None
    ) -> BacktrackingState:
        del slope  # the Armijo condition uses only the value
        xp = namespace(state.step_size)
        like = state.step_size
        value = filled(like, value)
        rounding = 2 * float(xp.finfo(like.dtype).eps) if value_rtol is None else value_rtol
        bound = (
            state.value
            + cast(sufficient_decrease, like) * state.step_size * state.slope
            + cast(rounding, like) * xp.abs(state.value)
        )
        running = ~state.done
        accepted = running & xp.isfinite(value) & (value <= bound)
        lower = running & xp.isfinite(value) & (value < state.best_value)
        best_step_size = xp.where(lower, state.step_size, state.best_step_size)
        trials = increment(state.trials, running)
        exhausted = running & ~accepted & (trials >= max_trials)
        shorter = cast(decrease_factor, like) * state.step_size
        following = xp.where(exhausted, best_step_size, shorter)
        return state._replace(
            step_size=xp.where(accepted | state.done, state.step_size, following),
            done=state.done | accepted | exhausted,
            failed=state.failed | exhausted,
            best_step_size=best_step_size,
            best_value=xp.where(lower, value, state.best_value),
            trials=trials,
        )

    return LineSearch(init, tell, frozenset({"value", "slope"}))
