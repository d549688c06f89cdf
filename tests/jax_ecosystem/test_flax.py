"""Networks with BatchNorm and Dropout in Flax Linen and NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from cdat_jax import CompositeLoss, cdat
from tests.jax.problems import dense, flat, same

RATE = 0.5
MOMENTUM = 0.9
x = np.random.default_rng(0).normal(size=(12, 3))
y = np.tanh(x[:, 0] - 2 * x[:, 1])


def solver():
    return cdat(optax.adam(1.0), sigma=1.0, initial_learning_rate=1e-2, max_growth=1.5)


def squared_error(outputs):
    return jnp.mean((outputs - y) ** 2)


def expected_measurement(loss, params):
    """Return slope and curvature at the first step of Adam from the dense gradient and Hessian."""
    _, gradient, hessian = dense(loss, params)
    u = -np.sign(gradient) * (np.abs(gradient) / (np.abs(gradient) + 1e-8))
    return gradient @ u, u @ hessian @ u


class Linen(linen.Module):
    @linen.compact
    def __call__(self, inputs, train):
        z = linen.Dense(6, param_dtype=jnp.float64)(inputs)
        z = linen.BatchNorm(
            use_running_average=not train, momentum=MOMENTUM, param_dtype=jnp.float64
        )(z)
        z = linen.Dropout(RATE, deterministic=not train)(jnp.tanh(z))
        return linen.Dense(1, param_dtype=jnp.float64)(z)[:, 0]


class Nnx(nnx.Module):
    def __init__(self, rngs):
        options = {"param_dtype": jnp.float64, "rngs": rngs}
        self.first = nnx.Linear(3, 6, **options)
        self.norm = nnx.BatchNorm(6, momentum=MOMENTUM, **options)
        self.dropout = nnx.Dropout(RATE, rngs=rngs)
        self.last = nnx.Linear(6, 1, **options)

    def __call__(self, inputs):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(inputs)))))[:, 0]


def test_linen_measures_the_loss_of_the_step_and_updates_the_statistics_once():
    model = Linen()
    variables = model.init(jax.random.key(0), x, train=False)
    params, statistics = variables["params"], variables["batch_stats"]
    optimizer = solver()

    def loss_and_statistics(params, statistics, key):
        outputs, updated = model.apply(
            {"params": params, "batch_stats": statistics},
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return squared_error(outputs), updated["batch_stats"]

    def value_fn(params, statistics, key):
        return loss_and_statistics(params, statistics, key)[0]

    @jax.jit
    def step(params, state, statistics, key):
        (value, new), grad = jax.value_and_grad(loss_and_statistics, has_aux=True)(
            params, statistics, key
        )
        extra = {"value": value, "grad": grad, "value_fn": value_fn}
        updates, state = optimizer.update(
            grad, state, params, statistics=statistics, key=key, **extra
        )
        return optax.apply_updates(params, updates), state, new

    key = jax.random.key(1)
    expected = expected_measurement(lambda p: value_fn(p, statistics, key), params)
    after, state, moved = step(params, optimizer.init(params), statistics, key)
    info = state.tuner.info
    np.testing.assert_allclose([info.slope, info.curvature], expected, rtol=1e-7)
    _, other = expected_measurement(lambda p: value_fn(p, statistics, jax.random.key(2)), params)
    assert abs(other - expected[1]) > 1e-2 * abs(expected[1])  # the mask makes a difference

    z = x @ np.asarray(params["Dense_0"]["kernel"]) + np.asarray(params["Dense_0"]["bias"])
    np.testing.assert_allclose(
        moved["BatchNorm_0"]["mean"], (1 - MOMENTUM) * z.mean(axis=0), rtol=1e-12, atol=1e-15
    )
    for _ in range(60):
        key = jax.random.fold_in(key, 0)
        after, state, moved = step(after, state, moved, key)
    outputs = model.apply({"params": after, "batch_stats": moved}, x, train=False)
    assert squared_error(outputs) < 0.5 * np.var(y)


def nnx_parts():
    model = Nnx(nnx.Rngs(0))
    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    # Flax keeps the statistics in float32.
    wide = lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf
    return graph, params, jax.tree.map(wide, rest)


def test_nnx_measures_the_loss_of_the_step_and_updates_the_statistics_once():
    """`rest` has statistics and keys; the loss works on a copy, and one call returns new ones."""
    graph, params, rest = nnx_parts()
    optimizer = solver()

    def loss_and_rest(params, rest):
        model = nnx.merge(graph, params, rest, copy=True)
        value = squared_error(model(x))
        return value, nnx.split(model, nnx.Param, ...)[2]

    def value_fn(params, rest):
        return loss_and_rest(params, rest)[0]

    @jax.jit
    def step(params, state, rest):
        (value, new), grad = jax.value_and_grad(loss_and_rest, has_aux=True)(params, rest)
        extra = {"value": value, "grad": grad, "value_fn": value_fn, "rest": rest}
        updates, state = optimizer.update(grad, state, params, **extra)
        return optax.apply_updates(params, updates), state, new

    expected = expected_measurement(lambda p: value_fn(p, rest), params)
    kept = jax.tree.map(jnp.copy, rest)
    after, state, moved = step(params, optimizer.init(params), rest)
    info = state.tuner.info
    np.testing.assert_allclose([info.slope, info.curvature], expected, rtol=1e-7)
    assert same(nnx.to_pure_dict(rest["norm"]), nnx.to_pure_dict(kept["norm"]))
    _, other = expected_measurement(lambda p: value_fn(p, moved), params)
    assert abs(other - expected[1]) > 1e-2 * abs(expected[1])  # the next mask differs

    z = x @ np.asarray(params["first"]["kernel"]) + np.asarray(params["first"]["bias"])
    np.testing.assert_allclose(
        moved["norm"]["mean"][...], (1 - MOMENTUM) * z.mean(axis=0), rtol=1e-12, atol=1e-15
    )
    for _ in range(60):
        after, state, moved = step(after, state, moved)
    model = nnx.merge(graph, after, moved)
    model.eval()
    assert squared_error(model(x)) < 0.5 * np.var(y)


@pytest.mark.parametrize("curvature", ["forward", "hvp", "gauss_newton"])
def test_training_of_linen_on_a_plain_pytree_is_the_same(curvature):
    """The network written out by hand, with the parameters of Flax."""
    model = linen.Dense(1, param_dtype=jnp.float64)
    params = model.init(jax.random.key(0), x)
    optimizer = cdat(optax.sgd(1.0), sigma=1.0, curvature=curvature)

    def by_hand(params, inputs):
        layer = params["params"]
        return inputs @ layer["kernel"] + layer["bias"]

    ends = []
    for network in (model.apply, by_hand):
        loss = CompositeLoss(network, lambda z: squared_error(z[:, 0]))
        value, grad = jax.value_and_grad(loss)(params, x)
        extra = {"value": value, "grad": grad, "value_fn": loss, "inputs": x}
        updates, _ = optimizer.update(grad, optimizer.init(params), params, **extra)
        ends.append(flat(updates))
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-12)
