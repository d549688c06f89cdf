"""The update direction of any ``torch.optim`` optimizer: its step at learning rate 1.

The base optimizer steps on stand-ins of the parameters, so neither the parameters nor the autograd
graph that refers to them is touched. For optimizers whose step does not depend on the parameters the
stand-ins are zero, and after the step they *are* the direction, without the rounding of a difference.
For all others they start as copies, and the direction is what the step changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

# Their step reads the parameters for weight decay only, which is added in closed form below.
_INDEPENDENT_OF_PARAMS: tuple[type[Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adadelta,
)


def base_direction(base: Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    """Advance the state of `base` by one step and return the step it would take at learning rate 1.

    Parameters
    ----------
    base : torch.optim.Optimizer
        Its averages move on; its parameters do not.
    params : sequence of Tensor
        The parameters that have a gradient, in the order of the groups.

    Returns
    -------
    list of Tensor
        The direction u for each of `params`, weight decay included.
    """
    exact = type(base) in _INDEPENDENT_OF_PARAMS
    grads = {p: p.grad for p in params}
    stand_ins = {p: torch.zeros_like(p) if exact else p.detach().clone() for p in params}
    decoupled: list[tuple[Tensor, Tensor, float]] = []
    real_params = [group["params"] for group in base.param_groups]
    real_lr = [group["lr"] for group in base.param_groups]
    versions = [p._version for p in params]
    try:
        for group in base.param_groups:
            decay = float(group.get("weight_decay", 0.0)) if exact else 0.0
            sign = -1.0 if group.get("maximize", False) else 1.0
            for p in [p for p in group["params"] if p in stand_ins]:
                grad, stand_in = grads[p], stand_ins[p]
                assert grad is not None
                if decay and not _decouples(base, group):
                    grad = torch.add(grad, p.detach(), alpha=sign * decay)
                elif decay:
                    decoupled.append((stand_in, p, decay))
                stand_in.grad = grad
            group["params"] = [stand_ins[p] for p in group["params"] if p in stand_ins]
            group["lr"] = 1.0
        for p, stand_in in stand_ins.items():
            if p in base.state:
                base.state[stand_in] = base.state.pop(p)
        base.step()
    finally:
        for group, group_params, lr in zip(base.param_groups, real_params, real_lr, strict=True):
            group["params"], group["lr"] = group_params, lr
        for p, stand_in in stand_ins.items():
            if stand_in in base.state:
                base.state[p] = base.state.pop(stand_in)
            stand_in.grad = None
    if [p._version for p in params] != versions:
        msg = (
            f"base {type(base).__name__} keeps its own references to the parameters and stepped on "
            "them instead of its param_groups; it cannot be wrapped"
        )
        raise TypeError(msg)
    with torch.no_grad():
        for stand_in, p, decay in decoupled:
            stand_in.add_(p, alpha=-decay)
        if not exact:
            for p, stand_in in stand_ins.items():
                stand_in.sub_(p)
    return [stand_ins[p] for p in params]


def _decouples(base: Optimizer, group: dict[str, object]) -> bool:
    """Return whether weight decay acts on the parameters directly instead of on the gradient."""
    return isinstance(base, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay", False))
