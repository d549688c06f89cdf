"""The closure of a step: it returns the loss and leaves the differentiation to the optimizer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cdat_torch.curvature.autograd import Kernels, LossFn, evaluate
from cdat_torch.curvature.fallback import evaluated
from cdat_torch.curvature.methods import BY_NAME, Ways
from cdat_torch.distributed.dtensor import all_agree, locals_of
from cdat_torch.distributed.fsdp import reduce_scatter
from cdat_torch.side_effects import SideEffects
from cdat_torch.spaces import scalar_dtype
from cdat_torch.step.evaluation import ClosureLoss, Gradient


def evaluate_closure(closure: Any, params: Sequence[Tensor], kernels: Kernels) -> Tensor:
    """Call the closure, and refuse a loss whose graph backward has already consumed.

    The ``.grad`` of all `params` is None before.

    Raises
    ------
    TypeError
        If the closure is missing, called backward, or returned something else than a tensor.
    ValueError
        If the loss is not a scalar or has no graph.
    """
    if not callable(closure):
        msg = f"closure must be a function that returns the loss, got {closure!r}"
        raise TypeError(msg)
    loss_fn: LossFn = closure

    def checked() -> Tensor:
        loss = loss_fn()
        if any(p.grad is not None and bool(torch.any(p.grad != 0)) for p in params):
            msg = (
                "closure must return the loss without calling backward, but it changed p.grad;"
                " remove loss.backward() and end with `return loss`: the optimizer"
                " differentiates it"
            )
            raise TypeError(msg)
        return loss

    return evaluate(checked, "closure", kernels=kernels)


def closure_loss(
    closure: Any, params: Sequence[Tensor], ways: Ways, effects: SideEffects
) -> ClosureLoss:
    """Evaluate the closure and its gradient, the latter also in ``p.grad``.

    Parameters
    ----------
    closure : callable
        Returns the loss.
    params : sequence of Tensor
        All that require a gradient.
    ways : sequence of str
        How the curvature is to be measured; empty if it is not.
    effects : SideEffects
        It takes note of what the evaluation changes.
    """
    refuse_grad_scaler()
    if ways:
        BY_NAME[ways[0]].check(closure, "closure")
    loss, (variables, grads, recording), ways = evaluated(
        closure, lambda kernels: evaluate_closure(closure, params, kernels), params, ways, effects
    )
    for p, g in zip(params, reduce_scatter(params, variables, grads), strict=True):
        p.grad = g
    gradient = Gradient.known(params, variables, grads)
    return ClosureLoss(closure, effects.start, loss, gradient, ways, recording)


def refuse_grad_scaler() -> None:
    """Raise if a GradScaler called ``step`` with a closure: it scaled no loss of the closure's."""
    frame = sys._getframe(1)
    for _ in range(12):
        if frame.f_back is None:
            return
        frame = frame.f_back
        if frame.f_code.co_filename.endswith("grad_scaler.py"):
            msg = (
                "closure must not be given to GradScaler.step, which cannot scale its loss; use "
                "optimizer.backward(loss, scaler=scaler) and then scaler.step(optimizer)"
            )
            raise TypeError(msg)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether all entries are finite: the one number a step reads from the device.

    Of sharded tensors all entries count, also those in other processes.
    """
    return all_agree(not tensors or _finite(locals_of(tensors)), tensors)


def _finite(tensors: Sequence[Tensor]) -> bool:
    """Test sums first: one that is finite has finite terms, any other may have overflowed."""
    first = tensors[0]
    sums = [t.sum(dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    total = torch.stack([s.detach().to(first.device, scalar_dtype(first.device)) for s in sums])
    if bool(torch.isfinite(total).all()):
        return True
    finite = [torch.isfinite(t).all().to(first.device) for t in tensors]
    return bool(torch.stack(finite).all())
