"""Provenance of numbers: versions, and digests of the code that made them."""

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
    """Return the versions of Python, this package and the packages that numbers depend on."""
    names = ("cdat", "array-api-compat", "numpy", "scikit-learn")
    found = {name: version(name) for name in names}
    own = backends.BACKENDS[backend].versions()
    return {"python": platform.python_version()} | found | own


def version(package: str) -> str:
    """Return the version of an installed package, or "from a source tree"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "from a source tree"


@functools.cache
def code_fingerprint(modules: tuple[str, ...]) -> str:
    """Return a digest of the Python sources of modules and packages; missing ones are skipped."""
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
    """Return a digest of the user's code: the files in which functions were defined.

    Parameters
    ----------
    objects : iterable
        Functions (or None) of a task, a base and a contender; other values are ignored.

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
    """Return the file that defines a function, else its own source, else its byte code."""
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
