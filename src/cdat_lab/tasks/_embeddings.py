"""Mini-batch learning of embeddings: two matrix factorisations and a contrastive loss."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cdat_lab.tasks._blocks import SIGNAL, signals, task_with_held_out
from cdat_lab.tasks._networks import cross_entropy, gelu_mlp, mlp_params, normal, squared_loss
from cdat_lab.tasks._task import Array, Float64, Namespace, Task

RANK = 8
PEOPLE, FILMS = 60, 50
WORDS, WINDOW = 60, 4
OTHERS = 7
"""Other signals that the view of a signal is told apart from."""
TEMPERATURE = 0.2


def ratings(seed: int) -> Task:
    """Return the factorisation of a matrix of ratings, of which a part is known."""
    training, samples = 1500, 2000
    generator = np.random.default_rng(seed)
    people, films = generator.standard_normal((PEOPLE, 4)), generator.standard_normal((FILMS, 4))
    table = people @ films.T / 2 + generator.standard_normal((PEOPLE, 1)) * 0.5
    rows, columns = np.divmod(generator.permutation(PEOPLE * FILMS)[:samples], FILMS)
    targets = table[rows, columns] + 0.4 * generator.standard_normal(samples)
    return task_with_held_out(
        name="ratings",
        description=(
            f"{training} ratings of {FILMS} films by {PEOPLE} people (generated), factorised with "
            f"rank {RANK}, squared loss"
        ),
        inputs=_pairs(rows, PEOPLE, columns, FILMS),
        targets=targets[:, None],
        training=training,
        params=_factors(generator, PEOPLE, FILMS),
        model=factorisation,
        criterion=squared_loss,
        steps={"gd": 1200},
    )


def _pairs(rows: NDArray[np.int64], height: int, columns: NDArray[np.int64], width: int) -> Float64:
    """Return a one-hot row and a one-hot column, side by side."""
    return np.concatenate([np.eye(height)[rows], np.eye(width)[columns]], axis=1)


def _factors(generator: np.random.Generator, rows: int, columns: int) -> tuple[Float64, ...]:
    return (
        normal(generator, (rows, RANK), 0.3),
        normal(generator, (columns, RANK), 0.3),
        np.zeros((rows, 1)),
        np.zeros((columns, 1)),
    )


def factorisation(xp: Namespace, params: Sequence[Array], inputs: Array) -> Array:
    """Return the product of the factors of a row and a column, plus their biases.

    Parameters
    ----------
    xp : namespace
        The namespace of the arrays.
    params : sequence of Array
        Factors of rows and columns, then their biases.
    inputs : Array, shape (samples, rows + columns)
        One-hot rows and columns, side by side.

    Returns
    -------
    Array, shape (samples, 1)
    """
    rows, columns, row_bias, column_bias = params
    left, right = inputs[:, : rows.shape[0]], inputs[:, rows.shape[0] :]
    product = xp.sum((left @ rows) * (right @ columns), axis=-1, keepdims=True)
    return product + left @ row_bias + right @ column_bias


def co_occurrences(seed: int) -> Task:
    """Return word vectors from counts of words near each other, with the loss of GloVe.

    References
    ----------
    J. Pennington, R. Socher, C. Manning, "GloVe: Global Vectors for Word Representation", 2014.
    """
    counts = _neighbours()
    generator = np.random.default_rng(seed)
    rows, columns = np.nonzero(counts)
    order = generator.permutation(len(rows))
    rows, columns = rows[order], columns[order]
    training = len(rows) * 4 // 5
    found = counts[rows, columns]
    targets = np.stack([np.log(found), np.minimum(1.0, (found / 100) ** 0.75)], axis=1)
    return task_with_held_out(
        name="co-occurrences",
        description=(
            f"{training} counts of pairs among {WORDS} words of the Python reference (pydoc), "
            f"factorised with rank {RANK}, weighted squared loss of the logarithm"
        ),
        inputs=_pairs(rows, WORDS, columns, WORDS),
        targets=targets,
        training=training,
        params=_factors(generator, WORDS, WORDS),
        model=factorisation,
        criterion=weighted_loss,
        steps={"momentum": 1200},
    )


def weighted_loss(xp: Namespace, outputs: Array, targets: Array) -> Array:
    """Return half the mean squared residual of the first target, weighted by the second."""
    residual = outputs[:, 0] - targets[:, 0]
    return 0.5 * xp.mean(targets[:, 1] * residual * residual)


@functools.cache
def _neighbours() -> Float64:
    """Return how often the most frequent words are at most four words apart."""
    from pydoc_data.topics import topics

    text = " ".join(topics[name] for name in sorted(topics)).lower()
    words = re.findall(r"[a-z]+", text)[:40000]
    index = {word: i for i, (word, _) in enumerate(Counter(words).most_common(WORDS))}
    codes = np.array([index.get(word, -1) for word in words])
    counts = np.zeros((WORDS, WORDS))
    for distance in range(1, WINDOW + 1):
        left, right = codes[:-distance], codes[distance:]
        both = (left >= 0) & (right >= 0)
        np.add.at(counts, (left[both], right[both]), 1.0)
    return counts + counts.T


def contrastive(seed: int) -> Task:
    """Return the task of recognising a second, noisy view of a signal among those of others.

    References
    ----------
    A. van den Oord, Y. Li, O. Vinyals, "Representation Learning with Contrastive Predictive
    Coding", arXiv:1807.03748.
    """
    training, samples, sizes = 1200, 1600, (SIGNAL, 64, 48, 16)
    generator = np.random.default_rng(seed)
    data = signals(generator, samples)[0]
    others = (
        np.arange(samples)[:, None] + generator.integers(1, samples, (samples, OTHERS))
    ) % samples
    shown = np.concatenate(
        [np.arange(samples)[:, None], np.arange(samples)[:, None], others], axis=1
    )
    views = data[shown] + 0.5 * generator.standard_normal((samples, OTHERS + 2, SIGNAL))
    targets = np.zeros((samples, OTHERS + 1))
    targets[:, 0] = 1
    return task_with_held_out(
        name="contrastive",
        description=(
            f"{training} generated signals, each with a second view and those of {OTHERS} others, "
            f"with more noise in each step; a {'-'.join(map(str, sizes))} gelu network, "
            "cross-entropy of the cosines"
        ),
        inputs=views,
        targets=targets,
        training=training,
        params=mlp_params(sizes, generator),
        model=similarities,
        criterion=cross_entropy,
        steps={"adam": 600},
        noise=(OTHERS + 2, SIGNAL),
    )


def similarities(
    xp: Namespace, params: Sequence[Array], inputs: Array, noise: Array | None
) -> Array:
    """Return the cosines of the first view with each of the others, over the temperature.

    Parameters
    ----------
    xp : namespace
        The namespace of the arrays.
    params : sequence of Array
        Weights and biases of the network that embeds a view.
    inputs : Array, shape (rows, views, 40)
    noise : Array or None, in the shape of the inputs
        Added in training.

    Returns
    -------
    Array, shape (rows, views - 1)
    """
    views = inputs if noise is None else inputs + 0.3 * noise
    embedded = gelu_mlp(xp, params, xp.reshape(views, (-1, views.shape[-1])))
    embedded = embedded / xp.sqrt(xp.sum(embedded * embedded, axis=-1, keepdims=True) + 1e-8)
    embedded = xp.reshape(embedded, (*views.shape[:-1], -1))
    return xp.sum(embedded[:, :1, :] * embedded[:, 1:, :], axis=-1) / TEMPERATURE
