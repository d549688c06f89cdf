"""Reporting each Hessian-vector product to a progress bar or a callable."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

Progress: TypeAlias = bool | Callable[[int, int], object]


@contextmanager
def reporter(progress: Progress, total: int) -> Iterator[Callable[[], None]]:
    """Yield the function to call after each of `total` products."""
    if progress is False or progress is None:
        yield lambda: None
    elif callable(progress):
        done = 0

        def report() -> None:
            nonlocal done
            done += 1
            progress(done, total)

        yield report
    elif progress is True:
        with _bar(total) as advance:
            yield advance
    else:
        msg = f"progress must be a bool or a callable progress(done, total), got {progress!r}"
        raise TypeError(msg)


@contextmanager
def _bar(total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on stderr, by tqdm or else by rich."""
    description = "Hessian products"
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        try:
            rich = importlib.import_module("rich.progress")
            console = importlib.import_module("rich.console").Console(stderr=True)
        except ImportError:
            msg = (
                "progress=True needs tqdm or rich; install one (pip install tqdm), "
                "or pass a callable progress(done, total)"
            )
            raise ImportError(msg) from None
        with rich.Progress(console=console) as bar:
            task = bar.add_task(description, total=total)
            yield lambda: bar.advance(task)
    else:
        with tqdm(total=total, desc=description) as bar:
            yield lambda: bar.update(1)
