"""The interface of a line search: ask for a trial, tell its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from cdat_core._types import Scalar


class LineSearchState(Protocol):
    """The fields that every line-search state has; states are NamedTuples of scalars."""

    @property
    def step_size(self) -> Scalar:
        """The next trial; once `done`, the step to take (0 if none is acceptable)."""
        ...

    @property
    def done(self) -> Scalar:
        """Whether the search has ended, boolean."""
        ...

    @property
    def failed(self) -> Scalar:
        """Whether the search ended without meeting its condition, boolean."""
        ...

    @property
    def trials(self) -> Scalar:
        """Number of trials told so far, int32."""
        ...


class LineSearch(NamedTuple):
    """A line search as pure functions; the caller evaluates the loss and drives the loop.

    ::

        state = search.init(measurement, like, previous_step_size)
        while not state.done:
            state = search.tell(state, loss(w + state.step_size * u))

    Attributes
    ----------
    init : callable
        ``init(measurement, like, previous_step_size=None) -> state``. `like` is a real floating 0-d
        array that fixes namespace, dtype and device; `previous_step_size` is the step accepted at
        the last training step, from which the first guess grows.
    tell : callable
        ``tell(state, value, slope=None) -> state`` with the loss, and the slope if it is in
        `trial_needs`, at the trial. A state that is done is returned unchanged.
    needs : frozenset of str
        The fields of `Measurement` that `init` reads.
    trial_needs : frozenset of str
        What `tell` needs of a trial: "value", and also "slope" if the search uses the derivative of
        the loss along the update at the trial.
    """

    init: Callable[..., Any]
    tell: Callable[..., Any]
    needs: frozenset[str]
    trial_needs: frozenset[str] = frozenset({"value"})
