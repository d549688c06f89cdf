"""The tuner's state inside the ``state_dict`` of the optimizer.

Scalars are stored as Python numbers in each parameter group: distributed checkpointing drops
further top-level keys and casts tensors in ``state`` to the dtype of the parameter. The eigenvector
of the sharpness has that dtype, and is stored there.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from cdat_torch.sharding import local

_KEY = "tuner"
_VECTOR = "sharpness_vector"


class SavedTuner(NamedTuple):
    """The tuner's part of a checkpoint; `state` maps field names to Python numbers."""

    state: dict[str, Any] | None
    skipped: int
    until_refresh: int


def with_tuner(
    state_dict: dict[str, Any], tuner_state: Any, skipped: int, until_refresh: int
) -> dict[str, Any]:
    """Return `state_dict` with the tuner's scalars as Python numbers in each group."""
    numbers = None
    if tuner_state is not None:
        numbers = {name: field.item() for name, field in tuner_state._asdict().items()}
    saved = {"state": numbers, "skipped": skipped, "until_refresh": until_refresh}
    for group in state_dict["param_groups"]:
        group["tuned_lr"] = float(group["tuned_lr"])
        group[_KEY] = dict(saved)
    return state_dict


def split(
    state_dict: dict[str, Any], tuner_state: Any, groups: list[dict[str, Any]]
) -> tuple[dict[str, Any], SavedTuner | None]:
    """Return the base's part of `state_dict` and the tuner's; None if it is a plain optimizer's."""
    saved_groups = [dict(group) for group in state_dict["param_groups"]]
    if len(saved_groups) != len(groups):
        msg = f"state_dict must hold {len(groups)} parameter groups, got {len(saved_groups)}"
        raise ValueError(msg)
    tuners = [group.pop(_KEY, None) for group in saved_groups]
    if any(tuner is None for tuner in tuners):
        warnings.warn(
            "state_dict comes from an optimizer without a tuner: the tuner starts cold and the "
            "learning-rate multipliers stay as they are",
            stacklevel=3,
        )
        for saved, group in zip(saved_groups, groups, strict=True):
            saved.update({key: group[key] for key in ("lr", "direction_weight", "tuned_lr")})
        return {**state_dict, "param_groups": saved_groups}, None
    for saved in (*saved_groups, *tuners):
        _check_numbers(saved)
    if set(tuners[0]) != set(SavedTuner._fields):
        msg = f"state_dict must hold {SavedTuner._fields} of the tuner, got {tuple(tuners[0])}"
        raise ValueError(msg)
    tuner = SavedTuner(**tuners[0])
    expected = None if tuner_state is None else set(tuner_state._fields)
    found = None if tuner.state is None else set(tuner.state)
    if expected != found:
        msg = (
            f"state_dict must hold the tuner state {expected}, got {found}: is it another tuner's?"
        )
        raise ValueError(msg)
    if tuner.state is not None:
        _check_numbers(tuner.state, every=True)
    return {**state_dict, "param_groups": saved_groups}, tuner


def check_base_state(state_dict: dict[str, Any], base: Optimizer) -> None:
    """Raise a ValueError if the base's part of a checkpoint does not fit its parameters."""
    by_index = _by_index(state_dict, base)
    for index, state in state_dict["state"].items():
        if index not in by_index or not isinstance(state, dict):
            msg = f"state_dict['state'] must map parameters to dictionaries, got {index!r}"
            raise ValueError(msg)
        p = by_index[index]
        for name, value in state.items():
            where = f"state_dict['state'][{index}][{name!r}]"
            if isinstance(value, str) or (
                isinstance(value, torch.Tensor) and not bool(torch.isfinite(local(value)).all())
            ):
                msg = f"{where} must be finite numbers, got {value!r}"
                raise ValueError(msg)
            present = base.state.get(p, {}).get(name)
            if not (isinstance(value, torch.Tensor) and isinstance(present, torch.Tensor)):
                continue
            if value.shape != present.shape:
                msg = f"{where} must have shape {tuple(present.shape)}, got {tuple(value.shape)}"
                raise ValueError(msg)


def _by_index(state_dict: dict[str, Any], base: Optimizer) -> dict[int, Tensor]:
    """Return the parameters by their index in `state_dict`; ValueError if the numbers differ."""
    params = [p for group in base.param_groups for p in group["params"]]
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    if len(params) != len(saved):
        msg = f"state_dict must hold {len(params)} parameters, got {len(saved)}"
        raise ValueError(msg)
    return dict(zip(saved, params, strict=True))


def with_vector(
    state_dict: dict[str, Any], vector: dict[Tensor, Tensor], base: Optimizer
) -> dict[str, Any]:
    """Return `state_dict` with the eigenvector of the sharpness in the state of each parameter.

    Zeros stand for none: distributed checkpointing loads only what it finds in the state of the
    new optimizer. The dictionaries that the base itself looks into stay as they are.
    """
    state = dict(state_dict["state"])
    for index, p in _by_index(state_dict, base).items():
        if p.requires_grad:
            part = vector[p] if p in vector else torch.zeros_like(p, requires_grad=False)
            state[index] = {**state.get(index, {}), _VECTOR: part}
    return {**state_dict, "state": state}


def split_vector(
    state_dict: dict[str, Any], base: Optimizer
) -> tuple[dict[str, Any], dict[Tensor, Tensor]]:
    """Return the base's part of `state_dict` and the eigenvector, empty if there is none."""
    vector, state = {}, dict(state_dict["state"])
    for index, p in _by_index(state_dict, base).items():
        if _VECTOR not in state.get(index, {}):
            continue
        rest = dict(state.pop(index))
        part = rest.pop(_VECTOR)
        if not isinstance(part, Tensor) or part.shape != p.shape:
            found = tuple(part.shape) if isinstance(part, Tensor) else repr(part)
            msg = (
                f"state_dict['state'][{index}][{_VECTOR!r}] must be a tensor of shape "
                f"{tuple(p.shape)}, got {found}"
            )
            raise ValueError(msg)
        vector[p] = part.detach().to(p, copy=True)
        if rest:  # an empty state tells the base that it has to begin
            state[index] = rest
    known = any(bool(part.any()) for part in vector.values())
    return {**state_dict, "state": state}, vector if known else {}


_RATES = ("lr", "direction_weight", "tuned_lr", "skipped", "until_refresh")


def _check_numbers(values: dict[str, Any], *, every: bool = False) -> None:
    """Require finite numbers >= 0 under the names that hold some, or under all."""
    for name in values if every else set(values) & set(_RATES):
        value = values[name]
        number = not isinstance(value, bool) and isinstance(value, int | float | torch.Tensor)
        if not number or not 0 <= float(value) < math.inf:
            msg = f"state_dict must hold a finite {name} >= 0, got {value!r}"
            raise ValueError(msg)


def restore(numbers: dict[str, Any] | None, like: Any) -> Any:
    """Return a tuner state like `like` that holds `numbers`."""
    assert numbers is not None
    return type(like)(
        *(torch.full_like(field, numbers[name]) for name, field in like._asdict().items())
    )
