"""Curvature along a direction and dominant eigenvalues, against closed forms in numpy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import rosen_der, rosen_hess, rosen_hess_prod

from cdat_core import (
    ArraySpace,
    PowerIterationState,
    TupleSpace,
    directional_curvature,
    finite_difference_hvp,
    measure,
    power_iteration,
)
from tests.examples import examples

SPACE = ArraySpace()
entries = st.integers(-(3 << 10), 3 << 10).map(lambda k: k / 1024)  # far from underflow


def matrices(size):
    """Symmetric matrices."""
    rows = st.lists(entries, min_size=size * size, max_size=size * size)
    return rows.map(lambda x: np.reshape(x, (size, size))).map(lambda a: (a + a.T) / 2)


def vectors(size):
    return st.lists(entries, min_size=size, max_size=size).map(np.array)


@examples(50)
@given(matrix=matrices(4), grad=vectors(4), direction=vectors(4))
def test_measure_of_a_dense_quadratic(xp, dtype, eps, matrix, grad, direction):
    """Rounding: at most n + 2 roundings on every term of <u, A u>, and n on those of <g, u>."""
    hessian, g, u = (xp.asarray(x, dtype=dtype) for x in (matrix, grad, direction))
    measurement = measure(xp.asarray(2.5, dtype=dtype), g, lambda v: hessian @ v, u, space=SPACE)
    slope, curvature = grad @ direction, direction @ matrix @ direction
    terms = np.abs(direction) @ np.abs(matrix) @ np.abs(direction)
    assert float(measurement.value) == 2.5
    assert measurement.sharpness is None
    magnitude = np.abs(grad) @ np.abs(direction)
    assert abs(float(measurement.slope) - slope) <= 8 * eps * magnitude
    assert abs(float(measurement.curvature) - curvature) <= 12 * eps * terms
    assert (measurement.slope.dtype, measurement.curvature.dtype) == (dtype, dtype)
    assert (measurement.slope.shape, measurement.curvature.shape) == ((), ())


@given(w=vectors(3), u=vectors(3))
def test_curvature_of_a_quartic(w, u):
    """f = sum(w**4) / 12 has the Hessian diag(w**2)."""
    curvature = directional_curvature(lambda v: w**2 * v, u, space=SPACE)
    assert curvature == pytest.approx(math.fsum(w**2 * u**2), rel=1e-14, abs=1e-300)
    numerical = finite_difference_hvp(lambda w: w**3 / 3, w, space=SPACE)
    # Truncation: h**2 / 3 * |u|**2 with h = 6e-6 max(1, |w|); rounding: eps * |g| / h.
    assert directional_curvature(numerical, u, space=SPACE) == pytest.approx(
        math.fsum(w**2 * u**2), abs=1e-8 * (u @ u) + 1e-12
    )


@given(w=vectors(4), u=vectors(4))
def test_curvature_of_the_rosenbrock_function(w, u):
    expected = u @ rosen_hess(w) @ u
    scale = np.abs(u) @ np.abs(rosen_hess(w)) @ np.abs(u)
    exact = directional_curvature(lambda v: rosen_hess_prod(w, v), u, space=SPACE)
    assert exact == pytest.approx(expected, abs=1e-14 * scale)
    # Here third derivatives reach 1e4 and fourth 2.4e3; h is at most 4e-5.
    numerical = finite_difference_hvp(rosen_der, w, space=SPACE)
    assert directional_curvature(numerical, u, space=SPACE) == pytest.approx(
        expected, abs=1e-5 * (u @ u) + 1e-12
    )


@pytest.mark.parametrize("step", [None, 1e-3])
def test_finite_difference_is_linear_in_the_length_of_the_vector(xp, dtype, eps, step):
    """On a quadratic only rounding is left: eps * |g| / h, a fraction of |H v|."""
    matrix = np.array([[2.0, 1.0, 0.0], [1.0, -3.0, 0.5], [0.0, 0.5, 1.0]])
    hessian = xp.asarray(matrix, dtype=dtype)
    w = xp.asarray([1.0, -2.0, 0.5], dtype=dtype)
    hvp = finite_difference_hvp(lambda p: hessian @ p, w, step=step, space=SPACE)
    for length in (1e-6, 1.0, 1e6):
        v = np.array([1.0, 2.0, 2.0]) / 3 * length
        product = hvp(xp.asarray(v, dtype=dtype))
        assert product.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(product), matrix @ v, atol=20 * eps / (step or eps ** (1 / 3)) * length
        )


@pytest.mark.parametrize(("size", "moved"), [(0.0, 1e-3), (0.25, 1e-3), (50.0, 0.05)])
def test_finite_difference_moves_the_parameters_by_a_length_relative_to_theirs(size, moved):
    """And by at least `step` itself, whatever the length of the vector."""
    seen = []

    def grad(p):
        seen.append(p)
        return p

    w = size * np.array([0.6, 0.8])
    hvp = finite_difference_hvp(grad, w, step=1e-3, space=SPACE)
    for length in (1e-3, 1e3):
        seen.clear()
        hvp(length * np.array([0.8, 0.6]))
        direction = np.array([0.8, 0.6])
        np.testing.assert_allclose(seen, [w + moved * direction, w - moved * direction], rtol=1e-13)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zero_direction_has_zero_slope_and_curvature(xp, dtype, zero):
    w = xp.asarray([1.0, 2.0], dtype=dtype)
    u = xp.asarray([zero, zero], dtype=dtype)
    for hvp in (lambda v: 3 * v, finite_difference_hvp(lambda p: 3 * p, w, space=SPACE)):
        measurement = measure(xp.asarray(1.0, dtype=dtype), w, hvp, u, space=SPACE)
        assert (float(measurement.slope), float(measurement.curvature)) == (0.0, 0.0)
        assert [float(x) for x in hvp(u)] == [0.0, 0.0]


def test_finite_difference_at_zero_parameters(xp, dtype, eps):
    """The displacement then has the length `step` itself."""
    w = xp.zeros((2,), dtype=dtype)
    hvp = finite_difference_hvp(lambda p: 3 * p, w, space=SPACE)
    np.testing.assert_allclose(
        np.asarray(hvp(xp.ones((2,), dtype=dtype))), [3.0, 3.0], rtol=16 * eps
    )


def test_non_finite_hessian_shows(xp, dtype):
    """No operation may turn NaN into a number."""
    u = xp.asarray([1.0, 2.0], dtype=dtype)
    assert math.isnan(float(directional_curvature(lambda v: v * xp.nan, u, space=SPACE)))
    found = power_iteration(lambda v: v * xp.nan, u, num_matvecs=2, space=SPACE)
    assert math.isnan(float(found.eigenvalue))
    assert math.isnan(float(found.residual_norm))


@examples(50)
@given(matrix=matrices(5), grad=vectors(5), direction=vectors(5))
def test_tuple_of_arrays_equals_the_flattened_vector(xp, dtype, eps, matrix, grad, direction):
    def split(x):
        x = xp.asarray(x, dtype=dtype)
        return x[:2], xp.reshape(x[2:4], (2, 1)), x[4]

    def joined(parts):
        return xp.concat([xp.reshape(part, (-1,)) for part in parts])

    hessian = xp.asarray(matrix, dtype=dtype)
    value = xp.asarray(0.0, dtype=dtype)
    flat = measure(
        value, joined(split(grad)), lambda v: hessian @ v, joined(split(direction)), space=SPACE
    )
    parts = measure(
        value,
        split(grad),
        lambda v: split(hessian @ joined(v)),
        split(direction),
        space=TupleSpace(),
    )
    terms = np.abs(direction) @ np.abs(matrix) @ np.abs(direction)
    assert abs(float(parts.curvature - flat.curvature)) <= 12 * eps * terms
    assert abs(float(parts.slope - flat.slope)) <= 12 * eps * (np.abs(grad) @ np.abs(direction))


def test_tuple_space_operates_part_by_part(xp, dtype):
    space = TupleSpace()
    x = (xp.asarray([1.0, 2.0], dtype=dtype), xp.asarray(3.0, dtype=dtype))
    y = (xp.asarray([4.0, 5.0], dtype=dtype), xp.asarray(6.0, dtype=dtype))
    assert float(space.vdot(x, y)) == 32.0
    half = xp.asarray(0.5, dtype=xp.float64)
    for a in (0.5, half):  # a multiplier of another dtype does not widen the vector
        scaled, moved = space.scale(a, x), space.add_scale(x, a, y)
        assert [part.dtype for part in (*scaled, *moved)] == [dtype] * 4
        assert [np.asarray(part).tolist() for part in scaled] == [[0.5, 1.0], 1.5]
        assert [np.asarray(part).tolist() for part in moved] == [[3.0, 4.5], 6.0]


@pytest.mark.parametrize("name", ["complex64", "complex128"])
def test_complex_arrays_are_real_vectors_of_twice_the_length(xp, name):
    real_dtype = xp.float32 if name == "complex64" else xp.float64
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((2, 4, 3, 2))

    def both(real):
        pair = real[..., 0] + 1j * real[..., 1]
        return xp.asarray(pair, dtype=getattr(xp, name)), xp.asarray(real, dtype=real_dtype)

    (cx, rx), (cy, ry) = both(x), both(y)
    tolerance = 24 * float(xp.finfo(real_dtype).eps) * np.sum(np.abs(x * y))
    assert abs(float(SPACE.vdot(cx, cy) - SPACE.vdot(rx, ry))) <= tolerance
    assert SPACE.vdot(cx, cy).dtype == real_dtype
    a = xp.asarray(0.5, dtype=real_dtype)
    assert np.array_equal(np.asarray(SPACE.scale(a, cx)), np.asarray(both(0.5 * x)[0]))
    assert SPACE.add_scale(cx, a, cy).dtype == getattr(xp, name)
    # <u, H u> of f = |w|^2 / 2 + Re(w^2) / 4, whose Hessian v -> v + conj(v) / 2 is real-linear.
    curvature = directional_curvature(lambda v: v + xp.conj(v) / 2, cx, space=SPACE)
    assert float(curvature) == pytest.approx(
        np.sum(1.5 * x[..., 0] ** 2 + 0.5 * x[..., 1] ** 2), rel=100 * tolerance
    )


def test_shapes_must_agree(xp):
    x, y = xp.zeros((3,)), xp.zeros((1,))
    with pytest.raises(ValueError, match=r"same shape, got \(3,\) and \(1,\)"):
        SPACE.vdot(x, y)
    with pytest.raises(ValueError, match=r"same shape, got \(1,\) and \(3,\)"):
        measure(xp.zeros(()), y, lambda v: v, x, space=SPACE)
    with pytest.raises(ValueError, match=r"same shape, got \(3,\) and \(1,\)"):
        TupleSpace().vdot((x, x), (x, y))
    with pytest.raises(ValueError, match="zip"):
        TupleSpace().vdot((x, x), (x,))
    with pytest.raises(ValueError, match="at least one array"):
        TupleSpace().vdot((), ())


# Power iteration


def spectrum(*eigenvalues, seed=0):
    """Return a symmetric matrix with these eigenvalues."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(eigenvalues),) * 2))
    matrix = basis * np.array(eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize(
    "eigenvalues", [(5.0, 2.0, 1.0, -1.0), (-5.0, 3.0, 1.0, 0.5), (2.0, 0.0, 0.0, 0.0), (-7.0,)]
)
def test_power_iteration_finds_the_eigenvalue_of_largest_magnitude(xp, dtype, eps, eigenvalues):
    matrix = spectrum(*eigenvalues)
    hessian = xp.asarray(matrix, dtype=dtype)
    start = xp.asarray(np.linspace(1.0, 2.0, len(eigenvalues)) * 100, dtype=dtype)
    found = power_iteration(lambda v: hessian @ v, start, num_matvecs=60, space=SPACE)
    values, basis = np.linalg.eigh(matrix)
    top = np.argmax(np.abs(values))
    size = abs(values[top])
    assert float(found.eigenvalue) == pytest.approx(values[top], abs=16 * eps * size)
    # (3 / 5)**60 = 5e-14 of the start is left in the other directions.
    vector = np.asarray(found.vector, dtype=np.float64)
    assert abs(vector @ basis[:, top]) == pytest.approx(1.0, abs=16 * eps)
    assert float(found.residual_norm) <= (16 * eps + 1e-12) * size
    assert int(found.num_matvecs) == 60
    assert (found.vector.dtype, found.eigenvalue.dtype) == (dtype, dtype)


@examples(50)
@given(matrix=matrices(4), start=vectors(4), num_matvecs=st.integers(1, 8))
def test_residual_bounds_the_distance_to_an_eigenvalue(matrix, start, num_matvecs):
    found = power_iteration(lambda v: matrix @ v, start, num_matvecs=num_matvecs, space=SPACE)
    eigenvalues = np.linalg.eigvalsh(matrix)
    rounding = 1e-14 * np.max(np.abs(eigenvalues))
    if np.any(found.vector):
        distance = np.min(np.abs(eigenvalues - found.eigenvalue))
        assert distance <= found.residual_norm + rounding
        assert np.linalg.norm(found.vector) == pytest.approx(1.0, rel=1e-14)
        assert np.min(eigenvalues) - rounding <= found.eigenvalue
        assert found.eigenvalue <= np.max(eigenvalues) + rounding
    else:  # a zero start, or a vector the matrix annihilates
        assert found.eigenvalue == 0


def test_warm_start_equals_one_long_run(xp, dtype):
    """Bit for bit."""
    hessian = xp.asarray(spectrum(3.0, 2.5, -2.0), dtype=dtype)
    start = xp.ones((3,), dtype=dtype)
    long = power_iteration(lambda v: hessian @ v, start, num_matvecs=7, space=SPACE)
    state = start
    for num_matvecs in (1, 2, 4):
        state = power_iteration(lambda v: hessian @ v, state, num_matvecs=num_matvecs, space=SPACE)
    assert isinstance(state, PowerIterationState)
    assert np.array_equal(np.asarray(state.vector), np.asarray(long.vector))
    assert [float(x) for x in state[1:]] == [float(x) for x in long[1:]]


def test_power_iteration_on_tuples(xp, dtype, eps):
    matrix = spectrum(4.0, -1.0, 0.5)
    hessian = xp.asarray(matrix, dtype=dtype)

    def hvp(parts):
        product = hessian @ xp.concat(parts)
        return product[:1], product[1:]

    start = xp.ones((1,), dtype=dtype), xp.ones((2,), dtype=dtype)
    found = power_iteration(hvp, start, num_matvecs=40, space=TupleSpace())
    assert float(found.eigenvalue) == pytest.approx(4.0, rel=16 * eps)
    assert [part.shape for part in found.vector] == [(1,), (2,)]


def test_zero_start_gives_zero(xp, dtype):
    """And no NaN, nor a division warning."""
    start = xp.zeros((3,), dtype=dtype)
    found = power_iteration(lambda v: 2 * v, start, num_matvecs=2, space=SPACE)
    assert [float(x) for x in found.vector] == [0.0, 0.0, 0.0]
    assert [float(x) for x in found[1:]] == [0.0, 0.0, 2.0]


def test_annihilated_start_gives_zero(xp, dtype):
    hessian = xp.asarray([[1.0, 0.0], [0.0, 0.0]], dtype=dtype)
    start = xp.asarray([0.0, 1.0], dtype=dtype)
    found = power_iteration(lambda v: hessian @ v, start, num_matvecs=3, space=SPACE)
    assert [float(x) for x in (*found.vector, *found[1:])] == [0.0, 0.0, 0.0, 0.0, 3.0]


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError)])
def test_number_of_products_is_a_positive_integer(value, error):
    with pytest.raises(error, match=rf"^num_matvecs must be an integer >= 1, got {value}$"):
        power_iteration(lambda v: v, np.ones(2), num_matvecs=value, space=SPACE)
