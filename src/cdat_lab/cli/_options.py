"""Options shared by several commands, and their validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import joblib
import typer

from cdat_lab import backends, registry

INTERRUPTED = 130

Out = Annotated[
    Path | None, typer.Option(file_okay=False, help="Folder of the results.", show_default=False)
]
Jobs = Annotated[
    int | None, typer.Option(min=1, help="Worker processes.  [default: one for each CPU core]")
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Reuse finished runs with the same configuration, versions and code."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the path of the report.")]
With = Annotated[
    list[Path] | None,
    typer.Option(
        "--with",
        metavar="FILE.py",
        help="A Python file that registers tasks, base optimizers or contenders; repeatable.",
    ),
]
Dask = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Run the jobs on a dask cluster, e.g. tcp://host:8786; its workers must see the same "
        "folder.",
    ),
]
Backend = Annotated[
    str, typer.Option(help=f"One of: {', '.join(backends.BACKENDS)}.", show_default=False)
]


def fail(message: str) -> NoReturn:
    """Exit with an error message and status 1."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


def checked(option: str, find: Callable[..., Any], *arguments: Any) -> Any:
    """Call `find`; turn a ValueError into an error about the option."""
    try:
        return find(*arguments)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def load_files(paths: Iterable[Path] | None) -> None:
    """Run the files of ``--with``."""
    for path in paths or ():
        checked("--with", registry.load_file, path)


def one_backend(name: str | None) -> str:
    """Return an installed backend: the given one, or the first available."""
    if name is None:
        found = backends.available()
        if not found:
            fail(f"no backend is installed: {_described()}")
        return found[0].name
    _check_backend(name, backends.BACKENDS)
    if backends.BACKENDS[name].missing():
        fail(backends.BACKENDS[name].describe())
    return name


def several_backends(name: str) -> tuple[str, ...]:
    """Return the backends for ``--backend``, where "all" means every framework installed.

    NumPy is slow, so "all" includes it only if nothing else is installed.
    """
    _check_backend(name, ("all", *backends.BACKENDS))
    if name != "all":
        return (one_backend(name),)
    found = [backend.name for backend in backends.available()]
    frameworks = [name for name in found if name != "numpy"]
    if not found:
        fail(f"no backend is installed: {_described()}")
    return tuple(frameworks or found)


def _check_backend(name: str, known: Iterable[str]) -> None:
    if name not in known:
        msg = f"there is no backend {name!r}; choose one of: {', '.join(known)}"
        raise typer.BadParameter(msg, param_hint="--backend")


def _described() -> str:
    return "; ".join(backend.describe() for backend in backends.BACKENDS.values())


def writable(folder: Path) -> Path:
    """Create a folder, or exit with the reason why it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".cdat-writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        fail(f"cannot write to {folder}: {error.strerror}")
    return folder


def process_count(jobs: int | None, work: int) -> int:
    """Return the number of worker processes to start for `work` jobs."""
    return max(1, min(jobs or joblib.cpu_count(), work))
