"""Exact curvature without a second reverse pass: the autograd graph is replayed along a direction.

<u, H u> is a sum over the operations of the forward pass: the adjoint of each output, which
backward computes anyway, times the second-order change of that output. `recording` watches the
backward pass and then carries the direction through the graph; each operation has a rule in
`elementwise`, `products`, `structure`, `reductions`, `softmax`, `normalisation`, `attention` or
`losses`, or is left to `fallback`.
"""

from cdat_torch.curvature.replay import (
    attention,
    elementwise,
    losses,
    normalisation,
    products,
    reductions,
    softmax,
    structure,
)
from cdat_torch.curvature.replay.recording import Recording
from cdat_torch.curvature.replay.registry import Unsupported
from cdat_torch.curvature.replay.verification import Mismatch
from cdat_torch.curvature.replay.versions import is_open, require_open

__all__ = ["Mismatch", "Recording", "Unsupported", "is_open", "require_open"]

# Importing the modules registers their rules.
_RULES = (
    attention, elementwise, losses, normalisation, products, reductions, softmax, structure,
)  # fmt: skip
