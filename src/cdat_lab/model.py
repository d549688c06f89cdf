"""The joint model of rate and sharpness, run under the rules that the claims are about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdat_core import dynamics
from cdat_lab import registry
from cdat_lab.bases import GD
from cdat_lab.contenders import Contender

STEPS = 5000
CONSTANT_RATE = 0.5
DISPLACEMENTS = (1e-3, 2e-3, 5e-3)
"""Initial displacements along the sharpest direction; one run each, as for seeds."""

RULES = ("constant", "armijo", "cdat-1", "cdat-1.9", "cdat-2", "cdat-2.0625")


@dataclass(frozen=True, eq=False)
class Simulation:
    """Runs of the joint model under one rule, one for each initial displacement.

    Attributes
    ----------
    contender : Contender
        The rule.
    sharpness, displacement, value : ndarray of float64, shape (steps + 1, runs)
        Before each step and after the last; value is the loss.
    learning_rate : ndarray of float64, shape (steps, runs)
        The rate of each step.
    """

    contender: Contender
    sharpness: NDArray[np.float64]
    displacement: NDArray[np.float64]
    value: NDArray[np.float64]
    learning_rate: NDArray[np.float64]

    @property
    def steps(self) -> int:
        """The length of the runs."""
        return len(self.learning_rate)


def simulate(
    rules: Iterable[str] = RULES,
    *,
    steps: int = STEPS,
    learning_rate: float = CONSTANT_RATE,
    displacements: Iterable[float] = DISPLACEMENTS,
    model: dynamics.JointModel | None = None,
) -> list[Simulation]:
    """Run the joint model under each rule.

    Parameters
    ----------
    rules : iterable of str
        Names of contenders; those with a tuned rate use `learning_rate`.
    steps : int
        Length of the runs, at least 1.
    learning_rate : float
        The constant rate, or the peak of a schedule.
    displacements : iterable of float
        Initial displacements.
    model : JointModel, optional
        The constants of the model; by default its own.

    Returns
    -------
    list of Simulation

    Raises
    ------
    ValueError
        If a rule is unknown, or is a complete optimizer, which has no rate to set.
    """
    start = np.array(list(displacements), dtype=np.float64)
    found = []
    for name in rules:
        contender = registry.find_contender(name)
        if contender.rule is None:
            msg = f"{name!r} is a complete optimizer; the joint model needs a learning-rate rule"
            raise ValueError(msg)
        settings = contender.settings(GD)  # the model is of gradient descent
        if contender.tuned is not None:
            settings[contender.tuned] = learning_rate
        rule = contender.rule(steps, **settings)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            run = dynamics.simulate(rule, steps=steps, displacement=start, model=model)
        found.append(
            Simulation(
                contender,
                np.asarray(run.sharpness),
                np.asarray(run.displacement),
                np.asarray(run.value),
                np.asarray(run.learning_rate),
            )
        )
    return found
