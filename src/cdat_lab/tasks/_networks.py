"""Networks as pure functions of a namespace, the weights and the inputs, and their criteria."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from cdat_lab.tasks._task import Array, Float64, Namespace


def tanh_mlp(xp: Namespace, params: Sequence[Array], inputs: Array) -> Array:
    """Return the outputs of a fully connected network with tanh between its layers.

    Parameters
    ----------
    xp : namespace
        That of the arrays.
    params : sequence of Array
        Weights and biases in turn: shapes (fan_in, fan_out), (fan_out,), ...
    inputs : Array, shape (samples, fan_in of the first layer)
        The inputs.

    Returns
    -------
    Array, shape (samples, fan_out of the last layer)
    """
    hidden = inputs
    for index in range(0, len(params), 2):
        if index:
            hidden = xp.tanh(hidden)
        hidden = hidden @ params[index] + params[index + 1]
    return hidden


def squared_loss(xp: Namespace, outputs: Array, targets: Array) -> Array:
    """Return half the squared distance of the outputs to the targets, averaged over the rows."""
    residual = outputs - targets
    return 0.5 * xp.sum(residual * residual) / outputs.shape[0]


def mlp_params(sizes: Sequence[int], generator: np.random.Generator) -> tuple[Float64, ...]:
    """Return weights drawn from N(0, 1/fan_in) and zero biases for the given layer sizes."""
    params: list[Float64] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        params.append(generator.standard_normal((fan_in, fan_out)) / math.sqrt(fan_in))
        params.append(np.zeros(fan_out))
    return tuple(params)
