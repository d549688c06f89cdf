"""Gauss-Newton in both adapters, against a dense J^T H_L J in numpy float64."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import cdat_jax
import cdat_torch
from cdat_core import tuners

LOSSES = ("squared", "cross-entropy")
INPUTS, HIDDEN, OUTPUTS, EXAMPLES = 4, 5, 3, 12
SHAPES = ((INPUTS, HIDDEN), (HIDDEN,), (HIDDEN, OUTPUTS), (OUTPUTS,))


def problem() -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Return weights, inputs, targets of a regression and labels."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape) / 2 for shape in SHAPES]
    x, y = rng.normal(size=(EXAMPLES, INPUTS)), rng.normal(size=(EXAMPLES, OUTPUTS))
    return weights, x, y, rng.integers(0, OUTPUTS, EXAMPLES)


def network(weights: Any, x: Any, tanh: Any) -> Any:
    return tanh(x @ weights[0] + weights[1][None, :]) @ weights[2] + weights[3][None, :]


def jax_loss(kind: str) -> tuple[cdat_jax.CompositeLoss, dict[str, Any]]:
    _, x, y, labels = problem()
    model_fn = lambda w, x: network(w, x, jnp.tanh)
    if kind == "squared":
        loss_fn = lambda z, y: jnp.mean(jnp.sum((z - y) ** 2, axis=1)) / 2
        return cdat_jax.CompositeLoss(model_fn, loss_fn), {"x": x, "y": y}
    loss_fn = lambda z, y: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, y))
    return cdat_jax.CompositeLoss(model_fn, loss_fn), {"x": x, "y": labels}


def torch_loss(kind: str, params: list[torch.Tensor]) -> cdat_torch.CompositeLoss:
    _, x, y, labels = problem()
    inputs = torch.tensor(x)
    targets = torch.tensor(y if kind == "squared" else labels)

    def loss_fn(z: torch.Tensor) -> torch.Tensor:
        if kind == "squared":
            return (z - targets).square().sum(1).mean() / 2
        return torch.nn.functional.cross_entropy(z, targets)

    return cdat_torch.CompositeLoss(lambda: network(params, inputs, torch.tanh), loss_fn)


def reference(kind: str, weights: list[np.ndarray]) -> tuple[float, np.ndarray, np.ndarray]:
    """Return value, gradient and the Gauss-Newton matrix, by the chain rule written out."""
    _, x, y, labels = problem()
    first, bias, second, last = weights
    hidden = np.tanh(x @ first + bias)
    z = hidden @ second + last
    value, gradient, matrix = 0.0, 0.0, 0.0
    for i in range(EXAMPLES):
        # The derivative of output k by each parameter, in the order of SHAPES.
        bent = 1 - hidden[i] ** 2
        eye = np.eye(OUTPUTS)
        by_bias = second.T * bent
        jacobian = np.concatenate(
            [
                np.einsum("a,kh->kah", x[i], by_bias).reshape(OUTPUTS, -1),
                by_bias,
                np.einsum("h,jk->khj", hidden[i], eye).reshape(OUTPUTS, -1),
                eye,
            ],
            axis=1,
        )
        if kind == "squared":
            residual, curvature = z[i] - y[i], eye
            loss = 0.5 * residual @ residual
        else:
            log_sum = np.log(np.sum(np.exp(z[i])))
            p = np.exp(z[i] - log_sum)
            residual, curvature = p - eye[labels[i]], np.diag(p) - np.outer(p, p)
            loss = log_sum - z[i, labels[i]]
        value += loss / EXAMPLES
        gradient = gradient + jacobian.T @ residual / EXAMPLES
        matrix = matrix + jacobian.T @ curvature @ jacobian / EXAMPLES
    return value, gradient, matrix


def parts(vector: np.ndarray) -> list[np.ndarray]:
    ends = np.cumsum([np.prod(shape) for shape in SHAPES])[:-1]
    return [p.reshape(s) for p, s in zip(np.split(vector, ends), SHAPES, strict=True)]


@pytest.mark.parametrize("kind", LOSSES)
def test_curvature_is_that_of_the_dense_matrix(kind: str) -> None:
    weights = problem()[0]
    value, gradient, matrix = reference(kind, weights)
    params = [torch.tensor(w, requires_grad=True) for w in weights]
    composite, batch = jax_loss(kind)
    objective = lambda w: composite(w, **batch)
    hessian_differs = False
    rng = np.random.default_rng(1)
    for u in (*rng.normal(size=(4, len(gradient))), -gradient):
        expected = (value, gradient @ u, u @ matrix @ u)
        arrays = [jnp.asarray(w) for w in weights], [jnp.asarray(p) for p in parts(u)]
        ours = cdat_jax.measure(
            functools.partial(composite, **batch), *arrays, curvature="gauss_newton"
        )
        theirs = cdat_torch.measure(
            torch_loss(kind, params),
            params,
            [torch.tensor(p) for p in parts(u)],
            curvature="gauss_newton",
        )
        for found in (ours, theirs):
            np.testing.assert_allclose([float(f) for f in found[:3]], expected, rtol=1e-10)
        hessian = float(cdat_jax.measure(objective, *arrays).curvature)
        hessian_differs = hessian_differs or abs(hessian / expected[2] - 1) > 0.01
    assert hessian_differs


def trained_by_hand(kind: str, steps: int) -> list[list[float]]:
    """Gradient descent with sigma = 1 and decay = 0.5."""
    w, n, d, rows = problem()[0], 0.0, 0.0, []
    for _ in range(steps):
        value, gradient, matrix = reference(kind, w)
        n = 0.5 * n + 0.5 * (gradient @ gradient)
        d = 0.5 * d + 0.5 * (gradient @ matrix @ gradient)
        rows.append([value, n / d])
        w = [p - n / d * g for p, g in zip(w, parts(gradient), strict=True)]
    return rows


def train_jax(kind: str, base: Any, steps: int) -> list[list[float]]:
    composite, batch = jax_loss(kind)
    rule = cdat_jax.scale_by_tuner(tuners.cdat(1.0, 0.5), curvature="gauss_newton")
    solver = optax.chain(base, rule)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, grad = jax.value_and_grad(composite)(params, **batch)
        updates, state = solver.update(
            grad, state, params, value=value, grad=grad, value_fn=composite, **batch
        )
        return optax.apply_updates(params, updates), state, value

    params, rows = [jnp.asarray(w) for w in problem()[0]], []
    state = solver.init(params)
    for _ in range(steps):
        params, state, value = step(params, state)
        rows.append([float(value), float(state[-1].learning_rate)])
    return rows


def train_torch(kind: str, base: Any, steps: int) -> list[list[float]]:
    params, rows = [torch.tensor(w, requires_grad=True) for w in problem()[0]], []
    optimizer = cdat_torch.TunedOptimizer(
        base(params), tuners.cdat(1.0, 0.5), curvature="gauss_newton"
    )
    closure = torch_loss(kind, params)
    for _ in range(steps):
        value = optimizer.step(closure)
        rows.append([float(value), float(optimizer.last.learning_rate)])
    return rows


@pytest.mark.parametrize("base", ["gradient descent", "adam"])
@pytest.mark.parametrize("kind", LOSSES)
def test_training_takes_the_same_trajectory(kind: str, base: str) -> None:
    """Thirty steps amplify rounding of 1e-16 by less than the factor that 1e-9 leaves."""
    optax_base, torch_base = {
        "gradient descent": (optax.sgd(1.0), lambda p: torch.optim.SGD(p, lr=1.0)),
        "adam": (optax.adam(1.0), lambda p: torch.optim.Adam(p, lr=1.0)),
    }[base]
    ours, theirs = train_jax(kind, optax_base, 30), train_torch(kind, torch_base, 30)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    if base == "gradient descent":
        np.testing.assert_allclose(ours, trained_by_hand(kind, 30), rtol=1e-9)
    assert ours[-1][0] < 0.8 * ours[0][0]
