"""The map P^-1/2 for a preconditioned sharpness, also from the state of an Adam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from cdat_core.extend import validation
from cdat_jax._curvature import check_like, tangent_like
from cdat_jax._spaces import PyTree

Preconditioner: TypeAlias = Callable[[PyTree], PyTree] | float | jax.Array


def adam_inverse_sqrt(
    state: Any, *, b2: Any = 0.999, eps: Any = 1e-8, eps_root: Any = 0.0
) -> Callable[[PyTree], PyTree]:
    """Return the map ``v -> P^-1/2 v`` of an Adam, for the argument `inverse_sqrt` of `sharpness`.

    P is the diagonal matrix ``sqrt(v_hat + eps_root) + eps`` by which Adam divided its last update;
    v_hat is the bias-corrected second moment.

    Parameters
    ----------
    state : pytree
        An Optax state with exactly one ``optax.ScaleByAdamState`` in it, after at least one step:
        the state of ``optax.adam`` or ``adamw``, of a chain with it, or of `cdat` around it. Only
        the second moments and the count are used, not the momentum.
    b2, eps, eps_root : float or jax.Array, optional
        Must equal those of the optimizer, because the state does not store them; the defaults are
        Optax's.

    Returns
    -------
    callable
        It maps pytrees shaped like the parameters, and can be an argument or a result of a jitted
        function.

    Raises
    ------
    TypeError, ValueError
        If there is no such state or more than one, if no step has been taken (under ``jax.jit``
        the result is NaN instead), or if a number is out of range.

    Notes
    -----
    ``optax.adamax``, ``radam``, ``yogi`` and ``contrib.adopt`` have a state of the same type but
    divide by something else; write your own callable for them.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, optax
    >>> from cdat_jax import adam_inverse_sqrt, sharpness
    >>> loss = lambda w: 50 * w[0] ** 2 + w[1] ** 2 / 2
    >>> params, solver = jnp.array([1.0, 1.0]), optax.adam(1e-3)
    >>> _, state = solver.update(jax.grad(loss)(params), solver.init(params))
    >>> found = sharpness(loss, params, num_matvecs=2, inverse_sqrt=adam_inverse_sqrt(state))
    >>> round(float(found), 3)  # |g| at the first step, here 100 and 1, divides 100 and 1
    1.0
    """
    b2 = validation.fraction("b2", b2)
    eps = validation.nonnegative("eps", eps)
    eps_root = validation.nonnegative("eps_root", eps_root)
    adam = _only_adam(state)
    if not isinstance(adam.count, jax.core.Tracer) and int(adam.count) == 0:
        msg = "state must come from an Adam after at least one step, got one with count 0"
        raise ValueError(msg)
    correction = 1.0 - b2**adam.count

    def factor(second: jax.Array) -> jax.Array:
        # bfloat16 has too few digits for a sum with eps.
        wide = second.astype(jnp.promote_types(second.dtype, jnp.float32))
        return jax.lax.rsqrt(jnp.sqrt(wide / correction + eps_root) + eps).astype(wide.dtype)

    factors = jax.tree.map(factor, adam.nu)
    apply: Callable[[PyTree], PyTree] = jax.tree_util.Partial(  # type: ignore[no-untyped-call]
        _scale_entries, factors
    )
    return apply


def inverse_square_root(inverse_sqrt: Preconditioner | None) -> Callable[[PyTree], PyTree] | Any:
    """Return `inverse_sqrt` as a pytree for `cdat_core.preconditioned`, or None."""
    if callable(inverse_sqrt):
        if not isinstance(inverse_sqrt, jax.tree_util.Partial):
            inverse_sqrt = jax.tree_util.Partial(inverse_sqrt)  # type: ignore[no-untyped-call]
        return jax.tree_util.Partial(_apply, inverse_sqrt)  # type: ignore[no-untyped-call]
    if isinstance(inverse_sqrt, tuple | list | dict):
        msg = (
            "inverse_sqrt must be a callable or a number, "
            f"got {type(inverse_sqrt).__name__}; "
            "if it is the state of an Adam, pass adam_inverse_sqrt(state)"
        )
        raise TypeError(msg)
    return None if inverse_sqrt is None else validation.positive("inverse_sqrt", inverse_sqrt)


def _apply(inverse_sqrt: Callable[[PyTree], PyTree], v: PyTree) -> PyTree:
    return tangent_like(v, inverse_sqrt(v), name="inverse_sqrt(v)")


def _only_adam(state: Any) -> optax.ScaleByAdamState:
    def is_adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    found = [node for node in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(node)]
    if len(found) != 1:
        msg = (
            f"state must contain exactly one optax.ScaleByAdamState, got {len(found)} "
            f"in {type(state).__name__}; pass the part for these params, or your own callable as "
            "inverse_sqrt"
        )
        raise ValueError(msg)
    return found[0]


@jax.jit
def _scale_entries(factors: PyTree, v: PyTree) -> PyTree:
    check_like(v, factors, name="the second moments of the Adam state")
    return jax.tree.map(lambda f, x: (f * x).astype(x.dtype), factors, v)
