"""Backends: each trains a task under one framework and returns the same trajectory."""

from cdat_lab.backends._availability import (
    BACKENDS,
    Backend,
    available,
    load,
    package_obstacle,
    single_threaded,
)
from cdat_lab.backends._trajectory import Problem, Trajectory

__all__ = [
    "BACKENDS",
    "Backend",
    "Problem",
    "Trajectory",
    "available",
    "load",
    "package_obstacle",
    "single_threaded",
]
