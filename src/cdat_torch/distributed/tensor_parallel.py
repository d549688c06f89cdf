"""Second derivatives of PyTorch's tensor parallelism.

Where a replicated tensor enters a parallel module (``DTensor.from_local``), the backward pass sums
gradients over the processes. PyTorch's own backward does so outside the graph, so a second
derivative silently lacks terms. `replacements` gives a backward that keeps the sum in the graph.
"""

from __future__ import annotations

import functools
from typing import Any

from cdat_torch import pytorch_internals
from cdat_torch.pytorch_internals import Binding


def replacements() -> list[tuple[Binding, Any]]:
    """Return what to bind instead of the function of ``DTensor.from_local``, if it is in use."""
    binding = pytorch_internals.from_local_binding()
    return [] if binding is None else [(binding, _from_local(getattr(*binding)))]


@functools.cache
def _from_local(original: Any) -> Any:
    """Return `original`, an autograd function, with a backward that can be differentiated."""
    if original.__dict__.get("cdat", False):
        return original

    def backward(ctx: Any, gradient: Any) -> tuple[Any, ...]:
        rest = (None,) * (len(ctx.needs_input_grad) - 1)
        if gradient is None:
            return None, *rest
        from torch.distributed.tensor import Replicate

        asked = getattr(ctx, "grad_placements", None) or ctx.forward_input_placements
        placements = [Replicate() if p.is_partial() else p for p in asked]
        redistributed = gradient.redistribute(ctx.forward_input_device_mesh, placements)
        return redistributed.to_local(), *rest

    members = {"backward": staticmethod(backward), "cdat": True}
    return type(original)("FromLocal", (original,), members)


def reason_against(function: Any, node: Any) -> str | None:
    """Return why a second derivative through this node of a graph would lack terms, else None."""
    if pytorch_internals.is_from_local(function):
        if any(p.is_replicate() for p in node.forward_input_placements):
            return (
                "a tensor parallel module took a replicated tensor outside of "
                "cdat_torch.further_differentiable()"
            )
    elif pytorch_internals.redistributes_once(function):
        return "in this version of PyTorch redistributing a DTensor has no second derivative"
    return None
