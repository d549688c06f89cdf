"""A base optimizer and its tuner as one transformation, which also protects the base's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from cdat_core.extend import name_guards, validation
from cdat_core.linesearch import LineSearch
from cdat_core.tuners import GuardOptions, Tuner
from cdat_jax._average import AverageParamsState, advance_average, start_average
from cdat_jax._loops import cond
from cdat_jax._preconditioner import inverse_square_root
from cdat_jax._rate import Direction, ScaleByTunerState, tuning
from cdat_jax._rule import chosen_tuner, is_self_tuning
from cdat_jax._spaces import PyTree
from cdat_jax._transform import scaled


class TunedState(NamedTuple):
    """State of `tuned` and `cdat`.

    Attributes
    ----------
    base : Any
        The state of the base transformation.
    tuner : ScaleByTunerState
        The tuner's state, the learning rate and what the last step measured.
    step : jax.Array
        Steps taken, int32; the argument of a `learning_rate` schedule. Skipped steps do not count.
    average : AverageParamsState or None
        The average of the parameters, if one is kept; see `averaged_params`.
    """

    base: Any
    tuner: ScaleByTunerState
    step: jax.Array
    average: AverageParamsState | None = None


def tuned(
    base: optax.GradientTransformation,
    tuner_or_search: Tuner[Any] | LineSearch,
    *,
    learning_rate: float | Callable[[jax.Array], Any] = 1.0,
    curvature: str = "auto",
    every: Any = None,
    sharpness_matvecs: int = 8,
    inverse_sqrt: Callable[[Any], Callable[[PyTree], PyTree]] | None = None,
    average: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Wrap a base transformation with a tuned learning rate.

    Equal to ``optax.chain(base, scale_by_tuner(...))``, with four additions. A step that is
    skipped because something is not finite leaves the state of `base` unchanged too. The tuned rate
    can be multiplied by a factor or a schedule. The sharpness can be preconditioned like `base`. An
    average of the parameters can be kept. ``update`` takes the same arguments as for
    `scale_by_tuner`.

    Parameters
    ----------
    base : optax.GradientTransformation
        The optimizer with learning rate 1, such as ``optax.adam(1.0)``.
    tuner_or_search : cdat_core.tuners.Tuner or cdat_core.linesearch.LineSearch
        The rule for the rate.
    learning_rate : float or callable
        Multiplier of the tuned rate, or a schedule ``step -> multiplier`` (warm-up, decay). It is
        applied after tuning, so the tuner does not see it.
    curvature, every, sharpness_matvecs
        See `scale_by_tuner`.
    inverse_sqrt : callable, optional
        For a tuner that needs the sharpness. A function from the state of `base` after its update
        to the map ``v -> P^-1/2 v``, where P is the preconditioner by which `base` divided that
        update; the sharpness is then the largest eigenvalue of ``P^-1/2 H P^-1/2``. For
        ``optax.adam(1.0)`` it is `adam_inverse_sqrt`; set other hyperparameters of Adam with
        ``functools.partial``. By default P is the identity.
    average : bool
        Keep an average of the parameters; see `average_params` and `averaged_params`. It takes the
        updates as they are: if a transformation that changes them follows, end the chain with
        `average_params` instead.

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
            "inverse_sqrt must be a callable from the state of base to the map v -> P^-1/2 v, "
            f"got {inverse_sqrt!r}; for example cdat_jax.adam_inverse_sqrt"
        )
        raise TypeError(msg)
    if not isinstance(average, bool):
        msg = f"average must be True or False, got {average!r}"
        raise TypeError(msg)

    def init(params: PyTree) -> TunedState:
        step = jnp.zeros((), dtype=jnp.int32)
        kept = start_average(params) if average else None
        return TunedState(base.init(params), init_tuner(params), step, kept)

    def update(
        updates: PyTree, state: TunedState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, TunedState]:
        def update_base() -> tuple[PyTree, Any]:
            direction, base_state = base.update(updates, state.base, params, **extra_args)
            return direction, base_state

        def keep_base() -> tuple[PyTree, Any]:
            direction, like = jax.eval_shape(update_base)
            zeros = jax.tree.map(jnp.zeros_like, direction)
            old = jax.tree.map(
                lambda leaf, new: leaf if leaf.dtype == new.dtype else leaf.astype(new.dtype),
                jax.tree.map(jnp.asarray, state.base), like,
            )  # fmt: skip
            return zeros, old

        def find_direction() -> Direction:
            direction, base_state = update_base()
            if inverse_sqrt is None:
                return Direction(direction)
            return Direction(direction, inverse_square_root(inverse_sqrt(base_state)))

        # Only the measurement shows whether the step is skipped, so the base is updated again after
        # it. That is mostly elementwise and in place; keeping both the old and the new state until
        # then would take longer, and twice the memory.
        tuner = tune(find_direction, updates, state.tuner, params, **extra_args)
        taken = tuner.info.skipped == state.tuner.info.skipped
        direction, base_state = cond(taken, update_base, keep_base)
        factor = learning_rate(state.step) if callable(learning_rate) else learning_rate
        scaled_updates = scaled(factor * tuner.learning_rate, direction)
        kept = state.average
        if kept is not None:
            kept = advance_average(kept, params, scaled_updates, taken)
        return scaled_updates, TunedState(base_state, tuner, state.step + taken, kept)

    return optax.GradientTransformationExtraArgs(init, update)


@name_guards
def cdat(
    base: optax.GradientTransformation,
    *,
    total_steps: Any = None,
    momentum: Any = 0.9,
    full_batch: bool = False,
    average: bool | None = None,
    learning_rate: float | Callable[[jax.Array], Any] = 1.0,
    sigma: Any = None,
    decay: Any = None,
    eps: Any = None,
    curvature: str = "auto",
    every: Any = None,
    **guards: Unpack[GuardOptions],
) -> optax.GradientTransformationExtraArgs:
    """Wrap a base transformation with a rate that tunes itself, or with the published CDAT rule.

    Without any of the hyperparameters of the published rule (sigma, decay, eps and the guards), the
    rate is that of `cdat_core.tuners.self_tuning`: it is made for mini-batches, and nothing has to
    be chosen. On a full batch say ``full_batch=True``. With any of them it is
    `cdat_core.tuners.cdat`.

    Parameters
    ----------
    base : optax.GradientTransformation
        The optimizer with learning rate 1, such as ``optax.adam(1.0)``.
    total_steps : int or jax.Array, optional
        The length of the run, skipped steps included. The rate falls to zero over its last 30 %,
        and is zero afterwards; see `cdat_core.tuners.with_cooldown`. A run may be resumed with
        another number: the cooldown moves. It may be a traced array.
    momentum : float or jax.Array
        The momentum of `base`, or Adam's b1, in [0, 1). Only the self-tuning rule uses it: it aims
        at 0.7 times 2 / (1 + momentum).
    full_batch : bool
        Each step sees the same, complete data: `cdat_core.tuners.full_batch`, the published rule
        with sigma 1.9, no average and a cautious start, measured in each step.
    average : bool, optional
        Keep an average of the parameters; see `averaged_params`. By default, for the self-tuning
        rule without `total_steps`: its rate does not fall, so evaluate the average.
    learning_rate : float or callable
        Multiplier of the tuned rate, or a schedule of it; see `tuned`.
    sigma, decay, eps
        See `cdat_core.tuners.cdat`, which any of them chooses; the others are then 2, 0.9 and 0.
    curvature, every
        See `scale_by_tuner`. In the cooldown nothing is measured.
    initial_learning_rate, max_growth, max_learning_rate
        Guards on the rate; see `cdat_core.tuners.cdat`. Any of them chooses that rule.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Its state is a `TunedState`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the kind described.

    See Also
    --------
    make_step : The cheapest step for a rule that does not measure in each step.

    Examples
    --------
    >>> import optax
    >>> from cdat_jax import cdat
    >>> solver = cdat(optax.adam(1.0), total_steps=10_000)
    >>> published = cdat(optax.adam(1.0), sigma=1.9, initial_learning_rate=1e-4, max_growth=1.1)
    """
    rule: dict[str, Any] = {"full_batch": full_batch, "sigma": sigma, "decay": decay, "eps": eps}
    rule |= guards
    if average is None:
        average = total_steps is None and is_self_tuning(**rule)
    tuner = chosen_tuner(total_steps=total_steps, momentum=momentum, every=every, **rule)
    return tuned(base, tuner, learning_rate=learning_rate, curvature=curvature, average=average)
