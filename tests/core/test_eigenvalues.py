"""Extreme eigenvalues by Lanczos, against numpy's eigh and ARPACK (scipy's eigsh)."""

import math

import numpy as np
import pytest
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from cdat_core import ArraySpace, TopEigenvalues, TupleSpace, power_iteration, top_eigenvalues

SPACE = ArraySpace()
RNG = np.random.default_rng(7)

SPECTRA = {
    "random": np.sort(RNG.standard_normal(120)),
    "clustered": np.concatenate(
        [-1 + 1e-3 * RNG.random(40), 1e-3 * RNG.random(40), 2 + 1e-3 * RNG.random(40)]
    ),
    "outlier": np.concatenate([RNG.random(119), [100.0]]),
    "decaying": np.arange(1.0, 121.0) ** -2,
    "singular": np.concatenate([np.zeros(100), np.linspace(1.0, 3.0, 20)]),
    "indefinite": np.linspace(-3.0, 3.0, 120) ** 3,
}


def symmetric(eigenvalues, seed=0):
    """Return a symmetric matrix with these eigenvalues."""
    n = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    matrix = basis * np.asarray(eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def wide(array):
    return np.asarray(array, dtype=np.float64)


def ends(values, k, which):
    """Return the wanted eigenvalues, descending."""
    values = np.sort(values)[::-1]
    return {
        "largest": values[:k],
        "smallest": values[len(values) - k :],
        "both": np.concatenate([values[:k], values[len(values) - k :]]),
    }[which]


@pytest.mark.parametrize(("which", "k"), [("largest", 4), ("smallest", 1), ("both", 2)])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_pairs_and_their_residuals(xp, dtype, eps, spectrum, k, which):
    """Residuals are true, and each bounds the distance to an eigenvalue; values are inside."""
    matrix = wide(xp.asarray(symmetric(spectrum), dtype=dtype))
    hessian = xp.asarray(matrix, dtype=dtype)
    start = xp.asarray(np.random.default_rng(1).standard_normal(120), dtype=dtype)
    found = top_eigenvalues(
        lambda v: hessian @ v, start, k=k, num_matvecs=20, space=SPACE, which=which
    )
    wanted = 2 * k if which == "both" else k
    exact = np.linalg.eigvalsh(matrix)
    size = np.max(np.abs(exact))
    values, residual_norms = wide(found.values), wide(found.residual_norms)
    vectors = np.stack([wide(v) for v in found.vectors], axis=1)
    assert found.values.shape == found.residual_norms.shape == (wanted,)
    assert found.values.dtype == found.residual_norms.dtype == found.vectors[0].dtype == dtype
    assert int(found.num_matvecs) == 20
    assert np.all(np.diff(values) <= 0)
    assert np.all(np.isfinite(residual_norms))
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(wanted), atol=32 * eps)
    true = np.linalg.norm(matrix @ vectors - vectors * values, axis=0)
    np.testing.assert_allclose(residual_norms, true, atol=64 * eps * size)
    for value, residual in zip(values, residual_norms, strict=True):
        assert np.min(np.abs(exact - value)) <= residual + 64 * eps * size
    # Ritz values approach the ends from inside: the j-th largest from below, and so on.
    inside = ends(exact, k, which) - values
    slack = 64 * eps * size
    top = k if which != "smallest" else 0
    assert np.all(inside[:top] >= -slack)
    assert np.all(inside[top:] <= slack)
    assert np.all(np.stack([wide(start)]) @ vectors >= -slack * np.linalg.norm(wide(start)))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("n", [3, 12])
def test_full_run_is_exact(xp, dtype, eps, n, k):
    matrix = symmetric(np.linspace(-2.0, 4.0, n))
    hessian = xp.asarray(matrix, dtype=dtype)
    start = xp.asarray(np.random.default_rng(2).standard_normal(n), dtype=dtype)
    exact = np.linalg.eigvalsh(matrix)
    for which in ("largest", "smallest"):
        found = top_eigenvalues(
            lambda v: hessian @ v, start, k=k, num_matvecs=n + 3, space=SPACE, which=which
        )
        np.testing.assert_allclose(wide(found.values), ends(exact, k, which), atol=64 * eps * 4)
        assert not wide(found.residual_norms).any()


def arpack(matrix, start, *, k, which, ncv, maxiter, tol):
    """Return the eigenvalues that ARPACK found, descending, and the products it took."""
    spent = 0

    def matvec(v):
        nonlocal spent
        spent += 1
        return matrix @ v

    operator = LinearOperator(matrix.shape, matvec=matvec, dtype=matrix.dtype)
    options = {"ncv": ncv, "maxiter": maxiter, "tol": tol, "v0": start}
    try:
        values = eigsh(operator, k, which=which, return_eigenvectors=False, **options)
    except ArpackNoConvergence as failure:
        values = failure.eigenvalues
    return np.sort(values)[::-1], spent


def worst(found, exact):
    """Return the largest error; fewer eigenvalues than wanted are an error of inf."""
    return np.max(np.abs(found - exact)) if len(found) == len(exact) else math.inf


@pytest.mark.parametrize("which", ["largest", "smallest"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_no_worse_than_arpack_for_the_same_products(spectrum, k, which):
    """All that ARPACK can reach with its restarts lies in the Krylov space of one long run.

    Rounding floor: 1000 eps |H|; both commit a few eps |H| in every step.
    """
    matrix = symmetric(spectrum)
    start = np.random.default_rng(3).standard_normal(len(spectrum))
    exact = ends(np.linalg.eigvalsh(matrix), k, which)
    floor = 1000 * np.finfo(np.float64).eps * np.max(np.abs(spectrum))
    converged = 0
    for ncv in (2 * k + 2, 20):
        for maxiter in (1, 4):
            for tol in (0.0, 10.0, 1e12):  # with large ones ARPACK returns what it has
                theirs, spent = arpack(
                    matrix,
                    start,
                    k=k,
                    which={"largest": "LA", "smallest": "SA"}[which],
                    ncv=ncv,
                    maxiter=maxiter,
                    tol=tol,
                )
                assert spent >= k
                ours = top_eigenvalues(
                    lambda v: matrix @ v, start, k=k, num_matvecs=spent, space=SPACE, which=which
                )
                assert worst(ours.values, exact) <= worst(theirs, exact) + floor
                converged += len(theirs) == k
    assert converged >= 4  # so that something is compared


def test_faster_than_power_iteration():
    matrix = symmetric(np.linspace(0.0, 1.0, 100))
    start = np.random.default_rng(4).standard_normal(100)
    power = power_iteration(lambda v: matrix @ v, start, num_matvecs=30, space=SPACE)
    found = top_eigenvalues(lambda v: matrix @ v, start, num_matvecs=30, space=SPACE)
    assert abs(found.values[0] - 1) < 0.1 * abs(power.eigenvalue - 1)


@pytest.mark.parametrize(
    ("which", "k", "expected"),
    [
        ("largest", 2, [5.0, -1.0]),
        ("largest", 4, [5.0, -1.0, -2.0, None]),
        ("smallest", 4, [5.0, -1.0, -2.0, None]),
        ("smallest", 1, [-2.0]),
        ("both", 1, [5.0, -2.0]),
        ("both", 2, [5.0, -1.0, -2.0, None]),
        ("both", 3, [5.0, -1.0, -2.0, None, None, None]),
    ],
)
def test_early_end_is_filled(xp, dtype, eps, which, k, expected):
    """Three distinct eigenvalues of multiplicity two give three pairs, however many are wanted."""
    diagonal = xp.asarray([-1.0, 5.0, -2.0, 5.0, -1.0, -2.0], dtype=dtype)
    start = xp.asarray([1.0, 2.0, 1.0, -1.0, 0.5, 2.0], dtype=dtype)
    found = top_eigenvalues(
        lambda v: diagonal * v, start, k=k, num_matvecs=6, space=SPACE, which=which
    )
    for value, vector, residual, wanted in zip(
        wide(found.values), found.vectors, wide(found.residual_norms), expected, strict=True
    ):
        if wanted is None:
            assert (value, residual) == (0.0, math.inf)
            assert not wide(vector).any()
        else:
            assert value == pytest.approx(wanted, abs=32 * eps * 5)
            assert residual == 0
            assert np.linalg.norm(wide(vector)) == pytest.approx(1.0, abs=16 * eps)
            np.testing.assert_allclose(
                wide(diagonal) * wide(vector), wanted * wide(vector), atol=64 * eps * 5
            )


def test_zero_start_finds_nothing(xp, dtype):
    found = top_eigenvalues(
        lambda v: 2 * v, xp.zeros((3,), dtype=dtype), k=2, num_matvecs=3, space=SPACE
    )
    assert wide(found.values).tolist() == [0.0, 0.0]
    assert wide(found.residual_norms).tolist() == [math.inf, math.inf]
    assert not any(wide(v).any() for v in found.vectors)


def test_zero_operator_has_the_eigenvalue_zero(xp, dtype):
    """Its residual and its vector distinguish it from padding."""
    found = top_eigenvalues(
        lambda v: 0 * v, xp.ones((4,), dtype=dtype), k=2, num_matvecs=3, space=SPACE
    )
    assert wide(found.values).tolist() == [0.0, 0.0]
    assert wide(found.residual_norms).tolist() == [0.0, math.inf]
    np.testing.assert_allclose(wide(found.vectors[0]), 0.5, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_finite_shows(xp, dtype):
    found = top_eigenvalues(
        lambda v: v * xp.nan, xp.ones((4,), dtype=dtype), k=2, num_matvecs=3, space=SPACE
    )
    assert np.all(np.isnan(wide(found.values)))
    assert np.all(np.isnan(wide(found.residual_norms)))
    assert all(np.all(np.isnan(wide(v))) for v in found.vectors)


@pytest.mark.parametrize("which", ["largest", "both"])
def test_warm_start_saves_products(which):
    spectrum = SPECTRA["random"]
    before, after = symmetric(spectrum), symmetric(spectrum) + 1e-3 * symmetric(spectrum, seed=5)
    exact = ends(np.linalg.eigvalsh(after), 2, which)
    start = np.random.default_rng(6).standard_normal(len(spectrum))
    options = {"k": 2, "space": SPACE, "which": which}
    first = top_eigenvalues(lambda v: before @ v, start, num_matvecs=60, **options)
    warm = top_eigenvalues(lambda v: after @ v, first, num_matvecs=8, **options)
    cold = top_eigenvalues(lambda v: after @ v, start, num_matvecs=8, **options)
    assert isinstance(warm, TopEigenvalues)
    assert int(warm.num_matvecs) == 8
    assert worst(warm.values, exact) < 1e-2 * worst(cold.values, exact)


def test_warm_start_from_an_eigenvector_hides_the_rest():
    """The risk that the docstring warns about."""
    before, after = np.array([3.0, 1.0, 2.0]), np.array([3.0, 7.0, 2.0])
    first = top_eigenvalues(lambda v: before * v, np.ones(3), num_matvecs=3, space=SPACE)
    exact = first._replace(vectors=(np.array([1.0, 0.0, 0.0]),))
    warm = top_eigenvalues(lambda v: after * v, exact, num_matvecs=3, space=SPACE)
    assert warm.values.tolist() == [3.0]


def test_tuple_of_arrays_equals_the_flattened_vector(xp, dtype, eps):
    hessian = xp.asarray(symmetric(np.linspace(-1.0, 2.0, 8)), dtype=dtype)

    def split(x):
        return x[:3], xp.reshape(x[3:], (5, 1))

    def joined(parts):
        return xp.concat([xp.reshape(part, (-1,)) for part in parts])

    start = xp.asarray(np.linspace(1.0, 2.0, 8), dtype=dtype)
    options = {"k": 2, "num_matvecs": 8, "which": "both"}
    flat = top_eigenvalues(lambda v: hessian @ v, start, space=SPACE, **options)
    parts = top_eigenvalues(
        lambda v: split(hessian @ joined(v)), split(start), space=TupleSpace(), **options
    )
    np.testing.assert_allclose(wide(parts.values), wide(flat.values), atol=64 * eps)
    for a in parts.vectors:
        assert [part.shape for part in a] == [(3,), (5, 1)]
    warm = top_eigenvalues(
        lambda v: split(hessian @ joined(v)), parts, space=TupleSpace(), **options
    )
    np.testing.assert_allclose(wide(warm.values), wide(flat.values), atol=256 * eps)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_matvecs": 0}, ValueError, r"^num_matvecs must be an integer >= 1, got 0$"),
        ({"num_matvecs": 2, "k": 0}, ValueError, r"^k must be an integer >= 1, got 0$"),
        ({"num_matvecs": 2, "k": 1.0}, TypeError, r"^k must be an integer >= 1, got 1.0$"),
        (
            {"num_matvecs": 2, "k": 3},
            ValueError,
            r"^num_matvecs must be at least k, got num_matvecs=2 and k=3$",
        ),
        (
            {"num_matvecs": 3, "k": 2, "which": "both"},
            ValueError,
            r"^num_matvecs must be at least 2 \* k, got num_matvecs=3 and k=2$",
        ),
        (
            {"num_matvecs": 3, "which": "LA"},
            ValueError,
            r"^which must be 'largest', 'smallest' or 'both', got 'LA'$",
        ),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        top_eigenvalues(lambda v: v, np.ones(3), space=SPACE, **options)
