"""Trace estimators, against traces of dense matrices and the statistics they claim."""

import math

import numpy as np
import pytest

from cdat_core import ArraySpace, TupleSpace, hutchinson_trace, hutchpp_trace
from cdat_core._trace import _range_basis

SPACE = ArraySpace()

SPECTRA = {
    "decaying": np.arange(1.0, 41.0) ** -1.5,
    "flat": np.linspace(1.0, 2.0, 40),
    "indefinite": np.linspace(-1.0, 3.0, 40) ** 3,
    "low rank": np.concatenate([np.zeros(35), np.linspace(1.0, 5.0, 5)]),
}
ESTIMATORS = {"hutchinson": hutchinson_trace, "hutchpp": hutchpp_trace}


def symmetric(eigenvalues, seed=0):
    """Return a symmetric matrix with these eigenvalues."""
    n = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    matrix = basis * np.asarray(eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def wide(array):
    return np.asarray(array, dtype=np.float64)


def draw(kind, seed, count, n=40):
    rng = np.random.default_rng(seed)
    if kind == "signs":
        return list(rng.choice([-1.0, 1.0], size=(count, n)))
    return list(rng.standard_normal((count, n)))


@pytest.mark.parametrize("kind", ["signs", "gaussians"])
@pytest.mark.parametrize("spectrum", ["decaying", "flat", "indefinite"])
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_unbiased_within_its_stated_error(estimator, spectrum, kind):
    """Over 200 seeds; z = (estimate - trace) / standard_error.

    With Gaussian errors and p probes z has Student's distribution: mean 0, variance
    (p - 1) / (p - 3), here 1.05 and 1.07; skewed samples add to it. The variance over 200 seeds
    has itself a standard deviation of about 0.12; three of them are granted, on both sides.
    """
    eigenvalues = SPECTRA[spectrum]
    matrix, trace = symmetric(eigenvalues), np.sum(eigenvalues)
    options = {"num_sketch": 8} if estimator is hutchpp_trace else {}
    found = [
        estimator(lambda v: matrix @ v, draw(kind, 1000 + seed, 40), space=SPACE, **options)
        for seed in range(200)
    ]
    errors = np.array([float(f.estimate) for f in found]) - trace
    assert abs(np.mean(errors)) < 4 * np.std(errors, ddof=1) / math.sqrt(200)
    z = errors / np.array([float(f.standard_error) for f in found])
    assert 0.7 < np.var(z, ddof=1) < 1.45


@pytest.mark.parametrize("count", [1, 2, 7])
def test_hutchinson_is_a_mean(xp, dtype, eps, count):
    matrix = symmetric(SPECTRA["indefinite"])
    hessian = xp.asarray(matrix, dtype=dtype)
    probes = draw("gaussians", 2, count)
    found = hutchinson_trace(
        lambda v: hessian @ v, [xp.asarray(z, dtype=dtype) for z in probes], space=SPACE
    )
    samples = np.array([z @ matrix @ z for z in probes])
    terms = np.mean([np.abs(z) @ np.abs(matrix) @ np.abs(z) for z in probes])
    assert found.estimate.dtype == found.standard_error.dtype == dtype
    assert found.estimate.shape == found.standard_error.shape == ()
    assert (found.num_matvecs.dtype, int(found.num_matvecs)) == (xp.int32, count)
    assert float(found.estimate) == pytest.approx(np.mean(samples), abs=8 * eps * terms)
    if count == 1:
        assert float(found.standard_error) == math.inf
    else:
        assert float(found.standard_error) == pytest.approx(
            np.std(samples, ddof=1) / math.sqrt(count), abs=8 * eps * terms
        )


def test_hutchinson_with_signs_is_exact_on_a_diagonal(xp, dtype, eps):
    diagonal = xp.asarray(SPECTRA["indefinite"], dtype=dtype)
    probes = [xp.asarray(z, dtype=dtype) for z in draw("signs", 3, 3)]
    found = hutchinson_trace(lambda v: diagonal * v, probes, space=SPACE)
    size = np.sum(np.abs(SPECTRA["indefinite"]))
    assert float(found.estimate) == pytest.approx(np.sum(SPECTRA["indefinite"]), abs=8 * eps * size)
    assert float(found.standard_error) <= 8 * eps * size


@pytest.mark.parametrize("num_sketch", [5, 8, 11])
def test_hutchpp_is_exact_for_low_rank(xp, dtype, eps, num_sketch):
    """Rank 5; with more sketches the products are dependent, and the surplus is dropped."""
    matrix = symmetric(SPECTRA["low rank"])
    hessian = xp.asarray(matrix, dtype=dtype)
    probes = [xp.asarray(z, dtype=dtype) for z in draw("gaussians", 4, 12)]
    found = hutchpp_trace(lambda v: hessian @ v, probes, num_sketch=num_sketch, space=SPACE)
    assert found.estimate.dtype == dtype
    assert int(found.num_matvecs) == 12 + num_sketch
    # The sketch of 5 Gaussians has a condition number below 100; the remainder sees its square.
    assert float(found.estimate) == pytest.approx(15.0, abs=500 * eps)
    assert not float(found.standard_error) > 500 * eps or num_sketch == 11


def test_hutchpp_against_its_formula():
    """tr(Q^T H Q) + mean of <y, H y>, y = (I - Q Q^T) z, with numpy's QR instead of ours."""
    matrix = symmetric(SPECTRA["decaying"])
    probes = draw("gaussians", 5, 9)
    found = hutchpp_trace(lambda v: matrix @ v, probes, num_sketch=3, space=SPACE)
    q, _ = np.linalg.qr(matrix @ np.stack(probes[:3], axis=1))
    outside = np.stack(probes[3:], axis=1)
    outside = outside - q @ (q.T @ outside)
    samples = np.sum(outside * (matrix @ outside), axis=0)
    assert float(found.estimate) == pytest.approx(
        np.trace(q.T @ matrix @ q) + np.mean(samples), rel=1e-12
    )
    assert float(found.standard_error) == pytest.approx(
        np.std(samples, ddof=1) / math.sqrt(6), rel=1e-10
    )
    assert int(found.num_matvecs) == 12


@pytest.mark.parametrize("count", [2, 3, 20])
def test_default_split_spends_three_halves(count):
    matrix, spent = symmetric(SPECTRA["flat"]), 0

    def hvp(v):
        nonlocal spent
        spent += 1
        return matrix @ v

    found = hutchpp_trace(hvp, draw("signs", 6, count), space=SPACE)
    assert int(found.num_matvecs) == spent == count + count // 2


def test_hutchpp_beats_hutchinson_on_decaying_spectra_at_equal_products():
    """Root mean square errors over 50 seeds, 30 products each."""
    eigenvalues = np.arange(1.0, 101.0) ** -1.5
    matrix, trace = symmetric(eigenvalues), np.sum(eigenvalues)

    def error(estimator, count):
        found = [
            estimator(lambda v: matrix @ v, draw("signs", 300 + s, count, 100), space=SPACE)
            for s in range(50)
        ]
        assert {int(f.num_matvecs) for f in found} == {30}
        return math.sqrt(np.mean([(float(f.estimate) - trace) ** 2 for f in found]))

    assert error(hutchpp_trace, 20) < 0.2 * error(hutchinson_trace, 30)


def test_rank_deficient_sketches_are_dropped(xp, dtype, eps):
    """The zero operator, equal probes, a zero probe: no NaN, and the right trace."""
    one = xp.asarray([1.0, 2.0, 3.0], dtype=dtype)
    zero = xp.zeros((3,), dtype=dtype)
    rest = [xp.asarray(z, dtype=dtype) for z in draw("signs", 7, 4, 3)]
    diagonal = xp.asarray([2.0, 3.0, 5.0], dtype=dtype)
    nothing = hutchpp_trace(lambda v: 0 * v, [one, one, *rest], num_sketch=2, space=SPACE)
    assert (float(nothing.estimate), float(nothing.standard_error)) == (0.0, 0.0)
    single = hutchpp_trace(lambda v: diagonal * v, [one, *rest], num_sketch=1, space=SPACE)
    double = hutchpp_trace(
        lambda v: diagonal * v, [one, 2 * one, zero, *rest], num_sketch=3, space=SPACE
    )
    assert float(double.estimate) == pytest.approx(float(single.estimate), rel=16 * eps)
    assert float(double.standard_error) == pytest.approx(float(single.standard_error), rel=64 * eps)
    full = hutchpp_trace(
        lambda v: diagonal * v,
        [*(xp.asarray(z, dtype=dtype) for z in draw("gaussians", 8, 5, 3)), *rest],
        num_sketch=5,
        space=SPACE,
    )
    assert float(full.estimate) == pytest.approx(10.0, rel=64 * eps)


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_basis_of_the_sketch_is_orthonormal_or_zero(name):
    """Three dimensions have three directions, whatever the rounding errors of the vectors are."""
    for seed in range(10):
        products = [z.astype(name) for z in draw("gaussians", seed, 6, 3)]
        basis = np.stack([wide(q) for q in _range_basis(products, SPACE)])
        norms = np.linalg.norm(basis, axis=1)
        assert np.count_nonzero(norms) == 3
        eps = float(np.finfo(name).eps)
        np.testing.assert_allclose(basis @ basis.T, np.diag(norms != 0), atol=16 * eps)


def test_dependent_products_leave_the_sketch(xp, dtype):
    x = xp.asarray(draw("gaussians", 11, 1)[0], dtype=dtype)
    other = xp.asarray(draw("gaussians", 12, 1)[0], dtype=dtype)
    basis = _range_basis([x, 3 * x, 0 * x, other, x - other / 3], SPACE)
    assert [bool(wide(q).any()) for q in basis] == [True, False, False, True, False]


def test_one_probe_outside_has_no_standard_error(xp, dtype):
    probes = [xp.asarray([1.0, 1.0], dtype=dtype), xp.asarray([1.0, -1.0], dtype=dtype)]
    found = hutchpp_trace(lambda v: 2 * v, probes, space=SPACE)
    assert float(found.standard_error) == math.inf
    assert float(found.estimate) == pytest.approx(2.0 + 4.0)  # inside and outside, by hand


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_what_is_not_finite_shows(xp, dtype, estimator):
    probes = [xp.asarray(z, dtype=dtype) for z in draw("signs", 9, 4, 3)]
    spoiled = [*probes[:1], probes[1] * xp.nan, *probes[2:]]
    assert math.isnan(float(estimator(lambda v: v * xp.nan, probes, space=SPACE).estimate))
    assert math.isnan(float(estimator(lambda v: 2 * v, spoiled, space=SPACE).estimate))


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_tuple_of_arrays_equals_the_flattened_vector(xp, dtype, eps, estimator):
    diagonal = xp.asarray(np.linspace(1.0, 2.0, 6), dtype=dtype)
    z = [xp.asarray(z, dtype=dtype) for z in draw("gaussians", 10, 4, 6)]
    flat = estimator(lambda v: diagonal * v, z, space=SPACE)
    parts = estimator(
        lambda v: (diagonal[:2] * v[0], diagonal[2:] * v[1]),
        [(x[:2], x[2:]) for x in z],
        space=TupleSpace(),
    )
    for a, b in zip(flat, parts, strict=True):
        assert float(a) == pytest.approx(float(b), rel=64 * eps)


def test_bad_options_are_refused():
    one = [np.ones(2)]
    with pytest.raises(ValueError, match=r"^probes must hold at least 1 vector, got 0$"):
        hutchinson_trace(lambda v: v, [], space=SPACE)
    with pytest.raises(TypeError, match=r"^probes must be a list or tuple of vectors, got ndarray"):
        hutchinson_trace(lambda v: v, np.ones((2, 2)), space=SPACE)
    with pytest.raises(ValueError, match=r"^probes must hold at least 2 vectors, got 1$"):
        hutchpp_trace(lambda v: v, one, space=SPACE)
    with pytest.raises(ValueError, match=r"got num_sketch=2 and 2 probes$"):
        hutchpp_trace(lambda v: v, one * 2, num_sketch=2, space=SPACE)
    with pytest.raises(ValueError, match=r"^num_sketch must be an integer >= 1, got 0$"):
        hutchpp_trace(lambda v: v, one * 2, num_sketch=0, space=SPACE)
    with pytest.raises(ValueError, match=r"same shape, got \(2,\) and \(1,\)"):
        hutchinson_trace(lambda v: v[:1], one, space=SPACE)
