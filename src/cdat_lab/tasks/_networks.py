"""Networks as pure functions of a namespace, the weights and the inputs, and their criteria."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from cdat_lab.tasks._task import Array, Float64, Namespace


def tanh_mlp(xp: Namespace, params: Sequence[Array], inputs: Array) -> Array:
    """Return the outputs of a fully connected network with tanh between its layers.

    Parameters
    ----------
    xp : namespace
        The namespace of the arrays.
    params : sequence of Array
        Weights and biases, alternating: shapes (fan_in, fan_out), (fan_out,), ...
    inputs : Array, shape (samples, fan_in of the first layer)
        The inputs.

    Returns
    -------
    Array, shape (samples, fan_out of the last layer)
    """
    return _mlp(xp.tanh, params, inputs)


def gelu_mlp(xp: Namespace, params: Sequence[Array], inputs: Array) -> Array:
    """Return the outputs of a fully connected network with `gelu` between its layers.

    See `tanh_mlp` for the parameters.
    """
    return _mlp(lambda x: gelu(xp, x), params, inputs)


def _mlp(activation: Callable[[Array], Array], params: Sequence[Array], inputs: Array) -> Array:
    hidden = inputs
    for index in range(0, len(params), 2):
        if index:
            hidden = activation(hidden)
        hidden = hidden @ params[index] + params[index + 1]
    return hidden


def linear_network(xp: Namespace, params: Sequence[Array], inputs: Array) -> Array:
    """Return the inputs multiplied by each weight matrix in turn."""
    del xp
    hidden = inputs
    for weights in params:
        hidden = hidden @ weights
    return hidden


def last_axis_product(xp: Namespace, x: Array, weights: Array) -> Array:
    """Return ``x @ weights`` as one matrix product; NumPy would compute one for each row of x.

    Parameters
    ----------
    xp : namespace
        The namespace of the arrays.
    x : Array, shape (..., fan_in)
    weights : Array, shape (fan_in, fan_out)

    Returns
    -------
    Array, shape (..., fan_out)
    """
    rows = xp.reshape(x, (-1, x.shape[-1]))
    return xp.reshape(rows @ weights, (*x.shape[:-1], weights.shape[1]))


def gelu(xp: Namespace, x: Array) -> Array:
    """Return the Gaussian error linear unit in its tanh form: the array API has no erf."""
    return 0.5 * x * (1 + xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def log_softmax(xp: Namespace, x: Array) -> Array:
    """Return the logarithm of the softmax over the last axis."""
    shifted = x - xp.max(x, axis=-1, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))


def squared_loss(xp: Namespace, outputs: Array, targets: Array) -> Array:
    """Return half the squared distance between outputs and targets, averaged over the rows."""
    residual = outputs - targets
    return 0.5 * xp.sum(residual * residual) / outputs.shape[0]


def cross_entropy(xp: Namespace, outputs: Array, targets: Array) -> Array:
    """Return the mean of ``-sum(targets * log_softmax(outputs))`` over all but the last axis."""
    return -xp.sum(targets * log_softmax(xp, outputs)) / math.prod(outputs.shape[:-1])


def relative_entropy(xp: Namespace, outputs: Array, targets: Array) -> Array:
    """Return the cross-entropy minus its minimum, reached when the softmax equals the targets.

    This is the Kullback-Leibler divergence from the targets, which must be positive; its infimum
    is 0.
    """
    return cross_entropy(xp, outputs, targets) - cross_entropy(xp, xp.log(targets), targets)


def normal(
    generator: np.random.Generator, shape: tuple[int, ...], scale: float | None = None
) -> Float64:
    """Draw weights from N(0, scale**2), by default N(0, 1/fan_in), fan_in the first axis."""
    deviation = 1 / math.sqrt(shape[0]) if scale is None else scale
    return deviation * generator.standard_normal(shape)


def mlp_params(
    sizes: Sequence[int], generator: np.random.Generator, scale: float = 1.0
) -> tuple[Float64, ...]:
    """Return weights drawn from ``scale * N(0, 1/fan_in)`` and zero biases, layer by layer."""
    params: list[Float64] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        params += [scale * normal(generator, (fan_in, fan_out)), np.zeros(fan_out)]
    return tuple(params)
