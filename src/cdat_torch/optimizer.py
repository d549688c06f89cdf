"""Wrapping any ``torch.optim`` optimizer with a tuned learning rate.

One step: the closure gives the loss, the base optimizer the direction u, `cdat_torch.curvature` the
measurement along it, the core tuner the rate, and the parameters move by rate times multiplier
times u.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from cdat_core import Measurement, _validation
from cdat_core.linesearch import LineSearch
from cdat_core.tuners import Tuner
from cdat_torch import checkpoint
from cdat_torch.closure import all_finite, evaluate_closure
from cdat_torch.curvature import (
    LossFn,
    check_method,
    directional_curvature,
    gradients,
)
from cdat_torch.direction import base_direction
from cdat_torch.groups import (
    adopt,
    check_base,
    check_params,
    move,
    multiplier,
    scale_in_place,
    weights_and_factors,
)
from cdat_torch.reevaluation import RandomState, random_state
from cdat_torch.spaces import TensorListSpace, scalar_dtype
from cdat_torch.trial import evaluate_trial


class StepInfo(NamedTuple):
    """What the last step measured and did; 0-d tensors on the device of the parameters.

    Attributes
    ----------
    value, slope : Tensor or None
        Loss and directional derivative <g, u>; slope is None if the step was skipped before it.
    curvature : Tensor or None
        Directional curvature <u, H u>; None if this step did not measure it.
    learning_rate : Tensor
        The tuned rate in use, before the multipliers of the groups; 0 if the step was skipped.
    skipped : Tensor
        How many steps were skipped so far because something was not finite, int32.
    """

    value: Tensor | None
    slope: Tensor | None
    curvature: Tensor | None
    learning_rate: Tensor
    skipped: Tensor


class TunedOptimizer(Optimizer):
    """A ``torch.optim`` optimizer whose learning rate a tuner or a line search chooses.

    ``step`` takes a closure that returns the loss *without* calling backward::

        loss = optimizer.step(lambda: F.cross_entropy(model(x), y))

    On wrapping, ``group["lr"]`` becomes a multiplier: the group's learning rate over the default of
    the base, so 1.0 unless groups differ. Learning-rate schedulers attach to the wrapper and drive
    that multiplier. The tuned rate, before the multiplier, is ``group["tuned_lr"]``. The measured
    direction weighs the groups by their multipliers at wrapping; what a scheduler does to them
    later is applied after tuning.

    If loss or gradient is not finite the step is skipped: parameters, the state of the base and the
    averages of the tuner stay, and the count in `last` grows. That test reads one number from the
    device in each step. If only the curvature is not finite the parameters and averages stay, while
    the base optimizer has seen the (finite) gradient.

    Parameters
    ----------
    base : torch.optim.Optimizer
        The optimizer that gives the direction. It must not have a scheduler yet.
    tuner_or_search : cdat_core.tuners.Tuner or cdat_core.linesearch.LineSearch
        The rule for the rate. A line search evaluates the closure again for each trial, with the
        same random numbers and without moving buffers such as BatchNorm's running statistics; with
        a gradient only if the search asks for the slope of a trial.
    curvature : str
        How the curvature is computed; see `cdat_torch.measure`.
    every : int
        Measure the curvature every so many steps and hold the rate in between; after a skipped step
        it is measured at once.

    Attributes
    ----------
    base : torch.optim.Optimizer
        The wrapped optimizer.
    last : StepInfo or None
        The last measurement; None before the first step.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the kind described.

    Examples
    --------
    >>> import torch
    >>> from cdat_core import tuners
    >>> from cdat_torch import TunedOptimizer
    >>> w = torch.zeros(2, requires_grad=True)
    >>> optimizer = TunedOptimizer(torch.optim.SGD([w]), tuners.cdat(sigma=1.0))
    >>> loss = optimizer.step(lambda: ((w - 3.0) ** 2).sum())
    >>> w.tolist()
    [3.0, 3.0]
    """

    def __init__(
        self,
        base: Optimizer,
        tuner_or_search: Tuner[Any] | LineSearch,
        *,
        curvature: str = "auto",
        every: int = 1,
    ) -> None:
        check_base(base)
        if not isinstance(tuner_or_search, Tuner | LineSearch):
            msg = (
                "tuner_or_search must be a cdat_core Tuner or LineSearch, "
                f"got {tuner_or_search!r}; for example cdat_core.tuners.cdat()"
            )
            raise TypeError(msg)
        if "sharpness" in tuner_or_search.needs:
            msg = "tuner_or_search must not need Measurement.sharpness: it is not measured here yet"
            raise ValueError(msg)
        check_method(curvature)
        self._every = _validation.count("every", every)
        self._method = curvature
        self._rule = tuner_or_search
        self._is_tuner = isinstance(tuner_or_search, Tuner)
        self._needs_curvature = "curvature" in tuner_or_search.needs
        multipliers = [multiplier(group, base.defaults) for group in base.param_groups]
        # Nothing was changed up to here. Optimizer.__init__ would replace groups and state, which
        # this wrapper shares with its base; __setstate__ sets up the hooks alone.
        self.base = base
        self.defaults = {**base.defaults, "lr": 1.0}
        self.__setstate__({})
        first = base.param_groups[0]["params"][0]
        zero = torch.zeros((), dtype=scalar_dtype(first.device), device=first.device)
        self._rate = zero
        self._skipped = torch.zeros((), dtype=torch.int32, device=first.device)
        self._until_refresh = 0
        self._tuner_state: Any = self._cold_state()
        self.last: StepInfo | None = None
        for group, weight in zip(base.param_groups, multipliers, strict=True):
            adopt(group, weight, zero)

    def _cold_state(self) -> Any:
        """Return the state of a tuner that has seen nothing; None for a line search."""
        return self._rule.init(torch.zeros_like(self._rate)) if self._is_tuner else None

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the base; ``lr`` is the multiplier, ``tuned_lr`` the rate in use."""
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the base."""
        return self.base.state

    def __getstate__(self) -> dict[str, Any]:
        """Return everything, for copies and pickles; `state_dict` is the form for checkpoints."""
        return self.__dict__.copy()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its ``lr`` is a multiplier of the tuned rate (default 1.0).

        Parameters
        ----------
        param_group : dict
            As for every ``torch.optim`` optimizer.
        """
        weight = _validation.nonnegative("lr", param_group.get("lr", 1.0))
        check_params(param_group["params"])
        self.base.add_param_group({**param_group, "lr": weight})
        adopt(self.base.param_groups[-1], weight, self._rate)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of base and tuner; the tuner's scalars are Python numbers.

        Returns
        -------
        dict
            As of every ``torch.optim`` optimizer; loads with ``torch.load(weights_only=True)``.
        """
        return checkpoint.with_tuner(
            super().state_dict(), self._tuner_state, int(self._skipped), self._until_refresh
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; everything is checked before anything changes.

        The state of a plain optimizer loads too, with a warning: the tuner then starts cold and the
        multipliers stay as they are.

        Parameters
        ----------
        state_dict : dict
            The state of an equally built optimizer.

        Raises
        ------
        ValueError
            If the state belongs to another tuner or to other parameters.
        """
        saved, tuner = checkpoint.split(state_dict, self._tuner_state, self.param_groups)
        self.base.load_state_dict(saved)
        if tuner is None:
            tuner = checkpoint.SavedTuner(None, 0, 0)
            self._tuner_state = self._cold_state()
        elif self._tuner_state is not None:
            self._tuner_state = checkpoint.restore(tuner.state, self._tuner_state)
        self._until_refresh = tuner.until_refresh
        self._skipped = torch.full_like(self._skipped, tuner.skipped)
        self._rate = torch.full_like(self._rate, float(self.param_groups[0]["tuned_lr"]))
        for group in self.param_groups:
            group["tuned_lr"] = self._rate

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """Take one step.

        Parameters
        ----------
        closure : callable
            Returns the loss, a scalar tensor with its graph, and does not call backward. It runs
            with gradients enabled.

        Returns
        -------
        Tensor
            The loss before the step, detached.

        Raises
        ------
        TypeError
            If the closure is missing, called backward, or returned something else than a tensor.
        ValueError
            If the loss is not a scalar or does not depend on the parameters.
        """
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        start = random_state(params)
        measures = self._needs_curvature and self._until_refresh == 0
        twice = measures and self._method != "finite_difference"
        loss = evaluate_closure(closure, params, differentiated_twice=twice)
        with torch.enable_grad():
            grads = gradients(loss, params, create_graph=twice)
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else g.detach()

        point = _Point(
            closure=cast(LossFn, closure),
            start=start,
            loss=loss,
            value=loss.detach().to(self._rate),
            params=[p for p, g in zip(params, grads, strict=True) if g is not None],
            grads=[g for g in grads if g is not None],
        )
        if not all_finite(point.value, point.grads):
            self._until_refresh = 0
            self._conclude(point.value, None, None, torch.zeros_like(self._rate), skip=True)
            return loss.detach()

        direction = base_direction(self.base, point.params)
        weights, factors = weights_and_factors(self.param_groups, point.params)
        scale_in_place(direction, weights)
        if isinstance(self._rule, LineSearch):
            scale_in_place(direction, factors)  # a search looks along the step that is really taken
            rate, skip = self._search(point, direction)
        else:
            rate, skip = self._tune(point, direction, measures)
            scale_in_place(direction, factors)
        move(point.params, direction, rate, skip=skip)
        return loss.detach()

    def _tune(
        self, point: _Point, direction: list[Tensor], measures: bool
    ) -> tuple[Tensor, Tensor]:
        """Measure along the direction and ask the tuner; between measurements the rate holds."""
        assert isinstance(self._rule, Tuner)
        slope = point.slope(direction)
        if self._needs_curvature and not measures:
            self._until_refresh -= 1
            skip = ~torch.isfinite(slope)
            rate = torch.where(skip, torch.zeros_like(self._rate), self._rate)
            self._conclude(point.value, slope, None, rate, skip=skip)
            return rate, skip

        curvature = self._curvature(point, direction) if measures else None
        already_skipped = self._tuner_state.skipped
        rate, self._tuner_state = self._rule.update(
            Measurement(point.value, slope, curvature), self._tuner_state
        )
        skip = self._tuner_state.skipped > already_skipped
        if measures and self._every > 1:  # a skip loses the rate to hold: measure again at once
            self._until_refresh = 0 if bool(skip) else self._every - 1
        self._conclude(point.value, slope, curvature, rate, skip=skip)
        return rate, skip

    def _curvature(self, point: _Point, direction: list[Tensor]) -> Tensor:
        with torch.enable_grad():
            curvature, used = directional_curvature(
                point.closure,
                point.loss,
                point.grads,
                point.params,
                direction,
                method=self._method,
                start=point.start,
            )
        if used == "finite_difference":
            self._method = used  # what failed once is not tried again in each step
        return curvature

    def _search(self, point: _Point, direction: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Try steps along the direction until the line search is done."""
        assert isinstance(self._rule, LineSearch)
        space, slope = TensorListSpace(), point.slope(direction)
        here = [p.detach().clone() for p in point.params]
        trial = self._rule.init(Measurement(point.value, slope, None), self._rate, self._rate)
        while not bool(trial.done):
            there = space.add_scale(here, trial.step_size, direction)
            told = evaluate_trial(
                point.closure,
                point.params,
                there,
                direction,
                start=point.start,
                needs=self._rule.trial_needs,
            )
            trial = self._rule.tell(trial, *(number.to(self._rate) for number in told))
        skip = ~torch.isfinite(slope)
        self._conclude(point.value, slope, None, trial.step_size, skip=skip)
        return trial.step_size, skip

    def _conclude(
        self,
        value: Tensor,
        slope: Tensor | None,
        curvature: Tensor | None,
        rate: Tensor,
        *,
        skip: Tensor | bool,
    ) -> None:
        """Record what the step measured and decided."""
        self._rate = rate
        self._skipped = self._skipped + skip
        for group in self.param_groups:
            group["tuned_lr"] = rate
        self.last = StepInfo(value, slope, curvature, rate, self._skipped)


class _Point(NamedTuple):
    """The loss and its gradient at the present parameters.

    `params` and `grads` hold the parameters that the loss depends on; the gradients carry their
    graph if the curvature is to be measured exactly. `start` is the random state from which the
    closure was evaluated.
    """

    closure: LossFn
    start: RandomState
    loss: Tensor
    value: Tensor
    params: list[Tensor]
    grads: list[Tensor]

    def slope(self, direction: list[Tensor]) -> Tensor:
        return TensorListSpace().vdot([g.detach() for g in self.grads], direction)
