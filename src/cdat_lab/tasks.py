"""Tasks: data, initial weights and a loss written once on the array API.

The arrays of a task are numpy arrays in float64, made from the seed alone. A backend converts them
to its own arrays and calls the same loss, so a task is the same problem under every framework.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import array_api_compat
import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = Any
Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Task:
    """A training problem.

    Attributes
    ----------
    name : str
        How the command line calls it.
    description : str
        One sentence for the report.
    inputs : ndarray of float64, shape (samples, features)
        The inputs.
    targets : ndarray of float64, shape (samples, outputs)
        What the model should return.
    params : tuple of ndarray of float64
        The initial weights.
    loss : callable
        ``loss(params, inputs, targets) -> 0-d array``; pure, for arrays of any array-API framework.
    """

    name: str
    description: str
    inputs: Float64
    targets: Float64
    params: tuple[Float64, ...]
    loss: Callable[[Sequence[Array], Array, Array], Array]


def tanh_mlp(params: Sequence[Array], inputs: Array) -> Array:
    """Return the outputs of a fully connected network with tanh between its layers.

    Parameters
    ----------
    params : sequence of Array
        Weights and biases in turn: shapes (fan_in, fan_out), (fan_out,), ...
    inputs : Array, shape (samples, fan_in of the first layer)
        The inputs.

    Returns
    -------
    Array, shape (samples, fan_out of the last layer)
    """
    xp = array_api_compat.array_namespace(inputs)
    hidden = inputs
    for index in range(0, len(params), 2):
        if index:
            hidden = xp.tanh(hidden)
        hidden = hidden @ params[index] + params[index + 1]
    return hidden


def squared_loss(params: Sequence[Array], inputs: Array, targets: Array) -> Array:
    """Return half the squared distance of `tanh_mlp` to the targets, averaged over the samples."""
    xp = array_api_compat.array_namespace(inputs)
    residual = tanh_mlp(params, inputs) - targets
    return 0.5 * xp.sum(residual * residual) / inputs.shape[0]


def mlp_params(sizes: Sequence[int], generator: np.random.Generator) -> tuple[Float64, ...]:
    """Return weights drawn from N(0, 1/fan_in) and zero biases for the given layer sizes."""
    params: list[Float64] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        params.append(generator.standard_normal((fan_in, fan_out)) / math.sqrt(fan_in))
        params.append(np.zeros(fan_out))
    return tuple(params)


def digits(seed: int, samples: int = 512) -> Task:
    """Return the task of classifying scikit-learn's 8 x 8 digits by squared loss.

    Parameters
    ----------
    seed : int
        Seed of the choice of samples and of the weights, >= 0.
    samples : int
        How many of the 1797 images to train on.

    Returns
    -------
    Task
        64 inputs (pixels / 16, centred, over the mean deviation of a pixel), 10 one-hot targets.
    """
    from sklearn.datasets import load_digits

    generator = np.random.default_rng(seed)
    pixels, labels = load_digits(return_X_y=True)
    chosen = np.sort(generator.permutation(len(labels))[:samples])
    inputs = np.asarray(pixels[chosen], dtype=np.float64) / 16
    inputs = inputs - inputs.mean(axis=0)
    inputs = inputs / inputs.std(axis=0).mean()
    sizes = (64, 48, 48, 10)
    return Task(
        name="digits",
        description=(
            f"{samples} images of 8 x 8 handwritten digits (scikit-learn), full batch; a "
            f"{'-'.join(map(str, sizes))} tanh network, squared loss, float64"
        ),
        inputs=inputs,
        targets=np.eye(10)[labels[chosen]],
        params=mlp_params(sizes, generator),
        loss=squared_loss,
    )


@functools.lru_cache(maxsize=4)
def load(name: str, seed: int) -> Task:
    """Return a task; the last few are kept.

    Parameters
    ----------
    name : str
        A key of `TASKS`.
    seed : int
        Seed of data and weights, >= 0.

    Returns
    -------
    Task
        Its arrays are shared: do not change them.
    """
    return TASKS[name](seed)


TASKS: dict[str, Callable[[int], Task]] = {"digits": digits}
