"""Extreme eigenvalues of a Hessian, matrix-free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Literal, NamedTuple

from cdat_core import _validation
from cdat_core._arrays import counter, namespace, safe_reciprocal, sqrt_nonnegative
from cdat_core._krylov import LanczosResult, lanczos
from cdat_core._tridiagonal import ritz_decomposition
from cdat_core._types import HessianVectorProduct, InnerProductSpace, Scalar, V


class PowerIterationState(NamedTuple, Generic[V]):
    """The state of a power iteration; pass it back to `power_iteration` for a warm start.

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

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import ArraySpace
    >>> H = np.diag([1.0, 2.0, 8.0])
    >>> state = power_iteration(lambda v: H @ v, np.ones(3), num_matvecs=20, space=ArraySpace())
    >>> round(float(state.eigenvalue), 9), int(state.num_matvecs)
    (8.0, 20)

    Notes
    -----
    Squared lengths must stay in the range of the scalars. In float32 a start vector or a product
    shorter than about 1e-19 counts as zero; one longer than 1e19 has the length inf, and the
    iterate becomes zero.
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


class TopEigenvalues(NamedTuple, Generic[V]):
    """Eigenvalues at the ends of a spectrum; pass it back to `top_eigenvalues` as a warm start.

    Attributes
    ----------
    values : array
        The eigenvalues, descending; shape (k,), or (2 k,) for both ends.
    vectors : tuple of V
        An approximate eigenvector of unit norm for each value. Its inner product with the start
        vector is not negative.
    residual_norms : array
        ``|H v - value * v|`` for each pair, up to rounding errors of H: an eigenvalue of H lies
        at most this far from the value.
    num_matvecs : Scalar
        Hessian-vector products spent by this call, int32.
    """

    values: Scalar
    vectors: tuple[V, ...]
    residual_norms: Scalar
    num_matvecs: Scalar


def top_eigenvalues(
    hvp: HessianVectorProduct[V],
    start: TopEigenvalues[V] | V,
    *,
    k: int = 1,
    num_matvecs: int,
    space: InnerProductSpace[V],
    which: Literal["largest", "smallest", "both"] = "largest",
    process: Callable[..., LanczosResult[V]] = lanczos,
) -> TopEigenvalues[V]:
    """Return the k algebraically largest (or smallest) eigenvalues, by the Lanczos method.

    Parameters
    ----------
    hvp : HessianVectorProduct
        The operator ``v -> H v``, symmetric.
    start : V or TopEigenvalues
        A start vector, best a random one. Given the result of an earlier call, the sum of its
        vectors is the start, which saves products when H has changed a little. Beware: once the
        vectors have converged and H no longer changes, their sum has no component in the rest of
        the spectrum, and an eigenvalue that has become the largest stays hidden. Add noise to the
        sum if that matters.
    k : int, optional
        How many eigenvalues at each end.
    num_matvecs : int
        Products to spend, at least k (2 k for both ends). About 10 + 2 k find well separated
        eigenvalues to a few digits. All Lanczos vectors are kept in memory.
    space : InnerProductSpace
        The inner product of the vectors.
    which : {"largest", "smallest", "both"}, optional
        The end of the spectrum, by sign, not by magnitude; with ``"both"`` the k largest are
        followed by the k smallest, from the same products.
    process : callable, optional
        A replacement for `lanczos` with the same signature, for adapters that compile the loop.

    Returns
    -------
    TopEigenvalues
        The pairs with their residuals. If the process ends early with fewer pairs, the last entries
        have the value 0, a zero vector and the residual inf; after a zero start all entries do. An
        eigenvalue of higher multiplicity is found only once.

    Raises
    ------
    TypeError, ValueError
        If `k` or `num_matvecs` is not an integer >= 1, if `num_matvecs` is too small for `k`, or
        if `which` is unknown.

    See Also
    --------
    lanczos : The process, its breakdown and its range.
    power_iteration : Two vectors in memory, slower convergence.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import ArraySpace
    >>> eigenvalues = np.array([9.0, 4.0, 1.0, 0.0, -3.0])
    >>> found = top_eigenvalues(
    ...     lambda v: eigenvalues * v,
    ...     np.ones(5),
    ...     k=1,
    ...     num_matvecs=5,
    ...     space=ArraySpace(),
    ...     which="both",
    ... )
    >>> found.values.round(12).tolist()
    [9.0, -3.0]
    """
    k = _validation.count("k", k)
    num_matvecs = _validation.count("num_matvecs", num_matvecs)
    if which not in {"largest", "smallest", "both"}:
        msg = f"which must be 'largest', 'smallest' or 'both', got {which!r}"
        raise ValueError(msg)
    wanted = 2 * k if which == "both" else k
    if wanted > num_matvecs:
        msg = (
            f"num_matvecs must be at least {'2 * k' if which == 'both' else 'k'}, "
            f"got num_matvecs={num_matvecs} and k={k}"
        )
        raise ValueError(msg)
    vector = _sum(start.vectors, space) if isinstance(start, TopEigenvalues) else start
    run = process(hvp, vector, num_matvecs=num_matvecs, space=space)
    ritz = ritz_decomposition(run.diagonal, run.off_diagonal, run.num_valid)
    xp = namespace(run.diagonal)
    index = _selected(run.num_valid, k, which)
    found = index >= 0
    index = xp.where(found, index, xp.zeros_like(index))
    values = xp.take(ritz.values, index, axis=0)
    weights = xp.take(ritz.vectors, index, axis=1)
    weights = xp.where(found[None, :], weights, xp.zeros_like(weights))
    residual_norms = xp.abs(run.residual_norm * weights[-1, :])
    return TopEigenvalues(
        values=xp.where(found, values, xp.zeros_like(values)),
        vectors=tuple(_combination(run.vectors, weights[:, i], space) for i in range(wanted)),
        residual_norms=xp.where(found, residual_norms, xp.zeros_like(values) + float("inf")),
        num_matvecs=run.num_matvecs,
    )


def _selected(num_valid: Scalar, k: int, which: str) -> Scalar:
    """Return the indices of the wanted among `num_valid` ascending values; negative if missing."""
    xp = namespace(num_valid)

    def descending(end: Scalar, first: int, count: int) -> list[Scalar]:
        return [end - 1 - first - i for i in range(count)]

    if which == "largest":
        return xp.stack(descending(num_valid, 0, k))
    # Values that both ends would claim go to the largest.
    wanted = k if which == "smallest" else 2 * k
    bottom = xp.where(num_valid < wanted, num_valid, xp.zeros_like(num_valid) + wanted)
    if which == "smallest":
        return xp.stack(descending(bottom, 0, k))
    return xp.stack(descending(num_valid, 0, k) + descending(bottom, k, k))


def _sum(vectors: tuple[V, ...], space: InnerProductSpace[V]) -> V:
    """Return the sum of the vectors."""
    total = vectors[0]
    for vector in vectors[1:]:
        total = space.add_scale(total, 1.0, vector)
    return total


def _combination(vectors: tuple[V, ...], weights: Scalar, space: InnerProductSpace[V]) -> V:
    """Return the sum of ``weights[j] * vectors[j]``."""
    total = space.scale(weights[0], vectors[0])
    for j in range(1, len(vectors)):
        total = space.add_scale(total, weights[j], vectors[j])
    return total
