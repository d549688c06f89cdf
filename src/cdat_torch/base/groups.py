"""Parameter groups of a wrapped optimizer and the multipliers in their ``lr``.

The measured direction weighs each group by its multiplier at wrapping (``direction_weight``); the
step is rate times the current multiplier. A group wrapped with multiplier 0 does not move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cdat_torch import pytorch_internals

Group = dict[str, Any]

_LARGEST_MOMENTUM = 0.999

# What each of these does that no wrapper can allow, and what to use instead.
_REFUSED: dict[type[Optimizer], tuple[str, str]] = {
    torch.optim.LBFGS: ("choose step lengths itself", "wrap SGD with a line search"),
    torch.optim.ASGD: (
        "average the points it steps to",
        "wrap SGD and average with torch.optim.swa_utils.AveragedModel",
    ),
    torch.optim.SparseAdam: ("need sparse gradients", "wrap Adam, with sparse=False in the model"),
}


def check_base(base: Any) -> None:
    """Raise unless `base` is an optimizer that can be wrapped."""
    if not isinstance(base, Optimizer):
        msg = f"base must be a torch.optim.Optimizer, got {base!r}"
        raise TypeError(msg)
    for refused, (reason, instead) in _REFUSED.items():
        if isinstance(base, refused):
            msg = f"base must not {reason}, got {type(base).__name__}; {instead}"
            raise TypeError(msg)
    if "tuned_lr" in base.param_groups[0]:
        msg = f"base {type(base).__name__} is wrapped already; an optimizer has one tuner at a time"
        raise TypeError(msg)
    if pytorch_internals.has_scheduler(base):
        msg = (
            f"base {type(base).__name__} already has a learning-rate scheduler; wrap the optimizer "
            "first and attach the scheduler to the wrapper"
        )
        raise ValueError(msg)
    for group in base.param_groups:
        check_params(group["params"])
    if not any(group["params"] for group in base.param_groups):
        msg = f"base must have parameters, got {type(base).__name__} without any"
        raise ValueError(msg)


def check_params(params: Any) -> None:
    """Raise a ValueError if one of the parameters is not a real floating tensor."""
    for p in [params] if isinstance(params, Tensor) else params:
        tensor = p[1] if isinstance(p, tuple) else p
        if isinstance(tensor, Tensor) and not tensor.is_floating_point():
            msg = f"params must be real floating tensors, got one of {tensor.dtype}"
            raise ValueError(msg)


def multiplier(group: Group, defaults: dict[str, Any]) -> float:
    """Return the group's learning rate divided by the default of the base."""
    lr, default = float(group["lr"]), float(defaults["lr"])
    if lr == default:
        return 1.0
    if not default > 0:
        msg = f"base must have a default lr > 0 when groups differ, got {default} (group: {lr})"
        raise ValueError(msg)
    return lr / default


def momentum(groups: Sequence[Group]) -> float:
    """Return the largest momentum, or first beta, of the groups; 0 if they have none."""
    found = [0.0]
    for group in groups:
        betas = group.get("betas")
        first = betas[0] if isinstance(betas, tuple | list) and betas else group.get("momentum")
        if isinstance(first, int | float | Tensor):
            found.append(float(first))
    return min(max(found), _LARGEST_MOMENTUM)


def adopt(group: Group, weight: float, rate: Tensor) -> None:
    """Turn a group of the base into one whose ``lr`` is a multiplier of the tuned rate."""
    group["lr"] = group["direction_weight"] = weight
    group["tuned_lr"] = rate


def weights_and_factors(
    groups: Sequence[Group], params: Sequence[Tensor]
) -> tuple[list[float], list[float]]:
    """Return, for each parameter, its weight in u and the factor between u and the step."""
    pairs: dict[Tensor, tuple[float, float]] = {}
    for group in groups:
        weight, lr = float(group["direction_weight"]), float(group["lr"])
        for p in group["params"]:
            pairs[p] = weight, lr / weight if weight else 0.0
    return [pairs[p][0] for p in params], [pairs[p][1] for p in params]


def scale_in_place(tensors: list[Tensor], factors: list[float]) -> None:
    """Multiply each tensor by its factor; do nothing if all factors are 1."""
    if any(factor != 1.0 for factor in factors):
        torch._foreach_mul_(tensors, factors)


def move(params: list[Tensor], step: list[Tensor], rate: Tensor, *, skip: Tensor) -> None:
    """Add ``rate * step`` to the parameters, or nothing if `skip` is true.

    `step` may be overwritten. On an accelerator `skip` is not read but masks the step; a rate of 0
    would not do, because 0 times a value that is not finite is NaN.
    """
    if skip.device.type == "cpu":
        if not bool(skip):
            torch._foreach_add_(params, step, alpha=float(rate))
        return
    for u in step:
        u.mul_(rate.to(u.device)).masked_fill_(skip.to(u.device), 0.0)
    torch._foreach_add_(params, step)
