"""Handwritten digits of scikit-learn, classified by a fully connected network."""

from __future__ import annotations

import numpy as np

from cdat_lab.tasks._networks import mlp_params, squared_loss, tanh_mlp
from cdat_lab.tasks._task import Task


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
            f"{samples} images of 8 x 8 handwritten digits (scikit-learn); a "
            f"{'-'.join(map(str, sizes))} tanh network, squared loss, float64"
        ),
        inputs=inputs,
        targets=np.eye(10)[labels[chosen]],
        params=mlp_params(sizes, generator),
        model=tanh_mlp,
        criterion=squared_loss,
        steps={"adam": 600, "momentum": 800, "rmsprop": 1000, "gd": 1000},
    )
