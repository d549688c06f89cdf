"""The tuner's state inside the ``state_dict`` of the optimizer.

Scalars are stored as Python numbers in each parameter group, because distributed checkpointing
drops other top-level keys and casts tensors in ``state`` to the dtype of the parameter. The
eigenvector of the sharpness has that dtype and is stored in ``state``.

`read` validates the whole checkpoint before anything is loaded, against the tables below: for the
top level, a group, the tuner, and the state of a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from cdat_core.extend import namespace
from cdat_torch.distributed.dtensor import all_agree, local
from cdat_torch.messages import warn
from cdat_torch.step.progress import Progress
from cdat_torch.step.requirements import (
    AMOUNT,
    AMOUNTS,
    AVERAGE,
    DICT,
    EIGENVECTOR,
    NUMBER,
    RATE_ENTRIES,
    TOP,
    TUNER,
    TUNER_BEFORE_0_2,
    VECTORS,
    as_dict,
    group_table,
    require,
    state_table,
    validate,
)

_KEY = "tuner"

__all__ = ["AVERAGE", "EIGENVECTOR", "Checkpoint", "SavedTuner", "read", "write"]


class SavedTuner(NamedTuple):
    """The tuner's part of a checkpoint.

    Attributes
    ----------
    state : dict or None
        Maps the fields of the tuner's state to Python numbers, or to such a dict for a state inside
        it. None for a line search.
    skipped : int
        Steps skipped so far.
    progress : Progress
        How far the schedule of measurements is.
    averaged_steps : int
        Steps in the average of the weights.
    """

    state: dict[str, Any] | None
    skipped: int
    progress: Progress = Progress()
    averaged_steps: int = 0


class Checkpoint(NamedTuple):
    """A valid checkpoint, in its parts.

    Attributes
    ----------
    base : dict
        The state_dict of the base.
    tuner : SavedTuner or None
        None if the checkpoint was saved by a plain optimizer.
    vectors : dict
        Vectors by name and parameter: `EIGENVECTOR`, `AVERAGE`. One that is not known is empty.
    """

    base: dict[str, Any]
    tuner: SavedTuner | None
    vectors: dict[str, dict[Tensor, Tensor]]


def write(
    state_dict: dict[str, Any],
    base: Optimizer,
    tuner: SavedTuner,
    vectors: Mapping[str, Mapping[Tensor, Tensor]],
) -> dict[str, Any]:
    """Return the `state_dict` of the base with the tuner's part added.

    `vectors` are by name and parameter. A vector that is kept but not known yet holds zeros:
    distributed checkpointing loads only the entries that the new optimizer's state already has.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    for group in groups:
        group["tuned_lr"] = float(group["tuned_lr"])
        group[_KEY] = {
            "state": tuner.state,
            "skipped": tuner.skipped,
            "step": tuner.progress.step,
            "due": int(tuner.progress.due),
            "averaged_steps": tuner.averaged_steps,
        }
    state = dict(state_dict["state"])
    for name, vector in vectors.items():
        for index, p in _by_index(groups, base).items():
            if p in vector:
                state[index] = {**state.get(index, {}), name: vector[p]}
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
    require("", state_dict, DICT)
    validate("", state_dict, TOP)
    groups = [
        as_dict(f"['param_groups'][{i}]", g) for i, g in enumerate(state_dict["param_groups"])
    ]
    state = {index: as_dict(f"['state'][{index!r}]", s) for index, s in state_dict["state"].items()}
    if len(groups) != len(base.param_groups):
        msg = f"state_dict must hold {len(base.param_groups)} parameter groups, got {len(groups)}"
        raise ValueError(msg)
    tuner = _pop_tuner(groups, base, tuner_state)
    for i, (group, present) in enumerate(zip(groups, base.param_groups, strict=True)):
        validate(f"['param_groups'][{i}]", group, group_table(group, present, base.defaults))
    params = _by_index(groups, base)
    for index, entries in state.items():
        if index not in params:
            msg = f"keys of state_dict['state'] must be parameter indices, got {index!r}"
            raise ValueError(msg)
        validate(f"['state'][{index!r}]", entries, state_table(entries, params[index], base))
    vectors = {name: _pop_vector(name, state, params) for name in VECTORS}
    # Drop entries that held only vectors: an empty state would tell the base that it has taken a
    # step.
    state = {index: s for index, s in state.items() if s or not state_dict["state"][index]}
    saved = {**state_dict, "state": state, "param_groups": groups}
    return Checkpoint(saved, tuner, vectors)


def numbers_of(tuner_state: Any) -> dict[str, Any] | None:
    """Return the state of a tuner as Python numbers by field; None for None."""
    if tuner_state is None:
        return None
    return {
        name: numbers_of(field) if hasattr(field, "_asdict") else field.item()
        for name, field in tuner_state._asdict().items()
    }


def state_from_numbers(numbers: dict[str, Any] | None, like: Any) -> Any:
    """Return a tuner state like `like` with the values of `numbers`."""
    assert numbers is not None
    return type(like)(
        *(
            state_from_numbers(numbers[name], field)
            if hasattr(field, "_asdict")
            else namespace(field).full_like(field, numbers[name])
            for name, field in like._asdict().items()
        )
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
            group.update({name: present[name] for name in RATE_ENTRIES})
        return None
    for i, part in enumerate(found):
        if part is None:
            msg = (
                f"state_dict['param_groups'][{i}][{_KEY!r}] is missing, but other groups have it: "
                "the groups come from different optimizers"
            )
            raise ValueError(msg)
    return _read_tuner(found[0], tuner_state)


def _pop_vector(
    name: str, state: dict[Any, dict[str, Any]], params: dict[int | str, Tensor]
) -> dict[Tensor, Tensor]:
    """Remove a vector from `state` and return it by parameter; empty if it is zero."""
    saved = {params[i]: entries.pop(name) for i, entries in state.items() if name in entries}
    vector = {p: part.detach().to(p.device, copy=True) for p, part in saved.items()}
    zero = not any(bool(local(part).any()) for part in vector.values())
    return {} if all_agree(zero, vector.values()) else vector


def _read_tuner(found: Any, tuner_state: Any) -> SavedTuner:
    """Validate the tuner's part against the present state of the tuner and return it."""
    where = f"['param_groups'][0][{_KEY!r}]"
    require(where, found, DICT)
    old = "until_refresh" in found
    validate(where, found, TUNER_BEFORE_0_2 if old else TUNER)
    if "state" not in found:
        msg = f"state_dict{where}['state'] is missing"
        raise ValueError(msg)
    numbers = found["state"]
    if tuner_state is None and numbers is not None:
        msg = f"state_dict must hold no tuner state, got {numbers}; was it saved with a tuner?"
        raise ValueError(msg)
    if tuner_state is not None:
        numbers = _read_numbers(f"{where}['state']", numbers, tuner_state)
    if old:
        progress = Progress.before_measurement(int(found["until_refresh"]))
        return SavedTuner(numbers, int(found["skipped"]), progress)
    progress = Progress(int(found["step"]), bool(found["due"]))
    return SavedTuner(numbers, int(found["skipped"]), progress, int(found["averaged_steps"]))


def _read_numbers(where: str, numbers: Any, like: Any) -> dict[str, Any]:
    """Validate the numbers of a tuner state like `like` and return them."""
    names = sorted(map(str, numbers)) if isinstance(numbers, dict) else numbers
    if names != sorted(like._fields):
        msg = (
            f"state_dict{where} must hold a tuner state with the fields {sorted(like._fields)}, "
            f"got {names}; was it saved with another tuner, or with total_steps in one of the two "
            "only? Since version 0.2, CDAT without sigma is the self-tuning rule; sigma=2.0 is "
            "what it was before"
        )
        raise ValueError(msg)
    read = {}
    for name, field in like._asdict().items():
        if hasattr(field, "_asdict"):
            read[name] = _read_numbers(f"{where}[{name!r}]", numbers[name], field)
            continue
        requirement = AMOUNT if name in AMOUNTS else NUMBER
        require(f"{where}[{name!r}]", numbers[name], requirement)
        read[name] = _item(numbers[name])
    return read


def _item(number: Any) -> Any:
    """Return a Python number, given one or a tensor with one element."""
    return number.item() if isinstance(number, Tensor) else number
