"""A step of the base optimizer that may turn out to be none.

The measurement needs the direction of the step, and only the measurement tells whether the step
counts. Until then the state of the base must not be lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.optim import Optimizer

from cdat_torch.base import fused_adam
from cdat_torch.base.direction import base_direction, steps_by_parameter, steps_in_proportion
from cdat_torch.base.state import SavedState, copied

_SMALL = 2**18
"""Numbers below which a division of the parameters saves little."""
_PARTS = 8


def tentative_step(
    base: Optimizer, params: Sequence[Tensor], *, read: bool = False
) -> RehearsedStep | HeldStep:
    """Return the step of the base on `params`: its direction, and how to `undo` or `conclude` it.

    One of the two is to be called. With `read` the state of the base is that of the step meanwhile.
    """
    if read or not steps_by_parameter(base):
        return HeldStep(base, params)
    return RehearsedStep(base, params)


class HeldStep:
    """The base steps, and a copy of its whole state is held; for optimizers of unknown kind."""

    def __init__(self, base: Optimizer, params: Sequence[Tensor]) -> None:
        self._saved = SavedState(base)
        try:
            self.direction = base_direction(base, params)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Put the state back."""
        self._saved.restore()

    def conclude(self, rate: Tensor, *, skip: Tensor) -> bool:
        """Put the state back where `skip` holds; return False, since no parameter has moved."""
        del rate
        self._saved.restore_where(skip)
        return False


class RehearsedStep:
    """The base steps on copies of its state, which are dropped; `conclude` lets it step for good.

    That is one step of the base more, in the place of a second state that lives as long as the
    measurement. The parameters take turns, so that only a part is copied at a time.
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

    def undo(self) -> None:
        """Do nothing: the state is that from before the step."""

    def conclude(self, rate: Tensor, *, skip: Tensor) -> bool:
        """Take the step except where `skip` holds, without waiting for a device if possible.

        Return whether the parameters have moved as well, at `rate`. Otherwise they are left to the
        caller, and only the state has.
        """
        known = skip.device.type == "cpu"
        if known and bool(skip):
            return False
        if known and steps_in_proportion(self._base):
            step_at(self._base, float(rate))
            return True
        for part in _parts(self._with_state):
            saved = None if known else SavedState(self._base, part)
            base_direction(self._base, part)
            if saved is not None:
                saved.restore_where(skip)
        return False


def step_at(base: Optimizer, rate: float) -> None:
    """Let `base` step at `rate` times the ``lr`` of each group, which is a multiplier."""
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
    """Divide tensors into successive parts of about an eighth of their numbers."""
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
    """Let `base` find copies of the state of parameters; afterwards the originals again."""
    originals = {p: base.state[p] for p in params if p in base.state}
    base.state.update({p: copied(state) for p, state in originals.items()})
    try:
        yield
    finally:
        for p in params:
            base.state.pop(p, None)
        base.state.update(originals)
