"""The self-tuning rule is the same under NumPy, JAX and PyTorch: on scalars, and in training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from backends import BACKENDS

import cdat_jax
import cdat_torch
from cdat_core import Measurement, tuners

STEPS = 200
LENGTHS = {"endless": None, "cooldown": STEPS}


def histories(seed):
    """Return losses with outliers and a cliff, slopes of both signs and curvatures."""
    rng = np.random.default_rng(seed)
    losses = 1 + np.exp(-np.arange(STEPS) / 30) + 0.1 * rng.standard_normal(STEPS)
    losses[rng.integers(30, STEPS, 3)] *= 100
    losses[90:110] += 2
    slopes = -np.exp(rng.standard_normal(STEPS)) * rng.choice([1, 1, 1, -1], STEPS)
    return losses, slopes, np.exp(3 * rng.standard_normal(STEPS))


@pytest.mark.parametrize("total", LENGTHS.values(), ids=LENGTHS)
def test_rates_agree_on_one_history(total):
    tuner, found = tuners.self_tuning(total_steps=total), {}
    for name, backend in BACKENDS.items():
        update, observe = backend.wrap(tuner.update), backend.wrap(tuner.observe)
        for seed in range(3):
            state = tuner.init(backend.asarray(0.0, dtype="float64"))
            for step, numbers in enumerate(zip(*histories(seed), strict=True)):
                value, slope, curvature = (backend.asarray(x, dtype="float64") for x in numbers)
                if tuner.measures(step):
                    rate, state = update(Measurement(value, slope, curvature), state)
                else:
                    rate, state = observe(value, state)
                found.setdefault(name, []).append(float(rate))
    expected = found.pop("numpy")
    for rates in found.values():
        assert rates == pytest.approx(expected, rel=1e-9)


# A logistic regression with noisy labels: convex, so that rounding does not grow.

ROWS = np.random.default_rng(0)
INPUTS = ROWS.standard_normal((300, 5))
LABELS = (INPUTS.sum(axis=1) + ROWS.standard_normal(300) > 0).astype(float)
BATCHES = ROWS.integers(300, size=(STEPS, 32))

BASES = {
    "sgd": (lambda p: torch.optim.SGD(p), lambda: optax.sgd(1.0), 0.0),
    "momentum": (
        lambda p: torch.optim.SGD(p, momentum=0.9),
        lambda: optax.sgd(1.0, momentum=0.9),
        0.9,
    ),
    "adam": (lambda p: torch.optim.Adam(p), lambda: optax.adam(1.0), 0.9),
}


def by_numpy(momentum, adam, total):
    """Return the rates of a loop written out in NumPy, with the derivatives of the loss."""
    tuner = tuners.self_tuning(momentum, total)
    state, w, m, v = tuner.init(np.asarray(0.0)), np.zeros(5), np.zeros(5), np.zeros(5)
    for step, rows in enumerate(BATCHES):
        x, y = INPUTS[rows], LABELS[rows]
        z = x @ w
        value = np.mean(np.logaddexp(0, z) - y * z)
        chance = 1 / (1 + np.exp(-z))
        g = x.T @ (chance - y) / len(rows)
        if adam:
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            first, second = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            u = -first / (np.sqrt(second) + 1e-8)
        else:
            m = momentum * m + g
            u = -m
        if tuner.measures(step):
            curvature = np.mean(chance * (1 - chance) * (x @ u) ** 2)
            rate, state = tuner.update(Measurement(value, g @ u, curvature), state)
        else:
            rate, state = tuner.observe(value, state)
        w = w + rate * u
        yield float(rate)


def by_torch(make, total):
    """Return the rates of the PyTorch adapter."""
    w = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = cdat_torch.CDAT(make([w]), total_steps=total)
    for rows in BATCHES:
        x, y = torch.tensor(INPUTS[rows]), torch.tensor(LABELS[rows])
        optimizer.step(
            lambda x=x, y=y: torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y)
        )
        yield float(optimizer.last.learning_rate)


def by_jax(make, momentum, total):
    """Return the rates of the JAX adapter, in one scan."""

    def loss(w, x, y):
        z = x @ w
        return jnp.mean(jnp.logaddexp(0, z) - y * z)

    solver = cdat_jax.cdat(make(), momentum=momentum, total_steps=total)

    def step(carry, rows):
        w, state = carry
        x, y = jnp.asarray(INPUTS)[rows], jnp.asarray(LABELS)[rows]
        value, grad = jax.value_and_grad(loss)(w, x, y)
        updates, state = solver.update(
            grad, state, w, value=value, grad=grad, value_fn=loss, x=x, y=y
        )
        return (optax.apply_updates(w, updates), state), state.tuner.learning_rate

    start = jnp.zeros(5)
    _, rates = jax.jit(lambda: jax.lax.scan(step, (start, solver.init(start)), BATCHES))()
    return np.asarray(rates).tolist()


@pytest.mark.parametrize("total", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("base", BASES)
def test_adapters_take_the_same_rates_in_training(base, total):
    """200 steps in float64: measured, observed, and in the cooldown."""
    in_torch, in_jax, momentum = BASES[base]
    expected = list(by_numpy(momentum, base == "adam", total))
    assert list(by_torch(in_torch, total)) == pytest.approx(expected, rel=1e-9)
    assert by_jax(in_jax, momentum, total) == pytest.approx(expected, rel=1e-9)
