"""What each entry of a checkpoint must be: tables of requirements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from cdat_torch.base.direction import adapter_of
from cdat_torch.distributed.dtensor import local

RATE_ENTRIES = ("lr", "direction_weight", "tuned_lr")
EIGENVECTOR = "sharpness_vector"
AVERAGE = "averaged_weights"
VECTORS = (EIGENVECTOR, AVERAGE)
"""Vectors like the parameters, in the state of each parameter."""


class Requirement(NamedTuple):
    """What an entry must be, in words for the message and as a test."""

    description: str
    holds: Callable[[Any], bool]


def require(where: str, value: Any, requirement: Requirement) -> None:
    """Raise a ValueError unless `value`, found at `where`, is as required."""
    if not requirement.holds(value):
        msg = f"state_dict{where} must be {requirement.description}, got {value!r}"
        raise ValueError(msg)


def validate(where: str, values: dict[str, Any], table: Mapping[str, Requirement]) -> None:
    """Raise a ValueError unless `values` has every entry of the table, as required."""
    for name, requirement in table.items():
        require(f"{where}[{name!r}]", values.get(name), requirement)


def as_dict(where: str, values: Any) -> dict[str, Any]:
    """Return a copy of `values`, found at `where`, which must be a dict."""
    require(where, values, DICT)
    return dict(values)


def _is_number(value: Any) -> bool:
    """Return whether `value` is a single finite number; a tensor with one element counts."""
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        return False
    return torch.as_tensor(value).numel() == 1 and math.isfinite(value)


def _are_indices(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(i, int | str) for i in value)


DICT = Requirement("a dict", lambda value: isinstance(value, dict))
_LIST = Requirement("a list", lambda value: isinstance(value, list))
_INDICES = Requirement("a list of parameter indices", _are_indices)
AMOUNT = Requirement("a finite number >= 0", lambda value: _is_number(value) and value >= 0)

TOP = {"state": DICT, "param_groups": _LIST}
NUMBER = Requirement("a finite number", _is_number)
TUNER = {"skipped": AMOUNT, "step": AMOUNT, "due": AMOUNT, "averaged_steps": AMOUNT}
TUNER_BEFORE_0_2 = {"skipped": AMOUNT, "until_refresh": AMOUNT}
# Fields of tuner states that are never negative.
AMOUNTS = (
    *("rate", "step", "skipped", "numerator", "denominator", "weight"),
    *("usual_rate", "retreat", "spread", "best_spread"),
)


def group_table(
    found: dict[str, Any], present: dict[str, Any], defaults: dict[str, Any]
) -> dict[str, Requirement]:
    """Return the requirements for a group; options that it lacks keep their defaults."""
    options = {
        name: Requirement(
            f"of the same kind as the current value {present[name]!r}, and finite",
            partial(_is_like, present[name]),
        )
        for name in defaults
        if name in found
    }
    return {**options, "params": _INDICES, **dict.fromkeys(RATE_ENTRIES, AMOUNT)}


def _is_like(present: Any, value: Any) -> bool:
    """Return whether a saved option may replace the present one."""
    if isinstance(present, tuple | list):
        if not isinstance(value, tuple | list) or len(value) != len(present):
            return False
        return all(map(_is_like, present, value))
    if isinstance(present, bool):
        return value is None or isinstance(value, bool)
    if isinstance(present, int | float | Tensor):
        return _is_number(value)
    if present is None:
        return value is None or isinstance(value, bool) or _is_number(value)
    return True


# Entries in the state of PyTorch's optimizers: those with one number for a whole parameter, and
# those that are never negative.
_SCALARS = ("step", "mu_product")
_NONNEGATIVE = (
    *("step", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf"),
    *("step_size", "row_var", "col_var", "variance"),
)


def state_table(found: dict[str, Any], p: Tensor, base: Optimizer) -> dict[str, Requirement]:
    """Return the requirements for the saved state of a parameter.

    An entry must have the shape that it has in the state of `base`. If it is not there yet, the
    shape is known only for optimizers that keep tensors like the parameter, and numbers.
    """
    table = {}
    for name in found:
        like = base.state.get(p, {}).get(name)
        if like is None and adapter_of(base).independent_of_params:
            like = torch.zeros(()) if name in _SCALARS else p
        table[name] = _entry(name, like)
    for name in VECTORS:
        if name in found:
            table[name] = _finite("a tensor", Tensor, p)
    return table


def _entry(name: str, like: Any) -> Requirement:
    """Return the requirement for an entry of the state; `like` is an example, None if unknown."""
    finite = _finite("a number or a tensor", Tensor | int | float, like, name in _NONNEGATIVE)

    def none_or_finite(value: Any) -> bool:
        return value is None or finite.holds(value)

    def finite_if_number(value: Any) -> bool:
        return not isinstance(value, Tensor | int | float) or finite.holds(value)

    if name in _SCALARS:
        return finite
    if isinstance(like, Tensor | int | float):
        return finite._replace(holds=none_or_finite)
    return finite._replace(holds=finite_if_number)


def _finite(what: str, kind: Any, like: Any, nonnegative: bool = False) -> Requirement:
    """Return the requirement for finite values, with the shape of `like` if that is a tensor."""
    shape = like.shape if isinstance(like, Tensor) else None

    def holds(value: Any) -> bool:
        if not isinstance(value, kind):
            return False
        numbers = torch.as_tensor(value)
        part = local(numbers)
        return (
            bool(torch.isfinite(part).all())
            and (not nonnegative or bool((part >= 0).all()))
            and (shape is None or numbers.shape == shape)
        )

    shaped = "" if shape is None else f" of shape {tuple(shape)}"
    return Requirement(f"{what}{shaped}, finite{' and >= 0' if nonnegative else ''}", holds)
