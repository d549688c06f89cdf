"""Start vectors for the estimators of the spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cdat_jax._spaces import PyTree, TreeSpace

WARM_NOISE = 0.1
"""Length of the random part of a warm start, without which a new eigenvalue could be missed."""


def random_signs(params: PyTree, number: int, key: Any) -> list[PyTree]:
    """Return pytrees of random signs shaped like `params`; without a key, always the same."""
    key = jax.random.key(0) if key is None else key
    try:
        keys = jax.random.split(key, number)
    except (TypeError, ValueError) as error:
        msg = f"key must be a JAX random key, got {key!r}; for example jax.random.key(0)"
        raise TypeError(msg) from error
    leaves, structure = jax.tree.flatten(params)

    def draw(key: jax.Array) -> PyTree:
        own = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(structure, list(map(_signs, own, leaves)))

    return [draw(key) for key in keys]


def warm_start(vectors: Sequence[PyTree], noise: PyTree) -> PyTree:
    """Return the sum of unit vectors, plus `noise` scaled to the length `WARM_NOISE`."""
    space = TreeSpace()
    total = space.scale(WARM_NOISE / jnp.sqrt(space.vdot(noise, noise)), noise)
    for vector in vectors:
        total = space.add_scale(total, 1.0, vector)
    return total


def _signs(key: jax.Array, like: jax.Array) -> jax.Array:
    if jnp.issubdtype(like.dtype, jnp.complexfloating):
        real, imaginary = jax.random.split(key)
        return jax.lax.complex(_signs(real, like.real), _signs(imaginary, like.imag))
    one = jnp.ones_like(like)  # keeps the sharding of the parameter
    return jnp.where(jax.random.bernoulli(key, shape=like.shape), one, -one)
