"""Adam and AdamW on a CPU with PyTorch's fused kernel, which takes a third of the time.

Its moments and steps differ from those of the default implementation by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from cdat_torch import pytorch_internals
from cdat_torch.base.direction import adapter_of
from cdat_torch.distributed.dtensor import is_dtensor

_CHUNK = 2**18
"""Elements per chunk: with their moments they roughly fit into the cache."""


def has_kernel(base: Optimizer) -> bool:
    """Return whether the kernel can take the steps of `base`.

    It ignores strides, so all tensors must be contiguous. In half precision it rounds differently
    from the default, so those steps are left to the base.
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
    """Return whether the kernel takes a parameter with its gradient and its state."""
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
    """Let `base` use the kernel in those groups that do not choose an implementation.

    The first step of a parameter creates its state, with types that depend on the implementation,
    so that step is left to the base as it was built.
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
    """Return the step of `base` at learning rate 1; its state and parameters do not change.

    Parameters
    ----------
    base : torch.optim.Adam or torch.optim.AdamW
        `has_kernel` must hold for it.
    params : sequence of Tensor
        Each has its gradient in ``p.grad``.

    Returns
    -------
    list of Tensor
        For each of `params`, weight decay included.
    """
    found = {p: torch.empty_like(p) for p in params}
    for group in base.param_groups:
        chunks = [
            _Chunk(p, found[p].view(-1)[start : start + _CHUNK], start)
            for p in group["params"]
            if p in found
            for start in range(0, p.numel(), _CHUNK)
        ]
        for dtype in {chunk.param.dtype for chunk in chunks}:
            copies = [torch.empty(_CHUNK, dtype=dtype) for _ in _moments(group)]
            for some in _batches([chunk for chunk in chunks if chunk.param.dtype == dtype]):
                _step(base, group, some, copies)
    return [found[p] for p in params]


class _Chunk(NamedTuple):
    """Consecutive elements of a parameter."""

    param: Tensor
    direction: Tensor
    start: int

    def of(self, t: Tensor) -> Tensor:
        """Return these elements of a tensor with the shape of the parameter."""
        return t.view(-1)[self.start : self.start + self.direction.numel()]


def _batches(chunks: Sequence[_Chunk]) -> Iterator[list[_Chunk]]:
    """Group consecutive chunks into batches of at most `_CHUNK` elements."""
    batch: list[_Chunk] = []
    size = 0
    for chunk in chunks:
        if size + chunk.direction.numel() > _CHUNK:
            yield batch
            batch, size = [], 0
        batch.append(chunk)
        size += chunk.direction.numel()
    if batch:
        yield batch


def _moments(group: dict[str, Any]) -> list[str]:
    return ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]


def _step(
    base: Optimizer, group: dict[str, Any], chunks: Sequence[_Chunk], copies: Sequence[Tensor]
) -> None:
    """Step on zeros with copies of the moments; weight decay is added to the result."""
    states = [base.state.get(chunk.param, {}) for chunk in chunks]
    sizes = [chunk.direction.numel() for chunk in chunks]
    moments: list[list[Tensor]] = []
    for name, copy in zip(_moments(group), copies, strict=True):
        parts = torch.split(copy[: sum(sizes)], sizes)
        for part, chunk, state in zip(parts, chunks, states, strict=True):
            if name in state:
                part.copy_(chunk.of(state[name]))
            else:
                part.zero_()
        moments.append(list(parts))
    decay, maximize = group["weight_decay"], group["maximize"]
    decoupled = adapter_of(base).decays_params(group)
    params = [chunk.of(chunk.param.detach()) for chunk in chunks] if decay else []
    grads = [chunk.of(chunk.param.grad) for chunk in chunks]  # type: ignore[arg-type]
    if decay and not decoupled:
        sign = -1 if maximize else 1
        grads = [torch.add(g, p, alpha=sign * decay) for g, p in zip(grads, params, strict=True)]
    direction = [chunk.direction.zero_() for chunk in chunks]
    pytorch_internals.fused_adam(
        direction,
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
        for u, p in zip(direction, params, strict=True):
            u.add_(p, alpha=-decay)
