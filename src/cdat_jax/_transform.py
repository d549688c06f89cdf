"""Tuners and line searches as Optax transformations, called exactly like Optax's line searches."""

from __future__ import annotations

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from cdat_core.extend import name_guards
from cdat_core.linesearch import LineSearch
from cdat_core.tuners import GuardOptions, Tuner
from cdat_jax._rate import Direction, ScaleByTunerState, tuning
from cdat_jax._rule import chosen_tuner
from cdat_jax._spaces import PyTree


def scale_by_tuner(
    tuner_or_search: Tuner[Any] | LineSearch,
    *,
    curvature: str = "auto",
    every: Any = None,
    sharpness_matvecs: int = 8,
) -> optax.GradientTransformationExtraArgs:
    """Scale the updates by a tuned learning rate.

    The incoming updates are the direction u, so put this last in a chain, after an optimizer with
    learning rate 1. Its ``update`` takes the same arguments as Optax's line searches, so swapping
    one for the other changes one line::

        solver = optax.chain(optax.adam(1.0), cdat_jax.scale_by_tuner(tuner))
        updates, state = solver.update(
            grads, state, params, value=value, grad=grads, value_fn=loss_fn, batch=batch
        )

    `value` and `grad` are the loss and its raw gradient at `params`. `value_fn` is the same loss on
    the same batch. It is called as ``value_fn(params, **extra)``, where ``extra`` holds the other
    keyword arguments of ``update`` that are parameters of `value_fn` (all of them if it takes
    ``**kwargs``). It may return ``(loss, aux)``; `value` is then the loss alone.

    If anything measured is not finite, the updates are zero, the tuner's averages do not change,
    and ``state.info.skipped`` goes up by one. The optimizers earlier in the chain have then already
    used the bad gradient; `tuned` and `cdat` protect their state too.

    Parameters
    ----------
    tuner_or_search : cdat_core.tuners.Tuner or cdat_core.linesearch.LineSearch
        The rule for the rate. For a tuner that needs the sharpness, it is the largest eigenvalue
        of the Hessian with respect to all of `params`; `tuned` can also precondition it. A line
        search evaluates `value_fn` in a ``lax.while_loop``, and the slope of each trial if the
        search needs it.
    curvature : str
        How the curvature is computed; see `measure`.
    every : int or jax.Array, optional
        Measure curvature and sharpness in the steps 0, `every`, 2 `every` and so on, in place of
        the tuner's own schedule, which for most tuners is each step. Skipped steps count; the step
        after a skipped measurement measures too. Steps without a measurement do not pay for one,
        except under ``jax.vmap``, which computes both branches of a condition. The tuner sees their
        loss only. Such a step is skipped if the loss or ``<grad, updates>`` is not finite. See
        also `make_step`.
    sharpness_matvecs : int
        Hessian-vector products per measurement of the sharpness, starting from the last
        eigenvector; the first measurement starts from random signs and takes at least 20. During a
        measurement as many vectors shaped like `params` are in memory.

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
        new_state = tune(lambda: Direction(updates), updates, state, params, **extra_args)
        return scaled(new_state.learning_rate, updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


@name_guards
def scale_by_cdat(
    *,
    total_steps: Any = None,
    momentum: Any = 0.9,
    full_batch: bool = False,
    sigma: Any = None,
    decay: Any = None,
    eps: Any = None,
    curvature: str = "auto",
    every: Any = None,
    **guards: Unpack[GuardOptions],
) -> optax.GradientTransformationExtraArgs:
    """Scale the updates by the CDAT rate: `scale_by_tuner` with the rule that `cdat` chooses.

    Without `total_steps`, end the chain with `average_params` and evaluate the average.

    Parameters
    ----------
    total_steps, momentum, full_batch
        See `cdat`.
    sigma, decay, eps
        See `cdat_core.tuners.cdat`; any of them chooses that rule.
    curvature, every
        See `scale_by_tuner`.
    initial_learning_rate, max_growth, max_learning_rate
        Guards on the rate; see `cdat_core.tuners.cdat`. Any of them chooses that rule.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Its state is a `ScaleByTunerState`.

    Examples
    --------
    >>> import optax
    >>> from cdat_jax import scale_by_cdat
    >>> solver = optax.chain(optax.adam(1.0), scale_by_cdat(total_steps=10_000))
    """
    tuner = chosen_tuner(
        total_steps=total_steps, momentum=momentum, full_batch=full_batch, every=every,
        sigma=sigma, decay=decay, eps=eps, **guards,
    )  # fmt: skip
    return scale_by_tuner(tuner, curvature=curvature)


def scaled(factor: Any, updates: PyTree) -> PyTree:
    """Return the updates times a factor, with zeros where the product is not finite."""

    def times(u: Any) -> jax.Array:
        # With a check of `u` itself, XLA's loop over its elements takes longer.
        product = factor * jnp.asarray(u)
        return jnp.where(jnp.isfinite(product), product, 0).astype(jnp.asarray(u).dtype)

    return jax.tree.map(times, updates)
