"""Classification of pieces of two photographs by a small convolutional network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cdat_lab.tasks._networks import gelu, last_axis_product, normal, squared_loss
from cdat_lab.tasks._task import Array, Float64, Namespace, Task

SAMPLES, SIDE = 256, 16
FIRST, SECOND = 4, 2  # sides of the squares that each layer merges into one pixel
CHANNELS = (3, 16, 32)
QUADRANTS = 4
CLASSES = 2 * QUADRANTS


def patches(seed: int) -> Task:
    """Return the task of classifying which quarter of which photograph a piece comes from.

    The photographs are the two that come with scikit-learn, a temple and a flower.

    Parameters
    ----------
    seed : int
        Seed of the positions of the 256 pieces and of the weights, >= 0.

    Returns
    -------
    Task
        Inputs of shape (256, 16, 16, 3), standardised over all pixels together; 8 one-hot targets,
        equally frequent.
    """
    generator = np.random.default_rng(seed)
    labels = np.arange(SAMPLES) % CLASSES
    images = pieces(labels, SIDE, generator)
    return Task(
        name="patches",
        description=(
            f"{SAMPLES} pieces of {SIDE} x {SIDE} pixels of two photographs (scikit-learn), "
            f"{CLASSES} quarters to tell apart; two convolutions without overlap, GELU, squared "
            "loss, float64"
        ),
        inputs=(images - images.mean()) / images.std(),
        targets=np.eye(CLASSES)[labels],
        params=_params(generator),
        model=patch_network,
        criterion=squared_loss,
        steps={"adam": 400, "adamw": 400, "momentum": 600, "rmsprop": 600, "gd": 600},
    )


def patch_network(xp: Namespace, params: Sequence[Array], inputs: Array) -> Array:
    """Return the outputs of two convolutions without overlap and a linear layer.

    Parameters
    ----------
    xp : namespace
        The namespace of the arrays.
    params : sequence of Array
        Weights and biases of the three layers; a convolution maps a square of pixels, flattened row
        by row with all channels, to the channels of one pixel.
    inputs : Array, shape (samples, height, width, channels)
        The images.

    Returns
    -------
    Array, shape (samples, classes)
    """
    hidden = inputs
    for level, side in enumerate((FIRST, SECOND)):
        weights, bias = params[2 * level], params[2 * level + 1]
        hidden = gelu(xp, last_axis_product(xp, _squares(xp, hidden, side), weights) + bias)
    return xp.reshape(hidden, (inputs.shape[0], -1)) @ params[4] + params[5]


def _squares(xp: Namespace, images: Array, side: int) -> Array:
    """Return images in which each square of pixels is one pixel with all their channels."""
    samples, height, width, channels = images.shape
    rows, columns = height // side, width // side
    squares = xp.reshape(images, (samples, rows, side, columns, side, channels))
    squares = xp.permute_dims(squares, (0, 1, 3, 2, 4, 5))
    return xp.reshape(squares, (samples, rows, columns, side * side * channels))


def pieces(labels: NDArray[np.int64], side: int, generator: np.random.Generator) -> Float64:
    """Cut square pieces out of the quarters of two photographs.

    Parameters
    ----------
    labels : ndarray of int
        The quarter of each piece, from 0 to 7.
    side : int
        Pixels along each edge.
    generator : numpy.random.Generator
        For the positions.

    Returns
    -------
    ndarray of float64, shape (pieces, side, side, 3)
    """
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    return np.stack([_piece(photographs, int(label), side, generator) for label in labels])


def _piece(
    photographs: Sequence[Array], label: int, side: int, generator: np.random.Generator
) -> Float64:
    """Cut a piece out of a quarter of a photograph."""
    photograph, quadrant = divmod(label, QUADRANTS)
    image = photographs[photograph]
    height, width = image.shape[0] // 2, image.shape[1] // 2
    row = quadrant // 2 * height + int(generator.integers(height - side + 1))
    column = quadrant % 2 * width + int(generator.integers(width - side + 1))
    return np.asarray(image[row : row + side, column : column + side], dtype=np.float64)


def _params(generator: np.random.Generator) -> tuple[Float64, ...]:
    colours, few, many = CHANNELS
    pixels = (SIDE // FIRST // SECOND) ** 2
    shapes = [(FIRST**2 * colours, few), (SECOND**2 * few, many), (pixels * many, CLASSES)]
    params: list[Float64] = []
    for shape in shapes:
        params += [normal(generator, shape), np.zeros(shape[1])]
    return tuple(params)
