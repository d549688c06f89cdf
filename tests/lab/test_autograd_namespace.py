"""The namespace in which the NumPy backend differentiates a task."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import array_api_compat.numpy
import numpy as np
import pytest

from cdat_lab.backends import _autograd_namespace as xp
from cdat_lab.backends.numpy import Objective
from tests.lab.linear import linear_task

ROWS, INPUTS, OUTPUTS = 12, 5, 2


FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "acos": lambda xp, x: xp.acos(x / 2),
    "asinh": lambda xp, x: xp.asinh(x),
    "astype": lambda xp, x: xp.astype(x, xp.float64) * x,
    "atan2": lambda xp, x: xp.atan2(x, 2 + x),
    "concat": lambda xp, x: xp.concat([x, x * x], axis=-1),
    "concat flat": lambda xp, x: xp.concat([x, x[0, ...] ** 2], axis=None),
    "exp, log": lambda xp, x: xp.log(1 + xp.exp(x)),
    "matmul": lambda xp, x: xp.matmul(x, xp.matrix_transpose(x)),
    "max": lambda xp, x: xp.max(x, axis=-1, keepdims=True) * x,
    "mean": lambda xp, x: xp.mean(x * x, axis=(0, 1)),
    "permute_dims": lambda xp, x: xp.permute_dims(x, (2, 0, 1)) ** 2,
    "pow": lambda xp, x: xp.pow(x, 3),
    "reshape": lambda xp, x: xp.reshape(x, (-1, 2)) @ xp.reshape(x, (2, -1)),
    "stack": lambda xp, x: xp.stack([x, x * x], axis=1),
    "std": lambda xp, x: xp.std(x, axis=-1, correction=1, keepdims=True),
    "sum": lambda xp, x: xp.sum(x * x, axis=0),
    "take": lambda xp, x: xp.take(x * x, xp.asarray([1, 0, 1]), axis=-1),
    "take first": lambda xp, x: xp.take(x * x, xp.asarray([1, 1]), axis=0),
    "tanh": lambda xp, x: xp.tanh(x),
    "tril": lambda xp, x: xp.tril(x * x),
    "var": lambda xp, x: xp.var(x, axis=1),
    "where": lambda xp, x: xp.where(x > 0, x * x, xp.sin(x)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_functions_of_a_task_are_differentiated(name: str) -> None:
    """Value, gradient and Hessian of a function as the model of a task."""
    generator = np.random.default_rng(8)
    x = generator.permutation(np.linspace(-0.8, 0.9, 24)).reshape(2, 3, 4)
    u = generator.standard_normal(x.shape)
    shape = FUNCTIONS[name](array_api_compat.numpy, x).shape
    weights = generator.standard_normal(shape)
    task = linear_task(
        inputs=np.zeros((1, 1)),
        targets=np.zeros((1, 1)),
        params=(x,),
        model=lambda xp, params, inputs: FUNCTIONS[name](xp, params[0]),
        criterion=lambda xp, outputs, targets: xp.sum(weights * outputs * outputs),
    )

    def value(step: float) -> float:
        return float(np.sum(weights * FUNCTIONS[name](array_api_compat.numpy, x + step * u) ** 2))

    objective, h = Objective(task), 1e-3
    found, (grad,), hvp = objective.derivatives((x,), second=True)
    assert hvp is not None
    values = [value(k * h) for k in (-2, -1, 0, 1, 2)]
    slope = np.array([1, -8, 0, 8, -1]) @ values / (12 * h)
    curvature = np.array([-1, 16, -30, 16, -1]) @ values / (12 * h**2)
    assert found == pytest.approx(values[2], rel=1e-12)
    assert np.sum(grad * u) == pytest.approx(slope, rel=1e-8, abs=1e-8)
    assert np.sum(hvp((u,))[0] * u) == pytest.approx(curvature, rel=1e-6, abs=1e-6)
    steps = [FUNCTIONS[name](array_api_compat.numpy, x + k * h * u) for k in (-2, -1, 1, 2)]
    change = (steps[0] - 8 * steps[1] + 8 * steps[2] - steps[3]) / (12 * h)
    expected = 2 * np.sum(weights * change**2)
    assert objective.gauss_newton((x,), (u,)) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_a_saturated_tanh_has_no_curvature() -> None:
    x = np.array([[500.0, -500.0, 0.5, 20.0, -20.0]])
    task = linear_task(params=(x,), model=lambda xp, params, inputs: xp.tanh(params[0]))
    task = dataclasses.replace(task, criterion=lambda xp, outputs, targets: xp.sum(outputs))
    _, (grad,), hvp = Objective(task).derivatives((x,), second=True)
    assert hvp is not None
    slope = 1 - np.tanh(0.5) ** 2
    np.testing.assert_allclose(grad, [[0, 0, slope, 0, 0]], rtol=1e-14, atol=1e-14)
    expected = [[0, 0, -2 * np.tanh(0.5) * slope, 0, 0]]
    np.testing.assert_allclose(hvp((np.ones((1, 5)),))[0], expected, rtol=1e-14, atol=1e-14)


def test_constants_and_types_are_those_of_numpy() -> None:
    assert xp.pi == math.pi
    assert xp.float64 == np.float64
    assert xp.finfo(xp.float64).eps == np.finfo(np.float64).eps


def test_a_function_that_autograd_lacks_is_named() -> None:
    with pytest.raises(AttributeError, match="numpy backend has no function 'fused_attention'"):
        _ = xp.fused_attention
