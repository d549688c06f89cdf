"""Input and output of a backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdat_lab.bases import Base
from cdat_lab.contenders import Contender
from cdat_lab.tasks import Task


@dataclass(frozen=True, eq=False)
class Problem:
    """One run, ready for a backend.

    Attributes
    ----------
    task : Task
        The task to train.
    base : Base
        The optimizer that gives the direction.
    contender : Contender
        The rule that gives the rate.
    hyperparameters : mapping of str to float
        Arguments of the rule.
    steps : int
        Length of the run.
    record_every : int
        Number of steps between records.
    sharpness : bool
        Whether to record the sharpness.
    batch_size : int or None
        Rows of a mini-batch; None for the full batch.
    seed : int
        Seed of the mini-batches and of the start vector for the sharpness.
    """

    task: Task
    base: Base
    contender: Contender
    hyperparameters: Mapping[str, float]
    steps: int
    record_every: int
    sharpness: bool
    batch_size: int | None
    seed: int

    @property
    def measures_full_loss(self) -> bool:
        """Whether the loss of a step is that of all data at the weights that are evaluated."""
        elsewhere = self.contender.average or self.contender.optimizer == "schedule-free"
        return self.batch_size is None and self.task.noise is None and not elsewhere

    def probe(self) -> tuple[NDArray[np.float64], ...]:
        """Return the start vector for the first sharpness: random, shaped like the weights."""
        generator = np.random.default_rng([self.seed, 1])
        return tuple(generator.standard_normal(p.shape) for p in self.task.params)

    def batches(self) -> NDArray[np.int64] | None:
        """Return the rows of each mini-batch, shape (steps, batch_size); None for the full batch.

        Each pass over the data is a new permutation; rows left over at the end are dropped.
        """
        if self.batch_size is None:
            return None
        samples = len(self.task.inputs)
        generator = np.random.default_rng([self.seed, 2])
        each = samples // self.batch_size
        passes = -(-self.steps // each)
        rows = [
            generator.permutation(samples)[: each * self.batch_size].reshape(each, -1)
            for _ in range(passes)
        ]
        return np.concatenate(rows)[: self.steps]

    def noise(self, first: int, count: int) -> NDArray[np.float64] | None:
        """Return the standard normal numbers of some steps; None if the task has none.

        Parameters
        ----------
        first, count : int
            The first step and the number of steps.

        Returns
        -------
        ndarray of float64, shape (count, rows of a batch, *task.noise)
            Those of a step depend on the seed and the step only.
        """
        if self.task.noise is None:
            return None
        shape = (self.batch_size or len(self.task.inputs), *self.task.noise)
        steps = range(first, first + count)
        generators = (np.random.default_rng([self.seed, 3, step]) for step in steps)
        return np.stack([generator.standard_normal(shape) for generator in generators])

    def record_steps(self) -> NDArray[np.int64]:
        """Return the steps before which a record is taken: 0, record_every, ..., and the end."""
        return np.append(np.arange(0, self.steps, self.record_every), self.steps)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The history of a run; index t refers to the weights before step t.

    Attributes
    ----------
    loss : ndarray of float64, shape (steps,)
        The loss of each step on its batch.
    learning_rate, slope : ndarray of float64, shape (steps,)
        The rate of the step and the directional derivative <g, u>; NaN if the contender has none.
    curvature : ndarray of float64, shape (steps,)
        The directional curvature <u, H u>; NaN if the rule does not use it.
    trials : ndarray of int64, shape (steps,)
        Number of rates that a line search tried; 0 for other rules.
    skipped : ndarray of int64, shape (steps,)
        Cumulative number of steps skipped because a value was not finite.
    full_loss : ndarray of float64, shape (records,)
        The loss on all data before the steps `Problem.record_steps`.
    sharpness : ndarray of float64, shape (records,)
        Largest eigenvalue of the Hessian on all data, preconditioned if the base is; NaN if not
        requested, and before the first step of a preconditioned base.
    seconds : ndarray of float64, shape (records,)
        Cumulative wall-clock time of the steps, excluding compilation and records.
    compile_seconds : float
        Time spent compiling for this run; 0 if nothing was compiled.
    validation_loss : ndarray of float64, shape (records,), optional
        The loss on the held-out data, in the same steps as `full_loss`.
    """

    loss: NDArray[np.float64]
    learning_rate: NDArray[np.float64]
    slope: NDArray[np.float64]
    curvature: NDArray[np.float64]
    trials: NDArray[np.int64]
    skipped: NDArray[np.int64]
    full_loss: NDArray[np.float64]
    sharpness: NDArray[np.float64]
    seconds: NDArray[np.float64]
    compile_seconds: float
    validation_loss: NDArray[np.float64] | None = None
