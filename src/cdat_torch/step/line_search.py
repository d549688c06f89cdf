"""A line search as the rule for the rate, and the evaluation of its trials."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cdat_core import Measurement
from cdat_core.linesearch import LineSearch
from cdat_torch.curvature.autograd import LossFn, check_scalar, differentiate
from cdat_torch.curvature.fallback import Methods
from cdat_torch.distributed.replicas import Replicas
from cdat_torch.interrupts import deliver_interrupts
from cdat_torch.side_effects import RandomState, temporary_values, without_side_effects
from cdat_torch.spaces import TensorListSpace
from cdat_torch.step.checkpoint import SavedTuner
from cdat_torch.step.evaluation import ClosureLoss, StepLoss
from cdat_torch.step.info import Decision
from cdat_torch.step.progress import Progress


class SearchRule:
    """A line search, which evaluates the closure again for each trial."""

    along_step = True
    """The search looks along the actual step, with the factors of a scheduler."""
    methods_now = Methods()
    measures = False
    closure_reason = "a line search"
    needs_loss = True
    tracker = None
    state: Any = None
    progress = Progress()

    def __init__(self, search: LineSearch) -> None:
        self._search = search

    def load(self, saved: SavedTuner | None, vector: dict[Tensor, Tensor]) -> None:
        """Do nothing: a search has no state between steps."""

    def skip(self) -> None:
        """Do nothing."""

    def try_held_step(self, base: Optimizer, value: Tensor | None, *, replicas: Replicas) -> None:
        """Do nothing: each step looks for a rate."""

    def choose(
        self,
        evaluation: StepLoss,
        params: Sequence[Tensor],
        direction: Sequence[Tensor],
        *,
        present: Tensor,
        replicas: Replicas,
    ) -> Decision:
        """Try rates along the direction until the search is done.

        The parameters are those of `cdat_torch.step.rate.TunerRule.choose`.
        """
        assert isinstance(evaluation, ClosureLoss)
        space = TensorListSpace()
        u = evaluation.by_variable(dict(zip(params, direction, strict=True)))
        (slope,) = replicas.mean([evaluation.slope(u)])
        here = [p.detach().clone() for p in params]
        trial = self._search.init(Measurement(evaluation.value, slope, None), present, present)
        while not bool(trial.done):
            told = evaluate_trial(
                evaluation.closure,
                params,
                space.add_scale(here, trial.step_size, direction),
                direction,
                start=evaluation.start,
                needs=self._search.trial_needs,
            )
            trial = self._search.tell(trial, *replicas.mean([field.to(present) for field in told]))
        return Decision(trial.step_size, ~torch.isfinite(slope), slope)


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

    Afterwards parameters, ``.grad``, buffers and random state are as before.

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
