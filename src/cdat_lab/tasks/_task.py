"""A task: data, initial weights, and a loss written once on the array API."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = Any
Namespace: TypeAlias = Any
Float64 = NDArray[np.float64]

Model = Callable[..., Array]
Criterion = Callable[[Namespace, Array, Array], Array]

DEFAULT_STEPS = 600
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def check_name(what: str, name: str) -> None:
    """Raise a ValueError about `what` unless the name can be part of a file name."""
    if not NAME.fullmatch(name):
        msg = (
            f"{what} must start with a lower-case letter or a digit, followed by these or "
            f"'.', '_', '-', at most 64 characters in all, got {name!r}"
        )
        raise ValueError(msg)


@dataclass(frozen=True, eq=False)
class Task:
    """A training problem: the loss is ``criterion(xp, model(xp, params, inputs), targets)``.

    The arrays are numpy arrays, made from a seed alone. A backend converts them to its own arrays
    and calls the same functions with its own namespace `xp`, so a task is the same problem under
    every framework.

    Attributes
    ----------
    name : str
        Name on the command line and in files: lower-case letters, digits and ``. _ -``.
    description : str
        One phrase for the report.
    inputs, targets : ndarray of float64, shape (samples, ...)
        The data. A mini-batch is a subset of the rows.
    params : tuple of ndarray of float64
        The initial weights.
    model : callable
        ``model(xp, params, inputs) -> outputs``; pure, using only operators and the functions of
        the array-API namespace `xp`. Each row of the outputs depends on its row of the inputs only.
        With `noise` it is ``model(xp, params, inputs, noise) -> outputs``.
    criterion : callable
        ``criterion(xp, outputs, targets) -> 0-d array``, a mean over the rows.
    steps : mapping of str to int
        Length of a run by name of the base optimizer; others use `DEFAULT_STEPS`.
    held_out : tuple of ndarray or None
        Inputs and targets, float64, for the validation loss, which is recorded beside the training
        loss.
    noise : tuple of int or None
        If the training is random in each step (dropout, augmentation, a sampled code): the shape of
        the standard normal numbers that the model gets for each row, so an array of shape
        ``(rows, *noise)``. They are drawn from the seed and the step, the same under every
        framework. In an evaluation the model gets None instead.
    """

    name: str
    description: str
    inputs: Float64
    targets: Float64
    params: tuple[Float64, ...]
    model: Model
    criterion: Criterion
    steps: Mapping[str, int] = field(default_factory=dict)
    held_out: tuple[Float64, Float64] | None = None
    noise: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_name("name", self.name)
        _check_rows("inputs and targets", self.inputs, self.targets)
        if self.held_out is not None:
            _check_rows("held_out", *self.held_out)
        if not self.params:
            msg = "params must hold at least one array, got none"
            raise ValueError(msg)

    def outputs(
        self, xp: Namespace, params: Sequence[Array], inputs: Array, noise: Array | None = None
    ) -> Array:
        """Return the outputs of the model on these rows, with the noise of a step or without."""
        if self.noise is None:
            return self.model(xp, params, inputs)
        return self.model(xp, params, inputs, noise)

    def loss(
        self,
        xp: Namespace,
        params: Sequence[Array],
        inputs: Array,
        targets: Array,
        noise: Array | None = None,
    ) -> Array:
        """Return the loss of `params` on these rows, a 0-d array of `xp`."""
        return self.criterion(xp, self.outputs(xp, params, inputs, noise), targets)

    def check_batch_size(self, batch_size: int | None) -> None:
        """Raise a ValueError unless the data have enough rows for a mini-batch."""
        if batch_size is not None and not 1 <= batch_size <= len(self.inputs):
            msg = (
                f"batch_size must be at least 1 and at most {len(self.inputs)}, the rows of "
                f"{self.name}, got {batch_size}"
            )
            raise ValueError(msg)

    def budget(self, base: str) -> int:
        """Return the number of steps of a run with this base optimizer."""
        return self.steps.get(base, DEFAULT_STEPS)


def _check_rows(what: str, inputs: Float64, targets: Float64) -> None:
    if len(inputs) != len(targets) or len(inputs) == 0:
        msg = (
            f"{what} must have one row for each sample, at least one, got "
            f"{len(inputs)} and {len(targets)} rows"
        )
        raise ValueError(msg)
