"""Laws of the tuned rate, tested through the transformation on random problems."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdat_jax import scale_by_cdat
from tests.examples import examples

seeds = st.integers(0, 2**32 - 1)
positive = st.floats(1e-4, 1e4)
few = examples(25)


def quartic(params, scale):
    """Return a loss of any pytree that has curvature of both signs."""
    total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))
    powers = sum(jnp.sum(leaf**4 - leaf**2) for leaf in jax.tree.leaves(params))
    return scale * (powers + 0.1 * total**2)


@functools.cache
def rates_of(every=1):
    """Return a compiled function that takes three steps and returns their rates."""

    @jax.jit
    def rates(points, directions, sigma, loss_scale, direction_scale):
        solver = scale_by_cdat(sigma=sigma, every=every)
        state, found = solver.init(points[0]), []
        for params, direction in zip(points, directions, strict=True):
            value, grad = jax.value_and_grad(quartic)(params, loss_scale)
            updates = jax.tree.map(lambda u: direction_scale * u, direction)
            _, state = solver.update(
                updates, state, params,
                value=value, grad=grad, value_fn=quartic, scale=loss_scale,
            )  # fmt: skip
            found.append(state.learning_rate)
        return jnp.stack(found)

    return rates


def problem(seed):
    """Return three points and three descent directions, as vectors of six entries."""
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(3, 6))
    grads = [4 * w**3 - 2 * w + 0.2 * np.sum(w) for w in points]
    return list(points), [-g * generator.uniform(0.5, 2, size=6) for g in grads]


def as_dict(w):
    return {"b": w[:2], "a": {"c": w[2:5], "d": w[5]}}


def as_tuple(w):
    return (w[0], (w[1:4], [w[4:5], w[5:].reshape(1, 1)]))


every = pytest.mark.parametrize("every", [1, 2])


@every
@few
@given(seed=seeds, scale=positive)
def test_scaling_the_loss_leaves_the_rate(every, seed, scale):
    points, directions = problem(seed)
    plain = rates_of(every)(points, directions, 1.5, 1.0, 1.0)
    scaled = rates_of(every)(points, directions, 1.5, scale, 1.0)
    assert np.all(plain > 0)
    np.testing.assert_allclose(scaled, plain, rtol=1e-10)


@every
@few
@given(seed=seeds, scale=positive)
def test_scaling_the_updates_scales_the_rate_inversely(every, seed, scale):
    points, directions = problem(seed)
    plain = rates_of(every)(points, directions, 1.5, 1.0, 1.0)
    scaled = rates_of(every)(points, directions, 1.5, 1.0, scale)
    np.testing.assert_allclose(scale * scaled, plain, rtol=1e-10)


@few
@given(seed=seeds, sigma=st.floats(0.1, 4))
def test_the_rate_is_proportional_to_sigma(seed, sigma):
    points, directions = problem(seed)
    one = rates_of()(points, directions, 1.0, 1.0, 1.0)
    np.testing.assert_allclose(
        rates_of()(points, directions, sigma, 1.0, 1.0), sigma * one, rtol=1e-12
    )


@pytest.mark.parametrize("arrange", [as_dict, as_tuple])
@few
@given(seed=seeds)
def test_the_structure_of_the_parameters_does_not_matter(arrange, seed):
    points, directions = problem(seed)
    flat = rates_of()(points, directions, 1.5, 1.0, 1.0)
    arranged = [[arrange(x) for x in vectors] for vectors in (points, directions)]
    np.testing.assert_allclose(rates_of()(*arranged, 1.5, 1.0, 1.0), flat, rtol=1e-10)


@functools.cache
def greedy_step():
    @jax.jit
    def step(matrix, params, direction):
        loss = lambda w: 0.5 * w @ (matrix @ w)
        solver = scale_by_cdat(sigma=1.0)
        value, grad = jax.value_and_grad(loss)(params)
        updates, _ = solver.update(
            direction, solver.init(params), params, value=value, grad=grad, value_fn=loss
        )
        return updates

    return step


@few
@given(seed=seeds)
def test_sigma_one_minimises_every_convex_quadratic_along_the_update(seed):
    generator = np.random.default_rng(seed)
    factor = generator.normal(size=(4, 4))
    matrix, params = factor @ factor.T + 0.1 * np.eye(4), generator.normal(size=4)
    gradient = matrix @ params
    direction = -gradient * generator.uniform(0.5, 2, size=4)
    if gradient @ direction >= 0:
        return
    updates = np.asarray(greedy_step()(matrix, params, direction))
    remaining = (matrix @ (params + updates)) @ direction
    assert abs(remaining) <= 1e-12 * abs(gradient @ direction)
    assert updates @ direction > 0
