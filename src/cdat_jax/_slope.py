"""Loss and slope along a direction in one evaluation, for the trials of a line search."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cdat_jax._curvature import Objective, needs_reverse, require_scalar, tangent_like
from cdat_jax._spaces import PyTree, TreeSpace


def value_and_slope(
    value_fn: Objective, params: PyTree, direction: PyTree
) -> tuple[jax.Array, jax.Array]:
    """Return the loss and its derivative along `direction` at `params`.

    One forward-mode pass gives both, without a gradient. A ``custom_vjp`` has no forward-mode rule;
    a loss with one uses the inner product of the direction and the gradient.

    Parameters
    ----------
    value_fn : callable
        ``params -> loss``, a scalar, or ``params -> (loss, aux)``.
    params, direction : pytree
        The point and the direction u, cast to the dtypes of `params`.

    Returns
    -------
    value, slope : jax.Array
        0-d arrays.
    """
    objective, u = require_scalar(value_fn), tangent_like(params, direction)

    if not needs_reverse(objective, params, u):
        value, slope = jax.jvp(objective, (params,), (u,))
        return value, slope
    value, grad = jax.value_and_grad(objective)(params)
    return value, TreeSpace().vdot(jax.tree.map(jnp.conj, grad), u)
