"""The spectral density, against exact spectra in Wasserstein distance."""

import math

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from cdat_core import ArraySpace, TupleSpace, spectral_density
from cdat_core._density import _wasserstein

SPACE = ArraySpace()

SPECTRA = {
    "uniform": np.linspace(-1.0, 2.0, 100),
    "bulk and outliers": np.concatenate([np.linspace(0.0, 1.0, 95), [5.0, 8.0, 10.0, 15.0, 20.0]]),
    "singular": np.concatenate([np.zeros(60), np.linspace(0.5, 2.0, 40)]),
    "semicircle": np.cos(np.pi * (np.arange(100) + 0.5) / 100),
}


def symmetric(eigenvalues, seed=0):
    """Return a symmetric matrix with these eigenvalues."""
    n = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    matrix = basis * np.asarray(eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def wide(array):
    return np.asarray(array, dtype=np.float64)


def gaussians(seed, count, n):
    return np.random.default_rng(seed).standard_normal((count, n))


def estimate(spectrum, seed, count, num_matvecs):
    """Estimate the density of a diagonal operator (for Gaussians any basis is the same)."""
    return spectral_density(
        lambda v: spectrum * v,
        list(gaussians(seed, count, len(spectrum))),
        num_matvecs=num_matvecs,
        space=SPACE,
        reorthogonalize=False,
    )


def distance(found, spectrum):
    return wasserstein_distance(found.nodes.ravel(), spectrum, found.weights.ravel())


@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_shapes_and_mass(xp, dtype, eps, spectrum, reorthogonalize):
    hessian = xp.asarray(symmetric(spectrum), dtype=dtype)
    probes = [xp.asarray(z, dtype=dtype) for z in gaussians(1, 3, 100)]
    found = spectral_density(
        lambda v: hessian @ v,
        probes,
        num_matvecs=10,
        space=SPACE,
        reorthogonalize=reorthogonalize,
    )
    assert found.nodes.shape == found.weights.shape == (3, 10)
    for part in found[:4]:
        assert part.dtype == dtype
    assert found.standard_error.shape == found.quadrature_error.shape == ()
    assert (found.num_matvecs.dtype, int(found.num_matvecs)) == (xp.int32, 30)
    weights, nodes = wide(found.weights), wide(found.nodes)
    assert np.all(weights >= 0)
    np.testing.assert_allclose(weights.sum(axis=1), 1 / 3, rtol=8 * eps)
    slack = 32 * eps * np.max(np.abs(spectrum))
    assert np.min(spectrum) - slack <= np.min(nodes)
    assert np.max(nodes) <= np.max(spectrum) + slack
    assert np.all(np.diff(nodes, axis=1) >= 0)


@pytest.mark.parametrize("num_matvecs", [1, 2, 3, 6])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_quadrature_is_exact_up_to_its_degree(xp, dtype, eps, spectrum, num_matvecs):
    """Moments up to 2 m - 1 of the measure of one probe, and no further."""
    z = gaussians(2, 1, 100)[0]
    diagonal = xp.asarray(spectrum, dtype=dtype)
    probe = xp.asarray(z, dtype=dtype)
    found = spectral_density(lambda v: diagonal * v, [probe], num_matvecs=num_matvecs, space=SPACE)
    nodes, weights = wide(found.nodes)[0], wide(found.weights)[0]
    spectrum, mass = wide(diagonal), wide(probe) ** 2 / np.sum(wide(probe) ** 2)
    size = np.max(np.abs(spectrum))
    for degree in range(2 * num_matvecs):
        exact = np.sum(mass * (spectrum / size) ** degree)
        # Rounding errors of a node, times the degree.
        assert np.sum(weights * (nodes / size) ** degree) == pytest.approx(
            exact, abs=32 * (1 + degree) * eps
        )
    if num_matvecs <= 3:  # later the error is small
        degree = 2 * num_matvecs
        exact = np.sum(mass * (spectrum / size) ** degree)
        assert exact - np.sum(weights * (nodes / size) ** degree) > 1e-5


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_error_falls_with_probes(spectrum):
    """Like the square root of their number: by 4 from 1 to 16, up to the noise of 20 seeds."""
    mean = {
        count: np.mean([distance(estimate(spectrum, s, count, 20), spectrum) for s in range(20)])
        for count in (1, 4, 16)
    }
    assert 1.5 < mean[1] / mean[4] < 2.7
    assert 1.5 < mean[4] / mean[16] < 2.7


@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_error_falls_with_products(spectrum, reorthogonalize):
    """At least like their number from 2 to 32, up to the sampling error, which is taken out here.

    The rule of m nodes is compared with the exact measure of the same probe.
    """
    z = gaussians(3, 1, 100)[0]
    errors = []
    for num_matvecs in (2, 4, 8, 16, 32):
        found = spectral_density(
            lambda v: spectrum * v,
            [z],
            num_matvecs=num_matvecs,
            space=SPACE,
            reorthogonalize=reorthogonalize,
        )
        true = wasserstein_distance(found.nodes[0], spectrum, found.weights[0], z**2)
        errors.append(true)
        # The estimate is about the error with half as many nodes minus the error with all of them.
        assert true / 2 <= found.quadrature_error <= 16 * true + 1e-13
    assert all(fine < coarse for coarse, fine in zip(errors, errors[1:], strict=False))
    assert errors[-1] < errors[0] / 16


def test_quadrature_error_is_the_distance_of_two_rules():
    z, spectrum = gaussians(4, 2, 30), np.linspace(-1.0, 1.0, 30) ** 3
    options = {"space": SPACE}
    fine = spectral_density(lambda v: spectrum * v, list(z), num_matvecs=7, **options)
    coarse = spectral_density(lambda v: spectrum * v, list(z), num_matvecs=3, **options)
    expected = np.mean(
        [
            wasserstein_distance(fine.nodes[i], coarse.nodes[i], fine.weights[i], coarse.weights[i])
            for i in range(2)
        ]
    )
    assert float(fine.quadrature_error) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("count", [2, 5])
def test_standard_error_is_the_jackknife(count):
    """Written out with scipy: leave each probe out in turn."""
    spectrum = SPECTRA["uniform"]
    found = estimate(spectrum, 5, count, 6)
    deviations = []
    for i in range(count):
        rest = [j for j in range(count) if j != i]
        deviations.append(
            wasserstein_distance(
                found.nodes[rest].ravel(),
                found.nodes.ravel(),
                found.weights[rest].ravel(),
                found.weights.ravel(),
            )
        )
    expected = math.sqrt((count - 1) / count * np.sum(np.square(deviations)))
    assert float(found.standard_error) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("count", [4, 12])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_standard_error_is_realistic(spectrum, count):
    """Over 30 seeds its mean is that of the true error, within a factor of 1.5."""
    found = [estimate(spectrum, 100 + s, count, 24) for s in range(30)]
    true = np.mean([distance(density, spectrum) for density in found])
    stated = np.mean([float(density.standard_error) for density in found])
    assert 1 / 1.5 < stated / true < 1.5


def test_gap_is_a_distance_between_discrete_measures():
    rng = np.random.default_rng(6)
    x, y, p, q = rng.standard_normal(7), rng.standard_normal(5), rng.random(7), rng.random(5)
    p, q = p / p.sum(), q / q.sum()
    found = _wasserstein(np.concatenate([x, y]), np.concatenate([p, -q]))
    assert float(found) == pytest.approx(wasserstein_distance(x, y, p, q), rel=1e-13)


def test_multiples_of_the_identity_are_a_point(xp, dtype, eps):
    """The run of each probe ends after one step; the rest of its nodes is padding."""
    probes = [xp.asarray(z, dtype=dtype) for z in gaussians(7, 3, 6)]
    found = spectral_density(lambda v: 3 * v, probes, num_matvecs=4, space=SPACE)
    np.testing.assert_allclose(wide(found.nodes)[:, 0], 3.0, rtol=8 * eps)
    np.testing.assert_allclose(wide(found.weights), [[1 / 3, 0, 0, 0]] * 3, rtol=8 * eps)
    assert float(found.standard_error) <= 32 * eps
    assert float(found.quadrature_error) <= 32 * eps


def test_more_products_than_dimensions_give_the_measure_of_the_probe(xp, dtype, eps):
    """With a true node at zero beside the padding."""
    spectrum, z = np.array([-1.0, 0.0, 2.0]), np.array([1.0, 2.0, 3.0])
    diagonal, probe = xp.asarray(spectrum, dtype=dtype), xp.asarray(z, dtype=dtype)
    found = spectral_density(lambda v: diagonal * v, [probe], num_matvecs=8, space=SPACE)
    np.testing.assert_allclose(wide(found.nodes)[0, :3], spectrum, atol=16 * eps)
    np.testing.assert_allclose(wide(found.weights)[0, :3], z**2 / 14, rtol=32 * eps)
    assert not wide(found.weights)[0, 3:].any()


def test_unknown_errors_are_infinite(xp, dtype):
    diagonal = xp.asarray([1.0, 2.0, 3.0], dtype=dtype)
    z = xp.ones((3,), dtype=dtype)
    found = spectral_density(lambda v: diagonal * v, [z], num_matvecs=1, space=SPACE)
    assert float(found.standard_error) == float(found.quadrature_error) == math.inf
    assert wide(found.nodes).tolist() == [[pytest.approx(2.0)]]


def test_zero_probes_are_left_out(xp, dtype, eps):
    diagonal = xp.asarray([1.0, 2.0, 4.0, 0.5], dtype=dtype)
    zero = xp.zeros((4,), dtype=dtype)
    probes = [xp.asarray(z, dtype=dtype) for z in gaussians(8, 3, 4)]

    def density(probes):
        return spectral_density(lambda v: diagonal * v, probes, num_matvecs=3, space=SPACE)

    without, found = density(probes), density([probes[0], zero, *probes[1:]])
    np.testing.assert_allclose(wide(found.weights)[[0, 2, 3]], wide(without.weights), rtol=8 * eps)
    assert not wide(found.weights)[1].any()
    assert float(found.standard_error) == pytest.approx(float(without.standard_error), rel=64 * eps)
    assert float(found.quadrature_error) == pytest.approx(
        float(without.quadrature_error), rel=64 * eps
    )
    nothing = density([zero, zero])
    assert not wide(nothing.weights).any()
    assert not np.isnan(float(nothing.standard_error))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_finite_shows(xp, dtype):
    bad = xp.asarray([1.0, math.nan, 1.0], dtype=dtype)
    good = xp.asarray([1.0, 2.0, 3.0], dtype=dtype)
    for hvp, probes in ((lambda v: v * bad, [good]), (lambda v: v * good, [good, bad])):
        found = spectral_density(hvp, probes, num_matvecs=2, space=SPACE)
        assert np.all(np.isnan(wide(found.weights)))
        assert math.isnan(float(found.quadrature_error))
    assert math.isnan(float(found.standard_error))


def test_tuple_of_arrays_equals_the_flattened_vector(xp, dtype, eps):
    spectrum = xp.asarray(np.linspace(0.0, 3.0, 6), dtype=dtype)
    z = [xp.asarray(z, dtype=dtype) for z in gaussians(9, 2, 6)]
    flat = spectral_density(lambda v: spectrum * v, z, num_matvecs=3, space=SPACE)
    parts = spectral_density(
        lambda v: (spectrum[:2] * v[0], spectrum[2:] * v[1]),
        [(x[:2], x[2:]) for x in z],
        num_matvecs=3,
        space=TupleSpace(),
    )
    for a, b in zip(flat, parts, strict=True):
        np.testing.assert_allclose(wide(a), wide(b), rtol=64 * eps, atol=64 * eps)


def test_bad_options_are_refused():
    options = {"space": SPACE}
    with pytest.raises(ValueError, match=r"^probes must hold at least 1 vector, got 0$"):
        spectral_density(lambda v: v, [], num_matvecs=2, **options)
    with pytest.raises(TypeError, match=r"^probes must be a list or tuple of vectors, got ndarray"):
        spectral_density(lambda v: v, np.ones((2, 3)), num_matvecs=2, **options)
    with pytest.raises(ValueError, match=r"^num_matvecs must be an integer >= 1, got 0$"):
        spectral_density(lambda v: v, [np.ones(2)], num_matvecs=0, **options)
