"""Tasks: data, initial weights and a loss, the same problem under every framework."""

from __future__ import annotations

from collections.abc import Callable

from cdat_lab.tasks._characters import characters
from cdat_lab.tasks._deep_linear import deep_linear
from cdat_lab.tasks._digits import digits, digits_1536, digits_cross_entropy
from cdat_lab.tasks._patches import patches
from cdat_lab.tasks._task import Task, check_name
from cdat_lab.tasks._teacher_student import teacher_student

__all__ = ["TASKS", "Task", "check_name"]

TASKS: dict[str, Callable[[int], Task]] = {
    "characters": characters,
    "deep-linear": deep_linear,
    "digits": digits,
    "digits-1536": digits_1536,
    "digits-cross-entropy": digits_cross_entropy,
    "patches": patches,
    "teacher-student": teacher_student,
}
