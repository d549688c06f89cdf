"""Noisy labels of a random network, learnt by a deeper one with small initial weights."""

from __future__ import annotations

import numpy as np

from cdat_lab.tasks._networks import mlp_params, normal, squared_loss, tanh_mlp
from cdat_lab.tasks._task import Task

SAMPLES, INPUTS, HIDDEN, CLASSES = 512, 64, 32, 10
STUDENT = (INPUTS, 48, 48, 48, CLASSES)
WRONG = 0.1


def teacher_student(seed: int) -> Task:
    """Return the task of learning the noisy labels of a random network: strong sharpening.

    Inputs with a decaying spectrum, small initial weights and labels that can only be memorised
    cause progressive sharpening: under a small constant rate the sharpness grows more than
    ten-fold.

    Parameters
    ----------
    seed : int
        Seed of the inputs, the teacher, the wrong labels and the weights, >= 0.

    Returns
    -------
    Task
        64 Gaussian inputs, the standard deviation of the k-th proportional to ``k**-0.75`` and
        their mean square 1; one-hot targets, a tenth of them replaced at random.
    """
    generator = np.random.default_rng(seed)
    scales = np.arange(1, INPUTS + 1) ** -0.75
    scales /= np.sqrt(np.mean(scales**2))
    inputs = generator.standard_normal((SAMPLES, INPUTS)) * scales
    first = normal(generator, (INPUTS, HIDDEN))
    last = normal(generator, (HIDDEN, CLASSES), 1.0)
    labels = np.argmax(np.tanh(2 * inputs @ first) @ last, axis=1)
    replaced = generator.permutation(SAMPLES)[: round(WRONG * SAMPLES)]
    labels[replaced] = generator.integers(CLASSES, size=len(replaced))
    return Task(
        name="teacher-student",
        description=(
            f"{SAMPLES} Gaussian inputs with a decaying spectrum, labels of a random network, a "
            f"tenth of them random; a {'-'.join(map(str, STUDENT))} tanh network with small "
            "initial weights, squared loss, float64"
        ),
        inputs=inputs,
        targets=np.eye(CLASSES)[labels],
        params=mlp_params(STUDENT, generator, 0.5),
        model=tanh_mlp,
        criterion=squared_loss,
        steps={"adam": 600, "adamw": 600, "momentum": 1000, "rmsprop": 1000, "gd": 3000},
    )
