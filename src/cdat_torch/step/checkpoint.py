"""The tuner's state inside the ``state_dict`` of the optimizer.

Scalars are stored as Python numbers in each parameter group, because distributed checkpointing
drops other top-level keys and casts tensors in ``state`` to the dtype of the parameter. The
eigenvector of the sharpness has that dtype and is stored in ``state``.

`read` validates the whole checkpoint before anything is loaded, against the tables below: for the
top level, a group, the tuner, and the state of a parameter.
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
_RATE_ENTRIES = ("lr", "direction_weight", "tuned_lr")


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
        None if the checkpoint was saved by a plain optimizer.
    eigenvector : dict
        The eigenvector of the sharpness by parameter; empty if there is none.
    """

    base: dict[str, Any]
    tuner: SavedTuner | None
    eigenvector: dict[Tensor, Tensor]


def write(
    state_dict: dict[str, Any],
    base: Optimizer,
    tuner: SavedTuner,
    eigenvector: dict[Tensor, Tensor] | None,
) -> dict[str, Any]:
    """Return the `state_dict` of the base with the tuner's part added.

    `eigenvector` is None if the tuner needs none. Parts that are not known yet are stored as zeros:
    distributed checkpointing loads only the entries that the new optimizer's state already has.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    for group in groups:
        group["tuned_lr"] = float(group["tuned_lr"])
        group[_KEY] = tuner._asdict()
    state = dict(state_dict["state"])
    if eigenvector is not None:
        for index, p in _by_index(groups, base).items():
            if p.requires_grad:
                part = eigenvector.get(p)
                part = torch.zeros_like(p, requires_grad=False) if part is None else part
                state[index] = {**state.get(index, {}), _VECTOR: part}
    return {**state_dict, "state": state, "param_groups": groups}


def read(state_dict: Any, base: Optimizer, tuner_state: Any) -> Checkpoint:
    """Validate `state_dict` and return its parts; it is not changed.

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
    groups = [
        _as_dict(f"['param_groups'][{i}]", g) for i, g in enumerate(state_dict["param_groups"])
    ]
    state = {
        index: _as_dict(f"['state'][{index!r}]", s) for index, s in state_dict["state"].items()
    }
    if len(groups) != len(base.param_groups):
        msg = f"state_dict must hold {len(base.param_groups)} parameter groups, got {len(groups)}"
        raise ValueError(msg)
    tuner = _pop_tuner(groups, base, tuner_state)
    for i, (group, present) in enumerate(zip(groups, base.param_groups, strict=True)):
        _validate(f"['param_groups'][{i}]", group, _group_table(group, present, base.defaults))
    params = _by_index(groups, base)
    for index, entries in state.items():
        if index not in params:
            msg = f"keys of state_dict['state'] must be parameter indices, got {index!r}"
            raise ValueError(msg)
        _validate(f"['state'][{index!r}]", entries, _state_table(entries, params[index], base))
    eigenvector = _pop_eigenvector(state, params)
    # Drop entries that held only the eigenvector: an empty state would tell the base that it has
    # taken a step.
    state = {index: s for index, s in state.items() if s or not state_dict["state"][index]}
    saved = {**state_dict, "state": state, "param_groups": groups}
    return Checkpoint(saved, tuner, eigenvector)


def numbers_of(tuner_state: Any) -> dict[str, Any] | None:
    """Return the state of a tuner as Python numbers by field; None for None."""
    if tuner_state is None:
        return None
    return {name: field.item() for name, field in tuner_state._asdict().items()}


def state_from_numbers(numbers: dict[str, Any] | None, like: Any) -> Any:
    """Return a tuner state like `like` with the values of `numbers`."""
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


def _pop_tuner(
    groups: list[dict[str, Any]], base: Optimizer, tuner_state: Any
) -> SavedTuner | None:
    """Remove the tuner's part from `groups` and return it; None if there is none.

    Groups of a plain optimizer get the present multipliers and rate instead.
    """
    found = [group.pop(_KEY, None) for group in groups]
    if all(part is None for part in found):
        warn(
            "state_dict comes from an optimizer without a tuner: the tuner starts cold and the "
            "learning-rate multipliers stay as they are"
        )
        for group, present in zip(groups, base.param_groups, strict=True):
            group.update({name: present[name] for name in _RATE_ENTRIES})
        return None
    for i, part in enumerate(found):
        if part is None:
            msg = (
                f"state_dict['param_groups'][{i}][{_KEY!r}] is missing, but other groups have it: "
                "the groups come from different optimizers"
            )
            raise ValueError(msg)
    return _read_tuner(found[0], tuner_state)


def _pop_eigenvector(
    state: dict[Any, dict[str, Any]], params: dict[int | str, Tensor]
) -> dict[Tensor, Tensor]:
    """Remove the eigenvector from `state` and return it by parameter; empty if it is zero."""
    saved = {params[i]: entries.pop(_VECTOR) for i, entries in state.items() if _VECTOR in entries}
    eigenvector = {p: part.detach().to(p, copy=True) for p, part in saved.items()}
    zero = not any(bool(local(part).any()) for part in eigenvector.values())
    return {} if all_agree(zero, eigenvector.values()) else eigenvector


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


def _as_dict(where: str, values: Any) -> dict[str, Any]:
    _require(where, values, _DICT)
    return dict(values)


def _is_number(value: Any) -> bool:
    """Return whether `value` is a single finite number; a tensor with one element counts."""
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        return False
    return torch.as_tensor(value).numel() == 1 and math.isfinite(value)


def _are_indices(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(i, int | str) for i in value)


_DICT = _Requirement("a dict", lambda value: isinstance(value, dict))
_LIST = _Requirement("a list", lambda value: isinstance(value, list))
_INDICES = _Requirement("a list of parameter indices", _are_indices)
_AMOUNT = _Requirement("a finite number >= 0", lambda value: _is_number(value) and value >= 0)

_TOP = {"state": _DICT, "param_groups": _LIST}
_TUNER = {"skipped": _AMOUNT, "until_refresh": _AMOUNT}


def _read_tuner(found: Any, tuner_state: Any) -> SavedTuner:
    """Validate the tuner's part against the present state of the tuner and return it."""
    where = f"['param_groups'][0][{_KEY!r}]"
    _require(where, found, _DICT)
    _validate(where, found, _TUNER)
    if "state" not in found:
        msg = f"state_dict{where}['state'] is missing"
        raise ValueError(msg)
    numbers = found["state"]
    names = sorted(map(str, numbers)) if isinstance(numbers, dict) else numbers
    expected = None if tuner_state is None else sorted(tuner_state._fields)
    if names != expected:
        msg = (
            f"state_dict must hold a tuner state with the fields {expected}, got {names}; was it "
            "saved with another tuner?"
        )
        raise ValueError(msg)
    if expected is not None:
        _validate(f"{where}['state']", numbers, dict.fromkeys(expected, _AMOUNT))
        numbers = {name: _item(number) for name, number in numbers.items()}
    return SavedTuner(numbers, int(found["skipped"]), int(found["until_refresh"]))


def _item(number: Any) -> Any:
    """Return a Python number, given one or a tensor with one element."""
    return number.item() if isinstance(number, Tensor) else number


def _group_table(
    found: dict[str, Any], present: dict[str, Any], defaults: dict[str, Any]
) -> dict[str, _Requirement]:
    """Return the requirements for a group; options that it lacks keep their defaults."""
    options = {
        name: _Requirement(
            f"of the same kind as the current value {present[name]!r}, and finite",
            partial(_is_like, present[name]),
        )
        for name in defaults
        if name in found
    }
    return {**options, "params": _INDICES, **dict.fromkeys(_RATE_ENTRIES, _AMOUNT)}


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


def _state_table(found: dict[str, Any], p: Tensor, base: Optimizer) -> dict[str, _Requirement]:
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
    if _VECTOR in found:
        table[_VECTOR] = _finite("a tensor", Tensor, p)
    return table


def _entry(name: str, like: Any) -> _Requirement:
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


def _finite(what: str, kind: Any, like: Any, nonnegative: bool = False) -> _Requirement:
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
    return _Requirement(f"{what}{shaped}, finite{' and >= 0' if nonnegative else ''}", holds)
