"""Mini-batch language models of characters: causal transformers with dropout."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Sequence

import numpy as np

from cdat_lab.tasks._blocks import dropout
from cdat_lab.tasks._characters import causal_attention, layer_norm
from cdat_lab.tasks._networks import cross_entropy, gelu, last_axis_product, normal
from cdat_lab.tasks._task import Array, Float64, Namespace, Task

DROPPED = 0.1
ARRAYS_PER_LAYER = 10
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def topics_transformer(seed: int) -> Task:
    """Return the task of predicting the next character of Python's help texts.

    The text is that of the module ``pydoc_data.topics``; it may differ between versions of Python.
    """
    return _transformer(
        "topics-transformer", "Python's help texts (pydoc)", topics_text(), seed, 32, 24, 600
    )


def source_transformer(seed: int) -> Task:
    """Return the task of predicting the next character of Python source text.

    The text is that of the module ``argparse``; it may differ between versions of Python.
    """
    return _transformer(
        "source-transformer", "the source of argparse", source_text(), seed, 48, 24, 500
    )


@functools.cache
def topics_text() -> str:
    """Return the help texts, in lower case, with everything except a few characters replaced."""
    from pydoc_data.topics import topics

    text = "".join(topics[name] for name in sorted(topics)).lower()
    return re.sub(rf"[^{LETTERS},.']+", " ", text)[:65536]


@functools.cache
def source_text() -> str:
    """Return the source of a module, in lower case, with unusual characters replaced."""
    import argparse

    text = inspect.getsource(argparse).lower()
    return re.sub(rf"[^{LETTERS}_().,=:'\n]+", " ", text)[:65536]


def _transformer(
    name: str, what: str, text: str, seed: int, width: int, context: int, steps: int
) -> Task:
    """Return the task; the last tenth of the text is held out."""
    layers, training, held_out = 2, 768, 192
    generator = np.random.default_rng(seed)
    alphabet = sorted(set(text))
    codes = np.array([alphabet.index(character) for character in text])
    border = len(codes) * 9 // 10

    def windows(first: int, last: int, count: int) -> Float64:
        starts = first + generator.permutation(last - first - context)[:count]
        one_hot: Float64 = np.eye(len(alphabet))[codes[starts[:, None] + np.arange(context + 1)]]
        return one_hot

    known, unknown = windows(0, border, training), windows(border, len(codes), held_out)
    return Task(
        name=name,
        description=(
            f"{training} windows of {context} characters of {what}; a causal transformer of width "
            f"{width} with 2 heads and {layers} layers, dropout {DROPPED:g}, cross-entropy of the "
            "next character, float64"
        ),
        inputs=known[:, :-1],
        targets=known[:, 1:],
        params=_params(generator, len(alphabet), width, context, layers),
        model=dropout_transformer,
        criterion=cross_entropy,
        steps={"adamw": steps},
        held_out=(unknown[:, :-1], unknown[:, 1:]),
        noise=(2 * layers, context, width),
    )


def dropout_transformer(
    xp: Namespace, params: Sequence[Array], inputs: Array, noise: Array | None
) -> Array:
    """Return the logits of a pre-norm causal transformer with dropout in its residual branches.

    Parameters
    ----------
    xp : namespace
        The namespace of the arrays.
    params : sequence of Array
        As for `transformer`, for any number of layers.
    inputs : Array, shape (rows, positions, alphabet)
        One-hot.
    noise : Array or None, shape (rows, 2 * layers, positions, width)
        Chooses what is dropped.

    Returns
    -------
    Array, shape (rows, positions, alphabet)
    """
    times = functools.partial(last_axis_product, xp)
    embedding, positions, *layers, gain, shift, readout = params
    hidden = times(inputs, embedding) + positions
    for index in range(0, len(layers), ARRAYS_PER_LAYER):
        gain_1, shift_1, queries_keys_values, mixing, gain_2, shift_2, *mlp = layers[
            index : index + ARRAYS_PER_LAYER
        ]
        first = None if noise is None else noise[:, 2 * index // ARRAYS_PER_LAYER, :, :]
        second = None if noise is None else noise[:, 2 * index // ARRAYS_PER_LAYER + 1, :, :]
        normalised = layer_norm(xp, hidden, gain_1, shift_1)
        gathered = causal_attention(xp, times(normalised, queries_keys_values))
        hidden = hidden + dropout(xp, times(gathered, mixing), first, DROPPED)
        normalised = layer_norm(xp, hidden, gain_2, shift_2)
        branch = times(gelu(xp, times(normalised, mlp[0]) + mlp[1]), mlp[2]) + mlp[3]
        hidden = hidden + dropout(xp, branch, second, DROPPED)
    return times(layer_norm(xp, hidden, gain, shift), readout)


def _params(
    generator: np.random.Generator, symbols: int, width: int, context: int, layers: int
) -> tuple[Float64, ...]:
    params = [normal(generator, (symbols, width), 0.5), normal(generator, (context, width), 0.5)]
    for _ in range(layers):
        params += [np.ones(width), np.zeros(width)]
        params += [normal(generator, (width, 3 * width)), normal(generator, (width, width))]
        params += [np.ones(width), np.zeros(width)]
        params += [normal(generator, (width, 2 * width)), np.zeros(2 * width)]
        params += [normal(generator, (2 * width, width)), np.zeros(width)]
    params += [np.ones(width), np.zeros(width), normal(generator, (width, symbols))]
    return tuple(params)
