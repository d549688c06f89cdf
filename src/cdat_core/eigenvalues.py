"""The dominant eigenvalue of a Hessian, matrix-free."""

from __future__ import annotations

from typing import Generic, NamedTuple

from cdat_core import _validation
from cdat_core._arrays import counter, safe_reciprocal, sqrt_nonnegative
from cdat_core._types import HessianVectorProduct, InnerProductSpace, Scalar, V


class PowerIterationState(NamedTuple, Generic[V]):
    """Where a power iteration stands; pass it back to `power_iteration` for a warm start.

    Attributes
    ----------
    vector : V
        The current iterate, of unit norm (zero if the operator annihilated it).
    eigenvalue : Scalar
        The Rayleigh quotient of the last vector that was multiplied.
    residual_norm : Scalar
        ``|H v - eigenvalue * v|`` for that vector: a symmetric H has an eigenvalue at most this far
        from `eigenvalue`.
    num_matvecs : Scalar
        Hessian-vector products spent so far, int32.
    """

    vector: V
    eigenvalue: Scalar
    residual_norm: Scalar
    num_matvecs: Scalar


def power_iteration(
    hvp: HessianVectorProduct[V],
    state: PowerIterationState[V] | V,
    *,
    num_matvecs: int,
    space: InnerProductSpace[V],
) -> PowerIterationState[V]:
    """Run `num_matvecs` steps of power iteration towards the eigenvalue of largest magnitude.

    During training the Hessian changes little from step to step, so a few steps from the last state
    track the sharpness well.

    Parameters
    ----------
    hvp : HessianVectorProduct
        The operator ``v -> H v``, symmetric.
    state : PowerIterationState or V
        A start vector (any non-zero length), or the state of an earlier call. A zero start vector
        gives the eigenvalue 0.
    num_matvecs : int
        Products to spend, at least 1. The loop is unrolled; adapters that compile put their own
        loop around ``num_matvecs=1``.
    space : InnerProductSpace
        The inner product of the vectors.

    Returns
    -------
    PowerIterationState
        The new iterate with its Rayleigh quotient and residual.
    """
    num_matvecs = _validation.count("num_matvecs", num_matvecs)
    if not isinstance(state, PowerIterationState):
        norm = sqrt_nonnegative(space.vdot(state, state))
        unit = space.scale(safe_reciprocal(norm), state)
        state = PowerIterationState(unit, 0 * norm, 0 * norm, counter(norm))
    vector, eigenvalue, residual_norm, spent = state
    for _ in range(num_matvecs):
        product = hvp(vector)
        eigenvalue = space.vdot(vector, product)
        residual = space.add_scale(product, -eigenvalue, vector)
        residual_norm = sqrt_nonnegative(space.vdot(residual, residual))
        length = sqrt_nonnegative(space.vdot(product, product))
        vector = space.scale(safe_reciprocal(length), product)
    return PowerIterationState(vector, eigenvalue, residual_norm, spent + num_matvecs)
