"""Mini-batch regression: outliers, counts and a deep network without normalisation."""

from __future__ import annotations

import numpy as np

from cdat_lab.tasks._blocks import task_with_held_out
from cdat_lab.tasks._networks import gelu_mlp, mlp_params, normal, squared_loss, tanh_mlp
from cdat_lab.tasks._task import Array, Namespace, Task


def diabetes(seed: int) -> Task:
    """Return regression on the diabetes data of scikit-learn, with outliers among the targets."""
    from sklearn.datasets import load_diabetes

    training, sizes = 320, (10, 48, 48, 1)
    generator = np.random.default_rng(seed)
    features, progress = load_diabetes(return_X_y=True)
    order = generator.permutation(len(progress))
    inputs, targets = features[order], progress[order, None].astype(np.float64)
    inputs = inputs / inputs.std(axis=0)
    targets = (targets - targets.mean()) / targets.std()
    targets[: training // 20] += 5 * generator.standard_normal((training // 20, 1))
    return task_with_held_out(
        "diabetes",
        f"{training} patients with 10 features (diabetes, scikit-learn), a twentieth of the "
        f"targets far off; a {'-'.join(map(str, sizes))} tanh network, squared loss",
        inputs,
        targets,
        training,
        mlp_params(sizes, generator),
        tanh_mlp,
        squared_loss,
        {"rmsprop": 700},
    )


def outliers(seed: int) -> Task:
    """Return regression on Friedman's function with heavy-tailed noise and a robust loss."""
    training, samples, sizes = 1200, 1700, (10, 64, 64, 1)
    generator = np.random.default_rng(seed)
    inputs = generator.uniform(size=(samples, 10))
    a, b, c, d, e = inputs[:, :5].T
    targets = 10 * np.sin(np.pi * a * b) + 20 * (c - 0.5) ** 2 + 10 * d + 5 * e
    targets = (targets - targets.mean()) / targets.std()
    targets = targets + 0.1 * generator.standard_t(1.5, size=samples)
    return task_with_held_out(
        "outliers",
        f"{training} values of Friedman's function with heavy-tailed noise; a "
        f"{'-'.join(map(str, sizes))} gelu network, pseudo-Huber loss",
        (inputs - 0.5) * np.sqrt(12),
        targets[:, None],
        training,
        mlp_params(sizes, generator),
        gelu_mlp,
        pseudo_huber,
        {"momentum": 900},
    )


def pseudo_huber(xp: Namespace, outputs: Array, targets: Array) -> Array:
    """Return the mean of ``sqrt(1 + residual**2) - 1``, linear for outliers."""
    residual = outputs - targets
    return xp.mean(xp.sqrt(1 + residual * residual) - 1)


def counts(seed: int) -> Task:
    """Return Poisson regression on generated counts."""
    training, samples, features = 1500, 2000, 20
    generator = np.random.default_rng(seed)
    inputs = generator.standard_normal((samples, features))
    inputs *= np.arange(1, features + 1) ** -0.5 * 2
    weights = 0.6 * normal(generator, (features, 1))
    drawn = generator.poisson(np.exp(np.minimum(inputs @ weights + 0.5, 4.0)))
    return task_with_held_out(
        "counts",
        f"{training} generated counts with {features} features; Poisson regression",
        inputs,
        drawn.astype(np.float64),
        training,
        (np.zeros((features, 1)), np.zeros(1)),
        tanh_mlp,
        poisson_deviance,
        {"gd": 900},
    )


def poisson_deviance(xp: Namespace, outputs: Array, targets: Array) -> Array:
    """Return half the mean deviance of counts whose log-rates are the outputs."""
    positive = xp.where(targets > 0, targets, xp.ones_like(targets))
    lowest = targets - targets * xp.log(positive)
    return xp.mean(xp.exp(outputs) - targets * outputs - lowest)


def deep_tanh(seed: int) -> Task:
    """Return the task of fitting a random network by eight tanh layers without normalisation."""
    training, samples, sizes = 1200, 1700, (16, *[32] * 8, 3)
    generator = np.random.default_rng(seed)
    inputs = generator.standard_normal((samples, sizes[0]))
    hidden = np.tanh(1.5 * inputs @ normal(generator, (sizes[0], 24)))
    targets = hidden @ normal(generator, (24, sizes[-1]))
    targets = targets / targets.std() + 0.2 * generator.standard_normal(targets.shape)
    return task_with_held_out(
        "deep-tanh",
        f"{training} noisy outputs of a random network; a tanh network with {len(sizes) - 1} "
        f"layers of width {sizes[1]}, squared loss",
        inputs,
        targets,
        training,
        mlp_params(sizes, generator, 1.2),
        tanh_mlp,
        squared_loss,
        {"gd": 1000},
    )
