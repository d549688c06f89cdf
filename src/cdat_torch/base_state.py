"""A step of the base optimizer that may turn out to be none.

The measurement needs the direction of the step, and only the measurement tells whether the step
counts. Until then the state of the base must not be lost.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cdat_torch.direction import base_direction, steps_by_parameter
from cdat_torch.sharding import local


class RehearsedStep:
    """The base steps on copies of its state, which are dropped; `conclude` lets it step for good.

    That is one step of the base more, in the place of a second state that lives as long as the
    measurement. The parameters take turns in parts, so that only a part is copied at a time.
    """

    def __init__(self, base: Optimizer, params: Sequence[Tensor]) -> None:
        self._base = base
        self._to_repeat: list[list[Tensor]] = []
        self.direction: list[Tensor] = []
        for part in _parts(params):
            with _copied_state(base, part):
                self.direction += base_direction(base, part)
                if any(p in base.state for p in part):
                    self._to_repeat.append(part)

    def undo(self) -> None:
        """Do nothing: the state is that from before the step."""

    def conclude(self, skip: Tensor) -> None:
        """Take the step except where `skip` holds, without waiting for a device if possible."""
        known = skip.device.type == "cpu"
        if known and bool(skip):
            return
        for part in self._to_repeat:
            saved = None if known else SavedState(self._base, part)
            base_direction(self._base, part)
            if saved is not None:
                saved.restore_where(skip)


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

    def conclude(self, skip: Tensor) -> None:
        """Put the state back where `skip` holds."""
        self._saved.restore_where(skip)


def tentative_step(
    base: Optimizer, params: Sequence[Tensor], *, read: bool = False
) -> RehearsedStep | HeldStep:
    """Return the step of the base on `params`: its direction, and how to `undo` or `conclude` it.

    One of the two is to be called. With `read` the state of the base is that of the step meanwhile.
    """
    if read or not steps_by_parameter(base):
        return HeldStep(base, params)
    return RehearsedStep(base, params)


class SavedState:
    """A copy of ``base.state``, of some parameters or as a whole."""

    def __init__(self, base: Optimizer, params: Sequence[Tensor] | None = None) -> None:
        self._base = base
        self._params = None if params is None else set(params)
        self._saved = {p: _copied(base.state[p]) for p in self._present()}

    def _present(self) -> list[Tensor]:
        return [p for p in self._base.state if self._params is None or p in self._params]

    def restore(self) -> None:
        """Put everything back, bit for bit; tensors keep their identity."""
        for p in self._present():
            if p not in self._saved:
                del self._base.state[p]
                continue
            state, saved = self._base.state[p], self._saved[p]
            for name in set(state) - set(saved):
                del state[name]
            for name, value in saved.items():
                if isinstance(value, Tensor) and isinstance(state.get(name), Tensor):
                    state[name].copy_(value)
                else:
                    state[name] = value

    def restore_where(self, skip: Tensor) -> None:
        """Put everything back where `skip` holds, without waiting for a device if possible."""
        new = set(self._present()) != set(self._saved)
        if skip.device.type == "cpu" or new:
            if bool(skip):
                self.restore()
            return
        for p, saved in self._saved.items():
            for name, value in saved.items():
                now = self._base.state[p].get(name)
                if isinstance(value, Tensor) and isinstance(now, Tensor):
                    now, value = local(now), local(value)  # noqa: PLW2901
                    now.copy_(torch.where(skip.to(now.device), value, now))


@contextmanager
def _copied_state(base: Optimizer, params: Sequence[Tensor]) -> Iterator[None]:
    """Let `base` find copies of the state of `params`; afterwards it finds the originals."""
    originals = {p: base.state[p] for p in params if p in base.state}
    base.state.update({p: _copied(state) for p, state in originals.items()})
    try:
        yield
    finally:
        for p in params:
            base.state.pop(p, None)
        base.state.update(originals)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)
        for name, value in state.items()
    }


_PARTS = 8
_SMALL = 2**18
"""Numbers below which a division of the parameters saves little memory."""


def _parts(params: Sequence[Tensor]) -> list[list[Tensor]]:
    """Divide the parameters into at most about `_PARTS` successive parts of similar size."""
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
