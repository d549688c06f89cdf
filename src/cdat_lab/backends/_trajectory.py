"""What goes into a backend and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdat_lab.bases import Base
from cdat_lab.contenders import Contender
from cdat_lab.tasks import Task

FIRST_MATVECS = 60
"""Hessian-vector products spent on the first sharpness, from a random vector."""

MATVECS = 5
"""Hessian-vector products spent on each later sharpness, from the last vector."""


@dataclass(frozen=True, eq=False)
class Problem:
    """One run, ready for a backend.

    Attributes
    ----------
    task : Task
        What to train.
    base : Base
        The optimizer that gives the direction.
    contender : Contender
        The rule that gives the rate.
    hyperparameters : mapping of str to float
        Arguments of the rule.
    steps : int
        Length of the run.
    sharpness_every : int
        Steps from one sharpness to the next.
    seed : int
        Seed of the first vector of the power iteration.
    """

    task: Task
    base: Base
    contender: Contender
    hyperparameters: Mapping[str, float]
    steps: int
    sharpness_every: int
    seed: int

    def probe(self) -> tuple[NDArray[np.float64], ...]:
        """Return the first vector of the power iteration, shaped like the weights."""
        generator = np.random.default_rng([self.seed, 1])
        return tuple(generator.standard_normal(p.shape) for p in self.task.params)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What happened at each step; index t belongs to the weights before step t.

    Attributes
    ----------
    loss : ndarray of float64, shape (steps + 1,)
        The loss; the last entry is that of the final weights.
    learning_rate, slope : ndarray of float64, shape (steps,)
        The rate of the step and the directional derivative <g, u>.
    curvature : ndarray of float64, shape (steps,)
        The directional curvature <u, H u>; NaN where the rule did not ask for it.
    sharpness : ndarray of float64, shape (steps,)
        Largest eigenvalue of the Hessian, preconditioned if the base is; NaN between refreshes.
    skipped : ndarray of int64, shape (steps,)
        Steps skipped so far because something was not finite.
    seconds_per_step : float
        Wall-clock time without compilation, sharpness included.
    compile_seconds : float
        Time spent compiling for this run; 0 where there was nothing to compile.
    """

    loss: NDArray[np.float64]
    learning_rate: NDArray[np.float64]
    slope: NDArray[np.float64]
    curvature: NDArray[np.float64]
    sharpness: NDArray[np.float64]
    skipped: NDArray[np.int64]
    seconds_per_step: float
    compile_seconds: float
