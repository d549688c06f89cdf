"""What a line search is told about a trial: the loss there, and its slope if it asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from cdat_torch.curvature.autograd import LossFn, check_scalar, differentiate
from cdat_torch.interrupts import deliver_interrupts
from cdat_torch.side_effects import RandomState, temporary_values, without_side_effects
from cdat_torch.spaces import TensorListSpace


def evaluate_trial(
    closure: LossFn,
    params: Sequence[Tensor],
    there: Sequence[Tensor],
    direction: Sequence[Tensor],
    *,
    start: RandomState,
    needs: AbstractSet[str],
) -> tuple[Tensor, ...]:
    """Return the loss at `there`, detached, and its slope along `direction` if that is needed.

    The evaluation leaves no trace: parameters, ``.grad``, buffers and random state are as before.

    Parameters
    ----------
    closure : callable
        Returns the loss at the present parameters.
    params, there, direction : sequence of Tensor
        The parameters, their values at the trial, and u.
    start : RandomState
        The random state from which the closure is evaluated.
    needs : set of str
        The slope is computed if this holds "slope"; without it no graph is built.
    """
    with_slope = "slope" in needs
    with temporary_values(params, there), without_side_effects(params, start):
        with torch.set_grad_enabled(with_slope), deliver_interrupts():
            loss = closure()
        check_scalar(loss, "closure")
        if not with_slope:
            return (loss.detach(),)
        grads = differentiate(loss, params).grads  # before the parameters move back
    pairs = [(g, u) for g, u in zip(grads, direction, strict=True) if g is not None]
    slope = TensorListSpace().vdot([g for g, _ in pairs], [u for _, u in pairs])
    return loss.detach(), slope
