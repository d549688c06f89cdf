"""Equinox modules: their floating arrays are the parameters, and everything else is fixed."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cdat_core import linesearch
from cdat_jax import cdat, scale_by_tuner, sharpness
from tests.jax.problems import dense

x = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3)))
y = jnp.tanh(x[:, 0] - 2 * x[:, 1])


class Network(eqx.Module):
    first: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    last: eqx.nn.Linear
    power: int  # not a parameter, nor is the integer array
    offset: jax.Array

    def __init__(self, key):
        keys = jax.random.split(key)
        self.first = eqx.nn.Linear(3, 5, key=keys[0], dtype=jnp.float64)
        self.dropout = eqx.nn.Dropout(0.5)
        self.last = eqx.nn.Linear(5, "scalar", key=keys[1], dtype=jnp.float64)
        self.power = 2
        self.offset = jnp.arange(3)

    def __call__(self, inputs, key):
        z = jnp.tanh(self.first(inputs + self.offset))
        return self.last(self.dropout(z, key=key) ** self.power)


def loss_of(model, x, y, key):
    outputs = jax.vmap(model)(x, jax.random.split(key, len(x)))
    return jnp.mean((outputs - y) ** 2)


def step_of(solver, static):
    def value_fn(params, x, y, key):
        return loss_of(eqx.combine(params, static), x, y, key)

    @eqx.filter_jit
    def step(params, state, x, y, key):
        value, grad = jax.value_and_grad(value_fn)(params, x, y, key)
        extra = {"value": value, "grad": grad, "value_fn": value_fn, "x": x, "y": y, "key": key}
        updates, state = solver.update(grad, state, params, **extra)
        return eqx.apply_updates(params, updates), state, value

    return step, value_fn


@pytest.mark.parametrize("curvature", ["forward", "hvp"])
def test_curvature_is_that_of_the_dense_hessian_under_the_same_mask(curvature):
    params, static = eqx.partition(Network(jax.random.key(0)), eqx.is_inexact_array)
    solver = cdat(optax.sgd(1.0), sigma=1.0, curvature=curvature)
    step, value_fn = step_of(solver, static)
    key = jax.random.key(1)
    _, state, _ = step(params, solver.init(params), x, y, key)
    _, gradient, hessian = dense(lambda p: value_fn(p, x, y, key), params)
    info = state.tuner.info
    assert float(info.slope) == pytest.approx(-gradient @ gradient, rel=1e-12)
    assert float(info.curvature) == pytest.approx(gradient @ hessian @ gradient, rel=1e-12)
    found = sharpness(value_fn, params, x, y, key, num_matvecs=12)
    assert float(found) == pytest.approx(np.linalg.eigvalsh(hessian)[-1], rel=1e-4)


@pytest.mark.parametrize(
    "build",
    [
        lambda: cdat(optax.adam(1.0), sigma=1.0, initial_learning_rate=1e-2, max_growth=1.5),
        lambda: optax.chain(optax.sgd(1.0), scale_by_tuner(linesearch.backtracking())),
    ],
    ids=["cdat", "backtracking"],
)
def test_a_module_trains_and_its_other_fields_do_not_change(build):
    model = eqx.nn.inference_mode(Network(jax.random.key(0)))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    solver, key = build(), jax.random.key(1)
    step, value_fn = step_of(solver, static)
    state, first = solver.init(params), value_fn(params, x, y, key)
    for _ in range(60):
        params, state, value = step(params, state, x, y, key)
    trained = eqx.combine(params, static)
    assert value < 0.2 * first
    assert loss_of(trained, x, y, key) <= value
    assert (trained.power, trained.dropout.p) == (2, 0.5)
    np.testing.assert_array_equal(trained.offset, np.arange(3))
