"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings

_INTERNAL = ("cdat_torch", "contextlib", "torch")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn about the first frame of the stack that is neither ours nor PyTorch's.

    A fixed ``stacklevel`` would not do: calls reach us directly, through the wrappers that PyTorch
    puts around ``Optimizer.step``, and through subclasses.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_internal(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_internal(module: str) -> bool:
    return module.partition(".")[0] in _INTERNAL
