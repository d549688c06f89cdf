"""How a step gets its rate: a tuner that measures, or a line search that tries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from cdat_core import Measurement
from cdat_core.extend import StepInfo, validation
from cdat_core.linesearch import LineSearch
from cdat_core.tuners import Tuner
from cdat_torch.base.direction import steps_in_proportion
from cdat_torch.base.rehearsal import step_at
from cdat_torch.curvature.methods import ways_named, ways_with_product
from cdat_torch.distributed.replicas import Replicas
from cdat_torch.spaces import TensorListSpace
from cdat_torch.step.checkpoint import SavedTuner, restore
from cdat_torch.step.evaluation import ClosureLoss, StepLoss
from cdat_torch.step.line_search import evaluate_trial
from cdat_torch.step.sharpness import SharpnessTracker


class Decision(NamedTuple):
    """The rate of a step, and what it rests on; means over all processes."""

    rate: Tensor
    skip: Tensor
    slope: Tensor | None = None
    curvature: Tensor | None = None
    sharpness: Tensor | None = None
    method: str | None = None

    @classmethod
    def none(cls, like: Tensor) -> Decision:
        """Return the decision to skip a step that could not be measured."""
        return cls(torch.zeros_like(like), torch.ones_like(like, dtype=torch.bool))

    def info(self, value: Tensor | None, skipped: Tensor) -> StepInfo:
        """Return what the user is told, with the loss and the number of skipped steps."""
        measured = (self.slope, self.curvature, self.sharpness)
        return StepInfo(value, *measured, self.rate, skipped, self.method)


class TunerRule:
    """A tuner with its state; it measures curvature and sharpness every so many steps.

    Parameters
    ----------
    tuner : Tuner
        The rule.
    like : Tensor
        A 0-d tensor that fixes dtype and device of the state.
    curvature : str
        The way to compute it; `ways` are those that are left, the one in use first.
    every : int
        Steps from one measurement to the next.
    tracker : SharpnessTracker
        What measures the sharpness; kept in `tracker` if the tuner needs it, else that is None.
    """

    along_step = False
    """The direction is measured before the multipliers of a scheduler."""

    def __init__(
        self,
        tuner: Tuner[Any],
        like: Tensor,
        *,
        curvature: str,
        every: int,
        tracker: SharpnessTracker,
    ) -> None:
        self.tracker = tracker if "sharpness" in tuner.needs else None
        self.ways = (ways_with_product if self.tracker else ways_named)(curvature)
        self._tuner = tuner
        self._every = validation.count("every", every)
        self._needs_curvature = "curvature" in tuner.needs
        self._needs_graph = self._needs_curvature or self.tracker is not None
        self.needs_value = "value" in tuner.needs
        self.until_refresh = 0
        self.state: Any = tuner.init(torch.zeros_like(like))
        self._like = like

    def load(self, saved: SavedTuner | None, vector: dict[Tensor, Tensor]) -> None:
        """Go on from a checkpoint and an eigenvector; None forgets all measurements."""
        if self.tracker is not None:
            self.tracker.vector = vector
        self.until_refresh = 0 if saved is None else saved.until_refresh
        if saved is None:
            self.state = self._tuner.init(torch.zeros_like(self._like))
        else:
            self.state = restore(saved.state, self.state)

    @property
    def measures(self) -> bool:
        """Whether the step to come measures curvature or sharpness."""
        return self._needs_graph and self.until_refresh == 0

    @property
    def needs_closure(self) -> str | None:
        """What evaluates the loss again, if anything does."""
        if not self._needs_graph or "hessian" in self.ways or "replay" in self.ways:
            return None
        return f'curvature="{self.ways[-1]}"'

    @property
    def needs_loss(self) -> bool:
        """Whether a gradient alone is not enough."""
        return self._needs_graph or self.needs_value

    def miss(self) -> None:
        """Take note of a step that was skipped: the rate to hold is lost."""
        self.until_refresh = 0

    def held_step(self, base: Optimizer, rate: Tensor, *, replicas: Replicas) -> Decision | None:
        """Let `base` step at the rate in use between measurements; None where `choose` is to.

        So it does with a single process and a base whose steps are in proportion to its rate.
        """
        if not self._holds or replicas.size > 1 or not steps_in_proportion(base):
            return None
        step_at(base, float(rate))
        self.until_refresh -= 1
        return Decision(rate, torch.zeros_like(rate, dtype=torch.bool))

    @property
    def _holds(self) -> bool:
        return self._needs_graph and not self.measures

    def choose(
        self,
        evaluation: StepLoss,
        value: Tensor | None,
        params: Sequence[Tensor],
        direction: Sequence[Tensor],
        *,
        present: Tensor,
        replicas: Replicas,
    ) -> Decision:
        """Measure along the direction and ask the tuner; between measurements the rate holds.

        Parameters
        ----------
        evaluation : StepLoss
            Loss and gradient of this process.
        value : Tensor or None
            The loss of all processes.
        params, direction : sequence of Tensor
            The parameters that have a gradient, and u.
        present : Tensor
            The rate in use.
        replicas : Replicas
            The other processes.
        """
        along = evaluation.along(dict(zip(params, direction, strict=True)))
        if self._holds:
            (slope,) = replicas.mean([evaluation.slope(along)])
            self.until_refresh -= 1
            skip = ~torch.isfinite(slope)
            return Decision(torch.where(skip, torch.zeros_like(present), present), skip)

        measured = {}
        if self.tracker is not None:  # first: the curvature frees the graph
            found = self.tracker.measure(
                evaluation, replicas=replicas, retain_graph=self._needs_curvature
            )
            measured["sharpness"] = found.sharpness
        if self._needs_curvature:
            measured["slope"], measured["curvature"] = evaluation.model(along)
        else:
            measured["slope"] = evaluation.slope(along)
        if self._needs_graph:
            self.ways = evaluation.ways  # what failed once is not tried again in each step
        means = dict(zip(measured, replicas.mean(list(measured.values())), strict=True))
        measurement = Measurement(value, None, None)._replace(**means)
        before = self.state.skipped
        rate, self.state = self._tuner.update(measurement, self.state)
        skip = self.state.skipped > before
        if self.tracker is not None:
            self.tracker.keep(found, where=~skip & torch.isfinite(means["sharpness"]))
        if self.measures and self._every > 1:
            # After a skip the curvature is measured again at once.
            self.until_refresh = 0 if bool(skip) else self._every - 1
        method = self.ways[0] if self._needs_graph else None
        return Decision(rate, skip, **means, method=method)


class SearchRule:
    """A line search; it evaluates the closure again for each trial."""

    along_step = True
    """The search looks along the step that is really taken."""
    ways = ()
    measures = False
    needs_closure = "a line search"
    needs_loss = True
    tracker = None
    state: Any = None
    until_refresh = 0

    def __init__(self, search: LineSearch) -> None:
        self._search = search

    def load(self, saved: SavedTuner | None, vector: dict[Tensor, Tensor]) -> None:
        """Do nothing: a search has no state between steps."""

    def miss(self) -> None:
        """Do nothing."""

    def held_step(self, base: Optimizer, rate: Tensor, *, replicas: Replicas) -> None:
        """Do nothing: each step looks for a rate."""

    def choose(
        self,
        evaluation: StepLoss,
        value: Tensor | None,
        params: Sequence[Tensor],
        direction: Sequence[Tensor],
        *,
        present: Tensor,
        replicas: Replicas,
    ) -> Decision:
        """Try steps along the direction until the search is done; see `TunerRule.choose`."""
        assert isinstance(evaluation, ClosureLoss)
        space = TensorListSpace()
        along = evaluation.along(dict(zip(params, direction, strict=True)))
        (slope,) = replicas.mean([evaluation.slope(along)])
        here = [p.detach().clone() for p in params]
        trial = self._search.init(Measurement(value, slope, None), present, present)
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


def rule(
    tuner_or_search: Any, like: Tensor, *, curvature: str, every: int, tracker: SharpnessTracker
) -> Any:
    """Return the `TunerRule` or `SearchRule`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its kind.
    """
    if isinstance(tuner_or_search, Tuner):
        return TunerRule(tuner_or_search, like, curvature=curvature, every=every, tracker=tracker)
    if isinstance(tuner_or_search, LineSearch):
        ways_named(curvature)
        validation.count("every", every)
        return SearchRule(tuner_or_search)
    msg = (
        f"tuner_or_search must be a cdat_core Tuner or LineSearch, got {tuner_or_search!r}; "
        "for example cdat_core.tuners.cdat()"
    )
    raise TypeError(msg)
