"""Tasks: data, initial weights and a loss, the same problem under every framework."""

from __future__ import annotations

import functools
from collections.abc import Callable

from cdat_lab.tasks._digits import digits
from cdat_lab.tasks._task import Task

__all__ = ["TASKS", "Task", "load"]

TASKS: dict[str, Callable[[int], Task]] = {
    "digits": digits,
}


@functools.lru_cache(maxsize=8)
def load(name: str, seed: int) -> Task:
    """Return a task; the last few are kept.

    Parameters
    ----------
    name : str
        A key of `TASKS`.
    seed : int
        Seed of data and weights, >= 0.

    Returns
    -------
    Task
        Its arrays are shared: do not change them.
    """
    return TASKS[name](seed)
