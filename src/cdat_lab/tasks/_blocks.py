"""Parts of the mini-batch tasks: data, augmentation and layers, on the array API."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cdat_lab.tasks._networks import gelu, last_axis_product, normal
from cdat_lab.tasks._task import Array, Criterion, Float64, Model, Namespace, Task

SIGNAL = 40
"""Length of a signal of `signals`."""
CLASSES = 10
"""Classes of `digit_images` and `signals`."""


def digit_images(
    generator: np.random.Generator, training: int, held_out: int
) -> tuple[Float64, NDArray[np.int64]]:
    """Draw digits of scikit-learn, standardised over all of them, and their labels.

    Returns
    -------
    inputs : ndarray of float64, shape (training + held_out, 64)
    labels : ndarray of int64, shape (training + held_out,)
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    chosen = generator.permutation(len(labels))[: training + held_out]
    inputs = np.asarray(pixels[chosen], dtype=np.float64) / 16
    inputs = inputs - inputs.mean(axis=0)
    return inputs / inputs.std(axis=0).mean(), labels[chosen].astype(np.int64)


def signals(generator: np.random.Generator, samples: int) -> tuple[Float64, NDArray[np.int64]]:
    """Generate one-dimensional signals of ten classes, in the spirit of MNIST-1D.

    Each class is a smooth random template. A sample is its template, scaled, shifted, tilted and
    with smooth and white noise added.

    Returns
    -------
    inputs : ndarray of float64, shape (samples, 40)
    labels : ndarray of int64, shape (samples,)

    References
    ----------
    S. Greydanus, D. Kobak, "Scaling Down Deep Learning with MNIST-1D", arXiv:2011.14439.
    """
    frequencies = np.arange(1, 6)
    waves = generator.standard_normal((CLASSES, 2, len(frequencies))) / frequencies**0.5
    labels = generator.integers(CLASSES, size=samples)
    shift = 0.15 * generator.standard_normal((samples, 1))
    time = np.linspace(0, 1, SIGNAL) + shift
    phases = math.pi * frequencies[:, None] * time[:, None, :]
    sine, cosine = waves[labels, 0, :, None], waves[labels, 1, :, None]
    inputs = np.sum(sine * np.sin(phases) + cosine * np.cos(phases), axis=1)
    inputs = inputs * (1 + 0.2 * generator.standard_normal((samples, 1)))
    inputs += generator.standard_normal((samples, 1)) * np.linspace(-0.7, 0.7, SIGNAL)
    smooth = generator.standard_normal((samples, SIGNAL // 4)).repeat(4, axis=1)
    inputs += 0.5 * smooth + 0.4 * generator.standard_normal((samples, SIGNAL))
    return inputs / inputs.std(), labels


def with_wrong(
    generator: np.random.Generator, labels: NDArray[np.int64], part: float
) -> NDArray[np.int64]:
    """Return labels of which a part is drawn anew, so that it can only be memorised."""
    replaced = generator.permutation(len(labels))[: round(part * len(labels))]
    noisy = labels.copy()
    noisy[replaced] = generator.integers(labels.max() + 1, size=len(replaced))
    return noisy


def task_with_held_out(
    name: str,
    description: str,
    inputs: Float64,
    targets: Float64,
    training: int,
    params: tuple[Float64, ...],
    model: Model,
    criterion: Criterion,
    steps: dict[str, int],
    *,
    noise: tuple[int, ...] | None = None,
) -> Task:
    """Return a task whose first rows are for training and the others held out."""
    return Task(
        name=name,
        description=f"{description}, float64",
        inputs=inputs[:training],
        targets=targets[:training],
        params=params,
        model=model,
        criterion=criterion,
        steps=steps,
        held_out=(inputs[training:], targets[training:]),
        noise=noise,
    )


def dropout(xp: Namespace, x: Array, noise: Array | None, rate: float) -> Array:
    """Set a part of the elements to 0 and scale up the others; without noise, return x.

    Parameters
    ----------
    xp : namespace
        The namespace of the arrays.
    x : Array
        Any shape.
    noise : Array or None
        Standard normal numbers in the shape of x.
    rate : float
        The part that is dropped.
    """
    if noise is None:
        return x
    kept = noise > statistics.NormalDist().inv_cdf(rate)
    return x * xp.where(kept, xp.ones_like(noise), xp.zeros_like(noise)) / (1 - rate)


def one_of(xp: Namespace, choices: Sequence[Array], noise: Array) -> Array:
    """Return for each row one of several arrays, all equally likely.

    Parameters
    ----------
    xp : namespace
        The namespace of the arrays.
    choices : sequence of Array, each of shape (rows, ...)
        What to choose from.
    noise : Array, shape (rows, number of choices)
        Standard normal numbers: the choice is the largest one.
    """
    largest = noise >= xp.max(noise, axis=-1, keepdims=True)
    weights = xp.where(largest, xp.ones_like(noise), xp.zeros_like(noise))
    shape = (choices[0].shape[0], *[1] * (len(choices[0].shape) - 1))
    chosen = choices[0] * xp.reshape(weights[:, 0], shape)
    for index in range(1, len(choices)):
        chosen = chosen + choices[index] * xp.reshape(weights[:, index], shape)
    return chosen


def shifted(xp: Namespace, x: Array, offset: int, axis: int) -> Array:
    """Return x moved by `offset` along an axis, with zeros where nothing moves in."""
    if not offset:
        return x
    size = x.shape[axis]
    before = [slice(None)] * len(x.shape)
    kept, empty = list(before), list(before)
    kept[axis] = slice(0, size - offset) if offset > 0 else slice(-offset, size)
    empty[axis] = slice(0, abs(offset))
    zeros = xp.zeros_like(x[tuple(empty)])
    parts = [zeros, x[tuple(kept)]] if offset > 0 else [x[tuple(kept)], zeros]
    return xp.concat(parts, axis=axis)


def convolution(xp: Namespace, x: Array, weights: Array, bias: Array) -> Array:
    """Return a convolution with three taps along each axis between the first and the last.

    Parameters
    ----------
    xp : namespace
        The namespace of the arrays.
    x : Array, shape (rows, length, channels) or (rows, height, width, channels)
        The borders are padded by zeros.
    weights : Array, shape (3 * channels, out) or (9 * channels, out)
    bias : Array, shape (out,)
    """
    for axis in range(1, len(x.shape) - 1):
        x = xp.concat([shifted(xp, x, offset, axis) for offset in (1, 0, -1)], axis=-1)
    return last_axis_product(xp, x, weights) + bias


def pooled(xp: Namespace, x: Array) -> Array:
    """Return the means of pairs along each axis between the first and the last."""
    for axis in range(1, len(x.shape) - 1):
        shape = (*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
        x = xp.mean(xp.reshape(x, shape), axis=axis + 1)
    return x


def relu(xp: Namespace, x: Array) -> Array:
    """Return the positive part."""
    return 0.5 * (x + xp.abs(x))


def softplus(xp: Namespace, x: Array) -> Array:
    """Return log(1 + exp(x))."""
    return relu(xp, x) + xp.log1p(xp.exp(-xp.abs(x)))


def layer_norm(xp: Namespace, x: Array) -> Array:
    """Return x with mean 0 and mean square 1 along the last axis."""
    centred = x - xp.mean(x, axis=-1, keepdims=True)
    return centred / xp.sqrt(xp.mean(centred * centred, axis=-1, keepdims=True) + 1e-5)


def residual_network(xp: Namespace, params: Sequence[Array], inputs: Array) -> Array:
    """Return the outputs of a residual network with layer normalisation before each block.

    Parameters
    ----------
    xp : namespace
        The namespace of the arrays.
    params : sequence of Array
        Weights and bias of the first layer; for each block gain, first weights, bias and second
        weights; gain, weights and bias of the last layer.
    inputs : Array, shape (rows, features)
    """
    first, bias, *blocks, gain, last, last_bias = params
    hidden = inputs @ first + bias
    for index in range(0, len(blocks), 4):
        scale, inner, shift, outer = blocks[index : index + 4]
        hidden = hidden + gelu(xp, (scale * layer_norm(xp, hidden)) @ inner + shift) @ outer
    return (gain * layer_norm(xp, hidden)) @ last + last_bias


def residual_params(
    generator: np.random.Generator, sizes: tuple[int, int, int], blocks: int
) -> tuple[Float64, ...]:
    """Return initial weights of `residual_network`; sizes are inputs, width and outputs."""
    inputs, width, outputs = sizes
    params = [normal(generator, (inputs, width)), np.zeros(width)]
    for _ in range(blocks):
        params += [np.ones(width), normal(generator, (width, width)), np.zeros(width)]
        params += [normal(generator, (width, width))]
    params += [np.ones(width), normal(generator, (width, outputs)), np.zeros(outputs)]
    return tuple(params)
