"""The JAX and the PyTorch adapter train the same small tanh network along the same trajectory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import cdat_jax
import cdat_torch
from cdat_core import linesearch, tuners

STEPS = 50
SIZES = (6, 12, 8, 3)

RULES = {
    "cdat sigma 1": tuners.cdat(1.0, 0.9),
    "cdat sigma 1.5": tuners.cdat(1.5, 0.9),
    "cdat guarded": tuners.cdat(1.5, 0.9, initial_learning_rate=1e-3, max_growth=1.1),
    "greedy, averaged": tuners.quadratically_greedy(decay=0.9),
    "gen": tuners.gen(),
    "polyak": tuners.polyak(max_learning_rate=0.02),
    "hypergradient": tuners.hypergradient(0.1),
    "constant": tuners.constant(0.01),
    "backtracking": linesearch.backtracking(initial_step_size=0.02, max_step_size=0.02),
}

BASES: dict[str, tuple[Callable[[], Any], Callable[[Any], torch.optim.Optimizer]]] = {
    "gradient descent": (lambda: optax.sgd(1.0), lambda p: torch.optim.SGD(p, lr=1.0)),
    "momentum": (
        lambda: optax.chain(optax.trace(0.9), optax.scale(-1.0)),
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
    ),
    "adam": (lambda: optax.adam(1.0), lambda p: torch.optim.Adam(p, lr=1.0)),
}


@pytest.fixture(autouse=True)
def _float64() -> Any:
    with jax.enable_x64(True):
        yield


def problem(dtype: type[np.floating]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    weights: list[np.ndarray] = []
    for fan_in, fan_out in zip(SIZES[:-1], SIZES[1:], strict=True):
        weights += [rng.normal(size=(fan_in, fan_out)) / np.sqrt(fan_in), np.zeros(fan_out)]
    x, y = rng.normal(size=(40, SIZES[0])), rng.normal(size=(40, SIZES[-1]))
    return [w.astype(dtype) for w in weights], x.astype(dtype), y.astype(dtype)


def loss(weights: Any, x: Any, y: Any, tanh: Callable[[Any], Any]) -> Any:
    for i in range(0, len(weights), 2):
        x = x @ weights[i] + weights[i + 1]
        x = tanh(x) if i + 2 < len(weights) else x
    return ((x - y) ** 2).sum(1).mean() / 2


def train_jax(base: str, rule: Any, dtype: type[np.floating], steps: int) -> np.ndarray:
    weights, x, y = problem(dtype)
    solver = optax.chain(BASES[base][0](), cdat_jax.scale_by_tuner(rule))
    value_fn = lambda w, x, y: loss(w, x, y, jnp.tanh)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, grad = jax.value_and_grad(value_fn)(params, x, y)
        updates, state = solver.update(
            grad, state, params, value=value, grad=grad, value_fn=value_fn, x=x, y=y
        )
        return optax.apply_updates(params, updates), state, value

    params = [jnp.asarray(w) for w in weights]
    state, rows = solver.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state)
        rows.append([float(value), float(state[-1].learning_rate)])
    assert {str(p.dtype) for p in params} == {np.dtype(dtype).name}
    return np.asarray(rows)


def train_torch(base: str, rule: Any, dtype: type[np.floating], steps: int) -> np.ndarray:
    weights, x, y = problem(dtype)
    params = [torch.tensor(w, requires_grad=True) for w in weights]
    inputs, targets = torch.tensor(x), torch.tensor(y)
    optimizer = cdat_torch.TunedOptimizer(BASES[base][1](params), rule)
    rows = []
    for _ in range(steps):
        value = optimizer.step(lambda: loss(params, inputs, targets, torch.tanh))
        rows.append([float(value), float(optimizer.last.learning_rate)])
    return np.asarray(rows)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("base", BASES)
def test_adapters_agree_over_fifty_steps_in_float64(base: str, rule: str) -> None:
    # Rounding differs at 1e-16 a step. Neither sigma <= 1.5 nor a line search with an upper
    # bound amplifies that beyond 1e-9 in 50 steps.
    ours = train_jax(base, RULES[rule], np.float64, STEPS)
    theirs = train_torch(base, RULES[rule], np.float64, STEPS)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=0)
    assert ours[-1, 0] < ours[0, 0]


@pytest.mark.parametrize("base", BASES)
def test_adapters_agree_in_float32(base: str) -> None:
    # Ten steps from float32 rounding (6e-8), amplified by the curvature's cancellation.
    ours = train_jax(base, RULES["cdat sigma 1"], np.float32, 10)
    theirs = train_torch(base, RULES["cdat sigma 1"], np.float32, 10)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=0)


def test_measurements_of_both_adapters_equal_each_other() -> None:
    weights, x, y = problem(np.float64)
    rng = np.random.default_rng(1)
    direction = [rng.normal(size=w.shape) for w in weights]
    params = [torch.tensor(w, requires_grad=True) for w in weights]
    theirs = cdat_torch.measure(
        lambda: loss(params, torch.tensor(x), torch.tensor(y), torch.tanh),
        params,
        [torch.tensor(u) for u in direction],
    )
    for method in ("forward", "hvp"):
        ours = cdat_jax.measure(
            lambda w: loss(w, x, y, jnp.tanh),
            [jnp.asarray(w) for w in weights],
            [jnp.asarray(u) for u in direction],
            curvature=method,
        )
        np.testing.assert_allclose(
            [float(f) for f in ours[:3]], [float(f) for f in theirs[:3]], rtol=1e-12
        )
