"""Copies of the state of a base optimizer, to restore it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cdat_torch.distributed.dtensor import local


class SavedState:
    """A copy of ``base.state``, for some parameters or all."""

    def __init__(self, base: Optimizer, params: Sequence[Tensor] | None = None) -> None:
        self._base = base
        self._params = None if params is None else set(params)
        self._saved = {p: copied(base.state[p]) for p in self._present()}

    def _present(self) -> list[Tensor]:
        return [p for p in self._base.state if self._params is None or p in self._params]

    def restore(self) -> None:
        """Restore everything bit for bit; tensors keep their identity."""
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
        """Restore everything if `skip` is true, without waiting for a device if possible."""
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


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the state of one parameter."""
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)
        for name, value in state.items()
    }
