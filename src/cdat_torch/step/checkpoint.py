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

from cdat_torch.base.direction import adapter_of
from cdat_torch.distributed.dtensor import all_agree, local

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
    _check_structure(state_dict)
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
    if not isinstance(tuners[0], dict) or set(tuners[0]) != set(SavedTuner._fields):
        msg = f"state_dict must hold {SavedTuner._fields} of the tuner, got {tuners[0]!r}"
        raise ValueError(msg)
    for saved in (*saved_groups, tuners[0]):
        _check_numbers(saved)
    tuner = SavedTuner(**tuners[0])
    expected = None if tuner_state is None else set(tuner_state._fields)
    found = set(tuner.state) if isinstance(tuner.state, dict) else tuner.state
    if expected != found:
        msg = (
            f"state_dict must hold the tuner state {expected}, got {found}: is it another tuner's?"
        )
        raise ValueError(msg)
    if tuner.state is not None:
        _check_numbers(tuner.state, every=True)
    return {**state_dict, "param_groups": saved_groups}, tuner


def _check_structure(state_dict: Any) -> None:
    """Raise a ValueError unless this is what optimizers call a state_dict."""
    parts = state_dict if isinstance(state_dict, dict) else {}
    groups = parts.get("param_groups")
    if not isinstance(parts.get("state"), dict) or not isinstance(groups, list):
        msg = f"state_dict must hold a dict 'state' and a list 'param_groups', got {state_dict!r}"
        raise ValueError(msg)
    for group in groups:
        indices = group.get("params") if isinstance(group, dict) else None
        if not isinstance(indices, list) or not all(isinstance(i, int | str) for i in indices):
            msg = f"state_dict['param_groups'] must hold dicts with a list 'params', got {group!r}"
            raise ValueError(msg)


def check_base_state(state_dict: dict[str, Any], base: Optimizer) -> None:
    """Raise a ValueError if the base's part of a checkpoint does not fit its parameters."""
    by_index = _by_index(state_dict, base)
    for found, group in zip(state_dict["param_groups"], base.param_groups, strict=True):
        for name in set(found) & set(base.defaults):
            if not _is_like(found[name], group[name]):
                msg = f"state_dict must hold a finite {name} like {group[name]}, got {found[name]}"
                raise ValueError(msg)
    for index, state in state_dict["state"].items():
        if index not in by_index or not isinstance(state, dict):
            msg = f"state_dict['state'] must map parameters to dictionaries, got {index!r}"
            raise ValueError(msg)
        p = by_index[index]
        for name, value in state.items():
            like = base.state.get(p, {}).get(name)
            if like is None and adapter_of(base).independent_of_params:
                like = torch.zeros(()) if name in _SCALARS else p
            required = _misfit(name, value, like)
            if required is not None:
                msg = f"state_dict['state'][{index}][{name!r}] must be {required}, got {value!r}"
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
    zero = not any(bool(local(part).any()) for part in vector.values())
    known = not all_agree(zero, vector.values())
    return {**state_dict, "state": state}, vector if known else {}


# What the optimizers of PyTorch keep: one number for all of a parameter, and squares or counts.
_SCALARS = ("step", "mu_product")
_NONNEGATIVE = (
    *("step", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf"),
    *("step_size", "row_var", "col_var", "variance"),
)


def _misfit(name: str, value: Any, like: Any) -> str | None:
    """Return what an entry of the state must be if `value` is not; `like` is one, if known."""
    if not isinstance(value, torch.Tensor | int | float):
        expected = isinstance(like, torch.Tensor | int | float) and value is not None
        return "a number or a tensor" if expected or name in _SCALARS else None
    numbers = torch.as_tensor(value)
    if not bool(torch.isfinite(local(numbers)).all()):
        return "finite"
    if name in _NONNEGATIVE and bool((local(numbers) < 0).any()):
        return "nonnegative"
    if isinstance(like, torch.Tensor) and numbers.shape != like.shape:
        return f"of shape {tuple(like.shape)}"
    return None


def _is_like(value: Any, present: Any) -> bool:
    """Return whether a hyperparameter may take the place of the present one."""
    if isinstance(present, tuple | list):
        fits = isinstance(value, tuple | list) and len(value) == len(present)
        return fits and all(map(_is_like, value, present))
    flag = value is None or isinstance(value, bool)
    if isinstance(present, bool):
        return flag
    number = isinstance(value, int | float | torch.Tensor) and not isinstance(value, bool)
    finite = number and torch.as_tensor(value).numel() == 1 and math.isfinite(value)
    if isinstance(present, int | float | torch.Tensor):
        return finite
    return finite or flag or present is not None


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
