"""The Lanczos process and the spaces it runs on, against dense linear algebra in numpy."""

import gc
import math
import weakref
from typing import ClassVar

import array_api_strict
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdat_core import ArraySpace, TupleSpace, lanczos
from cdat_core._orthogonal import remainder, remove
from cdat_core._tridiagonal import ritz_decomposition, tridiagonal_matrix
from tests.examples import examples

SPACE = ArraySpace()

SPECTRA = {
    "uniform": np.linspace(-1.0, 2.0, 20),
    "outlier": np.concatenate([np.linspace(0.0, 1.0, 19), [50.0]]),
    "decaying": 2.0 ** -np.arange(20.0),
    "indefinite": np.linspace(-3.0, 3.0, 20) ** 3,
    "singular": np.concatenate([np.zeros(15), np.linspace(1.0, 2.0, 5)]),
}


def symmetric(eigenvalues, seed=0):
    """Return a symmetric matrix with these eigenvalues."""
    n = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    matrix = basis * np.asarray(eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def wide(array):
    return np.asarray(array, dtype=np.float64)


def dense(run):
    """Return T and the matrix of the Lanczos vectors in double precision."""
    diagonal, off_diagonal = wide(run.diagonal), wide(run.off_diagonal)
    matrix = np.diag(diagonal) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1)
    return matrix, np.stack([wide(v) for v in run.vectors], axis=1)


@pytest.mark.parametrize("num_matvecs", [1, 2, 5, 12, 20])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_tridiagonalises(xp, dtype, eps, spectrum, num_matvecs):
    """H Q = Q T + r e_m^T with orthonormal Q: each step adds some rounding errors of |H|."""
    matrix = wide(xp.asarray(symmetric(spectrum), dtype=dtype))
    hessian = xp.asarray(matrix, dtype=dtype)
    start = np.random.default_rng(1).standard_normal(20) * 100
    run = lanczos(
        lambda v: hessian @ v,
        xp.asarray(start, dtype=dtype),
        num_matvecs=num_matvecs,
        space=SPACE,
    )
    assert run.diagonal.shape == (num_matvecs,)
    assert run.off_diagonal.shape == (num_matvecs - 1,)
    assert run.residual_norm.shape == run.num_valid.shape == run.num_matvecs.shape == ()
    for part in (run.diagonal, run.off_diagonal, run.residual_norm):
        assert part.dtype == dtype
    assert run.num_valid.dtype == run.num_matvecs.dtype == xp.int32
    assert int(run.num_matvecs) == num_matvecs
    m = int(run.num_valid)
    T, Q = dense(run)
    T, Q = T[:m, :m], Q[:, :m]
    size = np.max(np.abs(spectrum))
    np.testing.assert_allclose(Q.T @ Q, np.eye(m), atol=16 * eps)
    np.testing.assert_allclose(Q[:, 0], start / np.linalg.norm(start), atol=4 * eps)
    residual = matrix @ Q - Q @ T
    np.testing.assert_allclose(residual[:, :-1], 0, atol=64 * eps * size)
    assert np.linalg.norm(residual[:, -1]) == pytest.approx(
        float(run.residual_norm), abs=64 * eps * size
    )
    np.testing.assert_allclose(Q.T @ residual, 0, atol=64 * eps * size)
    assert np.all(wide(run.off_diagonal) >= 0)


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("beyond", [0, 1, 5])
def test_as_many_products_as_dimensions_are_exact(xp, dtype, eps, n, beyond):
    """More steps change nothing: the rest is exactly zero."""
    matrix = symmetric(np.linspace(-2.0, 3.0, n) if n > 1 else [3.0])
    hessian = xp.asarray(matrix, dtype=dtype)
    start = xp.asarray(np.linspace(1.0, 2.0, n), dtype=dtype)
    run = lanczos(lambda v: hessian @ v, start, num_matvecs=n + beyond, space=SPACE)
    assert int(run.num_valid) == n
    T, Q = dense(run)
    assert not T[n:].any()
    assert not Q[:, n:].any()
    assert float(run.residual_norm) == 0
    np.testing.assert_allclose(
        np.linalg.eigvalsh(T[:n, :n]), np.linalg.eigvalsh(matrix), atol=32 * eps * 3
    )


BREAKDOWNS = {
    # eigenvalues of a diagonal operator, start, dimension of the Krylov space
    "eigenvector": ([3.0, 1.0, 2.0, 5.0], [0.0, 0.0, 2.0, 0.0], 1),
    "two eigenvectors": ([3.0, 1.0, 2.0, 5.0], [1.0, 0.0, -2.0, 0.0], 2),
    "multiple eigenvalue": ([3.0, 3.0, 2.0, 2.0], [1.0, 0.5, 2.0, 3.0], 2),
    "identity": ([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0], 1),
    "zero operator": ([0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0], 1),
    "kernel": ([0.0, 0.0, 1.0, 2.0], [1.0, 2.0, 0.0, 0.0], 1),
    "zero start": ([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0], 0),
}


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("case", BREAKDOWNS.values(), ids=BREAKDOWNS)
def test_breakdown(xp, dtype, eps, case, reorthogonalize, scale):
    """The dimension is found at any scale of H and of the start, and the rest is exactly zero."""
    eigenvalues, start, dimension = case
    diagonal = xp.asarray(np.array(eigenvalues) * scale, dtype=dtype)
    run = lanczos(
        lambda v: diagonal * v,
        xp.asarray(np.array(start) / scale, dtype=dtype),
        num_matvecs=6,
        space=SPACE,
        reorthogonalize=reorthogonalize,
    )
    assert int(run.num_valid) == dimension
    assert not wide(run.diagonal)[dimension:].any()
    assert not wide(run.off_diagonal)[max(dimension - 1, 0) :].any()
    assert float(run.residual_norm) == 0
    for v in run.vectors[dimension:]:
        assert not wide(v).any()
    used = np.array(eigenvalues)[np.array(start) != 0]
    expected = np.sort(np.unique(used))[:dimension]
    block = wide(tridiagonal_matrix(run.diagonal, run.off_diagonal))[:dimension, :dimension]
    found = np.linalg.eigvalsh(block) if dimension else np.zeros(0)
    np.testing.assert_allclose(found / scale, expected, atol=16 * eps * max(eigenvalues))


class WideScalars(ArraySpace):
    """Scalars of float64 over vectors of float32, as an adapter may choose."""

    def vdot(self, x, y):
        return np.sum(wide(x) * wide(y))


@pytest.mark.parametrize("dimension", [1, 2, 4])
def test_breakdown_is_seen_where_scalars_are_wider_than_vectors(dimension):
    """Rounding errors of the vectors are far above the epsilon of the scalars."""
    n = 30
    spectrum = np.linspace(-1.0, 1.0, n)
    rng = np.random.default_rng(3)
    basis, _ = np.linalg.qr(rng.standard_normal((n, n)))
    hessian = (basis * spectrum @ basis.T).astype(np.float32)
    chosen = np.linspace(0, n - 1, dimension).astype(int)
    start = basis[:, chosen].sum(axis=1).astype(np.float32)
    run = lanczos(lambda v: hessian @ v, start, num_matvecs=8, space=WideScalars())
    assert run.diagonal.dtype == np.float64
    assert run.vectors[0].dtype == np.float32
    assert int(run.num_valid) == dimension
    T, _ = dense(run)
    np.testing.assert_allclose(
        np.linalg.eigvalsh(T[:dimension, :dimension]), spectrum[chosen], atol=1e-6
    )


@examples(100)
@given(
    entries=st.lists(st.sampled_from([0.0, 1.0, -1.0, 1e-7, 1e6, 0.3]), min_size=9, max_size=9),
    start=st.lists(st.sampled_from([0.0, 1.0, -2.0, 1e-9, 1e8]), min_size=3, max_size=3),
    num_matvecs=st.integers(1, 6),
)
def test_finite_input_gives_finite_output(xp, dtype, entries, start, num_matvecs):
    matrix = np.reshape(entries, (3, 3))
    hessian = xp.asarray(matrix + matrix.T, dtype=dtype)
    for reorthogonalize in (True, False):
        run = lanczos(
            lambda v: hessian @ v,
            xp.asarray(start, dtype=dtype),
            num_matvecs=num_matvecs,
            space=SPACE,
            reorthogonalize=reorthogonalize,
        )
        for part in (run.diagonal, run.off_diagonal, run.residual_norm, *run.vectors):
            assert np.all(np.isfinite(wide(part)))
        dimension = int(run.num_valid)
        assert (dimension == 0) == (not any(start))
        if reorthogonalize:
            assert dimension <= 3
            Q = dense(run)[1][:, :dimension]
            np.testing.assert_allclose(Q.T @ Q, np.eye(dimension), atol=1e-5)
        ritz = ritz_decomposition(run.diagonal, run.off_diagonal, run.num_valid)
        assert all(np.all(np.isfinite(wide(part))) for part in ritz)


def test_length_of_the_start_does_not_matter(xp, dtype):
    """Bit for bit, for powers of two."""
    hessian = xp.asarray(symmetric([3.0, 2.0, 1.0, -1.0]), dtype=dtype)
    start = xp.asarray([1.0, 2.0, -1.0, 0.5], dtype=dtype)
    runs = [
        lanczos(lambda v: hessian @ v, start * 2.0**power, num_matvecs=3, space=SPACE)
        for power in (0, -30, 30)
    ]
    for run in runs[1:]:
        np.testing.assert_array_equal(wide(run.diagonal), wide(runs[0].diagonal))
        np.testing.assert_array_equal(wide(run.off_diagonal), wide(runs[0].off_diagonal))


def test_few_steps_are_the_same_without_reorthogonalisation(xp, dtype, eps):
    hessian = xp.asarray(symmetric(SPECTRA["uniform"]), dtype=dtype)
    start = xp.ones((20,), dtype=dtype)
    runs = [
        lanczos(
            lambda v: hessian @ v,
            start,
            num_matvecs=6,
            space=SPACE,
            reorthogonalize=reorthogonalize,
        )
        for reorthogonalize in (True, False)
    ]
    # No Ritz value has converged after 6 steps, so rounding is amplified only a little.
    for a, b in zip(runs[0][:2], runs[1][:2], strict=True):
        np.testing.assert_allclose(wide(a), wide(b), atol=200 * eps)
    assert float(runs[0].residual_norm) == pytest.approx(
        float(runs[1].residual_norm), abs=200 * eps
    )
    assert runs[1].vectors == ()


def test_copies_of_converged_eigenvalues_appear_without_reorthogonalisation():
    """Prevent copies of eigenvalues: this is what reorthogonalisation is for."""
    spectrum = SPECTRA["outlier"]
    hessian = symmetric(spectrum)
    copies = []
    for reorthogonalize in (True, False):
        run = lanczos(
            lambda v: hessian @ v,
            np.ones(20),
            num_matvecs=20,
            space=SPACE,
            reorthogonalize=reorthogonalize,
        )
        found = np.linalg.eigvalsh(tridiagonal_matrix(run.diagonal, run.off_diagonal))
        copies.append(np.count_nonzero(np.abs(found - 50.0) < 1e-6))
    assert copies[0] == 1
    assert copies[1] > 1


@pytest.mark.parametrize("part", [1.0, 1e-3, 1e-5, 1e-7])
def test_two_passes_make_orthogonal_what_lies_nearly_in_the_span(part):
    """After one pass an angle of eps / part would be left."""
    q, _ = np.linalg.qr(np.random.default_rng(4).standard_normal((50, 11)))
    basis, x = list(q[:, :10].T), q[:, :10].sum(axis=1) + part * q[:, 10]
    rest, length, collapsed = remainder(x, lambda v: remove(v, basis, space=SPACE), space=SPACE)
    assert not collapsed
    assert float(length) == pytest.approx(part, rel=1e-14 / part)
    np.testing.assert_allclose(q[:, :10].T @ rest / length, 0, atol=1e-15)


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_what_lies_in_the_span_collapses(name):
    """Here the span is the whole space; no epsilon is needed to see it."""
    q, _ = np.linalg.qr(np.random.default_rng(5).standard_normal((4, 4)))
    q = q.astype(name)
    span = list(q.T)
    for x in np.random.default_rng(6).standard_normal((20, 4)).astype(name):
        _, length, collapsed = remainder(x, lambda v: remove(v, span, space=SPACE), space=SPACE)
        assert collapsed or length == 0


class Opaque:
    """A vector that only its space can operate on."""

    alive: ClassVar = weakref.WeakSet()
    most: ClassVar = 0

    def __init__(self, entries):
        self._entries = entries
        Opaque.alive.add(self)
        Opaque.most = max(Opaque.most, len(Opaque.alive))


class OpaqueSpace:
    """Scalars of array_api_strict, whatever the vectors are made of."""

    def vdot(self, x, y):
        return array_api_strict.asarray(float(x._entries @ y._entries))

    def scale(self, a, x):
        return Opaque(float(a) * x._entries)

    def add_scale(self, x, a, y):
        return Opaque(x._entries + float(a) * y._entries)


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_vectors_are_opaque_and_let_go(reorthogonalize):
    hessian = symmetric(SPECTRA["uniform"])

    def run(num_matvecs):
        gc.collect()
        Opaque.most = len(Opaque.alive)
        before = Opaque.most
        found = lanczos(
            lambda v: Opaque(hessian @ v._entries),
            Opaque(np.ones(20)),
            num_matvecs=num_matvecs,
            space=OpaqueSpace(),
            reorthogonalize=reorthogonalize,
        )
        return found, Opaque.most - before

    (short, few), (long, many) = run(5), run(15)
    assert many - few == (10 if reorthogonalize else 0)
    assert few <= 6 + 5 * reorthogonalize
    expected = lanczos(
        lambda v: hessian @ v,
        np.ones(20),
        num_matvecs=5,
        space=SPACE,
        reorthogonalize=reorthogonalize,
    )
    np.testing.assert_allclose(wide(short.diagonal), expected.diagonal, rtol=1e-13, atol=1e-14)
    assert isinstance(long.diagonal, type(array_api_strict.asarray(0.0)))


def test_tuple_of_arrays_equals_the_flattened_vector(xp, dtype, eps):
    hessian = xp.asarray(symmetric([4.0, 2.0, 1.0, 0.0, -1.0, -2.0]), dtype=dtype)

    def split(x):
        return x[:1], xp.reshape(x[1:], (1, 5))

    def joined(parts):
        return xp.concat([xp.reshape(part, (-1,)) for part in parts])

    start = xp.asarray([1.0, 2.0, 0.5, -1.0, 1.0, 3.0], dtype=dtype)
    flat = lanczos(lambda v: hessian @ v, start, num_matvecs=4, space=SPACE)
    parts = lanczos(
        lambda v: split(hessian @ joined(v)), split(start), num_matvecs=4, space=TupleSpace()
    )
    np.testing.assert_allclose(wide(parts.diagonal), wide(flat.diagonal), atol=200 * eps)
    np.testing.assert_allclose(wide(parts.off_diagonal), wide(flat.off_diagonal), atol=200 * eps)
    for a, b in zip(parts.vectors, flat.vectors, strict=True):
        assert [part.shape for part in a] == [(1,), (1, 5)]
        np.testing.assert_allclose(wide(joined(a)), wide(b), atol=200 * eps)


def test_complex_vectors_are_real_ones_of_twice_the_length(xp):
    """A real-linear operator: v -> v + conj(v) / 2 has the eigenvalues 3/2 and 1/2."""
    start = xp.asarray(np.array([1.0 + 2.0j, -0.5j, 3.0]))
    run = lanczos(lambda v: v + xp.conj(v) / 2, start, num_matvecs=4, space=SPACE)
    assert int(run.num_valid) == 2
    T, _ = dense(run._replace(vectors=(xp.zeros((2,)),)))
    np.testing.assert_allclose(np.linalg.eigvalsh(T[:2, :2]), [0.5, 1.5], rtol=1e-14)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(xp, dtype, bad):
    start = xp.asarray([1.0, 2.0], dtype=dtype)
    hessian = xp.asarray([[1.0, 0.5], [0.5, 3.0]], dtype=dtype)
    spoiled = xp.asarray([1.0, bad], dtype=dtype)
    for hvp, vector in ((lambda v: v * spoiled, start), (lambda v: hessian @ v, spoiled)):
        run = lanczos(hvp, vector, num_matvecs=3, space=SPACE)
        assert not np.all(np.isfinite(wide(run.diagonal)))
        ritz = ritz_decomposition(run.diagonal, run.off_diagonal, run.num_valid)
        assert np.all(np.isnan(wide(ritz.values)))
        assert np.all(np.isnan(wide(ritz.vectors)))


@pytest.mark.parametrize("num_valid", [0, 1, 3, 5])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e15])
def test_dead_rows_do_not_mix_with_zero_eigenvalues(xp, dtype, eps, num_valid, scale):
    """The block of size 3 is singular, like the rows after a breakdown."""
    diagonal, off_diagonal = np.zeros(5), np.zeros(4)
    diagonal[: min(num_valid, 3)] = np.array([1.0, 2.0, 1.0])[:num_valid]
    off_diagonal[: max(min(num_valid, 3) - 1, 0)] = 1.0
    ritz = ritz_decomposition(
        xp.asarray(scale * diagonal, dtype=dtype),
        xp.asarray(scale * off_diagonal, dtype=dtype),
        xp.asarray(num_valid, dtype=xp.int32),
    )
    T = scale * (np.diag(diagonal) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1))
    values, vectors = wide(ritz.values), wide(ritz.vectors)
    np.testing.assert_allclose(
        values[:num_valid], np.linalg.eigvalsh(T[:num_valid, :num_valid]), atol=8 * eps * scale
    )
    assert not values[num_valid:].any()
    assert not vectors[:, num_valid:].any()
    np.testing.assert_array_equal(np.asarray(ritz.valid), np.arange(5) < num_valid)
    np.testing.assert_allclose(vectors[num_valid:, :num_valid], 0, atol=8 * eps)
    np.testing.assert_allclose(T @ vectors, vectors * values, atol=16 * eps * scale)
    np.testing.assert_allclose(
        (vectors.T @ vectors)[:num_valid, :num_valid], np.eye(num_valid), atol=8 * eps
    )
    assert np.all(vectors[0] >= 0)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError)])
def test_number_of_products_is_a_positive_integer(value, error):
    with pytest.raises(error, match=rf"^num_matvecs must be an integer >= 1, got {value}$"):
        lanczos(lambda v: v, np.ones(2), num_matvecs=value, space=SPACE)


def test_product_of_another_shape_is_refused(xp):
    with pytest.raises(ValueError, match=r"same shape, got \(3,\) and \(1,\)"):
        lanczos(lambda v: v[:1], xp.ones((3,)), num_matvecs=2, space=SPACE)
