"""The learning rate of one step: asked of a tuner, or found by a line search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cdat_core import Measurement
from cdat_core.extend import StepInfo, observe_or_hold
from cdat_core.linesearch import LineSearch
from cdat_core.tuners import Tuner
from cdat_jax._arguments import bind, check_arguments, with_schedule
from cdat_jax._curvature import check_like, check_method, measure, require_scalar
from cdat_jax._loops import cond
from cdat_jax._slope import value_and_slope
from cdat_jax._spaces import PyTree, TreeSpace, check_inexact, scalar_dtype
from cdat_jax._tracking import SharpnessTracker

_NO_PARAMS = (
    "You are using a transformation that requires the current value of parameters, but you are not "
    "passing `params` when calling `update`."
)


class ScaleByTunerState(NamedTuple):
    """State of `scale_by_tuner`.

    Attributes
    ----------
    tuner_state : NamedTuple
        The state of the tuner, or of the last line search (with its ``failed`` and ``trials``).
    info : cdat_core.extend.StepInfo
        What the last step measured and did. In a step without a measurement, slope, curvature and
        sharpness are those of the last one.
    step : jax.Array
        Updates so far, int32. Skipped ones count.
    due : jax.Array or None
        Whether the next update measures, bool: the schedule says so, or a measurement was skipped
        because something was not finite. None for a line search, and for a tuner that needs neither
        curvature nor sharpness.
    sharpness_vector : Any
        The last eigenvector, shaped like the parameters; the next measurement of the sharpness
        starts from it. Zeros at first; None if the tuner does not need the sharpness.
    """

    tuner_state: Any
    info: StepInfo
    step: jax.Array
    due: jax.Array | None
    sharpness_vector: PyTree | None = None

    @property
    def learning_rate(self) -> jax.Array:
        """The rate of the last step, ``info.learning_rate``; 0 if the step was skipped."""
        rate: jax.Array = self.info.learning_rate
        return rate


class Direction(NamedTuple):
    """The direction u, and the map v -> P^-1/2 v (None where P is the identity)."""

    u: PyTree
    inverse_sqrt: Callable[[PyTree], PyTree] | Any = None


class StepInputs(NamedTuple):
    """The arguments of one update."""

    params: PyTree
    value: jax.Array
    grad: PyTree
    updates: PyTree
    objective: Callable[[PyTree], Any]
    find_direction: Callable[[], Direction]

    def direction_and_slope(self) -> tuple[Direction, jax.Array]:
        """Return the direction and the slope along it."""
        direction = self.find_direction()
        check_like(self.params, direction.u, name="the direction")
        # In JAX's convention for complex parameters the derivative along u is Re <conj(grad), u>.
        slope = TreeSpace().vdot(jax.tree.map(jnp.conj, self.grad), direction.u)
        return direction, slope.astype(self.value.dtype)


FindRate = Callable[[ScaleByTunerState, StepInputs, bool | None], ScaleByTunerState]
"""Returns the state with a new rate; the caller replaces the rate by 0 if the step is skipped.

The last argument is the value of ``state.due`` if it is known when the step is traced.
"""


def tuning(
    tuner_or_search: Tuner[Any] | LineSearch, *, curvature: str, every: Any, sharpness_matvecs: int
) -> tuple[Callable[[PyTree], ScaleByTunerState], Callable[..., ScaleByTunerState]]:
    """Return `init` and `tune`; `tune` returns the state with the rate of this step.

    `tune` takes the arguments of `update` after a function that returns the direction, which steps
    that do not measure do not call. If the step is skipped the rate is 0.

    A caller that branches itself passes ``tuner_step``, for each branch the value of ``state.due``,
    or what `tune` found for this step before; see `make_step`.
    """
    check_method(curvature)
    tuner_or_search = with_schedule(tuner_or_search, every)
    tracker, needs, measures = None, frozenset[str](), None
    if isinstance(tuner_or_search, Tuner):
        needs = tuner_or_search.needs
        if "sharpness" in needs:
            tracker = SharpnessTracker(curvature=curvature, num_matvecs=sharpness_matvecs)
        if needs & {"curvature", "sharpness"}:
            measures = tuner_or_search.measures or _always
        find_rate = _rate_of_tuner(tuner_or_search, curvature, tracker)
    elif isinstance(tuner_or_search, LineSearch):
        find_rate = _rate_of_search(tuner_or_search)
    else:
        msg = (
            "tuner_or_search must be a cdat_core Tuner or LineSearch, "
            f"got {tuner_or_search!r}; for example cdat_core.tuners.cdat()"
        )
        raise TypeError(msg)

    def init(params: PyTree) -> ScaleByTunerState:
        check_inexact(params)
        zero = jnp.zeros((), dtype=scalar_dtype(params))
        count = jnp.zeros((), dtype=jnp.int32)
        if isinstance(tuner_or_search, Tuner):
            tuner_state = tuner_or_search.init(zero)
        else:
            tuner_state = tuner_or_search.init(Measurement(zero, zero, None), zero)
        info = StepInfo(
            value=zero,
            slope=zero,
            curvature=zero if "curvature" in needs else None,
            sharpness=zero if "sharpness" in needs else None,
            learning_rate=zero,
            skipped=count,
        )
        vector = None if tracker is None else tracker.init(params)
        due = None if measures is None else jnp.asarray(measures(count), dtype=bool)
        return _unaliased(ScaleByTunerState(tuner_state, info, count, due, vector))

    def tune(
        find_direction: Callable[[], Direction],
        updates: PyTree,
        state: ScaleByTunerState,
        params: PyTree | None,
        *,
        value: Any,
        grad: PyTree,
        value_fn: Callable[..., Any],
        tuner_step: bool | ScaleByTunerState | None = None,
        **extra_args: Any,
    ) -> ScaleByTunerState:
        if params is None:
            raise ValueError(_NO_PARAMS)
        if isinstance(tuner_step, ScaleByTunerState):
            return tuner_step
        check_arguments(params, updates, grad, value)
        value = jnp.asarray(value, dtype=state.learning_rate.dtype)
        objective = bind(value_fn, extra_args)
        inputs = StepInputs(params, value, grad, updates, objective, find_direction)
        new_state = find_rate(state, inputs, tuner_step)
        info = new_state.info
        skip = info.skipped > state.info.skipped
        info = info._replace(learning_rate=jnp.where(skip, 0, info.learning_rate))
        step, due = state.step + 1, new_state.due
        if measures is not None and due is not None:  # so far, whether a measurement was skipped
            due = due | measures(step)
        return _unaliased(new_state._replace(info=info, step=step, due=due))

    return init, tune


def _always(step: jax.Array) -> jax.Array:
    """Return True: the schedule of a tuner that wants a measurement in each step."""
    return step >= 0


def _rate_of_tuner(tuner: Tuner[Any], curvature: str, tracker: SharpnessTracker | None) -> FindRate:
    """Return a function that asks `tuner` for the rate."""
    needs_curvature = "curvature" in tuner.needs

    def refresh(state: ScaleByTunerState, inputs: StepInputs) -> ScaleByTunerState:
        direction, slope = inputs.direction_and_slope()
        second = largest = vector = None
        if needs_curvature:
            found = measure(inputs.objective, inputs.params, direction.u, curvature=curvature)
            second = jnp.asarray(found.curvature, dtype=slope.dtype)
        if tracker is not None:
            eigenvalue, vector = tracker.measure(
                inputs.objective, inputs.params, state.sharpness_vector, direction.inverse_sqrt
            )
            largest = eigenvalue.astype(slope.dtype)
        measurement = Measurement(inputs.value, slope, second, largest)
        rate, tuner_state = tuner.update(measurement, state.tuner_state)
        skipped = tuner_state.skipped > state.tuner_state.skipped
        if largest is not None:
            usable = jnp.isfinite(largest) & ~skipped
            vector = jax.tree.map(
                lambda new, old: jnp.where(usable, new, old), vector, state.sharpness_vector
            )
        info = StepInfo(inputs.value, slope, second, largest, rate, tuner_state.skipped)
        due = None if state.due is None else skipped
        return ScaleByTunerState(tuner_state, info, state.step, due, vector)

    def hold(state: ScaleByTunerState, inputs: StepInputs, checked: PyTree) -> ScaleByTunerState:
        # The slope would need the direction, and so another update of the base.
        finite = jnp.isfinite(TreeSpace().vdot(inputs.grad, checked))
        value = jnp.where(finite, inputs.value, jnp.nan)
        rate, tuner_state = observe_or_hold(tuner, value, state.tuner_state)
        info = state.info._replace(
            value=inputs.value, learning_rate=rate, skipped=tuner_state.skipped
        )
        due = jnp.zeros((), dtype=bool)
        return state._replace(tuner_state=tuner_state, info=info, due=due)

    def find_rate(
        state: ScaleByTunerState, inputs: StepInputs, due: bool | None
    ) -> ScaleByTunerState:
        if state.due is None or due or (due is None and tuner.measures is None):
            return refresh(state, inputs)
        if due is not None:  # in a chain, `updates` would be computed for this check alone
            return hold(state, inputs, inputs.grad)
        new_state: ScaleByTunerState = cond(
            state.due,
            lambda: refresh(state, inputs),
            lambda: hold(state, inputs, inputs.updates),
        )
        return new_state

    return find_rate


def _rate_of_search(search: LineSearch) -> FindRate:
    """Return a function that runs a line search along the direction."""

    def find_rate(
        state: ScaleByTunerState, inputs: StepInputs, _due: bool | None
    ) -> ScaleByTunerState:
        space, dtype = TreeSpace(), state.learning_rate.dtype
        direction, slope = inputs.direction_and_slope()

        def tell(trial: Any) -> Any:
            moved = space.add_scale(inputs.params, trial.step_size, direction.u)
            told: tuple[Any, ...] = (
                value_and_slope(inputs.objective, moved, direction.u)
                if "slope" in search.trial_needs
                else (require_scalar(inputs.objective)(moved),)
            )
            return search.tell(trial, *(jnp.asarray(number, dtype=dtype) for number in told))

        measurement = Measurement(inputs.value, slope, None)
        start = search.init(measurement, inputs.value, state.learning_rate)
        final = jax.lax.while_loop(lambda trial: ~trial.done, tell, start)
        skipped = state.info.skipped + ~(jnp.isfinite(inputs.value) & jnp.isfinite(slope))
        info = StepInfo(inputs.value, slope, None, None, final.step_size, skipped)
        return ScaleByTunerState(final, info, state.step, None)

    return find_rate


def _unaliased(state: ScaleByTunerState) -> ScaleByTunerState:
    """Give each leaf its own buffer, so that the state can be donated; jit removes the copies."""
    copied: ScaleByTunerState = jax.tree.map(jnp.copy, state)
    return copied
