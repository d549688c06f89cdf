"""Registries of tasks, base optimizers and contenders, built-in and your own."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path

from cdat_lab import contenders
from cdat_lab.bases import BASES, Base
from cdat_lab.contenders import CONTENDERS, Contender
from cdat_lab.tasks import TASKS, Task, check_name


def register_task(name: str, factory: Callable[[int], Task]) -> None:
    """Register your own task.

    Parameters
    ----------
    name : str
        Name on the command line; the task that `factory` returns must have the same name.
    factory : callable
        ``factory(seed) -> Task``.

    Raises
    ------
    ValueError
        If the name is invalid or taken.
    """
    _check(name, TASKS, "task")
    TASKS[name] = factory


def register_base(base: Base) -> None:
    """Register your own base optimizer; see `register_task`."""
    _check(base.name, BASES, "base optimizer")
    BASES[base.name] = base


def register_contender(contender: Contender) -> None:
    """Register your own learning-rate rule; see `register_task`."""
    _check(contender.name, CONTENDERS, "contender")
    CONTENDERS[contender.name] = contender


def find_task(name: str) -> Callable[[int], Task]:
    """Return the factory of a task, or raise a ValueError that suggests similar names."""
    return TASKS[_known(name, TASKS, "task")]


def find_base(name: str) -> Base:
    """Return a base optimizer, or raise a ValueError that suggests similar names."""
    return BASES[_known(name, BASES, "base optimizer")]


def find_contender(name: str) -> Contender:
    """Return a contender, or raise a ValueError that suggests similar names.

    Every name ``cdat-SIGMA`` or ``cdat-SIGMA-ema-DECAY`` is a contender.
    """
    made = contenders.parse_cdat(name)
    if made is not None and name not in CONTENDERS:
        return made
    return CONTENDERS[_known(name, CONTENDERS, "contender")]


def load_file(path: Path) -> None:
    """Run a Python file that registers tasks, bases or contenders.

    Raises
    ------
    ValueError
        If there is no such file.
    """
    if not path.is_file():
        msg = f"there is no file {path}; pass a Python file that registers something"
        raise ValueError(msg)
    spec = importlib.util.spec_from_file_location(f"cdat_lab_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        msg = f"{path} must be a Python file whose name ends in .py"
        raise ValueError(msg)
    # Not added to sys.modules, so that its functions are pickled by value for worker processes.
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def _check(name: str, known: Iterable[str], kind: str) -> None:
    check_name(f"name of a {kind}", name)
    if name in known:
        msg = f"the {kind} {name!r} exists already; choose another name"
        raise ValueError(msg)


def _known(name: str, known: Iterable[str], kind: str) -> str:
    known = list(known)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    msg = f"there is no {kind} {name!r}; {hint}choose one of: {', '.join(known)}"
    raise ValueError(msg)
