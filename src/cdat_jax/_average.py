"""An average of the parameters along the run, as an Optax transformation."""

from __future__ import annotations

from typing import Any, NamedTuple
from typing import cast as typing_cast

import jax
import jax.numpy as jnp
import optax

from cdat_core import tuners
from cdat_jax._spaces import PyTree

_NO_AVERAGE = (
    "found no average of the parameters in this state; build the solver with "
    "cdat(base, average=True), or end its chain with cdat_jax.average_params()"
)


class AverageParamsState(NamedTuple):
    """State of `average_params`.

    Attributes
    ----------
    step : jax.Array
        Steps in the average, int32.
    average : Any
        The average, in the dtypes of the parameters; the initial parameters before the first step.
    wide : Any
        The same average in float32 where the parameters are narrower, which could not hold small
        changes; None elsewhere.
    """

    step: jax.Array
    average: PyTree
    wide: PyTree


def average_params() -> optax.GradientTransformationExtraArgs:
    """Keep an average of the parameters, for evaluation.

    Put it last in a chain: it leaves the updates unchanged and averages the parameters after them,
    ``average += weight * (params + updates - average)``. The weight is
    `cdat_core.tuners.average_weight`: the average remembers about the last ninth of the run,
    whatever its length. `averaged_params` finds the average in the state.

    A step whose updates are all zero does not count. So steps that a tuner skips, and the steps
    between two updates of ``optax.MultiSteps``, leave the average unchanged.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Its state is an `AverageParamsState`. ``update`` needs `params`.

    Examples
    --------
    >>> import jax.numpy as jnp, optax
    >>> from cdat_jax import average_params, averaged_params
    >>> solver = optax.chain(optax.sgd(0.1), average_params())
    >>> params = jnp.asarray(1.0)
    >>> state = solver.init(params)
    >>> for _ in range(2):
    ...     updates, state = solver.update(params, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> round(float(params), 3), round(float(averaged_params(state)), 3)
    (0.81, 0.819)
    """

    def update(
        updates: PyTree, state: AverageParamsState, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, AverageParamsState]:
        if params is None:
            msg = "average_params averages the parameters: pass `params` when calling `update`"
            raise ValueError(msg)
        moved = jnp.zeros((), dtype=bool)
        for u in jax.tree.leaves(updates):
            moved = moved | jnp.any(u != 0)
        return updates, advance_average(state, params, updates, moved)

    return optax.GradientTransformationExtraArgs(start_average, update)


def averaged_params(state: Any) -> PyTree:
    """Return the averaged parameters, in the dtypes of the parameters.

    Parameters
    ----------
    state : Any
        The state of a solver that keeps an average: of `cdat` without `total_steps` and without
        `sigma`, of `cdat` or `tuned` with ``average=True``, or of a chain that ends with
        `average_params`. The average may be nested in it.

    Returns
    -------
    pytree
        Before the first step, the initial parameters.

    Raises
    ------
    ValueError
        If the state contains no average, or several.

    Examples
    --------
    >>> import jax.numpy as jnp, optax
    >>> from cdat_jax import averaged_params, cdat
    >>> state = cdat(optax.adam(1.0)).init(jnp.asarray(1.0))
    >>> float(averaged_params(state))
    1.0
    """

    def is_average(node: Any) -> bool:
        return isinstance(node, AverageParamsState)

    found = [x for x in jax.tree.leaves(state, is_leaf=is_average) if is_average(x)]
    if not found:
        raise ValueError(_NO_AVERAGE)
    if len(found) > 1:
        msg = (
            f"found {len(found)} averages of the parameters in this state; "
            "pass the part of the state that contains the one you want"
        )
        raise ValueError(msg)
    return found[0].average


def start_average(params: PyTree) -> AverageParamsState:
    """Return the average before the first step."""

    def wide(p: Any) -> jax.Array | None:
        p = jnp.asarray(p)
        dtype = _wide_dtype(p)
        return None if dtype == p.dtype else p.astype(dtype)

    # The average must not share a buffer with the parameters, so that both can be donated.
    average = jax.tree.map(lambda p: jnp.array(p, copy=True), params)
    return AverageParamsState(jnp.zeros((), dtype=jnp.int32), average, jax.tree.map(wide, params))


def advance_average(
    state: AverageParamsState, params: PyTree, updates: PyTree, taken: jax.Array
) -> AverageParamsState:
    """Return the average with the parameters after a step; unchanged if it was not taken."""

    def mixed(new: jax.Array, average: jax.Array, wide: jax.Array | None) -> Any:
        old = average if wide is None else wide
        new = new.astype(old.dtype)
        if jnp.issubdtype(old.dtype, jnp.inexact):
            weight = tuners.average_weight(state.step.astype(old.real.dtype))
            new = old + weight * (new - old)
        new = jnp.where(taken, new, old)
        return new.astype(average.dtype), None if wide is None else new

    moved = optax.apply_updates(params, updates)
    leaves, structure = jax.tree.leaves(moved), typing_cast(Any, jax.tree.structure(moved))
    averages, wides = structure.flatten_up_to(state.average), structure.flatten_up_to(state.wide)
    pairs = [mixed(*leaf) for leaf in zip(leaves, averages, wides, strict=True)]
    return AverageParamsState(
        state.step + taken,
        jax.tree.unflatten(structure, [average for average, _ in pairs]),
        jax.tree.unflatten(structure, [wide for _, wide in pairs]),
    )


def _wide_dtype(p: jax.Array) -> Any:
    if not jnp.issubdtype(p.dtype, jnp.inexact):
        return p.dtype
    return jnp.promote_types(p.dtype, jnp.float32)
