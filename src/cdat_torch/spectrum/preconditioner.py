"""The factor P^-1/2 of a preconditioned Hessian, given or read from the state of an Adam."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from cdat_core.extend import validation

Vector: TypeAlias = Sequence[Tensor]
Preconditioner: TypeAlias = Callable[[Vector], Vector] | float | Optimizer


def inverse_square_root(
    inverse_sqrt: Preconditioner | None, params: list[Tensor]
) -> Callable[[Vector], Vector] | Any:
    """Return P^-1/2 as `cdat_core.preconditioned` takes it; None for no preconditioner."""
    if isinstance(inverse_sqrt, Optimizer):
        factors = _adam_factors(inverse_sqrt, params)

        def apply(v: Vector) -> Vector:
            return [(x * f).to(x.dtype) for x, f in zip(v, factors, strict=True)]

        return apply
    if inverse_sqrt is None or callable(inverse_sqrt):
        return inverse_sqrt
    return validation.positive("inverse_sqrt", inverse_sqrt)


def _adam_factors(optimizer: Optimizer, params: list[Tensor]) -> list[Tensor]:
    """Return 1 / sqrt(sqrt(v_hat) + eps) from the state of an Adam; 0 where it has none."""
    adam = getattr(optimizer, "base", optimizer)
    if not isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
        msg = (
            "inverse_sqrt must be a callable, a number, or an Adam or AdamW optimizer, "
            f"got {type(adam).__name__}; pass a callable v -> P^-1/2 v"
        )
        raise TypeError(msg)
    found: dict[Tensor, Tensor] = {}
    for group in adam.param_groups:
        for p in group["params"]:
            state = adam.state.get(p, {})
            if "exp_avg_sq" not in state:
                continue
            second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
            # bfloat16 has too few digits for a sum with eps.
            second = second if second.dtype == torch.float64 else second.float()
            correction = 1.0 - float(group["betas"][1]) ** float(state["step"])
            found[p] = ((second / correction).sqrt() + group["eps"]).rsqrt()
    if not any(p in found for p in params):
        msg = (
            f"inverse_sqrt {type(adam).__name__} holds no second moments of params; "
            "take a step with it first, and check that it has the same parameters"
        )
        raise ValueError(msg)
    return [found[p] if p in found else torch.zeros_like(p.detach()) for p in params]
