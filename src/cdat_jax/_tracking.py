"""The sharpness in each step of training: a few Lanczos steps from the last eigenvector."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import cdat_core
from cdat_core.extend import validation
from cdat_jax import _loops as loops
from cdat_jax._curvature import Objective, hessian_product, linearized_gradient, require_scalar
from cdat_jax._probes import random_signs, warm_start
from cdat_jax._spaces import PyTree, TreeSpace, scalar_dtype

FIRST_MATVECS = 20
"""The smallest number of products after a random start."""


class SharpnessTracker:
    """Measure the largest eigenvalue of P^-1/2 H P^-1/2 in each step, from a warm start.

    Parameters
    ----------
    curvature : str
        "finite_difference" multiplies by the Hessian with finite differences, every other method
        with the derivative of the gradient.
    num_matvecs : int
        Hessian-vector products from a warm start.

    Raises
    ------
    TypeError, ValueError
        If `num_matvecs` is not a positive integer, or `curvature` has no Hessian-vector products.
    """

    def __init__(self, *, curvature: str, num_matvecs: int) -> None:
        if curvature == "gauss_newton":
            msg = (
                'curvature="gauss_newton" has no Hessian-vector products, which a tuner that needs '
                'the sharpness takes; use curvature="auto" or "finite_difference"'
            )
            raise ValueError(msg)
        self._finite_difference = curvature == "finite_difference"
        self._num_matvecs = validation.count("sharpness_matvecs", num_matvecs)

    def init(self, params: PyTree) -> PyTree:
        """Return the vector before the first measurement, which is zero."""
        return jax.tree.map(jnp.zeros_like, params)

    def measure(
        self,
        objective: Objective,
        params: PyTree,
        vector: PyTree,
        inverse_sqrt: Callable[[PyTree], PyTree] | Any,
    ) -> tuple[jax.Array, PyTree]:
        """Return the sharpness and its eigenvector, where the next measurement starts.

        If `vector` is zero, the Lanczos method starts from random signs and is restarted from its
        own result until it has taken `FIRST_MATVECS` products. The signs are the same in each step,
        so the state contains no random key.

        Parameters
        ----------
        objective : callable
            ``params -> loss``.
        params, vector : pytree
            The point, and the last eigenvector.
        inverse_sqrt : callable, number or None
            P^-1/2.
        """
        if not jax.tree.leaves(params):
            return jnp.zeros((), dtype=scalar_dtype(params)), vector
        space = TreeSpace()
        product = self._product(objective, params)
        if inverse_sqrt is not None:
            product = cdat_core.preconditioned(product, inverse_sqrt, space=space)
        noise = random_signs(params, 1, None)[0]

        def restarted(_: jax.Array, found: tuple[jax.Array, PyTree]) -> tuple[jax.Array, PyTree]:
            top = cdat_core.top_eigenvalues(
                product,
                warm_start([found[1]], noise),
                num_matvecs=self._num_matvecs,
                space=space,
                process=loops.lanczos,
            )
            return top.values[0], top.vectors[0]

        cold = space.vdot(vector, vector) == 0
        rounds = jnp.where(cold, -(-FIRST_MATVECS // self._num_matvecs), 1)
        start = (jnp.zeros((), dtype=scalar_dtype(params)), vector)
        found: tuple[jax.Array, PyTree] = jax.lax.fori_loop(0, rounds, restarted, start)
        return found

    def _product(
        self, objective: Objective, params: PyTree
    ) -> cdat_core.HessianVectorProduct[PyTree]:
        if self._finite_difference:
            gradient = jax.grad(require_scalar(objective))
            linear = cdat_core.finite_difference_hvp(gradient, params, space=TreeSpace())
        else:
            linear = linearized_gradient(objective, params)
        return functools.partial(hessian_product, linear)
