"""Mini-batch classification: with wrong labels, augmentation, depth, width and normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cdat_lab.tasks._blocks import (
    CLASSES,
    SIGNAL,
    convolution,
    digit_images,
    one_of,
    pooled,
    relu,
    residual_network,
    residual_params,
    shifted,
    signals,
    softplus,
    task_with_held_out,
    with_wrong,
)
from cdat_lab.tasks._networks import (
    cross_entropy,
    gelu,
    gelu_mlp,
    mlp_params,
    normal,
    tanh_mlp,
)
from cdat_lab.tasks._patches import CLASSES as QUARTERS
from cdat_lab.tasks._patches import pieces
from cdat_lab.tasks._task import Array, Criterion, Float64, Model, Namespace, Task

DIGITS, HELD_OUT_DIGITS = 1200, 500
SIGNALS, HELD_OUT_SIGNALS = 1600, 600
CHANNELS = (8, 16)
MOVES = tuple((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1))
"""The shifts of an image that `shifted_digits` draws from."""
DELAYS = (-2, -1, 0, 1, 2)
"""The shifts of a signal that `warped_signals` draws from."""


def digit_labels(seed: int) -> Task:
    """Return the task of classifying digits by a fully connected network."""
    return _digits("digit-labels", seed, (64, 64, 64, CLASSES), gelu_mlp, "gelu", {"momentum": 600})


def noisy_digits(seed: int) -> Task:
    """Return the task of classifying digits, a fifth of which have a random label."""
    sizes = (64, 96, CLASSES)
    return _digits("noisy-digits", seed, sizes, tanh_mlp, "tanh", {"adam": 700}, wrong=0.2)


def _digits(
    name: str,
    seed: int,
    sizes: tuple[int, ...],
    model: Model,
    activation: str,
    steps: dict[str, int],
    *,
    wrong: float = 0.0,
) -> Task:
    generator = np.random.default_rng(seed)
    inputs, labels = digit_images(generator, DIGITS, HELD_OUT_DIGITS)
    labels[:DIGITS] = with_wrong(generator, labels[:DIGITS], wrong)
    network = f"a {'-'.join(map(str, sizes))} {activation} network"
    return _classification(
        name,
        f"{DIGITS} images of 8 x 8 handwritten digits{_wrong(wrong)}; {network}",
        inputs,
        np.eye(CLASSES)[labels],
        DIGITS,
        mlp_params(sizes, generator),
        model,
        steps,
    )


def _wrong(part: float) -> str:
    return f", {100 * part:.0f} % of them with a random label" if part else ""


def _classification(
    name: str,
    description: str,
    inputs: Float64,
    targets: Float64,
    training: int,
    params: tuple[Float64, ...],
    model: Model,
    steps: dict[str, int],
    *,
    noise: tuple[int, ...] | None = None,
    criterion: Criterion = cross_entropy,
) -> Task:
    return task_with_held_out(
        name,
        f"{description}, cross-entropy",
        inputs,
        targets,
        training,
        params,
        model,
        criterion,
        steps,
        noise=noise,
    )


def shifted_digits(seed: int) -> Task:
    """Return the task of classifying digits by a convolutional network, under random shifts."""
    generator = np.random.default_rng(seed)
    inputs, labels = digit_images(generator, DIGITS, HELD_OUT_DIGITS)
    few, many = CHANNELS
    params = (
        normal(generator, (9, few)),
        np.zeros(few),
        normal(generator, (9 * few, many)),
        np.zeros(many),
        normal(generator, (4 * many, CLASSES)),
        np.zeros(CLASSES),
    )
    return _classification(
        "shifted-digits",
        f"{DIGITS} images of 8 x 8 handwritten digits, moved by up to one pixel at random in each "
        f"step; two convolutions with {few} and {many} channels",
        np.reshape(inputs, (-1, 8, 8, 1)),
        np.eye(CLASSES)[labels],
        DIGITS,
        params,
        shifting_network,
        {"momentum": 500},
        noise=(len(MOVES),),
    )


def shifting_network(
    xp: Namespace, params: Sequence[Array], inputs: Array, noise: Array | None
) -> Array:
    """Return the outputs of two convolutions with pooling and a linear layer.

    Parameters
    ----------
    xp : namespace
        The namespace of the arrays.
    params : sequence of Array
        Weights and biases of the three layers.
    inputs : Array, shape (rows, 8, 8, 1)
    noise : Array or None, shape (rows, 9)
        Chooses a shift of each image.
    """
    hidden = inputs
    if noise is not None:
        moved = [shifted(xp, shifted(xp, inputs, down, 1), right, 2) for down, right in MOVES]
        hidden = one_of(xp, moved, noise)
    return _convolutions(xp, params, hidden)


def _convolutions(xp: Namespace, params: Sequence[Array], hidden: Array) -> Array:
    *layers, last, bias = params
    for index in range(0, len(layers), 2):
        hidden = gelu(xp, convolution(xp, hidden, layers[index], layers[index + 1]))
        hidden = pooled(xp, hidden)
    return xp.reshape(hidden, (hidden.shape[0], -1)) @ last + bias


def signal_labels(seed: int) -> Task:
    """Return the task of classifying generated signals by a fully connected network."""
    sizes = (SIGNAL, 96, 64, CLASSES)
    return _signals("signal-labels", seed, sizes, gelu_mlp, "gelu", {"gd": 900})


def noisy_signals(seed: int) -> Task:
    """Return the task of classifying generated signals, a quarter with a random label."""
    sizes = (SIGNAL, 64, 64, CLASSES)
    return _signals("noisy-signals", seed, sizes, tanh_mlp, "tanh", {"rmsprop": 900}, wrong=0.25)


def deep_relu(seed: int) -> Task:
    """Return the task of classifying signals by ten layers of ReLU without normalisation."""
    sizes = (SIGNAL, *[40] * 9, CLASSES)
    scale = math.sqrt(2)
    return _signals("deep-relu", seed, sizes, relu_mlp, "ReLU", {"momentum": 700}, scale=scale)


def relu_mlp(xp: Namespace, params: Sequence[Array], inputs: Array) -> Array:
    """Return the outputs of a fully connected ReLU network; see `tanh_mlp`."""
    hidden = inputs
    for index in range(0, len(params), 2):
        hidden = relu(xp, hidden) if index else hidden
        hidden = hidden @ params[index] + params[index + 1]
    return hidden


def _signals(
    name: str,
    seed: int,
    sizes: tuple[int, ...],
    model: Model,
    activation: str,
    steps: dict[str, int],
    *,
    wrong: float = 0.0,
    scale: float = 1.0,
) -> Task:
    generator = np.random.default_rng(seed)
    inputs, labels = signals(generator, SIGNALS + HELD_OUT_SIGNALS)
    labels[:SIGNALS] = with_wrong(generator, labels[:SIGNALS], wrong)
    widths = f"{sizes[0]}-{sizes[1]}-...-{sizes[-1]}" if len(sizes) > 5 else _joined(sizes)
    return _classification(
        name,
        f"{SIGNALS} generated signals of {CLASSES} classes{_wrong(wrong)}; a {widths} {activation} "
        f"network with {len(sizes) - 1} layers",
        inputs,
        np.eye(CLASSES)[labels],
        SIGNALS,
        mlp_params(sizes, generator, scale),
        model,
        steps,
    )


def _joined(sizes: Sequence[int]) -> str:
    return "-".join(map(str, sizes))


def warped_signals(seed: int) -> Task:
    """Return the task of classifying signals by a convolutional network, under augmentation.

    In each step a signal is shifted and scaled at random, and noise is added.
    """
    generator = np.random.default_rng(seed)
    inputs, labels = signals(generator, SIGNALS + HELD_OUT_SIGNALS)
    few, many = CHANNELS
    params = (
        normal(generator, (3, few)),
        np.zeros(few),
        normal(generator, (3 * few, many)),
        np.zeros(many),
        normal(generator, (3 * many, many)),
        np.zeros(many),
        normal(generator, (SIGNAL // 8 * many, CLASSES)),
        np.zeros(CLASSES),
    )
    return _classification(
        "warped-signals",
        f"{SIGNALS} generated signals of {CLASSES} classes, shifted, scaled and with noise added "
        "at random in each step; three convolutions",
        inputs[:, :, None],
        np.eye(CLASSES)[labels],
        SIGNALS,
        params,
        warping_network,
        {"adam": 600},
        noise=(len(DELAYS) + 1 + SIGNAL,),
    )


def warping_network(
    xp: Namespace, params: Sequence[Array], inputs: Array, noise: Array | None
) -> Array:
    """Return the outputs of convolutions with pooling and a linear layer.

    Parameters
    ----------
    xp : namespace
        The namespace of the arrays.
    params : sequence of Array
        Weights and biases of the layers.
    inputs : Array, shape (rows, 40, 1)
    noise : Array or None, shape (rows, 46)
        For the shift, the scale and the noise of a signal.
    """
    hidden = inputs
    if noise is not None:
        count = len(DELAYS)
        hidden = one_of(xp, [shifted(xp, inputs, k, 1) for k in DELAYS], noise[:, :count])
        scale = 1 + 0.1 * noise[:, count : count + 1]
        hidden = hidden * scale[:, :, None] + 0.2 * noise[:, count + 1 :][:, :, None]
    return _convolutions(xp, params, hidden)


def residual_teacher(seed: int) -> Task:
    """Return the task of learning labels of a random network, 15 % of them wrong.

    The network is residual with layer normalisation.
    """
    training, held_out, features = 1500, 500, 32
    generator = np.random.default_rng(seed)
    inputs = generator.standard_normal((training + held_out, features))
    inputs *= np.arange(1, features + 1) ** -0.5 * 2
    hidden = np.tanh(inputs @ normal(generator, (features, 32)))
    labels = np.argmax(hidden @ normal(generator, (32, CLASSES)), axis=1)
    labels[:training] = with_wrong(generator, labels[:training], 0.15)
    return _classification(
        "residual-teacher",
        f"{training} Gaussian inputs, labels of a random network{_wrong(0.15)}; a residual "
        "network with layer normalisation, 3 blocks of width 48",
        inputs,
        np.eye(CLASSES)[labels],
        training,
        residual_params(generator, (features, 48, CLASSES), 3),
        residual_network,
        {"adamw": 700},
    )


def residual_photos(seed: int) -> Task:
    """Return the task of classifying pieces of photographs by a residual network.

    As `patches`, with smaller pieces and layer normalisation.
    """
    training, samples, side = 1500, 2000, 8
    generator = np.random.default_rng(seed)
    labels = generator.integers(QUARTERS, size=samples)
    images = np.reshape(pieces(labels, side, generator), (samples, -1))
    images = (images - images.mean()) / images.std()
    return _classification(
        "residual-photos",
        f"{training} pieces of {side} x {side} pixels of two photographs (scikit-learn), "
        f"{QUARTERS} quarters to tell apart; a residual network with layer normalisation, 2 blocks "
        "of width 64",
        images,
        np.eye(QUARTERS)[labels],
        training,
        residual_params(generator, (images.shape[1], 64, QUARTERS), 2),
        residual_network,
        {"adamw": 700},
    )


def wide_spirals(seed: int) -> Task:
    """Return the task of telling three spirals apart by a network with one wide layer."""
    training, held_out, arms, width = 1200, 500, 3, 1024
    generator = np.random.default_rng(seed)
    labels = generator.integers(arms, size=training + held_out)
    radius = np.sqrt(generator.uniform(0.05, 1, size=len(labels)))
    angle = 2 * np.pi * (labels / arms + 0.9 * radius)
    inputs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    inputs += 0.05 * generator.standard_normal(inputs.shape)
    sizes = (2, width, arms)
    params = list(mlp_params(sizes, generator))
    params[0] *= 3
    params[1] = normal(generator, (width,), 1.0)
    return _classification(
        "wide-spirals",
        f"{training} points of {arms} noisy spirals; a {_joined(sizes)} gelu network",
        inputs / inputs.std(),
        np.eye(arms)[labels],
        training,
        tuple(params),
        gelu_mlp,
        {"rmsprop": 800},
    )


def tumours(seed: int) -> Task:
    """Return logistic regression on the breast-cancer data of scikit-learn."""
    from sklearn.datasets import load_breast_cancer

    training = 400
    generator = np.random.default_rng(seed)
    features, labels = load_breast_cancer(return_X_y=True)
    order = generator.permutation(len(labels))
    inputs = np.asarray(features[order], dtype=np.float64)
    inputs = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
    return _classification(
        "tumours",
        f"{training} tumours with 30 features (breast cancer, scikit-learn); logistic regression",
        inputs,
        labels[order, None].astype(np.float64),
        training,
        (0.1 * normal(generator, (30, 1)), np.zeros(1)),
        tanh_mlp,
        {"gd": 600},
        criterion=logistic_loss,
    )


def logistic_loss(xp: Namespace, outputs: Array, targets: Array) -> Array:
    """Return the mean cross-entropy of targets 0 and 1 and the sigmoid of the outputs."""
    return xp.mean(softplus(xp, outputs) - targets * outputs)
