"""Evaluating a loss so that its curvature can be measured, in the first of several ways that works.

Whether a graph can be replayed shows only when it is there. If it cannot, the loss is evaluated
once more for the next way, and that one stays in use. Among several processes the loss is evaluated
once, because its forward pass may take all of them and only one may find a graph that it cannot
replay: then with kernels whose graph serves double backward as well.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from cdat_torch.curvature.autograd import Differentiated, Kernels, LossFn, differentiate
from cdat_torch.curvature.gauss_newton import CompositeLoss, first_line, tensors_of
from cdat_torch.curvature.methods import BY_NAME, REPLAYED_GAUSS_NEWTON, Ways
from cdat_torch.curvature.replay import Mismatch, Unsupported
from cdat_torch.distributed.replicas import several_processes
from cdat_torch.kernels import anything_compiled, further_differentiable, logger
from cdat_torch.side_effects import SideEffects

T = TypeVar("T")
_CALLED = {"hessian": "double backward", "gauss_newton": "a forward-mode pass"}


def evaluated(
    loss_fn: LossFn,
    evaluate: Callable[[Kernels], Tensor],
    params: Sequence[Tensor],
    ways: Ways,
    effects: SideEffects,
) -> tuple[Tensor, Differentiated, Ways]:
    """Return a loss, its first derivative, and the ways that are left to measure its curvature.

    Parameters
    ----------
    loss_fn : callable
        The loss.
    evaluate : callable
        Evaluates `loss_fn` with a choice of kernels.
    params : sequence of Tensor
        The parameters.
    ways : sequence of str
        None of them if no curvature is to be measured.
    effects : SideEffects
        It takes note of what the evaluation changes.
    """
    together = several_processes()
    if together and ways[:1] == (REPLAYED_GAUSS_NEWTON,):
        ways = ways[1:]  # the other way evaluates the model again
    while True:
        method = BY_NAME[ways[0]] if ways else None
        kernels = method.kernels if method else nullcontext
        if together and method is not None and method.recorded:
            kernels = further_differentiable
        # compiled modules do not say which buffers they move, and hooks would compile them anew
        buffers = kernels is not nullcontext or not anything_compiled()
        with effects.record(buffers=buffers), _outputs(loss_fn, ways) as outputs:
            loss = evaluate(kernels)
        try:
            return loss, *differentiated(loss, params, ways, outputs=outputs, again=together)
        except Unsupported as error:
            ways = given_up(ways, error)
            effects.restore()


@contextmanager
def _outputs(loss_fn: LossFn, ways: Ways) -> Iterator[list[Any] | None]:
    """Give a list of the outputs of the model, if the first way needs them."""
    if ways[:1] == (REPLAYED_GAUSS_NEWTON,) and isinstance(loss_fn, CompositeLoss):
        with loss_fn.noting_outputs() as outputs:
            yield outputs
    else:
        yield None


def differentiated(
    loss: Tensor,
    params: Sequence[Tensor],
    ways: Ways,
    *,
    outputs: list[Any] | None = None,
    again: bool = True,
    sync: bool = True,
) -> tuple[Differentiated, Ways]:
    """Differentiate for the first way; with `again` for the next one where that does not work."""
    while True:
        method = BY_NAME[ways[0]] if ways else None
        twice, record = (method.differentiated_twice, method.recorded) if method else (False, False)
        try:
            with torch.enable_grad():
                ends = None if outputs is None else tensors_of(outputs)
                return differentiate(
                    loss, params, create_graph=twice, record=record, outputs=ends, sync=sync
                ), ways
        except Unsupported as error:
            if not again:
                raise
            ways = given_up(ways, error)


def first_that_works(ways: Ways, compute: Callable[[str], T]) -> tuple[T, Ways]:
    """Return what `compute` returns for the first way that works, and the ways from there on."""
    while True:
        try:
            return compute(ways[0]), ways
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            ways = given_up(ways, error)


def given_up(ways: Ways, error: Exception) -> Ways:
    """Return the ways after the first one, and tell the user; raise `error` if there are none."""
    if len(ways) == 1:
        raise error
    reason, rest = first_line(error), ways[1:]
    if isinstance(error, Mismatch):
        warnings.warn(
            f"the autograd graph was not replayed exactly ({reason}); the curvature comes from "
            f"{_CALLED.get(rest[0], rest[0])} instead. Please report this with the operation",
            stacklevel=5,
        )
    elif isinstance(error, Unsupported):
        logger.log(
            logging.INFO,
            "the autograd graph cannot be replayed (%s); the curvature comes from %s instead, "
            "which costs more",
            reason,
            _CALLED.get(rest[0], rest[0]),
        )
    else:
        warnings.warn(
            f"the loss has an operation without a second derivative ({reason}); the curvature "
            "comes from central finite differences of gradients instead: two further evaluations "
            "of the loss for each product with the Hessian",
            stacklevel=5,
        )
    return rest
