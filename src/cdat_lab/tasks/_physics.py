"""Physics-informed networks: the residual of a differential equation at random points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cdat_lab.tasks._networks import mlp_params, squared_loss
from cdat_lab.tasks._task import Array, Namespace, Task

DAMPING, STIFFNESS, DURATION = 0.6, 16.0, 2.0
VISCOSITY = 0.05


class Jet(NamedTuple):
    """A function with its derivatives along two inputs, each at most of second order."""

    value: Array
    first: Array  # along the first input
    second: Array  # along the second input
    twice: Array  # twice along the second input


def network_jet(xp: Namespace, params: Sequence[Array], jet: Jet) -> Jet:
    """Return the outputs of a tanh network and their derivatives, by forward propagation.

    Parameters
    ----------
    xp : namespace
        The namespace of the arrays.
    params : sequence of Array
        Weights and biases, alternating.
    jet : Jet of Array, each of shape (rows, inputs)
        The inputs and their derivatives.
    """
    value, first, second, twice = jet
    for index in range(0, len(params), 2):
        weights, bias = params[index], params[index + 1]
        if index:
            value = xp.tanh(value)
            slope = 1 - value * value
            twice = slope * (twice - 2 * value * second * second)
            first, second = slope * first, slope * second
        value, first = value @ weights + bias, first @ weights
        second, twice = second @ weights, twice @ weights
    return Jet(value, first, second, twice)


def oscillator(seed: int) -> Task:
    """Return the task of solving a damped oscillator, ``u'' + 0.6 u' + 16 u = 0``.

    The initial values u = 1 and u' = 0 at time 0 are built into the solution,
    ``u(t) = 1 + t**2 N(t)`` with a network N.
    """
    training, sizes = 512, (1, 32, 32, 1)
    generator = np.random.default_rng(seed)
    params = list(mlp_params(sizes, generator))
    params[0], params[1] = 2 * params[0], generator.standard_normal(params[1].shape)
    return Task(
        name="oscillator",
        description=(
            f"the equation of a damped oscillator at {training} random times; a "
            f"{'-'.join(map(str, sizes))} tanh network, squared residual, float64"
        ),
        inputs=generator.uniform(0, DURATION, size=(training, 1)),
        targets=np.zeros((training, 1)),
        params=tuple(params),
        model=oscillator_residual,
        criterion=squared_loss,
        steps={"adam": 1200},
        held_out=(generator.uniform(0, DURATION, size=(400, 1)), np.zeros((400, 1))),
    )


def oscillator_residual(xp: Namespace, params: Sequence[Array], inputs: Array) -> Array:
    """Return the residual of the equation, relative to the stiffness."""
    t, none = inputs, xp.zeros_like(inputs)
    n = network_jet(xp, params, Jet(t, none, xp.ones_like(t), none))
    u = 1 + t * t * n.value
    velocity = 2 * t * n.value + t * t * n.second
    acceleration = 2 * n.value + 4 * t * n.second + t * t * n.twice
    return (acceleration + DAMPING * velocity + STIFFNESS * u) / STIFFNESS


def burgers(seed: int) -> Task:
    """Return the task of solving the viscous Burgers equation, ``u_t + u u_x = 0.05 u_xx``.

    The initial values ``-sin(pi x)`` and the zeros at the ends of [-1, 1] are built into the
    solution, ``u(t, x) = -sin(pi x) + t (1 - x**2) N(t, x)`` with a network N.
    """
    training, sizes = 1024, (2, 32, 32, 32, 1)
    generator = np.random.default_rng(seed)

    def points(count: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        return generator.uniform((0, -1), (1, 1), size=(count, 2))

    return Task(
        name="burgers",
        description=(
            f"the viscous Burgers equation at {training} random points; a "
            f"{'-'.join(map(str, sizes))} tanh network, squared residual, float64"
        ),
        inputs=points(training),
        targets=np.zeros((training, 1)),
        params=mlp_params(sizes, generator, 1.5),
        model=burgers_residual,
        criterion=squared_loss,
        steps={"adam": 1000},
        held_out=(points(500), np.zeros((500, 1))),
    )


def burgers_residual(xp: Namespace, params: Sequence[Array], inputs: Array) -> Array:
    """Return the residual of the equation at points (t, x)."""
    t, x = inputs[:, :1], inputs[:, 1:]
    one, none = xp.ones_like(t), xp.zeros_like(t)
    along_t, along_x = xp.concat([one, none], axis=1), xp.concat([none, one], axis=1)
    n = network_jet(xp, params, Jet(inputs, along_t, along_x, xp.zeros_like(inputs)))
    window = 1 - x * x
    sine, cosine = xp.sin(math.pi * x), xp.cos(math.pi * x)
    u = -sine + t * window * n.value
    u_t = window * (n.value + t * n.first)
    u_x = -math.pi * cosine + t * (window * n.second - 2 * x * n.value)
    curved = window * n.twice - 4 * x * n.second - 2 * n.value
    u_xx = math.pi**2 * sine + t * curved
    return u_t + u * u_x - VISCOSITY * u_xx
