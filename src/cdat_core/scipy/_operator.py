"""Conversions between Hessian-vector products and SciPy's linear operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse.linalg
from numpy.typing import NDArray

from cdat_core._types import HessianVectorProduct

Array = NDArray[Any]


def as_linear_operator(
    hvp: HessianVectorProduct[Array], like: Array
) -> scipy.sparse.linalg.LinearOperator:
    """Return a Hessian-vector product as a symmetric operator for SciPy's solvers.

    Parameters
    ----------
    hvp : HessianVectorProduct
        ``v -> H v`` on NumPy arrays shaped like `like`.
    like : ndarray, any shape
        Gives shape and dtype of the vectors; its values do not matter.

    Returns
    -------
    scipy.sparse.linalg.LinearOperator, shape (like.size, like.size)
        It raises a ValueError if a product has another shape than `like`.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.sparse.linalg import cg
    >>> from cdat_core.scipy import as_linear_operator
    >>> operator = as_linear_operator(lambda v: 2 * v, np.zeros((2, 2)))
    >>> solution, _ = cg(operator, np.ones(4))
    >>> solution.tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    shape, dtype, size = like.shape, like.dtype, like.size
    if not np.issubdtype(dtype, np.floating):
        msg = f"like must have a real floating dtype, got {dtype}"
        raise TypeError(msg)

    def product(vector: Array) -> Array:
        result = np.asarray(hvp(np.asarray(vector, dtype=dtype).reshape(shape)))
        if result.shape != shape:
            msg = f"hvp must return an array of shape {shape}, got {result.shape}"
            raise ValueError(msg)
        return result.reshape(size)

    return scipy.sparse.linalg.LinearOperator(
        shape=(size, size), matvec=product, rmatvec=product, dtype=dtype
    )


def from_linear_operator(operator: Any) -> HessianVectorProduct[Array]:
    """Return a Hessian-vector product from any operator that SciPy accepts.

    Parameters
    ----------
    operator : LinearOperator, ndarray or sparse array, shape (n, n)
        Symmetric, which is not checked (see `cdat_core.testing.check_hvp`).

    Returns
    -------
    HessianVectorProduct
        ``v -> H v`` on arrays of n entries and any shape.

    Raises
    ------
    ValueError
        If the operator is not square.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import ArraySpace, power_iteration
    >>> from cdat_core.scipy import from_linear_operator
    >>> hvp = from_linear_operator(np.diag([1.0, 2.0, 9.0]))
    >>> state = power_iteration(hvp, np.ones(3), num_matvecs=30, space=ArraySpace())
    >>> round(float(state.eigenvalue), 6)
    9.0
    """
    linear = scipy.sparse.linalg.aslinearoperator(operator)
    if linear.shape[0] != linear.shape[1]:
        msg = f"operator must be square, got shape {linear.shape}"
        raise ValueError(msg)

    def hvp(v: Array, /) -> Array:
        product: Array = linear.matvec(v.reshape(-1)).reshape(v.shape)
        return product

    return hvp
