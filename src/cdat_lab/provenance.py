"""Where numbers come from: versions, and digests of the code that made them."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cdat_lab import backends


def versions(backend: str) -> dict[str, str]:
    """Return the versions of Python, of this package and of what the numbers depend on."""
    names = ("cdat", "array-api-compat", "numpy", "scikit-learn")
    found = {name: version(name) for name in names}
    own = backends.BACKENDS[backend].versions()
    return {"python": platform.python_version()} | found | own


def version(package: str) -> str:
    """Return the version of an installed package, or that it is a source tree on the path."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "from a source tree"


@functools.cache
def code_fingerprint(modules: tuple[str, ...]) -> str:
    """Return a digest of the Python sources of the given modules and packages that are there."""
    digest = hashlib.sha256()
    for name in modules:
        spec = importlib.util.find_spec(name)
        if spec is None:
            continue
        for folder in map(Path, spec.submodule_search_locations or ()):
            for path in sorted(folder.rglob("*.py")):
                digest.update(path.relative_to(folder).as_posix().encode())
                digest.update(path.read_bytes())
        if not spec.submodule_search_locations and spec.origin is not None:
            digest.update(Path(spec.origin).read_bytes())
    return digest.hexdigest()[:16]


def definition(objects: Iterable[Any]) -> str:
    """Return a digest of what a user brought: the files in which functions were defined.

    Parameters
    ----------
    objects : iterable
        Functions (or None) and plain values of a task, a base and a contender.

    Returns
    -------
    str
        Empty if all functions are part of this package.
    """
    foreign = [o for o in objects if callable(o) and not _own(o)]
    if not foreign:
        return ""
    digest = hashlib.sha256()
    for function in foreign:
        digest.update(_source(function))
    return digest.hexdigest()[:16]


def _own(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).split(".")[0] == "cdat_lab"


def _source(function: Any) -> bytes:
    """Return the file that defines a function, or its own source, or else its byte code."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
        if file is not None and Path(file).is_file():
            return Path(file).read_bytes()
        return inspect.getsource(function).encode()
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        if code is None:
            return repr(function).encode()
        compiled: bytes = code.co_code
        return compiled + repr(code.co_consts).encode()
