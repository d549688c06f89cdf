"""The space of pytrees against numpy, and the core's power iteration on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cdat_core import PowerIterationState, power_iteration
from cdat_jax import TreeSpace, hvp
from tests.jax.problems import dense, flat, random_like, same

space = TreeSpace()


def nested(dtype):
    shapes = {"a": (2, 3), "b": [(4,), ()], "c": ({"d": (1, 1, 2)}, None)}
    return jax.tree.map(
        lambda shape: jnp.zeros(shape, dtype=dtype), shapes, is_leaf=lambda x: type(x) is tuple
        and all(type(n) is int for n in x),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_operations_agree_with_numpy(dtype):
    tolerance = 1e-6 if dtype == "float32" else 1e-14
    x, y = (random_like(nested(dtype), seed) for seed in (0, 1))
    product = space.vdot(x, y)
    assert product.shape == ()
    assert product.dtype == (jnp.float32 if tolerance == 1e-6 else jnp.float64)
    assert float(product) == pytest.approx(np.vdot(flat(x), flat(y)).real, rel=tolerance)
    for factor in (0.3, jnp.asarray(0.3), np.float64(0.3), jnp.asarray(0.3, dtype=jnp.float32)):
        scaled, moved = space.scale(factor, x), space.add_scale(x, factor, y)
        np.testing.assert_allclose(flat(scaled), 0.3 * flat(x), rtol=1e-6)
        np.testing.assert_allclose(flat(moved), flat(x) + 0.3 * flat(y), rtol=1e-6, atol=1e-7)
        for tree in (scaled, moved):
            assert jax.tree.structure(tree) == jax.tree.structure(x)
            assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_inner_products_of_low_precision_accumulate_in_float32(dtype):
    """In bfloat16 a sum of ones would stop growing at 256."""
    x = {"a": jnp.ones(5000, dtype=dtype), "b": jnp.full((3,), 200.0, dtype=dtype)}
    product = jax.jit(space.vdot)(x, x)
    assert product.dtype == jnp.float32
    assert float(product) == 5000 + 3 * 200.0**2


def test_factors_are_not_rounded_to_the_precision_of_the_leaves():
    """1.001 in bfloat16 is 1; the product must be computed with the wider factor."""
    x = jnp.full(3, 1000.0, dtype=jnp.bfloat16)
    factor = jnp.asarray(1.001, dtype=jnp.float32)
    exact = (x.astype(jnp.float32) * factor).astype(jnp.bfloat16)
    for other in (1.001, factor):
        assert np.array_equal(space.scale(other, x), exact)
    y = jnp.full(3, 3.0, dtype=jnp.bfloat16)
    third = jnp.asarray(1 / 3, dtype=jnp.float32)
    assert np.array_equal(space.scale(third, y), jnp.ones(3, dtype=jnp.bfloat16))
    assert np.array_equal(space.add_scale(y, -third, y), jnp.full(3, 2.0, dtype=jnp.bfloat16))


def test_mixed_dtypes_are_kept_leaf_by_leaf():
    x = {"a": jnp.ones(2, dtype=jnp.bfloat16), "b": jnp.ones(2, dtype=jnp.float64)}
    y = {"a": jnp.ones(2, dtype=jnp.float64), "b": jnp.ones(2, dtype=jnp.bfloat16)}
    assert space.vdot(x, y).dtype == jnp.float64
    moved = space.add_scale(x, 2.0, y)
    assert {name: leaf.dtype for name, leaf in moved.items()} == {
        "a": jnp.bfloat16,
        "b": jnp.float64,
    }


def test_complex_leaves_count_as_real_vectors_of_twice_the_length():
    x, y = jnp.asarray([1 + 2j, 3j]), jnp.asarray([2 - 1j, 1 + 1j])
    assert float(space.vdot(x, y)) == 1 * 2 + 2 * -1 + 0 * 1 + 3 * 1
    assert float(space.vdot(x, 1j * x)) == 0
    assert space.vdot(x, y).dtype == jnp.float64
    assert float(space.vdot({"z": x, "r": jnp.ones(2)}, {"z": x, "r": jnp.ones(2)})) == 14 + 2


def test_python_numbers_and_numpy_arrays_are_leaves():
    assert float(space.vdot({"a": 2.0, "b": np.ones(2)}, {"a": 3.0, "b": np.ones(2)})) == 8
    assert float(space.add_scale(1.0, 2.0, 3.0)) == 7
    assert float(space.scale(2.0, 3.0)) == 6


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.ones(2), np.ones((2, 1)), r"same shape, got \(2,\) and \(2, 1\)"),
        (np.ones(1), np.ones(3), r"same shape, got \(1,\) and \(3,\)"),
        ({"a": np.ones(2)}, {"b": np.ones(2)}, "structure|Dict key mismatch"),
        ((np.ones(2), np.ones(2)), (np.ones(2),), "structure|Tuple arity mismatch"),
        ((np.ones(2),), [np.ones(2)], "structure|Expected tuple"),
    ],
)
def test_trees_that_do_not_match_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        space.vdot(x, y)


@pytest.mark.parametrize("empty", [(), {}, {"a": None}], ids=str)
def test_the_product_of_trees_without_leaves_is_zero(empty):
    assert same(space.vdot(empty, empty), jnp.float32(0))


def curved(params):
    """An objective with a clear largest eigenvalue of its Hessian."""
    total = jnp.sum(params["a"]) + 2 * jnp.sum(params["b"])
    return total**2 + sum(jnp.sum(jnp.cosh(leaf)) for leaf in jax.tree.leaves(params))


@pytest.fixture(scope="module")
def spectrum(strict_jax):
    """Parameters, eigenvalues and eigenvectors."""
    params = random_like({"a": jnp.zeros((2, 2)), "b": jnp.zeros(3)}, seed=0)
    _, _, hessian = dense(curved, params)
    return params, *np.linalg.eigh(hessian)


def test_power_iteration_under_jit_finds_the_largest_eigenvalue(spectrum):
    params, eigenvalues, eigenvectors = spectrum

    @jax.jit
    def run(params, start):
        return power_iteration(hvp(curved, params), start, num_matvecs=6, space=space)

    state = run(params, random_like(params, seed=1))
    assert float(state.eigenvalue) == pytest.approx(eigenvalues[-1], rel=1e-10)
    assert abs(flat(state.vector) @ eigenvectors[:, -1]) == pytest.approx(1, rel=1e-10)
    assert float(state.residual_norm) < 1e-6 * eigenvalues[-1]
    assert int(state.num_matvecs) == 6


def test_power_iteration_is_a_carry_of_a_compiled_loop(spectrum):
    params, eigenvalues, _ = spectrum

    @jax.jit
    def run(params, start):
        product = hvp(curved, params)
        body = lambda _, state: power_iteration(product, state, num_matvecs=1, space=space)
        first = power_iteration(product, start, num_matvecs=1, space=space)
        return jax.lax.fori_loop(0, 5, body, first)

    state = run(params, random_like(params, seed=1))
    assert isinstance(state, PowerIterationState)
    assert float(state.eigenvalue) == pytest.approx(eigenvalues[-1], rel=1e-10)
    assert int(state.num_matvecs) == 6
