"""The trace of a Hessian, matrix-free."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from cdat_core import _validation
from cdat_core._arrays import counter, namespace, safe_reciprocal
from cdat_core._orthogonal import norm, remainder, remove
from cdat_core._probes import checked_probes
from cdat_core._types import HessianVectorProduct, InnerProductSpace, Scalar, V

DEPENDENT = 16.0
"""A sketch vector is dropped if its part outside the others is this many rounding errors."""


class TraceEstimate(NamedTuple):
    """A random estimate of a trace.

    Attributes
    ----------
    estimate : Scalar
        The trace, in units of H.
    standard_error : Scalar
        Its standard deviation over draws of the probes, estimated from their spread; inf if there
        is only one probe for it.
    num_matvecs : Scalar
        Hessian-vector products spent, int32.
    """

    estimate: Scalar
    standard_error: Scalar
    num_matvecs: Scalar


def hutchinson_trace(
    hvp: HessianVectorProduct[V],
    probes: Sequence[V],
    *,
    space: InnerProductSpace[V],
    over: Callable[..., Iterable[Any]] = map,
) -> TraceEstimate:
    """Estimate the trace of H as the mean of ``<z, H z>`` over random probes z.

    Parameters
    ----------
    hvp : HessianVectorProduct
        The operator ``v -> H v``, symmetric.
    probes : sequence of V
        Random vectors whose entries are independent with mean 0 and variance 1. With random signs
        the variance is ``2 * (|H|_F**2 - sum(H_ii**2))`` per probe, and a diagonal H is exact;
        with Gaussians it is ``2 * |H|_F**2``.
    space : InnerProductSpace
        The inner product of the vectors.
    over : callable, optional
        A replacement for `map`, for adapters that compile the loop.

    Returns
    -------
    TraceEstimate
        The estimate, unbiased, with its standard error; one product per probe. Probes or products
        that are not finite make it NaN or inf.

    Raises
    ------
    TypeError, ValueError
        If `probes` is not a sequence or is empty.

    Notes
    -----
    The estimator is due to Hutchinson (1989), Communications in Statistics 18.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import ArraySpace
    >>> H = np.array([[2.0, 1.0], [1.0, 5.0]])
    >>> signs = [np.array([1.0, 1.0]), np.array([1.0, -1.0])]
    >>> found = hutchinson_trace(lambda v: H @ v, signs, space=ArraySpace())
    >>> float(found.estimate), float(found.standard_error), int(found.num_matvecs)
    (7.0, 2.0, 2)
    """
    probes = checked_probes(probes, at_least=1)
    samples = list(over(lambda z: space.vdot(z, hvp(z)), probes))
    estimate, standard_error = _mean(samples)
    return TraceEstimate(estimate, standard_error, counter(estimate) + len(probes))


def hutchpp_trace(
    hvp: HessianVectorProduct[V],
    probes: Sequence[V],
    *,
    num_sketch: int | None = None,
    space: InnerProductSpace[V],
    over: Callable[..., Iterable[Any]] = map,
) -> TraceEstimate:
    """Estimate the trace of H by Hutch++: exactly on a sketched subspace, by probes outside it.

    The first `num_sketch` probes z give the subspace spanned by the products ``H z``, which
    captures most of the large eigenvalues. The trace of H on it is computed exactly. The mean of
    ``<y, H y>`` is added, where y runs over the components of the other probes outside the
    subspace. On decaying spectra the error falls like 1/num_matvecs instead of its square root, and
    an H of rank at most `num_sketch` is exact up to rounding.

    Parameters
    ----------
    hvp : HessianVectorProduct
        The operator ``v -> H v``, symmetric.
    probes : sequence of V
        At least 2 random vectors whose entries are independent with mean 0 and variance 1.
    num_sketch : int, optional
        Number of probes for the sketch, from 1 to ``len(probes) - 1``, by default half of them
        (``len(probes) // 2``). This many vectors are kept in memory.
    space : InnerProductSpace
        The inner product of the vectors.
    over : callable, optional
        A replacement for `map`, for adapters that compile the loop.

    Returns
    -------
    TraceEstimate
        The estimate, unbiased, with the standard error of the part outside the subspace.
        ``len(probes) + num_sketch`` products are spent: two for each probe of the sketch, one for
        each of the others; by default 3/2 ``len(probes)``.

    Raises
    ------
    TypeError, ValueError
        If `probes` is not a sequence or has fewer than 2 entries, or `num_sketch` is out of range.

    Notes
    -----
    Meyer, Musco, Musco and Woodruff, arXiv:2010.09649. Products that depend linearly on earlier
    ones are left out of the basis. On flat spectra `hutchinson_trace` is better for the same number
    of products.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import ArraySpace
    >>> x = np.arange(1.0, 6.0)  # H = x x^T has rank 1 and the trace 55
    >>> gaussians = np.random.default_rng(0).standard_normal((4, 5))
    >>> found = hutchpp_trace(lambda v: x * (x @ v), list(gaussians), space=ArraySpace())
    >>> round(float(found.estimate), 9), int(found.num_matvecs)
    (55.0, 6)
    """
    probes = checked_probes(probes, at_least=2)
    num_sketch = len(probes) // 2 if num_sketch is None else num_sketch
    num_sketch = _validation.count("num_sketch", num_sketch)
    if num_sketch >= len(probes):
        msg = (
            "num_sketch must be smaller than the number of probes, "
            f"got num_sketch={num_sketch} and {len(probes)} probes"
        )
        raise ValueError(msg)
    basis = _range_basis(list(over(hvp, probes[:num_sketch])), space)

    def quadratic_form(v: V) -> Scalar:
        return space.vdot(v, hvp(v))

    inside = over(quadratic_form, basis)
    samples = list(
        over(lambda z: quadratic_form(remove(z, basis, space=space)), probes[num_sketch:])
    )
    outside, standard_error = _mean(samples)
    estimate = outside
    for part in inside:
        estimate = estimate + part
    return TraceEstimate(estimate, standard_error, counter(estimate) + len(probes) + num_sketch)


def _range_basis(products: list[V], space: InnerProductSpace[V]) -> list[V]:
    """Return an orthonormal basis of the span, with a zero vector for each dependent product."""
    basis: list[V] = []
    for product in products:
        before = norm(product, space=space)
        rest, length, collapsed = remainder(
            product, partial(remove, basis=basis, space=space), space=space
        )
        xp = namespace(length)
        floor = DEPENDENT * float(xp.finfo(length.dtype).eps) * before
        dropped = collapsed | (length <= floor)
        factor = xp.where(dropped, xp.zeros_like(length), safe_reciprocal(length))
        basis.append(space.scale(factor, rest))
    return basis


def _mean(samples: list[Scalar]) -> tuple[Scalar, Scalar]:
    """Return the mean and its standard error, inf for one sample."""
    xp = namespace(samples[0])
    values = xp.stack(samples)
    mean = xp.mean(values)
    if len(samples) == 1:
        return mean, xp.zeros_like(mean) + math.inf
    return mean, xp.std(values, correction=1.0) / math.sqrt(len(samples))
