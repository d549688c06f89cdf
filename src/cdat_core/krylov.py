"""The Lanczos process: a symmetric operator as a tridiagonal matrix."""

from __future__ import annotations

from typing import Generic, NamedTuple

from cdat_core import _validation
from cdat_core._arrays import counter, increment, namespace, safe_reciprocal
from cdat_core._orthogonal import norm, normalized, remainder, rounding_unit
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
        The start vector, of any non-zero length. What it has no part of is never found. A zero
        vector gives zero coefficients and ``num_valid = 0``, and so does a vector whose squared
        length leaves the range of the scalars.
    num_matvecs : int
        Products to spend, at least 1; static, since the loop is unrolled. More than the dimension
        of the space are allowed and useless.
    space : InnerProductSpace
        The inner product of the vectors.
    reorthogonalize : bool, optional
        Make each vector orthogonal to all before it, with two Gram-Schmidt passes. This takes
        memory for m vectors and ``2 m**2`` inner products. Without it three vectors are in memory,
        and once an eigenvalue has converged, rounding lets copies of it appear among the
        eigenvalues of T: harmless to a spectral density, wrong for a list of eigenvalues.

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
    The process ends by itself (breaks down) when the Krylov space is exhausted, that is, when a
    coefficient falls below 16 rounding errors of the largest coefficient so far, or when a vector
    loses half of its length in the second Gram-Schmidt pass. The rest of the result is then zero,
    and the eigenvalues of the leading block are eigenvalues of H up to rounding. The rounding error
    is measured on the vectors, whose precision may be lower than that of the scalars. A start in
    an invariant subspace whose end is hidden by larger errors of `hvp`, or on which H is zero next
    to its norm elsewhere, goes on with the noise as a new direction: by then T has a tiny
    coefficient, and the result is a valid run for an H changed by those errors.

    Compiled, the unrolled loop is a graph of about ``4 * num_matvecs**2`` vector operations with
    reorthogonalisation; above a few dozen steps rather compile `hvp` alone.

    Squared lengths must stay in the range of the scalars: in float32 the operator should have a
    norm between 1e-18 and 1e18. Below it counts as zero. Above, and wherever `hvp` or `start` is
    not finite, coefficients are not finite.

    The method is in Golub and Van Loan, Matrix Computations, chapter 10.

    Examples
    --------
    Three eigenvalues, hence three steps, whatever is asked for:

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
    vector = normalized(start, space=space)
    size = space.vdot(vector, vector)
    xp = namespace(size)
    zero = xp.zeros_like(size)
    tiny = zero + float(xp.finfo(size.dtype).smallest_normal)
    tolerance = BREAKDOWN * rounding_unit(vector, space=space)
    # Conditions are written so that NaN counts as alive: it must show in the result.
    alive = size != 0
    previous = vector
    basis = [vector]
    magnitude, beta, num_valid = zero, zero, counter(size)
    diagonal, off_diagonal = [], []
    for step in range(num_matvecs):
        num_valid = increment(num_valid, alive)
        rest = hvp(vector)
        if step > 0:
            rest = space.add_scale(rest, -beta, previous)
        alpha = xp.where(alive, space.vdot(vector, rest), zero)
        rest = space.add_scale(rest, -alpha, vector)
        if reorthogonalize:
            rest, beta, collapsed = remainder(rest, basis, space=space)
            alive = alive & ~collapsed
        else:
            beta = norm(rest, space=space)
        magnitude = xp.maximum(magnitude, xp.maximum(xp.abs(alpha), beta))
        alive = alive & ~(beta <= xp.maximum(tolerance * magnitude, tiny))
        beta = xp.where(alive, beta, zero)
        diagonal.append(alpha)
        off_diagonal.append(beta)
        if step + 1 < num_matvecs:
            previous, vector = vector, space.scale(safe_reciprocal(beta), rest)
            if reorthogonalize:
                basis.append(vector)
    coefficients = xp.stack(off_diagonal)
    return LanczosResult(
        diagonal=xp.stack(diagonal),
        off_diagonal=coefficients[:-1],
        vectors=tuple(basis) if reorthogonalize else (),
        residual_norm=beta,
        num_valid=num_valid,
        num_matvecs=counter(size) + num_matvecs,
    )
