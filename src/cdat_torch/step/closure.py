"""The closure of a step: it returns the loss, and the optimizer differentiates it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cdat_torch.curvature.autograd import Kernels, LossFn, evaluate
from cdat_torch.curvature.fallback import Methods, evaluate_with_fallback
from cdat_torch.distributed.fsdp import reduce_scatter
from cdat_torch.side_effects import SideEffects
from cdat_torch.step.evaluation import ClosureLoss, Gradient


def evaluate_closure(closure: Any, params: Sequence[Tensor], kernels: Kernels) -> Tensor:
    """Call the closure, and refuse a loss whose graph backward has already consumed.

    The ``.grad`` of all `params` must be None before.

    Raises
    ------
    TypeError
        If the closure is missing, called backward, or returned something other than a tensor.
    ValueError
        If the loss is not a scalar or has no graph.
    """
    if not callable(closure):
        msg = f"closure must be a function that returns the loss, got {closure!r}"
        raise TypeError(msg)
    loss_fn: LossFn = closure

    def checked() -> Tensor:
        loss = loss_fn()
        # Zeros are no sign of backward: zero_grad(set_to_none=False) leaves them too.
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
    closure: Any, params: Sequence[Tensor], methods: Methods, effects: SideEffects
) -> ClosureLoss:
    """Evaluate the closure and its gradient; store the gradient in ``p.grad`` too.

    Parameters
    ----------
    closure : callable
        Returns the loss.
    params : sequence of Tensor
        All parameters that require a gradient.
    methods : Methods
        The methods to measure the curvature; empty if it is not measured.
    effects : SideEffects
        It records what the evaluation changes.
    """
    _refuse_grad_scaler()
    methods.current.check(closure, "closure")
    loss, (variables, grads, recording), methods = evaluate_with_fallback(
        closure,
        lambda kernels: evaluate_closure(closure, params, kernels),
        params,
        methods,
        effects,
    )
    for p, g in zip(params, reduce_scatter(params, variables, grads), strict=True):
        p.grad = g
    gradient = Gradient.without_unused(params, variables, grads)
    return ClosureLoss(closure, effects.start, loss, gradient, methods, recording)


def _refuse_grad_scaler() -> None:
    """Raise if ``GradScaler.step`` passed the closure on: it cannot scale the closure's loss.

    GradScaler passes the closure through unchanged, so the call stack is the only sign.
    """
    step = torch.amp.GradScaler.step.__code__
    frame = sys._getframe(1)
    for _ in range(12):  # GradScaler is about six frames up, with the wrappers of Optimizer.step
        if frame.f_back is None:
            return
        frame = frame.f_back
        if frame.f_code is step:
            msg = (
                "closure must not be given to GradScaler.step, which cannot scale its loss; use "
                "optimizer.backward(loss, scaler=scaler) and then scaler.step(optimizer)"
            )
            raise TypeError(msg)
