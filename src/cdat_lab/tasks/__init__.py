"""Tasks: data, initial weights and a loss, the same problem under every framework."""

from __future__ import annotations

from collections.abc import Callable

from cdat_lab.tasks._digits import digits
from cdat_lab.tasks._task import NAME, Task

__all__ = ["NAME", "TASKS", "Task"]

TASKS: dict[str, Callable[[int], Task]] = {
    "digits": digits,
}


