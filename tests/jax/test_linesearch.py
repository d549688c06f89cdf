"""The strong-Wolfe search in the transformation: slopes of trials, with and without custom_vjp."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cdat_core import Measurement, linesearch
from cdat_jax import scale_by_tuner
from cdat_jax._slope import value_and_slope
from tests.jax.problems import factors, flat, random_like, stepper, train

pytestmark = pytest.mark.usefixtures("quick_compilation", "debug_nans")


@jax.custom_vjp
def squared(x):
    return jnp.sum(x * x)


squared.defvjp(lambda x: (squared(x), x), lambda x, ct: (2 * ct * x,))


def tanh_network(loss=lambda r: jnp.sum(r * r)):
    """Return the loss of a small network, its parameters and a batch."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(32, 3))
    batch = (jnp.asarray(inputs), jnp.asarray(np.sin(2 * inputs[:, :1]) * inputs[:, 1:2]))
    params = {
        "hidden": jnp.asarray(generator.normal(size=(3, 8)) / 2),
        "bias": jnp.zeros(8),
        "out": jnp.asarray(generator.normal(size=(8, 1)) / 3),
    }

    def value_fn(params, batch):
        x, y = batch
        hidden = jnp.tanh(x @ params["hidden"] + params["bias"][None, :])
        return loss(hidden @ params["out"] - y) / len(x)

    return value_fn, params, batch


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "custom_vjp"])
def test_slope_is_the_inner_product_with_the_gradient(wrapped):
    value_fn, params, batch = tanh_network(squared if wrapped else lambda r: jnp.sum(r * r))
    direction = random_like(params, seed=1)
    value, slope = jax.jit(lambda p, u: value_and_slope(lambda q: value_fn(q, batch), p, u))(
        params, direction
    )
    expected, grad = jax.value_and_grad(tanh_network()[0])(params, batch)
    inner = flat(grad) @ flat(direction)
    np.testing.assert_allclose(value, expected, rtol=1e-14)
    np.testing.assert_allclose(slope, inner, rtol=1e-12)  # a sum of 40 terms, some cancel


@pytest.mark.parametrize("wrapped", [False, True], ids=["real", "custom_vjp"])
def test_slope_for_complex_parameters(wrapped):
    """Against a central difference, whose error is about 1e-10 here."""
    w, u = jnp.asarray([1 + 2j, -0.5j]), jnp.asarray([0.3 - 1j, 2 + 0.1j])

    def loss(w):
        parts = jnp.stack([w.real, w.imag])
        return (squared(parts) if wrapped else jnp.sum(parts**2)) + jnp.sum(jnp.sin(w).real)

    _, slope = value_and_slope(loss, w, u)
    difference = (loss(w + 1e-5 * u) - loss(w - 1e-5 * u)) / 2e-5
    np.testing.assert_allclose(slope, difference, rtol=1e-8)


def test_no_gradient_is_formed_for_a_trial():
    """A backward pass would contain transposed operations and more matrix products."""
    value_fn, params, batch = tanh_network()
    direction = random_like(params, seed=1)

    def along(p, u):
        return value_and_slope(lambda q: value_fn(q, batch), p, u)

    traced = str(jax.make_jaxpr(along)(params, direction))
    assert "transpose" not in traced
    # Two products for the loss and three for its tangent; the batch has no tangent.
    assert traced.count("dot_general") == 5
    reverse = jax.make_jaxpr(jax.grad(value_fn))(params, batch)
    assert "transpose" in str(reverse)


@pytest.mark.parametrize("base", ["sgd", "adam"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "custom_vjp"])
def test_zoom_trains_a_tanh_network(base, wrapped):
    """The strong Wolfe conditions hold at every step, and the loss falls."""
    value_fn, params, batch = tanh_network(squared if wrapped else lambda r: jnp.sum(r * r))
    first = getattr(optax, base)(1.0)
    solver = optax.chain(first, scale_by_tuner(linesearch.zoom()))
    step, state, gradient = stepper(solver, value_fn), solver.init(params), jax.grad(value_fn)
    start = value_fn(params, batch)
    for _ in range(25):
        before, (params, state) = params, step(params, state, batch=batch)
        search = state[1].tuner_state
        if bool(search.failed):  # the direction of Adam may be an ascent direction
            assert float(search.slope) >= 0
            continue
        moved = jax.tree.map(jnp.subtract, params, before)
        slopes = [flat(gradient(p, batch=batch)) @ flat(moved) for p in (before, params)]
        # The slopes are differences of terms, here up to 1e-10 of them after the move is rounded.
        assert abs(slopes[1]) <= 0.9 * abs(slopes[0]) * (1 + 1e-8)
        decrease = value_fn(params, batch) - value_fn(before, batch)
        assert decrease <= 1e-4 * slopes[0] + 1e-15
    assert value_fn(params, batch) < 0.5 * start


def test_zoom_equals_the_core_search_driven_by_hand():
    value_fn, params, batch = factors()
    search = linesearch.zoom(initial_step_size=8.0, curvature_condition=0.1)
    solver = optax.chain(optax.sgd(1.0), scale_by_tuner(search))
    evaluate = jax.jit(jax.value_and_grad(value_fn))
    w, previous, rates = params, None, []

    def move(w, rate, grad):
        return jax.tree.map(lambda p, g: p - rate * g, w, grad)

    for _ in range(8):
        value, grad = evaluate(w, batch)
        slope = np.asarray(-flat(grad) @ flat(grad))
        state = search.init(Measurement(np.asarray(value), slope, None), np.zeros(()), previous)
        while not state.done:
            value, there = evaluate(move(w, state.step_size, grad), batch)
            slope = np.asarray(-flat(there) @ flat(grad))
            state = search.tell(state, np.asarray(value), slope)
        previous = state.step_size
        rates.append(float(previous))
        w = move(w, previous, grad)
    found = [float(s[1].learning_rate) for _, s in train(solver, value_fn, params, 8, batch=batch)]
    # Interpolation divides small differences, which enlarges rounding from step to step.
    np.testing.assert_allclose(found, rates, rtol=1e-9)
    assert len(set(rates)) == 8


def test_training_step_with_zoom_compiles_once_and_finishes_in_float32(single_precision):
    """It also continues after the loss no longer changes."""
    value_fn, params, batch = factors(dtype=jnp.float32)
    solver = optax.chain(optax.sgd(1.0), scale_by_tuner(linesearch.zoom()))
    step, state = stepper(solver, value_fn), solver.init(params)
    losses = [float(value_fn(params, batch))]
    for _ in range(60):
        params, state = step(params, state, batch=batch)
        losses.append(float(value_fn(params, batch)))
        assert np.isfinite(losses[-1])
        assert int(state[1].tuner_state.trials) <= 30
        assert losses[-1] <= losses[-2] * (1 + 4 * np.finfo(np.float32).eps)
    assert step._cache_size() == 1
    assert state[1].learning_rate.dtype == jnp.float32


def test_backtracking_asks_for_no_slope():
    """A trial costs one forward pass; nothing in the loop is differentiated."""
    value_fn, params, batch = tanh_network()

    def sizes(search):
        solver = optax.chain(optax.sgd(1.0), scale_by_tuner(search))
        state = solver.init(params)
        traced = jax.make_jaxpr(
            lambda g: solver.update(
                g, state, params, value=1.0, grad=g, value_fn=value_fn, batch=batch
            )
        )(params)
        return str(traced).count("dot_general")

    assert (sizes(linesearch.backtracking()), sizes(linesearch.zoom())) == (2, 5)
