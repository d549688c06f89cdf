"""A tuner around a base optimizer, as one transformation that also protects the base's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cdat_core import tuners
from cdat_core.extend import validation
from cdat_core.linesearch import LineSearch
from cdat_core.tuners import Tuner
from cdat_jax._loops import cond
from cdat_jax._preconditioner import inverse_square_root
from cdat_jax._spaces import PyTree
from cdat_jax._transform import Direction, ScaleByTunerState, scaled, tuning


class TunedState(NamedTuple):
    """State of `tuned` and `cdat`.

    Attributes
    ----------
    base : Any
        The state of the base transformation.
    tuner : ScaleByTunerState
        The learning rate, the tuner's state and the last measurement.
    step : jax.Array
        Steps taken, int32; the argument of a `learning_rate` schedule. Skipped steps do not count.
    """

    base: Any
    tuner: ScaleByTunerState
    step: jax.Array


CDATState = TunedState
"""The state of `cdat`, by the name of its rule."""


def tuned(
    base: optax.GradientTransformation,
    tuner_or_search: Tuner[Any] | LineSearch,
    *,
    learning_rate: float | Callable[[jax.Array], Any] = 1.0,
    curvature: str = "auto",
    every: Any = 1,
    sharpness_matvecs: int = 8,
    inverse_sqrt: Callable[[Any], Callable[[PyTree], PyTree]] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap a base transformation with a tuned learning rate.

    Equal to ``optax.chain(base, scale_by_tuner(...))`` with three additions: a step that is skipped
    because something was not finite leaves the state of `base` unchanged as well, the tuned rate
    can be multiplied by a factor or schedule, and the sharpness can be that under the
    preconditioner of `base`. Call ``update`` as for `scale_by_tuner`.

    Parameters
    ----------
    base : optax.GradientTransformation
        The optimizer at learning rate 1, such as ``optax.adam(1.0)``.
    tuner_or_search : cdat_core.tuners.Tuner or cdat_core.linesearch.LineSearch
        The rule for the rate.
    learning_rate : float or callable
        Multiplier of the tuned rate, or a schedule ``step -> multiplier`` (warm-up, cooling down).
        It is applied after tuning: the tuner does not see it.
    curvature, every, sharpness_matvecs
        See `scale_by_tuner`.
    inverse_sqrt : callable, optional
        For a tuner that needs the sharpness: from the state of `base` after its update, the map
        ``v -> P^-1/2 v`` of what that update was divided by, so that the sharpness is the largest
        eigenvalue of ``P^-1/2 H P^-1/2``. For ``optax.adam(1.0)`` that is `adam_inverse_sqrt`; fix
        other hyperparameters by ``functools.partial``. By default P is the identity.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Its state is a `TunedState`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the kind described.

    Examples
    --------
    >>> import optax
    >>> from cdat_core import tuners
    >>> from cdat_jax import adam_inverse_sqrt, tuned
    >>> rule = tuners.sharpness_edge(sigma=1.0)
    >>> solver = tuned(optax.adam(1.0), rule, inverse_sqrt=adam_inverse_sqrt)
    """
    if not callable(learning_rate):
        learning_rate = validation.nonnegative("learning_rate", learning_rate)
    base = optax.with_extra_args_support(base)
    init_tuner, tune = tuning(
        tuner_or_search, curvature=curvature, every=every, sharpness_matvecs=sharpness_matvecs
    )
    if inverse_sqrt is not None and not callable(inverse_sqrt):
        msg = (
            "inverse_sqrt must be a callable, from the state of base to v -> P^-1/2 v, "
            f"got {inverse_sqrt!r}; for example cdat_jax.adam_inverse_sqrt"
        )
        raise TypeError(msg)

    def init(params: PyTree) -> TunedState:
        step = jnp.zeros((), dtype=jnp.int32)
        return TunedState(base.init(params), init_tuner(params), step)

    def update(
        updates: PyTree, state: TunedState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, TunedState]:
        def step() -> tuple[PyTree, Any]:
            moved: tuple[PyTree, Any] = base.update(updates, state.base, params, **extra_args)
            return moved

        def keep() -> tuple[PyTree, Any]:
            direction, like = jax.eval_shape(step)
            zeros = jax.tree.map(jnp.zeros_like, direction)
            old = jax.tree.map(
                lambda leaf, new: leaf if leaf.dtype == new.dtype else leaf.astype(new.dtype),
                jax.tree.map(jnp.asarray, state.base), like,
            )  # fmt: skip
            return zeros, old

        def find_direction() -> Direction:
            direction, moved = step()
            return direction, inverse_sqrt and inverse_square_root(inverse_sqrt(moved))

        # Whether the step counts is known only after the measurement. The base moves a second time
        # then, which is elementwise as a rule and happens in place: to keep its new state as well
        # as the old one until here takes longer, and twice the memory.
        tuner = tune(find_direction, updates, state.tuner, params, **extra_args)
        taken = tuner.info.skipped == state.tuner.info.skipped
        direction, base_state = cond(taken, step, keep)
        factor = learning_rate(state.step) if callable(learning_rate) else learning_rate
        moved = scaled(factor * tuner.learning_rate, direction)
        return moved, TunedState(base_state, tuner, state.step + taken)

    return optax.GradientTransformationExtraArgs(init, update)


def cdat(
    base: optax.GradientTransformation,
    *,
    learning_rate: float | Callable[[jax.Array], Any] = 1.0,
    sigma: Any = 2.0,
    decay: Any = 0.9,
    eps: Any = 0.0,
    initial_learning_rate: Any = None,
    max_growth: Any = None,
    max_learning_rate: Any = None,
    curvature: str = "auto",
    every: Any = 1,
) -> optax.GradientTransformationExtraArgs:
    """Wrap a base transformation with the CDAT rate: `tuned` with `cdat_core.tuners.cdat`.

    Parameters
    ----------
    base : optax.GradientTransformation
        The optimizer at learning rate 1, such as ``optax.adam(1.0)``.
    learning_rate : float or callable
        Multiplier of the tuned rate, or a schedule of it; see `tuned`.
    sigma, decay, eps, initial_learning_rate, max_growth, max_learning_rate
        See `cdat_core.tuners.cdat`.
    curvature, every
        See `scale_by_tuner`.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Its state is a `TunedState`.

    Examples
    --------
    >>> import optax
    >>> from cdat_jax import cdat
    >>> solver = cdat(optax.adam(1.0), sigma=1.9, initial_learning_rate=1e-4, max_growth=1.1)
    """
    tuner = tuners.cdat(
        sigma,
        decay,
        eps,
        initial_learning_rate=initial_learning_rate,
        max_growth=max_growth,
        max_learning_rate=max_learning_rate,
    )
    return tuned(base, tuner, learning_rate=learning_rate, curvature=curvature, every=every)
