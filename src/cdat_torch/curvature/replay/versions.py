"""The releases of PyTorch under which an autograd graph can be replayed.

The rules read what the nodes of the graph have saved, and that is not a stable interface. The tests
run with the oldest and the newest supported release. A newer release counts as supported until it
is known to be bad. Two checks guard against errors there: a node that no longer fits its rule is
left to double backward, and each step compares the replayed slope with the one from the gradient.
"""

from __future__ import annotations

import functools
import logging
import re

import torch

_OLDEST = (2, 12)  # the lower bound in pyproject.toml
_KNOWN_BAD: dict[tuple[int, int], str] = {}
"""Minor releases with a reason, such as ``{(2, 20): "SoftmaxBackward0 saves its input"}``."""


def why_unsupported(version: str) -> str | None:
    """Return why a graph of this release of PyTorch cannot be replayed; None if it can."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        return "its version cannot be read"
    minor = int(found[1]), int(found[2])
    if minor < _OLDEST:
        return "releases before {}.{} are not supported".format(*_OLDEST)
    return _KNOWN_BAD.get(minor)


def is_supported() -> bool:
    """Return whether graphs can be replayed under this PyTorch; if not, log the reason once."""
    reason = why_unsupported(torch.__version__)
    if reason is not None:
        _log_unsupported(torch.__version__, reason)
    return reason is None


def require_supported() -> None:
    """Raise a RuntimeError if graphs cannot be replayed under this PyTorch."""
    reason = why_unsupported(torch.__version__)
    if reason is not None:
        msg = (
            f'curvature="replay" does not work with PyTorch {torch.__version__} ({reason}); '
            'pass curvature="auto", which uses double backward there, or install another release'
        )
        raise RuntimeError(msg)


@functools.cache
def _log_unsupported(version: str, reason: str) -> None:
    logging.getLogger("cdat_torch").warning(
        "the autograd graph is not replayed under PyTorch %s (%s); the curvature comes from double "
        "backward or a forward-mode pass instead, which costs more",
        version,
        reason,
    )
