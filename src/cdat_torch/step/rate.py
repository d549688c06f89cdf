"""How a step gets its rate: by a tuner that measures, or by a line search.

`TunerRule` and `cdat_torch.step.line_search.SearchRule` have the same interface, `RateRule`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from cdat_core import Measurement, tuners
from cdat_core.extend import observe_or_hold, validation
from cdat_core.linesearch import LineSearch
from cdat_core.tuners import Tuner
from cdat_torch.base.base_step import step_at
from cdat_torch.base.direction import can_step_without_direction
from cdat_torch.curvature.fallback import Methods
from cdat_torch.distributed.replicas import Replicas
from cdat_torch.step.checkpoint import SavedTuner, state_from_numbers
from cdat_torch.step.evaluation import Direction, StepLoss
from cdat_torch.step.info import Decision
from cdat_torch.step.line_search import SearchRule
from cdat_torch.step.progress import Progress
from cdat_torch.step.sharpness import SharpnessTracker


class TunerRule:
    """A tuner with its state; it measures when the tuner's schedule, or `every`, says so.

    Parameters
    ----------
    tuner : Tuner
        The tuner.
    like : Tensor
        A 0-d tensor that fixes dtype and device of the state.
    curvature : str
        How to compute the curvature. The attribute `methods` shrinks when a method fails.
    every : int or None
        Steps from one measurement to the next; None means that the tuner decides.
    tracker : SharpnessTracker
        It measures the sharpness. The attribute `tracker` is None if the tuner needs none.

    Attributes
    ----------
    progress : Progress
        The number of the next step, and whether it repeats a measurement.
    state : NamedTuple of Tensor
        The state of the tuner.
    """

    along_step = False
    """The direction is measured without the factors of a scheduler."""

    def __init__(
        self,
        tuner: Tuner[Any],
        like: Tensor,
        *,
        curvature: str,
        every: int | None,
        tracker: SharpnessTracker,
    ) -> None:
        self.tracker = tracker if "sharpness" in tuner.needs else None
        if self.tracker is None:
            self.methods = Methods.named(curvature)
        else:
            self.methods = Methods.with_product(curvature)
        if every is not None:
            tuner = tuners.every(tuner, validation.count("every", every))
        self._tuner = tuner
        self._needs_curvature = "curvature" in tuner.needs
        self._needs_graph = self._needs_curvature or self.tracker is not None
        self._needs_value = "value" in tuner.needs
        self.progress = Progress()
        self.state: Any = tuner.init(torch.zeros_like(like))
        self._like = like

    def load(self, saved: SavedTuner | None, vector: dict[Tensor, Tensor]) -> None:
        """Continue from a checkpoint and an eigenvector; None forgets all measurements."""
        if self.tracker is not None:
            self.tracker.vector = {p: part.to(p.dtype) for p, part in vector.items()}
        if saved is None:
            self.progress = Progress()
            self.state = self._tuner.init(torch.zeros_like(self._like))
        else:
            self.progress = saved.progress.placed_in(self._tuner.measures)
            self.state = state_from_numbers(saved.state, self.state)

    @property
    def measures(self) -> bool:
        """Whether the next step measures curvature or sharpness."""
        if not self._needs_graph:
            return False
        schedule = self._tuner.measures
        return self.progress.due or schedule is None or bool(schedule(self.progress.step))

    @property
    def closure_reason(self) -> str | None:
        """What evaluates the loss again and so needs a closure; None if nothing does."""
        if not self._needs_graph or "hvp" in self.methods or "replay" in self.methods:
            return None
        return f'curvature="{self.methods.names[-1]}"'

    @property
    def needs_loss(self) -> bool:
        """Whether a gradient alone is not enough."""
        return self._needs_graph or self._needs_value

    @property
    def methods_now(self) -> Methods:
        """The methods for the next step; none if it does not measure."""
        return self.methods if self.measures else Methods()

    @property
    def _only_observes(self) -> bool:
        """Whether the next step is one between two measurements."""
        return self._needs_graph and not self.measures

    def skip(self) -> None:
        """Record a step that is skipped before anything is measured."""
        self.progress = self.progress.after(repeat=self.measures)
        nothing = torch.full_like(self._like, torch.nan)
        _, self.state = observe_or_hold(self._tuner, nothing, self.state)

    def try_held_step(
        self, base: Optimizer, value: Tensor | None, *, replicas: Replicas
    ) -> Decision | None:
        """Take a step between two measurements without its direction.

        Return None, and take no step, if that is impossible: if this step measures, with several
        processes, or with a base whose step is not proportional to its rate.
        """
        if replicas.size > 1 or not self._only_observes or not can_step_without_direction(base):
            return None
        rate, state = observe_or_hold(self._tuner, value, self.state)
        step_at(base, float(rate))
        self.state, self.progress = state, self.progress.after()
        return Decision.held(rate)

    def choose(
        self,
        evaluation: StepLoss,
        params: Sequence[Tensor],
        direction: Sequence[Tensor],
        *,
        present: Tensor,
        replicas: Replicas,
    ) -> Decision:
        """Measure along the direction and ask the tuner; between measurements it sees the loss.

        Parameters
        ----------
        evaluation : StepLoss
            The loss of the step, and the gradient of this process.
        params, direction : sequence of Tensor
            The parameters that have a gradient, and u.
        present : Tensor
            The rate in use, where a line search starts.
        replicas : Replicas
            The other processes.
        """
        del present
        u = evaluation.by_variable(dict(zip(params, direction, strict=True)))
        before = self.state.skipped
        if self._only_observes:
            assert evaluation.value is not None  # `needs_loss` has asked for it
            (slope,) = replicas.mean([evaluation.slope(u)])
            # A direction that is not finite is skipped like a loss that is not.
            value = torch.where(torch.isfinite(slope), evaluation.value, torch.nan)
            rate, self.state = observe_or_hold(self._tuner, value, self.state)
            self.progress = self.progress.after()
            return Decision(rate, torch.as_tensor(self.state.skipped > before))

        numbers, eigenvector = self._measure(evaluation, u, replicas)
        measurement = Measurement(evaluation.value, None, None)._replace(**numbers)
        rate, self.state = self._tuner.update(measurement, self.state)
        skip = torch.as_tensor(self.state.skipped > before)
        if self.tracker is not None and eigenvector is not None:
            self.tracker.keep(eigenvector, where=~skip & torch.isfinite(numbers["sharpness"]))
        sparse = self._needs_graph and self._tuner.measures is not None
        self.progress = self.progress.after(repeat=sparse and bool(skip))
        method = self.methods.names[0] if self._needs_graph else None
        return Decision(rate, skip, **numbers, method=method)

    def _measure(
        self, evaluation: StepLoss, u: Direction, replicas: Replicas
    ) -> tuple[dict[str, Tensor], dict[Tensor, Tensor] | None]:
        """Return what the tuner needs, means over all processes, and the eigenvector."""
        numbers, eigenvector = {}, None
        if self.tracker is not None:  # before the curvature, which frees the graph
            numbers["sharpness"], eigenvector = self.tracker.measure(
                evaluation, replicas=replicas, retain_graph=self._needs_curvature
            )
        if self._needs_curvature:
            numbers["slope"], numbers["curvature"] = evaluation.slope_and_curvature(u)
        else:
            numbers["slope"] = evaluation.slope(u)
        if self._needs_graph:
            self.methods = evaluation.methods  # a method that failed is not tried again
        means = replicas.mean(list(numbers.values()))
        return dict(zip(numbers, means, strict=True)), eigenvector


RateRule: TypeAlias = TunerRule | SearchRule
"""What an optimizer asks for the rate of a step."""


def rate_rule(
    tuner_or_search: Any,
    like: Tensor,
    *,
    curvature: str,
    every: int | None,
    tracker: SharpnessTracker,
) -> RateRule:
    """Return the `TunerRule` of a tuner or the `SearchRule` of a line search.

    Raises
    ------
    TypeError
        If `tuner_or_search` is neither.
    ValueError
        If `curvature` or `every` is not valid.
    """
    if isinstance(tuner_or_search, Tuner):
        return TunerRule(tuner_or_search, like, curvature=curvature, every=every, tracker=tracker)
    if isinstance(tuner_or_search, LineSearch):
        Methods.named(curvature)
        validation.optional(validation.count, "every", every)
        return SearchRule(tuner_or_search)
    msg = (
        f"tuner_or_search must be a cdat_core Tuner or LineSearch, got {tuner_or_search!r}; "
        "for example cdat_core.tuners.cdat()"
    )
    raise TypeError(msg)
