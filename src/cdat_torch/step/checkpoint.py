"""The tuner's state inside the ``state_dict`` of the optimizer.

Scalars are stored as Python numbers in each parameter group, because distributed checkpointing
drops other top-level keys and casts tensors in ``state`` to the dtype of the parameter. The
eigenvector of the sharpness has that dtype and is stored in ``state``.

`read` validates a checkpoint as a whole before anything is loaded. What it must hold is in the
tables below: for the top level, a group, the tuner, and the state of a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from cdat_torch.base.direction import adapter_of
from cdat_torch.distributed.dtensor import all_agree, local
from cdat_torch.messages import warn

_KEY = "tuner"
_VECTOR = "sharpness_vector"
_MULTIPLIERS = ("lr", "direction_weight", "tuned_lr")


class SavedTuner(NamedTuple):
    """The tuner's part of a checkpoint; `state` maps field names to Python numbers."""

    state: dict[str, Any] | None
    skipped: int
    until_refresh: int


class Checkpoint(NamedTuple):
    """A valid checkpoint, in its parts.

    Attributes
    ----------
    base : dict
        The state_dict of the base.
    tuner : SavedTuner or None
        None if the checkpoint is that of a plain optimizer.
    vector : dict
        The eigenvector of the sharpness by parameter; empty if there is none.
    """

    base: dict[str, Any]
    tuner: SavedTuner | None
    vector: dict[Tensor, Tensor]


def write(
    state_dict: dict[str, Any],
    base: Optimizer,
    tuner: SavedTuner,
    vector: dict[Tensor, Tensor] | None,
) -> dict[str, Any]:
    """Return the `state_dict` of the base with the tuner's part added.

    Zeros stand for an eigenvector that is not known yet: distributed checkpointing loads only what
    it finds in the state of the new optimizer. None is for tuners without one.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    for group in groups:
        group["tuned_lr"] = float(group["tuned_lr"])
        group[_KEY] = tuner._asdict()
    state = dict(state_dict["state"])
    if vector is not None:
        for index, p in _by_index(groups, base).items():
            if p.requires_grad:
                part = vector[p] if p in vector else torch.zeros_like(p, requires_grad=False)
                state[index] = {**state.get(index, {}), _VECTOR: part}
    return {**state_dict, "state": state, "param_groups": groups}


def read(state_dict: Any, base: Optimizer, tuner_state: Any) -> Checkpoint:
    """Return the parts of `state_dict`, which is checked and not changed.

    Parameters
    ----------
    state_dict : dict
        What `write` returned, or the ``state_dict`` of a plain optimizer.
    base : torch.optim.Optimizer
        The wrapped optimizer; it is not changed either.
    tuner_state : NamedTuple of Tensor or None
        The present state of the tuner, for the names of its fields.

    Raises
    ------
    ValueError
        If an entry is missing or not what the tables require.
    """
    _require("", state_dict, _DICT)
    _validate("", state_dict, _TOP)
    groups = [_copy(f"['param_groups'][{i}]", g) for i, g in enumerate(state_dict["param_groups"])]
    state = {index: _copy(f"['state'][{index!r}]", s) for index, s in state_dict["state"].items()}
    if len(groups) != len(base.param_groups):
        msg = f"state_dict must hold {len(base.param_groups)} parameter groups, got {len(groups)}"
        raise ValueError(msg)
    tuners = [group.pop(_KEY, None) for group in groups]
    tuner = None
    if all(found is not None for found in tuners):
        tuner = _tuner(tuners[0], tuner_state)
    else:
        warn(
            "state_dict comes from an optimizer without a tuner: the tuner starts cold and the "
            "learning-rate multipliers stay as they are"
        )
        for group, present in zip(groups, base.param_groups, strict=True):
            group.update({name: present[name] for name in _MULTIPLIERS})
    for i, (group, present) in enumerate(zip(groups, base.param_groups, strict=True)):
        _validate(f"['param_groups'][{i}]", group, _group_table(group, present, base.defaults))
    params = _by_index(groups, base)
    for index, entries in state.items():
        where = f"['state'][{index!r}]"
        _require("['state']", index, _Requirement("the index of a parameter", params.__contains__))
        _validate(where, entries, _state_table(entries, params[index], base))
    vector = {params[i]: s.pop(_VECTOR) for i, s in state.items() if _VECTOR in s}
    vector = {p: part.detach().to(p, copy=True) for p, part in vector.items()}
    zero = not any(bool(local(part).any()) for part in vector.values())
    known = not all_agree(zero, vector.values())
    # An empty state would tell the base that it has taken a step.
    state = {index: s for index, s in state.items() if s or not state_dict["state"][index]}
    return Checkpoint(
        {**state_dict, "state": state, "param_groups": groups}, tuner, vector if known else {}
    )


def numbers_of(tuner_state: Any) -> dict[str, Any] | None:
    """Return the state of a tuner as Python numbers by field; None for None."""
    if tuner_state is None:
        return None
    return {name: field.item() for name, field in tuner_state._asdict().items()}


def restore(numbers: dict[str, Any] | None, like: Any) -> Any:
    """Return a tuner state like `like` that holds `numbers`."""
    assert numbers is not None
    return type(like)(
        *(torch.full_like(field, numbers[name]) for name, field in like._asdict().items())
    )


def _by_index(groups: list[dict[str, Any]], base: Optimizer) -> dict[int | str, Tensor]:
    """Return the parameters of `base` by their index in a checkpoint."""
    params = [p for group in base.param_groups for p in group["params"]]
    saved = [i for group in groups for i in group["params"]]
    if len(params) != len(saved):
        msg = f"state_dict must hold {len(params)} parameters, got {len(saved)}"
        raise ValueError(msg)
    return dict(zip(saved, params, strict=True))


# What each entry must be.


class _Requirement(NamedTuple):
    description: str
    holds: Callable[[Any], bool]


def _require(where: str, value: Any, requirement: _Requirement) -> None:
    if not requirement.holds(value):
        msg = f"state_dict{where} must be {requirement.description}, got {value!r}"
        raise ValueError(msg)


def _validate(where: str, values: dict[str, Any], table: Mapping[str, _Requirement]) -> None:
    """Raise a ValueError unless `values` has every entry of the table, as required."""
    for name, requirement in table.items():
        _require(f"{where}[{name!r}]", values.get(name), requirement)


def _copy(where: str, values: Any) -> dict[str, Any]:
    _require(where, values, _DICT)
    return dict(values)


def _is_number(value: Any) -> bool:
    """Return whether this is one finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        return False
    return torch.as_tensor(value).numel() == 1 and math.isfinite(value)


def _are_indices(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(i, int | str) for i in value)


_DICT = _Requirement("a dict", lambda value: isinstance(value, dict))
_LIST = _Requirement("a list", lambda value: isinstance(value, list))
_INDICES = _Requirement("a list of the indices of parameters", _are_indices)
_AMOUNT = _Requirement("a finite number >= 0", lambda value: _is_number(value) and value >= 0)

_TOP = {"state": _DICT, "param_groups": _LIST}
_TUNER = {"skipped": _AMOUNT, "until_refresh": _AMOUNT}


def _tuner(found: Any, tuner_state: Any) -> SavedTuner:
    """Return the tuner's part, checked against the present state of the tuner."""
    where = f"['param_groups'][0][{_KEY!r}]"
    _require(where, found, _DICT)
    _validate(where, found, _TUNER)
    numbers = found.get("state")
    names = set(numbers) if isinstance(numbers, dict) else numbers
    expected = None if tuner_state is None else set(tuner_state._fields)
    if names != expected:
        msg = (
            f"state_dict must hold the tuner state {expected}, got {names}: is it another tuner's?"
        )
        raise ValueError(msg)
    if expected is not None:
        _validate(f"{where}['state']", numbers, dict.fromkeys(expected, _AMOUNT))
    return SavedTuner(numbers, found["skipped"], found["until_refresh"])


def _group_table(
    found: dict[str, Any], present: dict[str, Any], defaults: dict[str, Any]
) -> dict[str, _Requirement]:
    """Return what a group must hold; options that it does not have keep their defaults."""
    options = {
        name: _Requirement(f"finite and like {present[name]}", partial(_is_like, present[name]))
        for name in defaults
        if name in found
    }
    return {**options, "params": _INDICES, **dict.fromkeys(_MULTIPLIERS, _AMOUNT)}


def _is_like(present: Any, value: Any) -> bool:
    """Return whether an option may replace the present one."""
    if isinstance(present, tuple | list):
        fits = isinstance(value, tuple | list) and len(value) == len(present)
        return fits and all(map(_is_like, present, value))
    flag = value is None or isinstance(value, bool)
    if isinstance(present, bool):
        return flag
    if isinstance(present, int | float | Tensor):
        return _is_number(value)
    return _is_number(value) or flag or present is not None


# What the optimizers of PyTorch keep: one number for all of a parameter, and squares or counts.
_SCALARS = ("step", "mu_product")
_NONNEGATIVE = (
    *("step", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf"),
    *("step_size", "row_var", "col_var", "variance"),
)


def _state_table(found: dict[str, Any], p: Tensor, base: Optimizer) -> dict[str, _Requirement]:
    """Return what the state of a parameter must hold: entries like those of the base, if known."""
    table = {}
    for name in found:
        like = base.state.get(p, {}).get(name)
        if like is None and adapter_of(base).independent_of_params:
            like = torch.zeros(()) if name in _SCALARS else p
        table[name] = _entry(name, like)
    if _VECTOR in found:
        table[_VECTOR] = _finite("a tensor", Tensor, p)
    return table


def _entry(name: str, like: Any) -> _Requirement:
    """Return what an entry of the state must be; `like` is one, if known."""
    requirement = _finite("a number or a tensor", Tensor | int | float, like, name in _NONNEGATIVE)
    if name in _SCALARS:
        return requirement
    known = isinstance(like, Tensor | int | float)

    def holds(value: Any) -> bool:
        other = value is None if known else not isinstance(value, Tensor | int | float)
        return other or requirement.holds(value)

    return requirement._replace(holds=holds)


def _finite(what: str, kind: Any, like: Any, nonnegative: bool = False) -> _Requirement:
    """Return the requirement of finite numbers, of the shape of `like` if that is a tensor."""
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
    return _Requirement(f"{what}{shaped}, finite{' and >= 0' if nonnegative else ''}", holds)
