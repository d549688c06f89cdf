"""The state of the base optimizer, put back where a step turns out to be none."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cdat_torch.sharding import local


class SavedState:
    """A copy of ``base.state``; the base steps before the curvature along its step is known."""

    def __init__(self, base: Optimizer) -> None:
        self._saved: dict[Tensor, dict[str, Any]] = {
            p: {name: _copied(value) for name, value in state.items()}
            for p, state in base.state.items()
        }

    def restore(self, base: Optimizer) -> None:
        """Put everything back, bit for bit; tensors keep their identity."""
        for p in list(base.state):
            if p not in self._saved:
                del base.state[p]
                continue
            state, saved = base.state[p], self._saved[p]
            for name in set(state) - set(saved):
                del state[name]
            for name, value in saved.items():
                if isinstance(value, Tensor) and isinstance(state.get(name), Tensor):
                    state[name].copy_(value)
                else:
                    state[name] = value

    def restore_where(self, base: Optimizer, skip: Tensor) -> None:
        """Put everything back where `skip` holds, without waiting for a device if possible."""
        new = set(base.state) != set(self._saved)
        if skip.device.type == "cpu" or new:
            if bool(skip):
                self.restore(base)
            return
        for p, saved in self._saved.items():
            for name, value in saved.items():
                now = base.state[p].get(name)
                if isinstance(value, Tensor) and isinstance(now, Tensor):
                    now, value = local(now), local(value)  # noqa: PLW2901
                    now.copy_(torch.where(skip.to(now.device), value, now))


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)
