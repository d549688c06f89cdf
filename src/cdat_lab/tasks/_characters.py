"""Prediction of the next character of English text by a small causal transformer."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence

import numpy as np

from cdat_lab.tasks._networks import (
    cross_entropy,
    gelu,
    last_axis_product,
    log_softmax,
    normal,
)
from cdat_lab.tasks._task import Array, Float64, Namespace, Task

ALPHABET = " ',.abcdefghijklmnopqrstuvwxyz"
LENGTH_OF_TEXT = 16384
SAMPLES, CONTEXT = 32, 16
PREFIX = 4  # leading characters that only give context: after fewer, anything can follow
WIDTH, HEADS, LAYERS = 32, 2, 1
ARRAYS_PER_LAYER = 10


def characters(seed: int) -> Task:
    """Return the task of predicting the next character of English text.

    The text is the language reference that CPython ships for its ``help``, the module
    ``pydoc_data.topics``: the topics in alphabetical order, in lower case, with everything except
    letters, apostrophes, commas and full stops replaced by a space, cut to the first 16384
    characters. It may differ between versions of Python.

    Parameters
    ----------
    seed : int
        Seed of the 32 windows of 16 characters and of the weights, >= 0.

    Returns
    -------
    Task
        Inputs and targets are one-hot, shape (samples, characters, alphabet), so that an embedding
        is a matrix product under every framework. The first four characters of a window have no
        targets: with their context, few positions with different targets look alike, and the loss
        can get close to 0.
    """
    generator = np.random.default_rng(seed)
    codes = np.array([ALPHABET.index(character) for character in _text()])
    starts = generator.permutation(len(codes) - CONTEXT)[:SAMPLES]
    windows = np.eye(len(ALPHABET))[codes[starts[:, None] + np.arange(CONTEXT + 1)]]
    return Task(
        name="characters",
        description=(
            f"{SAMPLES} windows of {CONTEXT} characters of the Python reference (pydoc); a causal "
            f"transformer of width {WIDTH} with {HEADS} heads and {LAYERS} layer, cross-entropy of "
            "the next character, float64"
        ),
        inputs=windows[:, :-1],
        targets=windows[:, 1 + PREFIX :],
        params=_params(generator),
        model=transformer,
        criterion=cross_entropy,
        steps={"adam": 400, "adamw": 400, "momentum": 400, "rmsprop": 400, "gd": 400},
    )


def transformer(xp: Namespace, params: Sequence[Array], inputs: Array) -> Array:
    """Return the outputs of a pre-norm causal transformer.

    Parameters
    ----------
    xp : namespace
        The namespace of the arrays.
    params : sequence of Array
        Embeddings of characters and positions; for each layer gain and shift of the attention's
        normalisation, its two weights, gain and shift of the second normalisation, weights and
        biases of a network with one hidden layer; then gain and shift of the last normalisation and
        the output weights.
    inputs : Array, shape (samples, positions, alphabet)
        One-hot.

    Returns
    -------
    Array, shape (samples, positions - 4, alphabet)
        Logits for the character after each position except the first four.
    """
    times = functools.partial(last_axis_product, xp)
    embedding, positions, *layers, gain, shift, readout = params
    hidden = times(inputs, embedding) + positions
    for index in range(0, len(layers), ARRAYS_PER_LAYER):
        gain_1, shift_1, queries_keys_values, mixing, gain_2, shift_2, *mlp = layers[
            index : index + ARRAYS_PER_LAYER
        ]
        normalised = layer_norm(xp, hidden, gain_1, shift_1)
        gathered = causal_attention(xp, times(normalised, queries_keys_values))
        hidden = hidden + times(gathered, mixing)
        normalised = layer_norm(xp, hidden, gain_2, shift_2)
        hidden = hidden + times(gelu(xp, times(normalised, mlp[0]) + mlp[1]), mlp[2]) + mlp[3]
    return times(layer_norm(xp, hidden[:, PREFIX:, :], gain, shift), readout)


def layer_norm(xp: Namespace, x: Array, gain: Array, shift: Array) -> Array:
    """Return x with mean 0 and mean square 1 along the last axis, times `gain` plus `shift`."""
    centred = x - xp.mean(x, axis=-1, keepdims=True)
    variance = xp.mean(centred * centred, axis=-1, keepdims=True)
    return gain * centred / xp.sqrt(variance + 1e-5) + shift


def causal_attention(xp: Namespace, queries_keys_values: Array) -> Array:
    """Return causal multi-head attention, the heads concatenated.

    Parameters
    ----------
    xp : namespace
        The namespace of the arrays.
    queries_keys_values : Array, shape (samples, positions, 3 * width)
        The queries of all heads, then the keys, then the values.

    Returns
    -------
    Array, shape (samples, positions, width)
    """
    samples, positions, triple = queries_keys_values.shape
    width = triple // 3
    heads = xp.reshape(queries_keys_values, (samples, positions, 3, HEADS, width // HEADS))
    heads = xp.permute_dims(heads, (2, 0, 3, 1, 4))
    queries, keys, values = heads[0, ...], heads[1, ...], heads[2, ...]
    scores = queries @ xp.permute_dims(keys, (0, 1, 3, 2)) / math.sqrt(width // HEADS)
    seen = xp.tril(xp.ones_like(scores))
    weights = xp.exp(log_softmax(xp, scores - 1e9 * (1 - seen)))
    gathered = xp.permute_dims(weights @ values, (0, 2, 1, 3))
    return xp.reshape(gathered, (samples, positions, width))


def _text() -> str:
    from pydoc_data.topics import topics

    text = "".join(topics[name] for name in sorted(topics)).lower()
    return re.sub(f"[^{ALPHABET.strip()}]+", " ", text)[:LENGTH_OF_TEXT]


def _params(generator: np.random.Generator) -> tuple[Float64, ...]:
    symbols = len(ALPHABET)
    params = [
        normal(generator, (symbols, WIDTH), 0.5),
        normal(generator, (CONTEXT, WIDTH), 0.5),
    ]
    for _ in range(LAYERS):
        params += [
            np.ones(WIDTH),
            np.zeros(WIDTH),
            normal(generator, (WIDTH, 3 * WIDTH)),
            normal(generator, (WIDTH, WIDTH)),
            np.ones(WIDTH),
            np.zeros(WIDTH),
            normal(generator, (WIDTH, 2 * WIDTH)),
            np.zeros(2 * WIDTH),
            normal(generator, (2 * WIDTH, WIDTH)),
            np.zeros(WIDTH),
        ]
    params += [np.ones(WIDTH), np.zeros(WIDTH), normal(generator, (WIDTH, symbols))]
    return tuple(params)
