"""Mini-batch learning of sequences by recurrent networks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cdat_lab.tasks._blocks import task_with_held_out
from cdat_lab.tasks._networks import last_axis_product, normal, squared_loss
from cdat_lab.tasks._task import Array, Float64, Namespace, Task

LENGTH = 10
"""Steps are unrolled, so that compiling takes time in proportion."""
AHEAD = 6
"""Steps by which `chaos` looks ahead."""


def frequencies(seed: int) -> Task:
    """Return the task of reading frequency and phase of a noisy wave by a recurrent network."""
    training, samples, width = 1200, 1700, 32
    generator = np.random.default_rng(seed)
    frequency = generator.uniform(1, 6, size=(samples, 1))
    phase = generator.uniform(0, 2 * np.pi, size=(samples, 1))
    waves = np.sin(frequency * np.linspace(0, 2, LENGTH) + phase)
    scaled = (frequency - frequency.mean()) / frequency.std()
    targets = np.concatenate([scaled, np.sin(phase), np.cos(phase)], axis=1)
    return task_with_held_out(
        name="frequencies",
        description=(
            f"{training} noisy waves of {LENGTH} values, frequency and phase as targets; a tanh "
            f"recurrent network of width {width}, squared loss"
        ),
        inputs=(waves + 0.1 * generator.standard_normal(waves.shape))[:, :, None],
        targets=targets,
        training=training,
        params=(
            normal(generator, (1, width), 1.0),
            normal(generator, (width, width)),
            np.zeros(width),
            normal(generator, (width, 3)),
            np.zeros(3),
        ),
        model=recurrent_network,
        criterion=squared_loss,
        steps={"momentum": 700},
    )


def recurrent_network(xp: Namespace, params: Sequence[Array], inputs: Array) -> Array:
    """Return the outputs of a tanh recurrent network after its last input.

    Parameters
    ----------
    xp : namespace
        The namespace of the arrays.
    params : sequence of Array
        Weights of inputs and state, bias; weights and bias of the outputs.
    inputs : Array, shape (rows, length, features)

    Returns
    -------
    Array, shape (rows, outputs)
    """
    of_inputs, of_state, bias, last, last_bias = params
    driven = last_axis_product(xp, inputs, of_inputs) + bias
    state = xp.tanh(driven[:, 0, :])
    for step in range(1, inputs.shape[1]):
        state = xp.tanh(driven[:, step, :] + state @ of_state)
    return state @ last + last_bias


def chaos(seed: int) -> Task:
    """Return the task of forecasting the Lorenz system by a gated recurrent network.

    References
    ----------
    K. Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder for Statistical
    Machine Translation", arXiv:1406.1078.
    """
    training, samples, width = 1200, 1700, 32
    generator = np.random.default_rng(seed)
    path = _lorenz(generator, samples + LENGTH + AHEAD)
    noisy = path + 0.05 * generator.standard_normal(path.shape)
    windows = np.arange(samples)[:, None] + np.arange(LENGTH)
    # Held-out windows come after all windows for training.
    return task_with_held_out(
        name="chaos",
        description=(
            f"{training} noisy windows of {LENGTH} states of the Lorenz system, to forecast "
            f"{AHEAD} steps ahead; a gated recurrent network of width {width}, squared loss"
        ),
        inputs=noisy[windows],
        targets=path[np.arange(samples) + LENGTH - 1 + AHEAD],
        training=training,
        params=(
            normal(generator, (3, 3 * width)),
            normal(generator, (width, 3 * width)),
            np.zeros(3 * width),
            normal(generator, (width, 3)),
            np.zeros(3),
        ),
        model=gated_network,
        criterion=squared_loss,
        steps={"adam": 700},
    )


def _lorenz(generator: np.random.Generator, steps: int) -> Float64:
    """Return standardised states of the Lorenz system, by Runge-Kutta steps of 0.04."""

    def velocity(state: Float64) -> Float64:
        x, y, z = state
        return np.array([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])

    state, path = generator.standard_normal(3) + np.array([0.0, 0.0, 25.0]), []
    for step in range(100 + 4 * steps):
        a = velocity(state)
        b = velocity(state + 0.005 * a)
        c = velocity(state + 0.005 * b)
        d = velocity(state + 0.01 * c)
        state = state + 0.01 / 6 * (a + 2 * b + 2 * c + d)
        if step >= 100 and step % 4 == 0:
            path.append(state)
    found = np.array(path)
    return np.asarray((found - found.mean(axis=0)) / found.std(axis=0))


def gated_network(xp: Namespace, params: Sequence[Array], inputs: Array) -> Array:
    """Return the outputs of a gated recurrent network after its last input.

    Parameters
    ----------
    xp : namespace
        The namespace of the arrays.
    params : sequence of Array
        Weights of inputs and state and bias, each for update gate, reset gate and candidate side by
        side; weights and bias of the outputs.
    inputs : Array, shape (rows, length, features)

    Returns
    -------
    Array, shape (rows, outputs)
    """
    of_inputs, of_state, bias, last, last_bias = params
    width = of_state.shape[0]
    driven = last_axis_product(xp, inputs, of_inputs) + bias
    state = xp.zeros_like(driven[:, 0, :width])
    for step in range(inputs.shape[1]):
        now, before = driven[:, step, :], state @ of_state
        gates = 0.5 * (1 + xp.tanh(0.5 * (now[:, : 2 * width] + before[:, : 2 * width])))
        update, reset = gates[:, :width], gates[:, width:]
        proposed = xp.tanh(now[:, 2 * width :] + reset * before[:, 2 * width :])
        state = state + update * (proposed - state)
    return state @ last + last_bias
