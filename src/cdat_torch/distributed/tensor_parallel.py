"""What PyTorch's tensor parallelism needs so that it can be differentiated a second time.

Where a replicated tensor enters a parallel module (``DTensor.from_local``), the backward pass sums
gradients over the processes. PyTorch's own backward does so outside the graph: a second derivative
then lacks terms, in silence. `FromLocal` has the sum in the graph.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

_API = "torch.distributed.tensor._api"
_REDISTRIBUTE = "torch.distributed.tensor._redistribute"
_NAME = "_FromTorchTensor"


def replacements() -> list[tuple[ModuleType, str, Any]]:
    """Return what is to be bound anew, with its module and name; nothing before DTensor is used."""
    api = sys.modules.get(_API)
    if api is None or not hasattr(api, _NAME):
        return []
    return [(api, _NAME, _from_local(getattr(api, _NAME)))]


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
        laid_out = gradient.redistribute(ctx.forward_input_device_mesh, placements)
        return laid_out.to_local(), *rest

    members = {"backward": staticmethod(backward), "cdat": True}
    return type(original)("FromLocal", (original,), members)


def reason_against(function: Any, node: Any) -> str | None:
    """Return why a second derivative through this node of a graph would lack terms, if it would."""
    module, name = function.__module__, function.__name__
    if module == _API and name == _NAME and not function.__dict__.get("cdat", False):
        if any(p.is_replicate() for p in node.forward_input_placements):
            return (
                "a tensor parallel module took a replicated tensor outside of "
                "cdat_torch.further_differentiable()"
            )
    elif module == _REDISTRIBUTE and not hasattr(sys.modules[module], "NestedRedistribute"):
        return "this version of PyTorch redistributes DTensors once differentiably"
    return None
