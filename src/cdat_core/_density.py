"""The spectral density of a Hessian: the distribution of its eigenvalues, matrix-free."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from cdat_core import _validation
from cdat_core._arrays import namespace
from cdat_core._krylov import LanczosResult, lanczos
from cdat_core._probes import checked_probes
from cdat_core._tridiagonal import ritz_decomposition
from cdat_core._types import HessianVectorProduct, InnerProductSpace, Scalar, V


class SpectralDensity(NamedTuple):
    """A discrete estimate of the distribution of the eigenvalues.

    Attributes
    ----------
    nodes : array
        The positions of the mass, shape (probes, num_matvecs), in units of H; ascending in each
        row.
    weights : array
        The mass of each node, shape (probes, num_matvecs), not negative, of sum 1. A node of weight
        0 is padding: the process of its probe had ended early.
    standard_error : Scalar
        Estimate of the sampling error from using few probes, in Wasserstein-1 distance (in units
        of H, like the nodes); inf for one probe.
    quadrature_error : Scalar
        Estimate of the error from using few products, in the same distance: between the quadrature
        rules with ``num_matvecs`` and with half as many nodes, averaged over the probes; inf for
        ``num_matvecs=1``. It is usually too large, because it estimates the error of the shorter
        rule.
    num_matvecs : Scalar
        Hessian-vector products spent in all, int32.
    """

    nodes: Scalar
    weights: Scalar
    standard_error: Scalar
    quadrature_error: Scalar
    num_matvecs: Scalar


def spectral_density(
    hvp: HessianVectorProduct[V],
    probes: Sequence[V],
    *,
    num_matvecs: int,
    space: InnerProductSpace[V],
    reorthogonalize: bool = True,
    process: Callable[..., LanczosResult[V]] = lanczos,
    over: Callable[..., Iterable[Any]] = map,
) -> SpectralDensity:
    r"""Estimate the spectral density by stochastic Lanczos quadrature.

    Each probe z has a spectral measure, with the mass ``<z, v_i>**2 / |z|**2`` at the eigenvalue of
    the eigenvector v_i. `num_matvecs` Lanczos steps from z give its Gauss quadrature rule, exact
    for polynomials up to the degree ``2 * num_matvecs - 1``. The average over random probes
    converges to the spectral density, with the mass 1/n at each of the n eigenvalues.

    Parameters
    ----------
    hvp : HessianVectorProduct
        The operator ``v -> H v``, symmetric.
    probes : sequence of V
        Random vectors whose entries are independent with mean 0 and variance 1, such as Gaussians
        or random signs. They are normalised internally. A zero probe is left out; if all are zero,
        so are all weights.
    num_matvecs : int
        Products to spend on each probe, at least 1.
    space : InnerProductSpace
        The inner product of the vectors.
    reorthogonalize : bool, optional
        As in `lanczos`. Without it, three vectors are in memory, and the density is about as good.
    process, over : callable, optional
        Replacements for `lanczos` and `map` with the same signatures, for adapters that compile the
        loops.

    Returns
    -------
    SpectralDensity
        Nodes and weights. The integral of f against the density is ``sum(weights * f(nodes))``, and
        n times that estimates the trace of f(H). If anything is not finite, all weights and errors
        are NaN.

    Raises
    ------
    TypeError, ValueError
        If `probes` is empty, or `num_matvecs` not an integer >= 1.

    Notes
    -----
    `standard_error` is the delete-one jackknife. Distances between averages of measures are norms
    of differences of distribution functions, hence leaving probe i out moves the average by
    ``W1(mu_i, mean) / (p - 1)``, and the jackknife needs no further pass over the probes:
    ``sum(W1(mu_i, mean)**2) / (p * (p - 1))`` is its variance.

    The estimator goes back to Lin, Saad and Yang (arXiv:1308.5467); Ghorbani, Krishnan and Xiao
    (arXiv:1901.10159) use it for networks, and Chen, Trogdon and Ubaru (arXiv:2105.06595) analyse
    its Wasserstein error. The two error estimates are choices of this library.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import ArraySpace
    >>> eigenvalues = np.repeat([0.0, 1.0, 10.0], [70, 20, 10])
    >>> signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(4, 100))
    >>> found = spectral_density(
    ...     lambda v: eigenvalues * v, list(signs), num_matvecs=3, space=ArraySpace()
    ... )
    >>> found.nodes[0].round(6).tolist()
    [0.0, 1.0, 10.0]
    >>> found.weights.sum(axis=0).round(6).tolist()
    [0.7, 0.2, 0.1]
    """
    num_matvecs = _validation.count("num_matvecs", num_matvecs)
    probes = checked_probes(probes, at_least=1)

    def run_from(probe: V) -> LanczosResult[V]:
        run = process(
            hvp, probe, num_matvecs=num_matvecs, space=space, reorthogonalize=reorthogonalize
        )
        return run._replace(vectors=())  # frees their memory

    runs = list(over(run_from, probes))
    rules = [_gauss_rule(run, num_matvecs) for run in runs]
    xp = namespace(runs[0].diagonal)
    nodes = xp.stack([rule[0] for rule in rules])
    masses = xp.stack([rule[1] for rule in rules])
    share = _one_over(xp.sum(masses))
    total = runs[0].num_matvecs
    for run in runs[1:]:
        total = total + run.num_matvecs
    return SpectralDensity(
        nodes=nodes,
        weights=masses * share,
        standard_error=_sampling_error(nodes, masses, share),
        quadrature_error=_quadrature_error(runs, rules, share),
        num_matvecs=total,
    )


def _one_over(total: Scalar) -> Scalar:
    """Return 1/total, 0 for a total of 0; NaN stays NaN."""
    xp = namespace(total)
    empty = total == 0
    return xp.where(empty, total, 1 / xp.where(empty, xp.ones_like(total), total))


def _gauss_rule(run: LanczosResult[V], order: int) -> tuple[Scalar, Scalar]:
    """Return nodes and weights of the first `order` steps; no mass for a zero probe."""
    ritz = ritz_decomposition(run.diagonal[:order], run.off_diagonal[: order - 1], run.num_valid)
    xp = namespace(ritz.values)
    weights = ritz.vectors[0, :] ** 2
    return ritz.values, weights * _one_over(xp.sum(weights))


def _wasserstein(nodes: Scalar, difference: Scalar) -> Scalar:
    """Return the Wasserstein-1 distance of measures on the same `nodes`, shape (n,).

    `difference` holds the differences of their weights, shape (..., n). The distance is the
    integral of the absolute difference of the distribution functions.
    """
    xp = namespace(nodes)
    order = xp.argsort(nodes)
    nodes = xp.take(nodes, order, axis=0)
    gaps = nodes[1:] - nodes[:-1]
    distribution = xp.cumulative_sum(xp.take(difference, order, axis=-1), axis=-1)
    heights = xp.abs(distribution[..., :-1])
    return xp.sum(heights * xp.broadcast_to(gaps, heights.shape), axis=-1)


def _sampling_error(nodes: Scalar, masses: Scalar, share: Scalar) -> Scalar:
    """Return the jackknife estimate of the sampling error over the probes that are not zero."""
    xp = namespace(nodes)
    probes = nodes.shape[0]
    used = xp.sum(masses, axis=-1)
    # Row i compares probe i with the average; at the nodes of other probes it has no mass.
    zero = xp.zeros_like(masses)
    own = [
        xp.concat([masses[j, :] if j == i else zero[j, :] for j in range(probes)])
        for i in range(probes)
    ]
    average = xp.reshape(masses, (-1,)) * share
    distances = _wasserstein(xp.reshape(nodes, (-1,)), xp.stack(own) - average[None, :])
    count = xp.round(xp.sum(used))
    spread = xp.sum(used * distances**2)
    infinite = xp.zeros_like(spread) + math.inf
    several = ~(count <= 1)
    pairs = xp.where(several, count * (count - 1), xp.ones_like(count))
    return xp.where(several, xp.sqrt(spread / pairs), infinite)


def _quadrature_error(
    runs: list[LanczosResult[V]], rules: list[tuple[Scalar, Scalar]], share: Scalar
) -> Scalar:
    """Return the mean distance of the rules from those with half as many nodes."""
    xp = namespace(share)
    half = runs[0].diagonal.shape[0] // 2
    if half == 0:
        return xp.zeros_like(share) + math.inf
    total = xp.zeros_like(share)
    for run, (nodes, weights) in zip(runs, rules, strict=True):
        coarse, coarse_weights = _gauss_rule(run, half)
        total = total + _wasserstein(
            xp.concat([nodes, coarse]), xp.concat([weights, -coarse_weights])
        )
    return total * share
