"""Eigenvalues and eigenvectors of the tridiagonal matrix of a Lanczos run."""

from __future__ import annotations

import math
from typing import NamedTuple

from cdat_core._arrays import namespace
from cdat_core._types import Scalar


class Ritz(NamedTuple):
    """The eigendecomposition of the leading block of an m x m tridiagonal matrix.

    Attributes
    ----------
    values : array
        Eigenvalues of the leading block, ascending, then zeros; shape (m,).
    vectors : array
        Their eigenvectors in the columns, then zero columns; shape (m, m). The first component of
        each is not negative.
    valid : array
        Boolean, shape (m,): which entries belong to the leading block.
    """

    values: Scalar
    vectors: Scalar
    valid: Scalar


def tridiagonal_matrix(diagonal: Scalar, off_diagonal: Scalar) -> Scalar:
    """Return the symmetric tridiagonal matrix, shape (m, m)."""
    xp = namespace(diagonal)
    # Built by comparison: namespace, dtype and device follow the input, traced or not.
    row = _positions(diagonal)[:, None]
    column = _positions(diagonal)[None, :]
    zero = xp.zeros_like(diagonal)
    padded = xp.concat([off_diagonal, zero[:1]])
    matrix = xp.where(row == column, diagonal[:, None], zero[:, None])
    matrix = xp.where(row + 1 == column, padded[:, None], matrix)
    return xp.where(row == column + 1, padded[None, :], matrix)


def ritz_decomposition(diagonal: Scalar, off_diagonal: Scalar, num_valid: Scalar) -> Ritz:
    """Decompose the leading ``num_valid`` block of a tridiagonal matrix, of traced size.

    The rest of the diagonal is set to a number beyond the Gershgorin bound of the block, so that
    these entries sort after the eigenvalues of the block and never share an eigenspace with them,
    as zeros would with an eigenvalue 0. Coefficients that are not finite give NaN throughout.
    """
    xp = namespace(diagonal)
    zero, one = xp.zeros_like(diagonal), xp.ones_like(diagonal)
    valid = _positions(diagonal) < num_valid
    finite = xp.all(xp.isfinite(diagonal)) & xp.all(xp.isfinite(off_diagonal))
    diagonal = xp.where(finite, diagonal, zero)
    off_diagonal = xp.where(finite, off_diagonal, xp.zeros_like(off_diagonal))
    bound = xp.max(xp.abs(diagonal)) + 2 * xp.max(xp.concat([off_diagonal, zero[:1]]))
    sentinel = xp.where(bound > 0, 2 * bound, one)
    matrix = tridiagonal_matrix(xp.where(valid, diagonal, sentinel), off_diagonal)
    values, vectors = xp.linalg.eigh(matrix)
    vectors = xp.where(vectors[:1, :] < 0, -vectors, vectors)
    values = xp.where(valid, values, zero)
    vectors = xp.where(valid[None, :], vectors, xp.zeros_like(vectors))
    nan = one * math.nan
    return Ritz(xp.where(finite, values, nan), xp.where(finite, vectors, nan[None, :]), valid)


def _positions(like: Scalar) -> Scalar:
    """Return 0, 1, ..., m - 1 on the device of `like`, an array of shape (m,)."""
    xp = namespace(like)
    ones = xp.ones_like(like, dtype=xp.int32)
    return xp.cumulative_sum(ones) - 1
