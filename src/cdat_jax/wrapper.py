"""CDAT around a base optimizer, as one transformation that also protects the base's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cdat_core import _validation
from cdat_jax.spaces import PyTree
from cdat_jax.transform import ScaleByTunerState, scale_by_cdat


class CDATState(NamedTuple):
    """State of `cdat`.

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
    """Wrap a base transformation with the CDAT learning rate.

    Equal to ``optax.chain(base, scale_by_cdat(...))`` with two additions: a step that is skipped
    because something was not finite leaves the state of `base` unchanged as well, and the tuned
    rate can be multiplied by a factor or schedule. Call ``update`` as for `scale_by_tuner`.

    Parameters
    ----------
    base : optax.GradientTransformation
        The optimizer at learning rate 1, such as ``optax.adam(1.0)``.
    learning_rate : float or callable
        Multiplier of the tuned rate, or a schedule ``step -> multiplier`` (warm-up, cooling down).
        It is applied after tuning: the tuner does not see it.
    sigma, decay, eps, initial_learning_rate, max_growth, max_learning_rate
        See `cdat_core.tuners.cdat`.
    curvature, every
        See `scale_by_tuner`.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Its state is a `CDATState`.

    Examples
    --------
    >>> import optax
    >>> from cdat_jax import cdat
    >>> solver = cdat(optax.adam(1.0), sigma=1.9, initial_learning_rate=1e-4, max_growth=1.1)
    """
    if not callable(learning_rate):
        learning_rate = _validation.nonnegative("learning_rate", learning_rate)
    base = optax.with_extra_args_support(base)
    scale = scale_by_cdat(
        sigma,
        decay,
        eps,
        initial_learning_rate=initial_learning_rate,
        max_growth=max_growth,
        max_learning_rate=max_learning_rate,
        curvature=curvature,
        every=every,
    )

    def init(params: PyTree) -> CDATState:
        step = jnp.zeros((), dtype=jnp.int32)
        return CDATState(base.init(params), scale.init(params), step)

    def update(
        updates: PyTree, state: CDATState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, CDATState]:
        direction, base_state = base.update(updates, state.base, params, **extra_args)
        scaled, tuner = scale.update(direction, state.tuner, params, **extra_args)
        skip = tuner.info.skipped > state.tuner.info.skipped
        base_state = jax.tree.map(
            lambda new, old: jnp.where(skip, old, new), base_state, state.base
        )
        factor = learning_rate(state.step) if callable(learning_rate) else learning_rate
        scaled = jax.tree.map(lambda u: (factor * u).astype(u.dtype), scaled)
        return scaled, CDATState(base_state, tuner, state.step + ~skip)

    return optax.GradientTransformationExtraArgs(init, update)
