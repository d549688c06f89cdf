"""Which frameworks are installed, and how a worker is set up before it imports one."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cdat_lab.backends._trajectory import Problem, Trajectory

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NPROC": "1",  # number of threads of XLA
}


@dataclass(frozen=True)
class Backend:
    """A framework that can execute runs.

    Attributes
    ----------
    name, label : str
        Name on the command line; label in tables and figures.
    requires : tuple of str
        The packages it imports; their names on the package index are the same.
    """

    name: str
    label: str
    requires: tuple[str, ...]

    @property
    def extra(self) -> str:
        """The extra of this package that installs the required packages."""
        return "lab" if self.name == "numpy" else self.name

    def missing(self) -> list[str]:
        """Return the packages that are not installed."""
        return [name for name in self.requires if not _installed(name)]

    def versions(self) -> dict[str, str]:
        """Return the installed version of each package."""
        return {name: importlib.metadata.version(name) for name in self.requires}

    def describe(self) -> str:
        """Return the installed versions, or how to install what is missing."""
        missing = self.missing()
        if missing:
            return f'{" and ".join(missing)} not installed (pip install "cdat[{self.extra}]")'
        return ", ".join(f"{name} {version}" for name, version in self.versions().items())


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("jax", "JAX", ("jax", "optax")),
        Backend("torch", "PyTorch", ("torch",)),
        Backend("numpy", "NumPy", ("numpy", "autograd")),
    )
}


PACKAGES = {
    ("adamw-cosine", "jax"): "optax",
    ("dog", "jax"): "optax",
    ("mechanic", "jax"): "optax",
    ("prodigy", "jax"): "optax",
    ("prodigy-cosine", "jax"): "optax",
    ("schedule-free", "jax"): "optax",
    ("adamw-cosine", "torch"): "torch",
    ("prodigy", "torch"): "prodigyopt",
    ("prodigy-cosine", "torch"): "prodigyopt",
    ("schedule-free", "torch"): "schedulefree",
}
"""The package that provides a complete optimizer under a backend."""


def package_obstacle(optimizer: str, backend: str) -> str | None:
    """Return why an optimizer from another package cannot run under a backend; None if it can."""
    package = PACKAGES.get((optimizer, backend))
    if package is None:
        return f"{optimizer} is not available under {backend}"
    if not _installed(package):
        return f"{optimizer} needs {package} (pip install {package})"
    return None


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # hidden by an import hook, or partially imported
        return False


def available() -> list[Backend]:
    """Return the backends whose packages are installed."""
    return [backend for backend in BACKENDS.values() if not backend.missing()]


def load(name: str) -> Callable[[Problem], Trajectory]:
    """Import a backend and return its ``run`` function.

    Raises
    ------
    ImportError
        If a package it needs is missing.
    """
    module: Any = importlib.import_module(f"cdat_lab.backends.{name}")
    run: Callable[[Problem], Trajectory] = module.run
    return run


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Limit the frameworks to one CPU thread inside the block, so that sums have a fixed order.

    The environment variables affect only frameworks that are first imported inside the block.
    """
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    torch: Any = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch is not None else None
    if torch is not None:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if torch is not None:
            torch.set_num_threads(threads)
