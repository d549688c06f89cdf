"""One step of the base optimizer that can be rolled back.

We need the direction to measure, and the measurement to know whether the step is taken. So it must
be possible to restore the state of the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, Self

from torch import Tensor
from torch.optim import Optimizer

from cdat_torch.base import fused_adam, groups
from cdat_torch.base.direction import base_direction, can_step_without_direction, steps_by_parameter
from cdat_torch.base.state import SavedState, copied
from cdat_torch.distributed.dtensor import locals_of

_SMALL = 2**18
"""The fewest elements of a part of the parameters: smaller parts would save little memory."""
_PARTS = 8


class BaseStep:
    """One step of the base: its direction, then `commit` or `rollback`.

    As a context manager it rolls back if the block raises.

    Parameters
    ----------
    base : torch.optim.Optimizer
        The wrapped optimizer.
    params : sequence of Tensor
        The parameters to step on; each has its gradient in ``p.grad``.
    reversible : bool, optional
        If False, the state of the base advances at once and nothing is copied. `rollback`, or
        `commit` with `skip`, then leaves the state advanced; the parameters do not move.
    needs_state : bool, optional
        Whether the measurement reads the state of the base after the step.
    along_step : bool, optional
        Whether `direction` includes the factors by which schedulers have changed the multipliers
        of the groups since wrapping. Otherwise `commit` applies these factors.

    Attributes
    ----------
    direction : list of Tensor
        The step of the base at learning rate 1, weighted by the multipliers of the groups.
    """

    def __init__(
        self,
        base: Optimizer,
        params: Sequence[Tensor],
        *,
        reversible: bool = True,
        needs_state: bool = False,
        along_step: bool = False,
    ) -> None:
        self._base = base
        self._params = params
        weights, self._factors = groups.weights_and_factors(base.param_groups, params)
        self._state: _StateOfStep
        if not reversible:
            self._state = _Immediate(base, params)
        elif needs_state or not steps_by_parameter(base):
            self._state = _Snapshot(base, params)
        else:
            self._state = _Rehearsal(base, params)
        self.direction = self._state.direction
        try:
            groups.scale_in_place(self._local_direction, weights)
            if along_step:
                groups.scale_in_place(self._local_direction, self._factors)
                self._factors = [1.0] * len(self._factors)
        except BaseException:
            self.rollback()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            self.rollback()

    def commit(self, rate: Tensor, *, skip: Tensor) -> None:
        """Move the parameters by `rate` times their multiplier, and the state of the base.

        If `skip` is true nothing moves, except the state if the step is not `reversible`.
        `direction` is overwritten.
        """
        if self._state.can_step_at_rate and skip.device.type == "cpu":
            if not bool(skip):
                step_at(self._base, float(rate))
            return
        self._state.commit(skip)
        groups.scale_in_place(self._local_direction, self._factors)
        groups.move(locals_of(self._params), self._local_direction, rate, skip=skip)

    def rollback(self) -> None:
        """Restore the state of the base if it can be; the parameters have not moved yet."""
        self._state.rollback()

    @property
    def _local_direction(self) -> list[Tensor]:
        return locals_of(self.direction)


class _StateOfStep(Protocol):
    """How the state of the base advances, and how it is restored."""

    direction: list[Tensor]

    @property
    def can_step_at_rate(self) -> bool:
        """Whether the base can take the whole step itself, once the rate is known."""

    def commit(self, skip: Tensor) -> None:
        """Leave the state as it is after the step, or as before it if `skip` is true."""

    def rollback(self) -> None:
        """Restore the state."""


class _Immediate:
    """The state advances at once and cannot be restored."""

    can_step_at_rate = False

    def __init__(self, base: Optimizer, params: Sequence[Tensor]) -> None:
        self.direction = base_direction(base, params)

    def commit(self, skip: Tensor) -> None:
        """Do nothing."""

    def rollback(self) -> None:
        """Do nothing."""


class _Snapshot:
    """The base steps, and a copy of its whole state from before is kept.

    For optimizers of unknown kind, and if the measurement reads the state after the step.
    """

    can_step_at_rate = False

    def __init__(self, base: Optimizer, params: Sequence[Tensor]) -> None:
        self._saved = SavedState(base)
        try:
            self.direction = base_direction(base, params)
        except BaseException:
            self.rollback()
            raise

    def commit(self, skip: Tensor) -> None:
        """Restore the state if `skip` is true."""
        self._saved.restore_where(skip)

    def rollback(self) -> None:
        """Restore the state."""
        self._saved.restore()


class _Rehearsal:
    """The base steps on copies of its state, which are dropped; `commit` repeats the step.

    The second step costs time, but no copy of the state stays in memory during the measurement.
    The base steps on one part of the parameters after another, so that only the state of one part
    is copied at a time.
    """

    def __init__(self, base: Optimizer, params: Sequence[Tensor]) -> None:
        self._base = base
        self.direction: list[Tensor] = []
        self._with_state: list[Tensor] = []
        if fused_adam.has_kernel(base):
            self.direction, self._with_state = fused_adam.direction(base, params), list(params)
            return
        for part in _parts(params):
            with _on_copies(base, part):
                self.direction += base_direction(base, part)
                self._with_state += [p for p in part if p in base.state]

    @property
    def can_step_at_rate(self) -> bool:
        """Whether the step of the base is its direction times the rate."""
        return can_step_without_direction(self._base)

    def commit(self, skip: Tensor) -> None:
        """Repeat the step on the state itself, without waiting for a device if possible."""
        known = skip.device.type == "cpu"
        if known and bool(skip):
            return
        for part in _parts(self._with_state):
            saved = None if known else SavedState(self._base, part)
            base_direction(self._base, part)
            if saved is not None:
                saved.restore_where(skip)

    def rollback(self) -> None:
        """Do nothing: the state has not changed."""


def step_at(base: Optimizer, rate: float) -> None:
    """Let `base` step at `rate` times the multiplier of each group, its ``lr``."""
    multipliers = [group["lr"] for group in base.param_groups]
    try:
        for group in base.param_groups:
            group["lr"] = rate * float(group["lr"])
        with fused_adam.preferred(base):
            base.step()
    finally:
        for group, multiplier in zip(base.param_groups, multipliers, strict=True):
            group["lr"] = multiplier


def _parts(params: Sequence[Tensor]) -> list[list[Tensor]]:
    """Divide tensors into consecutive parts, each with about an eighth of the elements."""
    enough = max(_SMALL, sum(p.numel() for p in params) // _PARTS)
    parts: list[list[Tensor]] = []
    size = enough
    for p in params:
        if size + p.numel() > enough:
            parts.append([])
            size = 0
        parts[-1].append(p)
        size += p.numel()
    return parts


@contextmanager
def _on_copies(base: Optimizer, params: Sequence[Tensor]) -> Iterator[None]:
    """Replace the state of `params` by copies inside the block."""
    originals = {p: base.state[p] for p in params if p in base.state}
    base.state.update({p: copied(state) for p, state in originals.items()})
    try:
        yield
    finally:
        for p in params:
            base.state.pop(p, None)
        base.state.update(originals)
