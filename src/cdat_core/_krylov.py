"""The Lanczos process: a symmetric operator as a tridiagonal matrix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Generic, NamedTuple

from cdat_core import _validation
from cdat_core._arrays import counter, increment, namespace, safe_reciprocal
from cdat_core._orthogonal import norm, normalized, remainder, remove, rounding_unit
from cdat_core._types import HessianVectorProduct, InnerProductSpace, Scalar, V

BREAKDOWN = 16.0
"""Off-diagonal coefficients below this many rounding errors of |H| are taken as zero."""


class LanczosResult(NamedTuple, Generic[V]):
    """The tridiagonal matrix T of a Lanczos run of m steps.

    ``H Q = Q T + residual_norm * q e_m^T``, with the vectors in the columns of Q and a unit vector
    q orthogonal to them.

    Attributes
    ----------
    diagonal : array
        Diagonal of T, shape (m,), in units of H.
    off_diagonal : array
        Its off-diagonal, shape (m - 1,), not negative.
    vectors : tuple of V
        The m orthonormal Lanczos vectors; empty without reorthogonalisation.
    residual_norm : Scalar
        The coefficient that would follow, 0 after a breakdown.
    num_valid : Scalar
        Dimension of the Krylov space that was found, int32, at most m. Coefficients and vectors
        from this index on are exactly zero.
    num_matvecs : Scalar
        Hessian-vector products spent, int32: m, also after a breakdown.
    """

    diagonal: Scalar
    off_diagonal: Scalar
    vectors: tuple[V, ...]
    residual_norm: Scalar
    num_valid: Scalar
    num_matvecs: Scalar


def lanczos(
    hvp: HessianVectorProduct[V],
    start: V,
    *,
    num_matvecs: int,
    space: InnerProductSpace[V],
    reorthogonalize: bool = True,
) -> LanczosResult[V]:
    r"""Run `num_matvecs` steps of the Lanczos process from `start`.

    Parameters
    ----------
    hvp : HessianVectorProduct
        The operator ``v -> H v``, symmetric.
    start : V
        The start vector, of any non-zero length. Eigenvectors orthogonal to it are never found. A
        zero vector gives zero coefficients and ``num_valid = 0``, and so does a vector whose
        squared length leaves the range of the scalars.
    num_matvecs : int
        Products to spend, at least 1; static, since the loop is unrolled. More than the dimension
        of the space are allowed but add nothing.
    space : InnerProductSpace
        The inner product of the vectors.
    reorthogonalize : bool, optional
        Make each vector orthogonal to all before it, with two Gram-Schmidt passes. This takes
        memory for m vectors and ``2 m**2`` inner products. Without it, three vectors are in memory,
        but once an eigenvalue has converged, rounding makes copies of it appear among the
        eigenvalues of T: harmless in a spectral density, wrong in a list of eigenvalues.

    Returns
    -------
    LanczosResult
        The tridiagonal matrix and the vectors.

    Raises
    ------
    TypeError, ValueError
        If `num_matvecs` is not an integer or is below 1.

    Notes
    -----
    The process breaks down, that is, ends early, when the Krylov space is exhausted: when a
    coefficient falls below 16 rounding errors of the largest coefficient so far, or when a vector
    loses half of its length in the second Gram-Schmidt pass. The rest of the result is then zero,
    and the eigenvalues of the leading block are eigenvalues of H up to rounding. The rounding error
    is measured on the vectors, whose precision may be lower than that of the scalars. Larger errors
    of `hvp` can hide the end of an invariant subspace, and so can an H that is negligible on it
    compared with its norm elsewhere. The process then continues with noise as a new direction: T
    has a tiny coefficient, and the result is a valid run for H plus those errors.

    Compiled, the unrolled loop is a graph of about ``4 * num_matvecs**2`` vector operations with
    reorthogonalisation; beyond a few dozen steps, compile `hvp` alone.

    Squared lengths must stay in the range of the scalars: in float32 the operator should have a
    norm between 1e-18 and 1e18. A smaller norm counts as zero; with a larger one, and wherever
    `hvp` or `start` is not finite, the coefficients are not finite.

    The method is described in Golub and Van Loan, Matrix Computations, chapter 10.

    Examples
    --------
    Three distinct eigenvalues, hence three steps, even if more are asked for:

    >>> import numpy as np
    >>> from cdat_core import ArraySpace
    >>> eigenvalues = np.array([4.0, 1.0, 1.0, -2.0])
    >>> run = lanczos(lambda v: eigenvalues * v, np.ones(4), num_matvecs=6, space=ArraySpace())
    >>> int(run.num_valid), int(run.num_matvecs)
    (3, 6)
    >>> T = np.diag(run.diagonal) + np.diag(run.off_diagonal, 1) + np.diag(run.off_diagonal, -1)
    >>> np.linalg.eigvalsh(T[:3, :3]).round(12).tolist()
    [-2.0, 1.0, 4.0]
    """
    num_matvecs = _validation.count("num_matvecs", num_matvecs)
    state = lanczos_start(start, space=space)
    basis: list[V] = []
    remove_all = partial(remove, basis=basis, space=space) if reorthogonalize else None
    diagonal, off_diagonal = [], []
    for _ in range(num_matvecs):
        if reorthogonalize:
            basis.append(state.vector)
        state, alpha = lanczos_step(hvp, state, remove_all, space=space)
        diagonal.append(alpha)
        off_diagonal.append(state.beta)
    xp = namespace(state.beta)
    return LanczosResult(
        diagonal=xp.stack(diagonal),
        off_diagonal=xp.stack(off_diagonal)[:-1],
        vectors=tuple(basis),
        residual_norm=state.beta,
        num_valid=state.num_valid,
        num_matvecs=counter(state.beta) + num_matvecs,
    )


class LanczosState(NamedTuple, Generic[V]):
    """The state of a Lanczos process between two steps.

    Attributes
    ----------
    vector : V
        The Lanczos vector to multiply next, zero after a breakdown.
    previous : V or None
        The vector before it; None at first. A compiled loop, whose state may not change its
        structure, can start from any finite vector instead: `beta` is zero then.
    beta : Scalar
        The last off-diagonal coefficient, which couples the two vectors; zero at first.
    magnitude : Scalar
        The largest coefficient so far, in absolute value.
    alive : Scalar
        Boolean: whether the process has not broken down.
    num_valid : Scalar
        Steps taken before a breakdown, int32.
    tolerance : Scalar
        A coefficient of at most `tolerance` times `magnitude` is a breakdown.
    """

    vector: V
    previous: V | None
    beta: Scalar
    magnitude: Scalar
    alive: Scalar
    num_valid: Scalar
    tolerance: Scalar


def lanczos_start(start: V, *, space: InnerProductSpace[V]) -> LanczosState[V]:
    """Return the state before the first step; later states have the same dtypes.

    Parameters
    ----------
    start : V
        The start vector, of any non-zero length.
    space : InnerProductSpace
        The inner product of the vectors.

    Returns
    -------
    LanczosState
    """
    vector = normalized(start, space=space)
    size = space.vdot(vector, vector)
    zero = namespace(size).zeros_like(size)
    return LanczosState(
        vector=vector,
        previous=None,
        beta=zero,
        magnitude=zero,
        # Conditions are written so that NaN counts as alive: it must show in the result.
        alive=size != 0,
        num_valid=counter(size),
        tolerance=BREAKDOWN * rounding_unit(vector, space=space),
    )


def lanczos_step(
    hvp: HessianVectorProduct[V],
    state: LanczosState[V],
    remove_all: Callable[[V], V] | None,
    *,
    space: InnerProductSpace[V],
) -> tuple[LanczosState[V], Scalar]:
    """Take one step of the Lanczos process; `lanczos` is a Python loop over it.

    Parameters
    ----------
    hvp : HessianVectorProduct
        The operator.
    state : LanczosState
        From `lanczos_start` or the last step.
    remove_all : callable or None
        Subtracts from a vector its projection on all Lanczos vectors up to ``state.vector``, which
        the caller stores; None without reorthogonalisation.
    space : InnerProductSpace
        The inner product of the vectors.

    Returns
    -------
    state : LanczosState
        Its `beta` is the new off-diagonal coefficient.
    alpha : Scalar
        The new diagonal coefficient.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import ArraySpace
    >>> from cdat_core.extend import lanczos_start, lanczos_step
    >>> eigenvalues, space = np.array([4.0, 1.0]), ArraySpace()
    >>> state = lanczos_start(np.ones(2), space=space)
    >>> for _ in range(2):
    ...     state, alpha = lanczos_step(lambda v: eigenvalues * v, state, None, space=space)
    ...     print(round(float(alpha), 12), round(float(state.beta), 12))
    2.5 1.5
    2.5 0.0
    """
    xp = namespace(state.beta)
    vector, zero = state.vector, xp.zeros_like(state.beta)
    tiny = zero + float(xp.finfo(zero.dtype).smallest_normal)
    rest = hvp(vector)
    if state.previous is not None:
        rest = space.add_scale(rest, -state.beta, state.previous)
    alpha = xp.where(state.alive, space.vdot(vector, rest), zero)
    rest = space.add_scale(rest, -alpha, vector)
    alive = state.alive
    if remove_all is None:
        beta = norm(rest, space=space)
    else:
        rest, beta, collapsed = remainder(rest, remove_all, space=space)
        alive = alive & ~collapsed
    magnitude = xp.maximum(state.magnitude, xp.maximum(xp.abs(alpha), beta))
    alive = alive & ~(beta <= xp.maximum(state.tolerance * magnitude, tiny))
    beta = xp.where(alive, beta, zero)
    following = LanczosState(
        vector=space.scale(safe_reciprocal(beta), rest),
        previous=vector,
        beta=beta,
        magnitude=magnitude,
        alive=alive,
        num_valid=increment(state.num_valid, state.alive),
        tolerance=state.tolerance,
    )
    return following, alpha
