"""Linear regression through a product of several weight matrices."""

from __future__ import annotations

import itertools

import numpy as np

from cdat_lab.tasks._networks import linear_network, normal, squared_loss
from cdat_lab.tasks._task import Task

SAMPLES, INPUTS, OUTPUTS = 256, 32, 8
WIDTH, DEPTH = 32, 4
INITIAL = 0.5


def deep_linear(seed: int) -> Task:
    """Return the task of fitting a linear map by a deep linear network.

    The model is linear in the inputs and of degree 4 in the weights, so the curvature changes
    during training.

    Parameters
    ----------
    seed : int
        Seed of the inputs, the map and the weights, >= 0.

    Returns
    -------
    Task
        32 Gaussian inputs, the k-th with standard deviation ``k**-1.5``; 8 targets, a random linear
        map of the inputs, so the infimum of the loss is 0.
    """
    generator = np.random.default_rng(seed)
    inputs = generator.standard_normal((SAMPLES, INPUTS)) * np.arange(1, INPUTS + 1) ** -1.5
    sizes = (INPUTS, *[WIDTH] * (DEPTH - 1), OUTPUTS)
    return Task(
        name="deep-linear",
        description=(
            f"{SAMPLES} Gaussian inputs with a decaying spectrum, a linear map of them as targets; "
            f"a {'-'.join(map(str, sizes))} linear network with small initial weights, squared "
            "loss, float64"
        ),
        inputs=inputs,
        targets=inputs @ normal(generator, (INPUTS, OUTPUTS)),
        params=tuple(INITIAL * normal(generator, shape) for shape in itertools.pairwise(sizes)),
        model=linear_network,
        criterion=squared_loss,
        steps={"adam": 400, "adamw": 400, "momentum": 600, "rmsprop": 600, "gd": 1000},
    )
