"""Adam and AdamW on a CPU by PyTorch's fused kernel, which takes a third of the time.

Its moments and steps differ from those of the default by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from cdat_torch.base.direction import decouples_decay
from cdat_torch.distributed.dtensor import is_dtensor

_SIZE = 2**18
"""Numbers that are stepped on at a time: with their moments they about fit the cache."""


def has_kernel(base: Optimizer) -> bool:
    """Return whether the kernel can take the steps of `base`.

    It takes entries in the order of the memory, whatever the strides; in half precision it rounds
    otherwise, so that is left to the base.
    """
    if type(base) not in (torch.optim.Adam, torch.optim.AdamW):
        return False
    return all(
        not (group["capturable"] or group["differentiable"])
        and not any(isinstance(beta, Tensor) for beta in group["betas"])
        and all(_suits(p, base.state.get(p, {})) for p in group["params"])
        for group in base.param_groups
    )


def _suits(p: Tensor, state: dict[str, Any]) -> bool:
    """Return whether a parameter, its gradient and its state are such as the kernel takes."""
    return (
        p.device.type == "cpu"
        and p.dtype in (torch.float32, torch.float64)
        and not is_dtensor(p)
        and p.is_contiguous()
        and (p.grad is None or _is_like(p.grad, p))
        and all(not isinstance(t, Tensor) or t.is_contiguous() for t in state.values())
    )


def _is_like(g: Tensor, p: Tensor) -> bool:
    return g.layout is torch.strided and g.is_contiguous() and g.dtype == p.dtype


@contextmanager
def preferred(base: Optimizer) -> Iterator[None]:
    """Let `base` step by the kernel in those groups that leave the implementation open.

    The first step of a parameter creates its state, in types that depend on the implementation:
    that is left to the base as it was built.
    """
    groups = base.param_groups if has_kernel(base) else []
    first = any(p.grad is not None and p not in base.state for g in groups for p in g["params"])
    changed = [] if first else [g for g in groups if g["fused"] is None and g["foreach"] is None]
    for group in changed:
        group["fused"] = True
    try:
        yield
    finally:
        for group in changed:
            group["fused"] = None


def direction(base: Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    """Return the step of `base` at learning rate 1; its state and its parameters stay.

    Parameters
    ----------
    base : torch.optim.Adam or torch.optim.AdamW
        It `has_kernel`.
    params : sequence of Tensor
        Each has its gradient in ``p.grad``.

    Returns
    -------
    list of Tensor
        For each of `params`, weight decay included.
    """
    found = {p: torch.empty_like(p) for p in params}
    for group in base.param_groups:
        pieces = [
            _Piece(p, found[p].view(-1)[start : start + _SIZE], start)
            for p in group["params"]
            if p in found
            for start in range(0, p.numel(), _SIZE)
        ]
        for dtype in {piece.param.dtype for piece in pieces}:
            copies = [torch.empty(_SIZE, dtype=dtype) for _ in _moments(group)]
            for some in _together([piece for piece in pieces if piece.param.dtype == dtype]):
                _step(base, group, some, copies)
    return [found[p] for p in params]


class _Piece(NamedTuple):
    """Successive entries of a parameter."""

    param: Tensor
    direction: Tensor
    start: int

    def here(self, t: Tensor) -> Tensor:
        """Return these entries of what is like the parameter."""
        return t.view(-1)[self.start : self.start + self.direction.numel()]


def _together(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Divide pieces into successive lists of no more numbers than fit the copies."""
    some: list[_Piece] = []
    size = 0
    for piece in pieces:
        if size + piece.direction.numel() > _SIZE:
            yield some
            some, size = [], 0
        some.append(piece)
        size += piece.direction.numel()
    if some:
        yield some


def _moments(group: dict[str, Any]) -> list[str]:
    return ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]


def _step(
    base: Optimizer, group: dict[str, Any], pieces: Sequence[_Piece], copies: Sequence[Tensor]
) -> None:
    """Step on zeros, with copies of the moments; weight decay, unseen there, is added."""
    states = [base.state.get(piece.param, {}) for piece in pieces]
    sizes = [piece.direction.numel() for piece in pieces]
    moments: list[list[Tensor]] = []
    for name, copy in zip(_moments(group), copies, strict=True):
        parts = torch.split(copy[: sum(sizes)], sizes)
        for part, piece, state in zip(parts, pieces, states, strict=True):
            if name in state:
                part.copy_(piece.here(state[name]))
            else:
                part.zero_()
        moments.append(list(parts))
    decay, maximize = group["weight_decay"], group["maximize"]
    decoupled = decouples_decay(base, group)
    at = [piece.here(piece.param.detach()) for piece in pieces] if decay else []
    grads = [piece.here(piece.param.grad) for piece in pieces]  # type: ignore[arg-type]
    if decay and not decoupled:
        sign = -1 if maximize else 1
        grads = [torch.add(g, p, alpha=sign * decay) for g, p in zip(grads, at, strict=True)]
    u = [piece.direction.zero_() for piece in pieces]
    torch._fused_adam_(
        u,
        grads,
        moments[0],
        moments[1],
        moments[2] if group["amsgrad"] else [],
        [1.0 + torch.as_tensor(state.get("step", 0.0)) for state in states],
        lr=1.0,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=0.0,
        eps=group["eps"],
        amsgrad=group["amsgrad"],
        maximize=maximize,
    )
    if decay and decoupled:
        for here, p in zip(u, at, strict=True):
            here.add_(p, alpha=-decay)
