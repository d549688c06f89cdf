"""Handwritten digits of scikit-learn, classified by a fully connected network."""

from __future__ import annotations

import numpy as np

from cdat_lab.tasks._networks import (
    gelu_mlp,
    mlp_params,
    relative_entropy,
    squared_loss,
    tanh_mlp,
)
from cdat_lab.tasks._task import Float64, Task

SIZES = (64, 48, 48, 10)
NETWORK = "-".join(map(str, SIZES))
SMOOTHING = 0.1


def digits(seed: int) -> Task:
    """Return the task of classifying 512 digits by squared loss.

    Parameters
    ----------
    seed : int
        Seed of the samples and of the weights, >= 0.

    Returns
    -------
    Task
        64 inputs (pixels / 16, centred, divided by the mean standard deviation of the pixels), 10
        one-hot targets.
    """
    return _squared_digits("digits", 512, seed)


def digits_1536(seed: int) -> Task:
    """Return the task of `digits` with 1536 of the 1797 images, for mini-batches."""
    return _squared_digits("digits-1536", 1536, seed)


def digits_cross_entropy(seed: int) -> Task:
    """Return the task of classifying the samples of `digits` by a smoothed cross-entropy.

    A tenth of each target is spread over all classes. The entropy of the targets is subtracted
    from the loss, so that its infimum is 0.
    """
    generator = np.random.default_rng(seed)
    inputs, one_hot = _images(512, generator)
    return Task(
        name="digits-cross-entropy",
        description=(
            f"512 images of 8 x 8 handwritten digits (scikit-learn); a {NETWORK} GELU network, "
            "cross-entropy with label smoothing 0.1 above its infimum, float64"
        ),
        inputs=inputs,
        targets=(1 - SMOOTHING) * one_hot + SMOOTHING / one_hot.shape[1],
        params=mlp_params(SIZES, generator),
        model=gelu_mlp,
        criterion=relative_entropy,
        steps={"adam": 600, "adamw": 600, "momentum": 800, "rmsprop": 1000, "gd": 1000},
    )


def _squared_digits(name: str, samples: int, seed: int) -> Task:
    generator = np.random.default_rng(seed)
    inputs, one_hot = _images(samples, generator)
    return Task(
        name=name,
        description=(
            f"{samples} images of 8 x 8 handwritten digits (scikit-learn); a {NETWORK} tanh "
            "network, squared loss, float64"
        ),
        inputs=inputs,
        targets=one_hot,
        params=mlp_params(SIZES, generator),
        model=tanh_mlp,
        criterion=squared_loss,
        steps={"adam": 600, "adamw": 600, "momentum": 800, "rmsprop": 1000, "gd": 1000},
    )


def _images(samples: int, generator: np.random.Generator) -> tuple[Float64, Float64]:
    """Draw standardised images and their one-hot labels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    chosen = np.sort(generator.permutation(len(labels))[:samples])
    inputs = np.asarray(pixels[chosen], dtype=np.float64) / 16
    inputs = inputs - inputs.mean(axis=0)
    return inputs / inputs.std(axis=0).mean(), np.eye(10)[labels[chosen]]
