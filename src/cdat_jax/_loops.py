"""Loops and conditions that XLA compiles once.

A Python loop over Hessian-vector products would be unrolled: the program would grow with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import cdat_core
from cdat_core import extend
from cdat_jax._spaces import PyTree, TreeSpace, scalar_dtype


def lanczos(
    hvp: cdat_core.HessianVectorProduct[PyTree],
    start: PyTree,
    *,
    num_matvecs: int,
    space: TreeSpace,
    reorthogonalize: bool = True,
) -> cdat_core.LanczosResult[PyTree]:
    """Run `cdat_core.lanczos` as one ``lax.scan``, with the vectors stacked in one pytree.

    Parameters
    ----------
    hvp, start, num_matvecs, space, reorthogonalize
        See `cdat_core.lanczos`.

    Returns
    -------
    cdat_core.LanczosResult
        The same as from `cdat_core.lanczos`, up to rounding.
    """
    first = extend.lanczos_start(start, space=space)
    first = first._replace(previous=first.vector)
    rows = None
    if reorthogonalize:
        rows = jax.tree.map(lambda v: jnp.zeros((num_matvecs, *v.shape), v.dtype), first.vector)

    def step(carry: Any, index: jax.Array) -> Any:
        state, rows = carry
        remove_all = None
        if rows is not None:
            rows = jax.tree.map(lambda r, v: r.at[index].set(v), rows, state.vector)
            remove_all = partial(_remove, rows, space)
        state, alpha = extend.lanczos_step(hvp, state, remove_all, space=space)
        return (state, rows), (alpha, state.beta)

    (state, rows), (diagonal, off_diagonal) = jax.lax.scan(
        step, (first, rows), jnp.arange(num_matvecs)
    )
    return cdat_core.LanczosResult(
        diagonal=diagonal,
        off_diagonal=off_diagonal[:-1],
        vectors=() if rows is None else _unstacked(rows, num_matvecs),
        residual_norm=state.beta,
        num_valid=state.num_valid,
        num_matvecs=jnp.full((), num_matvecs, dtype=jnp.int32),
    )


def over(function: Callable[[PyTree], PyTree], vectors: Sequence[PyTree]) -> Sequence[PyTree]:
    """Return the results of `function` on each vector, by one ``lax.map``."""
    rows = jax.tree.map(lambda *leaves: jnp.stack(leaves), *vectors)
    return _unstacked(jax.lax.map(function, rows), len(vectors))


def cond(condition: jax.Array, if_true: Callable[[], Any], if_false: Callable[[], Any]) -> Any:
    """Return ``lax.cond``; outside of ``jax.jit``, where that always recompiles, use ``if``."""
    if isinstance(condition, jax.core.Tracer):
        return jax.lax.cond(condition, if_true, if_false)
    return if_true() if condition else if_false()


def _unstacked(rows: PyTree, number: int) -> tuple[PyTree, ...]:
    leaves, structure = jax.tree.flatten(rows)
    return tuple(jax.tree.unflatten(structure, [leaf[i] for leaf in leaves]) for i in range(number))


def _remove(rows: PyTree, space: TreeSpace, x: PyTree) -> PyTree:
    """Return `x` minus its projection on the orthonormal `rows`; rows of zeros change nothing."""
    coefficients = jax.vmap(space.vdot, in_axes=(0, None))(rows, x)

    def moved(leaf: jax.Array, row: jax.Array) -> jax.Array:
        # Not a matrix product: accelerators compute those in reduced precision.
        wide = row.astype(jnp.promote_types(row.dtype, scalar_dtype(row)))
        factors = coefficients.astype(scalar_dtype(row)).reshape(-1, *(1,) * leaf.ndim)
        return (leaf - jnp.sum(factors * wide, axis=0)).astype(leaf.dtype)

    return jax.tree.map(moved, x, rows)
