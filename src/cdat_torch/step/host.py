"""A tuner that computes with NumPy, for parameters on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdat_core import Measurement
from cdat_core.extend import observe_or_hold
from cdat_core.tuners import Tuner


def on_host(tuner: Tuner[Any]) -> Tuner[Any]:
    """Return the same tuner on CPU tensors, with its state and arithmetic in NumPy.

    A step of a tuner is some fifty operations on scalars, which take NumPy about a fifth of the
    time that they take PyTorch. Only for tuners that are written on the array API.
    """

    def init(like: Tensor) -> Any:
        return tuner.init(_to_numpy(like))

    def update(measurement: Measurement, state: Any) -> tuple[Tensor, Any]:
        fields = [None if field is None else _to_numpy(field) for field in measurement]
        with np.errstate(all="ignore"):  # the tuner itself tests for overflow
            rate, state = tuner.update(Measurement(*fields), state)
        return _to_torch(rate), state

    def observe(value: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        number = None if value is None else _to_numpy(value)
        with np.errstate(all="ignore"):
            rate, state = observe_or_hold(tuner, number, state)
        return _to_torch(rate), state

    return tuner._replace(init=init, update=update, observe=observe)


def _to_numpy(number: Tensor) -> Any:
    return np.float64(number.item())


def _to_torch(number: Any) -> Tensor:
    return torch.tensor(float(number), dtype=torch.float64)
