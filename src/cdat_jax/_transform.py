"""Tuners and line searches as Optax transformations, called exactly like Optax's line searches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cdat_core import Measurement, tuners
from cdat_core.linesearch import LineSearch
from cdat_core.tuners import Tuner
from cdat_jax._arguments import bind, check_arguments, period
from cdat_jax._curvature import check_like, check_method, measure, require_scalar
from cdat_jax._loops import cond
from cdat_jax._slope import value_and_slope
from cdat_jax._spaces import PyTree, TreeSpace, check_inexact, scalar_dtype
from cdat_jax._tracking import SharpnessTracker

_NO_PARAMS = (
    "You are using a transformation that requires the current value of parameters, but you are not "
    "passing `params` when calling `update`."
)


class TunerInfo(NamedTuple):
    """The last measurement, and how many steps were skipped.

    Attributes
    ----------
    value : jax.Array
        The loss at the last step.
    slope : jax.Array
        The directional derivative when it was last measured.
    curvature : jax.Array or None
        Directional curvature when it was last measured; None if the tuner does not need it.
    skipped : jax.Array
        Steps skipped because value, gradient, slope, curvature or sharpness was not finite, int32.
    sharpness : jax.Array or None
        The sharpness when it was last measured; None if the tuner does not need it.
    """

    value: jax.Array
    slope: jax.Array
    curvature: jax.Array | None
    skipped: jax.Array
    sharpness: jax.Array | None = None


class ScaleByTunerState(NamedTuple):
    """State of `scale_by_tuner`.

    Attributes
    ----------
    learning_rate : jax.Array
        The rate of the last step (0 if it was skipped).
    tuner_state : NamedTuple
        The state of the tuner, or of the last line search (with its ``failed`` and ``trials``).
    info : TunerInfo
        The last measurement.
    until_refresh : jax.Array
        Steps for which the present rate still holds (see `every`), int32.
    sharpness_vector : Any
        The eigenvector of the last sharpness, like the parameters, where the next measurement
        begins; zeros at first, None if the tuner does not need the sharpness.
    """

    learning_rate: jax.Array
    tuner_state: Any
    info: TunerInfo
    until_refresh: jax.Array
    sharpness_vector: PyTree | None = None


def scale_by_tuner(
    tuner_or_search: Tuner[Any] | LineSearch,
    *,
    curvature: str = "auto",
    every: Any = 1,
    sharpness_matvecs: int = 8,
) -> optax.GradientTransformationExtraArgs:
    """Scale the updates by a tuned learning rate.

    The updates that come in are the direction u, so put this last, behind an optimizer at learning
    rate 1. Its ``update`` is called like that of Optax's line searches, and swapping one for the
    other is one line::

        solver = optax.chain(optax.adam(1.0), cdat_jax.scale_by_tuner(tuner))
        updates, state = solver.update(
            grads, state, params, value=value, grad=grads, value_fn=loss_fn, batch=batch
        )

    `value` and `grad` are the loss and its raw gradient at `params`; `value_fn` is the same loss on
    the same batch, called as ``value_fn(params, **extra)`` with those further keyword arguments
    that it names (all of them if it accepts ``**kwargs``). It may return ``(loss, aux)``; `value`
    is then the loss alone.

    If something measured is not finite the updates are zero, the tuner's averages stay, and
    ``state.info.skipped`` counts it. The optimizers chained in front have then already seen the
    bad gradient; `tuned` and `cdat` protect their state too.

    Parameters
    ----------
    tuner_or_search : cdat_core.tuners.Tuner or cdat_core.linesearch.LineSearch
        The rule for the rate. The sharpness, for a tuner that needs it, is the largest eigenvalue
        of the Hessian in all of `params`; `tuned` also has that under a preconditioner. A line
        search evaluates `value_fn` in a ``lax.while_loop``, with its derivative along the updates
        if the search asks for the slope of a trial.
    curvature : str
        How the curvature is computed; see `measure`.
    every : int or jax.Array
        Measure curvature and sharpness every so many steps and hold the rate in between; after a
        skipped step they are measured at once. Steps without a measurement pay nothing for it,
        except under ``jax.vmap``, which computes both branches of a condition. They are skipped
        where the loss or ``<grad, updates>`` is not finite.
    sharpness_matvecs : int
        Hessian-vector products for a sharpness, from the last eigenvector; at first at least 20
        from random signs. As many vectors like `params` are in memory meanwhile.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Its state is a `ScaleByTunerState`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the kind described.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, optax
    >>> from cdat_core import tuners
    >>> from cdat_jax import scale_by_tuner
    >>> loss = lambda w: ((w - 3.0) ** 2).sum()
    >>> solver = optax.chain(optax.sgd(1.0), scale_by_tuner(tuners.cdat(sigma=1.0)))
    >>> params = jnp.zeros(2)
    >>> state = solver.init(params)
    >>> value, grad = jax.value_and_grad(loss)(params)
    >>> updates, state = solver.update(
    ...     grad, state, params, value=value, grad=grad, value_fn=loss
    ... )
    >>> [float(x) for x in optax.apply_updates(params, updates)]
    [3.0, 3.0]
    """
    init, tune = tuning(
        tuner_or_search, curvature=curvature, every=every, sharpness_matvecs=sharpness_matvecs
    )

    def update(
        updates: PyTree,
        state: ScaleByTunerState,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByTunerState]:
        new_state = tune(lambda: (updates, None), updates, state, params, **extra_args)
        return scaled(new_state.learning_rate, updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


Direction = tuple[PyTree, Callable[[PyTree], PyTree] | None]
"""The direction u, and the map v -> P^-1/2 v; None where P is the identity."""


def tuning(
    tuner_or_search: Tuner[Any] | LineSearch, *, curvature: str, every: Any, sharpness_matvecs: int
) -> tuple[Callable[[PyTree], ScaleByTunerState], Callable[..., ScaleByTunerState]]:
    """Return `init`, and `tune`, which returns the state with the rate of this step.

    `tune` is called like `update`, with a function in front that returns the direction: steps that
    hold the rate do not need it. The rate of a step that is skipped is 0.
    """
    check_method(curvature)
    every = period(every)
    tracker, measures = None, False
    if isinstance(tuner_or_search, Tuner):
        if "sharpness" in tuner_or_search.needs:
            tracker = SharpnessTracker(curvature=curvature, num_matvecs=sharpness_matvecs)
        measures = "curvature" in tuner_or_search.needs
        decide = _tuner_decision(tuner_or_search, curvature, every, tracker)
    elif isinstance(tuner_or_search, LineSearch):
        decide = _search_decision(tuner_or_search)
    else:
        msg = (
            "tuner_or_search must be a cdat_core Tuner or LineSearch, "
            f"got {tuner_or_search!r}; for example cdat_core.tuners.cdat()"
        )
        raise TypeError(msg)

    def init(params: PyTree) -> ScaleByTunerState:
        check_inexact(params)
        zero = jnp.zeros((), dtype=scalar_dtype(params))
        none_yet = jnp.zeros((), dtype=jnp.int32)
        if isinstance(tuner_or_search, Tuner):
            tuner_state = tuner_or_search.init(zero)
        else:
            tuner_state = tuner_or_search.init(Measurement(zero, zero, None), zero)
        unmeasured = (zero if measures else None, none_yet, None if tracker is None else zero)
        info = TunerInfo(zero, zero, *unmeasured)
        vector = None if tracker is None else tracker.init(params)
        return _unshared(ScaleByTunerState(zero, tuner_state, info, none_yet, vector))

    def tune(
        find_direction: Callable[[], Direction],
        updates: PyTree,
        state: ScaleByTunerState,
        params: PyTree | None,
        *,
        value: Any,
        grad: PyTree,
        value_fn: Callable[..., Any],
        **extra_args: Any,
    ) -> ScaleByTunerState:
        if params is None:
            raise ValueError(_NO_PARAMS)
        check_arguments(params, updates, grad, value)
        point = Point(
            params, jnp.asarray(value, dtype=state.learning_rate.dtype), grad, updates,
            bind(value_fn, extra_args), find_direction,
        )  # fmt: skip
        new_state = decide(state, point)
        skip = new_state.info.skipped > state.info.skipped
        return _unshared(
            new_state._replace(
                learning_rate=jnp.where(skip, 0, new_state.learning_rate),
                until_refresh=jnp.where(skip, 0, new_state.until_refresh),  # the rate was lost
            )
        )

    return init, tune


def scale_by_cdat(
    sigma: Any = 2.0,
    decay: Any = 0.9,
    eps: Any = 0.0,
    *,
    initial_learning_rate: Any = None,
    max_growth: Any = None,
    max_learning_rate: Any = None,
    curvature: str = "auto",
    every: Any = 1,
) -> optax.GradientTransformationExtraArgs:
    """Scale the updates by the CDAT rate: `scale_by_tuner` with `cdat_core.tuners.cdat`.

    Parameters
    ----------
    sigma, decay, eps, initial_learning_rate, max_growth, max_learning_rate
        See `cdat_core.tuners.cdat`.
    curvature, every
        See `scale_by_tuner`.

    Returns
    -------
    optax.GradientTransformationExtraArgs

    Examples
    --------
    >>> import optax
    >>> from cdat_jax import scale_by_cdat
    >>> solver = optax.chain(optax.adam(1.0), scale_by_cdat(sigma=1.9))
    """
    tuner = tuners.cdat(
        sigma,
        decay,
        eps,
        initial_learning_rate=initial_learning_rate,
        max_growth=max_growth,
        max_learning_rate=max_learning_rate,
    )
    return scale_by_tuner(tuner, curvature=curvature, every=every)


def scaled(factor: Any, updates: PyTree) -> PyTree:
    """Return the updates times a factor, zero where they are not finite."""

    def times(u: Any) -> jax.Array:
        u = jnp.asarray(u)
        return jnp.where(jnp.isfinite(u), factor * u, 0).astype(u.dtype)

    return jax.tree.map(times, updates)


def _unshared(state: ScaleByTunerState) -> ScaleByTunerState:
    """Give every leaf a buffer of its own, or the state could not be donated (free under jit)."""
    copied: ScaleByTunerState = jax.tree.map(jnp.copy, state)
    return copied


class Point(NamedTuple):
    """What an update is called with."""

    params: PyTree
    value: jax.Array
    grad: PyTree
    updates: PyTree
    objective: Callable[[PyTree], Any]
    find_direction: Callable[[], Direction]

    def direction(self) -> tuple[PyTree, jax.Array, Callable[[PyTree], PyTree] | None]:
        """Return the direction, the slope along it, and P^-1/2."""
        direction, inverse_sqrt = self.find_direction()
        check_like(self.params, direction, name="the direction")
        # The derivative along u is Re <conj(grad), u> in JAX's convention for complex parameters.
        slope = TreeSpace().vdot(jax.tree.map(jnp.conj, self.grad), direction)
        return direction, slope.astype(self.value.dtype), inverse_sqrt


Decide = Callable[[ScaleByTunerState, Point], ScaleByTunerState]
"""The state with a new rate, of any value where the step is skipped."""


def _tuner_decision(
    tuner: Tuner[Any], curvature: str, every: Any, tracker: SharpnessTracker | None
) -> Decide:
    """Return the function that asks a tuner for the rate, measuring every so many steps."""
    needs_curvature = "curvature" in tuner.needs

    def refresh(state: ScaleByTunerState, at: Point) -> ScaleByTunerState:
        direction, slope, inverse_sqrt = at.direction()
        second = largest = vector = None
        if needs_curvature:
            model = measure(at.objective, at.params, direction, curvature=curvature)
            second = jnp.asarray(model.curvature, dtype=slope.dtype)
        if tracker is not None:
            found = tracker.measure(at.objective, at.params, state.sharpness_vector, inverse_sqrt)
            largest, vector = found[0].astype(slope.dtype), found[1]
        measurement = Measurement(at.value, slope, second, largest)
        rate, tuner_state = tuner.update(measurement, state.tuner_state)
        if largest is not None:
            good = jnp.isfinite(largest) & (tuner_state.skipped == state.tuner_state.skipped)
            vector = jax.tree.map(
                lambda new, old: jnp.where(good, new, old), vector, state.sharpness_vector
            )
        info = TunerInfo(at.value, slope, second, tuner_state.skipped, largest)
        return ScaleByTunerState(rate, tuner_state, info, jnp.int32(every) - 1, vector)

    def hold(state: ScaleByTunerState, at: Point) -> ScaleByTunerState:
        # To find the direction only to see that it is finite would double what such a step costs
        # beyond that of the base.
        finite = jnp.isfinite(at.value) & jnp.isfinite(TreeSpace().vdot(at.grad, at.updates))
        skipped = state.tuner_state.skipped + ~finite
        return state._replace(
            tuner_state=state.tuner_state._replace(skipped=skipped),
            info=state.info._replace(value=at.value, skipped=skipped),
            until_refresh=state.until_refresh - 1,
        )

    def decide(state: ScaleByTunerState, at: Point) -> ScaleByTunerState:
        measures = needs_curvature or tracker is not None
        if not measures or (not isinstance(every, jax.Array) and every == 1):
            return refresh(state, at)
        due = state.until_refresh <= 0
        found: ScaleByTunerState = cond(due, lambda: refresh(state, at), lambda: hold(state, at))
        return found

    return decide


def _search_decision(search: LineSearch) -> Decide:
    """Return the function that runs a line search along the updates."""

    def decide(state: ScaleByTunerState, at: Point) -> ScaleByTunerState:
        space, dtype = TreeSpace(), state.learning_rate.dtype
        direction, slope, _ = at.direction()

        def tell(trial: Any) -> Any:
            moved = space.add_scale(at.params, trial.step_size, direction)
            told: tuple[Any, ...] = (
                value_and_slope(at.objective, moved, direction)
                if "slope" in search.trial_needs
                else (require_scalar(at.objective)(moved),)
            )
            return search.tell(trial, *(jnp.asarray(number, dtype=dtype) for number in told))

        start = search.init(Measurement(at.value, slope, None), at.value, state.learning_rate)
        final = jax.lax.while_loop(lambda trial: ~trial.done, tell, start)
        skip = ~(jnp.isfinite(at.value) & jnp.isfinite(slope))
        info = TunerInfo(at.value, slope, None, state.info.skipped + skip)
        return ScaleByTunerState(final.step_size, final, info, state.until_refresh)

    return decide
