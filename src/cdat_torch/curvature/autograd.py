"""Evaluating the user's loss and its gradient, and checking the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cdat_torch.curvature.replay import Recording
from cdat_torch.distributed import fsdp
from cdat_torch.distributed.dtensor import match_placements
from cdat_torch.interrupts import deliver_interrupts
from cdat_torch.kernels import further_differentiable, is_reentrant_checkpoint

LossFn = Callable[[], Tensor]
Kernels = Callable[[], AbstractContextManager[None]]
"""What chooses between the kernels of an operation for the block that it is entered for."""


class Differentiated(NamedTuple):
    """The first derivative of a loss.

    Attributes
    ----------
    variables : list of Tensor
        The tensors that the model computed with.
    grads : tuple of Tensor or None
        With respect to `variables`; None for those that the loss does not depend on.
    recording : Recording or None
        What was watched of the backward pass, if anything was.
    """

    variables: list[Tensor]
    grads: tuple[Tensor | None, ...]
    recording: Recording | None = None


def evaluate(loss_fn: LossFn, argument: str, *, kernels: Kernels = nullcontext) -> Tensor:
    """Call the user's loss with gradients on and check what comes back."""
    with torch.enable_grad(), kernels(), deliver_interrupts():
        loss = loss_fn()
    check_scalar(loss, argument)
    if not loss.requires_grad:
        msg = (
            f"{argument} must return a loss that depends on the parameters, got a tensor without a "
            "graph; do not detach it or compute it under torch.no_grad()"
        )
        raise ValueError(msg)
    return loss


def check_scalar(loss: Any, argument: str) -> None:
    """Raise unless `loss` is a real floating 0-d tensor."""
    if not isinstance(loss, Tensor):
        msg = (
            f"{argument} must return the loss as a tensor, got {loss!r}; end it with `return loss`"
            " (not loss.item(), and without calling backward)"
        )
        raise TypeError(msg)
    if loss.ndim != 0 or not loss.is_floating_point():
        msg = (
            f"{argument} must return a real scalar, got shape {tuple(loss.shape)} of {loss.dtype}; "
            "reduce it, for example with .mean()"
        )
        raise ValueError(msg)


def differentiate(
    loss: Tensor,
    params: Sequence[Tensor],
    *,
    create_graph: bool = False,
    record: bool = False,
    outputs: Sequence[Tensor] | None = None,
    sync: bool = True,
) -> Differentiated:
    """Return the tensors the model computed with, and the gradient with respect to them.

    They are `params` themselves, unless modules under ``fully_shard`` had to gather theirs for a
    second derivative; `cdat_torch.distributed.fsdp.reshard` then frees them.

    Parameters
    ----------
    loss : Tensor
        The loss of this process.
    params : sequence of Tensor
        The parameters.
    create_graph : bool
        Whether the gradient needs a graph, to be differentiated again.
    record : bool
        Whether to record the backward pass, to replay the graph of the loss; it is then retained.
    outputs : sequence of Tensor, optional
        With `record`, tensors up to which operations count as linear.
    sync : bool
        Only for modules under ``fully_shard`` and a gradient without a graph: see
        `cdat_torch.distributed.fsdp.backward`.

    Raises
    ------
    cdat_torch.curvature.replay.Unsupported
        With `record`, if the graph cannot be replayed; nothing was differentiated then.
    """
    variables = list(params)
    if fsdp.modules_of(params):
        if not (create_graph or record):
            grads = fsdp.backward(loss, params, sync=sync)
            return Differentiated(variables, _checked(grads, sync))
        variables = fsdp.unshard(params)
    if not record:
        return Differentiated(variables, gradients(loss, variables, create_graph=create_graph))
    recording = Recording(loss, variables, outputs)
    with recording.watching():
        found = gradients(loss, variables, create_graph=False, retain_graph=True)
    return Differentiated(variables, found, recording)


def gradients(
    loss: Tensor, params: Sequence[Tensor], *, create_graph: bool, retain_graph: bool | None = None
) -> tuple[Tensor | None, ...]:
    """Return the gradient of `loss`; None for parameters it does not depend on."""
    trainable = [p for p in params if p.requires_grad]
    if not trainable:
        msg = "params must hold at least one tensor that requires grad, got none"
        raise ValueError(msg)
    try:
        with further_differentiable() if create_graph else nullcontext(), deliver_interrupts():
            found: tuple[Tensor | None, ...] = torch.autograd.grad(
                loss,
                trainable,
                create_graph=create_graph,
                retain_graph=retain_graph,
                allow_unused=True,
            )
    except RuntimeError as error:
        if not is_reentrant_checkpoint(loss):
            raise
        msg = (
            "the loss uses activation checkpointing with use_reentrant=True, which supports "
            "loss.backward() alone; pass use_reentrant=False to torch.utils.checkpoint.checkpoint"
        )
        raise RuntimeError(msg) from error
    with torch.set_grad_enabled(create_graph):
        by_param = {
            p: None if g is None else match_placements(g, p)
            for p, g in zip(trainable, found, strict=True)
        }
    return _checked([by_param.get(p) for p in params])


def _checked(grads: Sequence[Tensor | None], known: bool = True) -> tuple[Tensor | None, ...]:
    if known and all(g is None for g in grads):
        msg = "the loss does not depend on any of the params; is this the right model?"
        raise ValueError(msg)
    return tuple(grads)


def vector_jacobian(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    retain_graph: bool = False,
) -> list[Tensor]:
    """Return the derivative of ``sum <output_i, vector_i>`` with respect to `inputs`."""
    pairs = [
        (y, match_placements(v.to(y.dtype), y))
        for y, v in zip(outputs, vectors, strict=True)
        if y.requires_grad
    ]
    trainable = [x for x in inputs if x.requires_grad]
    if not pairs or not trainable:  # the outputs are constant
        return [torch.zeros_like(x) for x in inputs]
    with further_differentiable(), deliver_interrupts():
        found = torch.autograd.grad(
            [y for y, _ in pairs],
            trainable,
            [v for _, v in pairs],
            retain_graph=retain_graph,
            allow_unused=True,
        )
    by_input = dict(zip(trainable, found, strict=True))
    products = [by_input.get(x) for x in inputs]
    return [
        torch.zeros_like(x) if h is None else match_placements(h, x)
        for h, x in zip(products, inputs, strict=True)
    ]
