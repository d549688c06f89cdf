"""Wrapping any ``torch.optim`` optimizer with a tuned learning rate.

One step: the closure gives the loss, the base optimizer the direction u, `cdat_torch.curvature` the
measurement along it, the core tuner the rate, and the parameters move by rate times multiplier times u.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from cdat_core import Measurement, _validation, tuners
from cdat_core.linesearch import LineSearch
from cdat_core.tuners import Tuner
from cdat_torch import checkpoint
from cdat_torch.curvature import (
    LossFn,
    check_method,
    check_scalar,
    directional_curvature,
    evaluate,
    gradients,
)
from cdat_torch.direction import base_direction
from cdat_torch.reevaluation import RandomState, assign, random_state, without_trace
from cdat_torch.spaces import TensorListSpace, scalar_dtype


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
    direction weighs the groups by their multipliers at wrapping; what a scheduler does to them later
    is applied after tuning.

    If loss or gradient is not finite the step is skipped: parameters, the state of the base and the
    averages of the tuner stay, and the count in `last` grows. That test reads one number from the
    device in each step. If only the curvature is not finite the parameters and averages stay, while
    the base optimizer has seen the (finite) gradient.

    Parameters
    ----------
    base : torch.optim.Optimizer
        The optimizer that gives the direction. It must not have a scheduler yet.
    tuner_or_search : cdat_core.tuners.Tuner or cdat_core.linesearch.LineSearch
        The rule for the rate. A line search evaluates the closure again for each trial, with the same
        random numbers and without moving buffers such as BatchNorm's running statistics.
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
        _check_base(base)
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
        multipliers = [_multiplier(group, base.defaults) for group in base.param_groups]
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
        self._tuner_state = tuner_or_search.init(zero) if self._is_tuner else None
        self.last: StepInfo | None = None
        for group, multiplier in zip(base.param_groups, multipliers, strict=True):
            _adopt(group, multiplier, zero)

    @property
    def _is_tuner(self) -> bool:
        return isinstance(self._rule, Tuner)

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
        multiplier = _validation.nonnegative("lr", param_group.get("lr", 1.0))
        _check_params(param_group["params"])
        self.base.add_param_group({**param_group, "lr": multiplier})
        _adopt(self.base.param_groups[-1], multiplier, self._rate)

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
            cold = self._rule.init(torch.zeros_like(self._rate)) if self._is_tuner else None
            self._tuner_state = cold
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
        if not callable(closure):
            msg = f"closure must be a function that returns the loss, got {closure!r}"
            raise TypeError(msg)
        start = random_state(self._trainable())
        measures = "curvature" in self._rule.needs and self._until_refresh == 0
        create_graph = measures and self._method != "finite_difference"
        loss = self._evaluate(closure, create_graph)
        grads = self._set_gradients(loss, create_graph)
        value = loss.detach().to(self._rate)
        if not _all_finite(value, grads):
            self._skip(value)
            return loss.detach()
        self._tune_and_move(closure, value, grads, start, measures)
        return loss.detach()

    def _trainable(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _evaluate(self, closure: LossFn, create_graph: bool) -> Tensor:
        """Call the closure and refuse a loss whose graph backward has already consumed."""
        params = self._trainable()
        before = [(p.grad, None if p.grad is None else p.grad._version) for p in params]
        loss = evaluate(
            _refusing_backward(closure, params, before),
            "closure",
            differentiated_twice=create_graph,
        )
        return loss

    def _set_gradients(self, loss: Tensor, create_graph: bool) -> list[Tensor]:
        """Set ``p.grad`` and return the gradients, with their graph if it was asked for."""
        params = self._trainable()
        with torch.enable_grad():
            grads = gradients(loss, params, create_graph=create_graph)
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else g.detach()
        return [g for g in grads if g is not None]

    def _skip(self, value: Tensor) -> None:
        self._skipped = self._skipped + 1
        self._until_refresh = 0
        self._set_rate(torch.zeros_like(self._rate))
        self.last = StepInfo(value, None, None, self._rate, self._skipped)

    def _set_rate(self, rate: Tensor) -> None:
        self._rate = rate
        for group in self.param_groups:
            group["tuned_lr"] = rate

    def _tune_and_move(
        self,
        closure: LossFn,
        value: Tensor,
        grads: list[Tensor],
        start: RandomState,
        measures: bool,
    ) -> None:
        space = TensorListSpace()
        params = [p for p in self._trainable() if p.grad is not None]
        direction = base_direction(self.base, params)
        weights = self._per_param(params, "direction_weight")
        _scale_in_place(direction, weights)
        slope = space.vdot([p.grad for p in params if p.grad is not None], direction)
        second = None
        if measures:
            with torch.enable_grad():
                second, self._method_used = directional_curvature(
                    closure, grads, params, direction, method=self._method, start=start
                )
            if self._method == "auto" and self._method_used == "finite_difference":
                self._method = "finite_difference"  # no second graph in vain from now on
        measurement = Measurement(value, slope, second)
        factors = [
            lr / weight if weight else 0.0
            for lr, weight in zip(self._per_param(params, "lr"), weights, strict=True)
        ]
        if isinstance(self._rule, LineSearch):
            self._search(closure, measurement, params, direction, factors, start)
            return
        if measures or "curvature" not in self._rule.needs:
            skipped = self._tuner_state.skipped
            rate, self._tuner_state = self._rule.update(measurement, self._tuner_state)
            newly_skipped = self._tuner_state.skipped - skipped
            self._until_refresh = self._every - 1 if measures else 0
            if self._until_refresh and bool(newly_skipped):
                self._until_refresh = 0  # the held rate was lost: measure at once
        else:
            usable = torch.isfinite(slope)
            rate = torch.where(usable, self._rate, torch.zeros_like(self._rate))
            newly_skipped = (~usable).to(torch.int32)
            self._until_refresh -= 1
        self._skipped = self._skipped + newly_skipped
        self._set_rate(rate)
        self.last = StepInfo(value, slope, second, rate, self._skipped)
        _move(params, direction, rate, factors, skip=newly_skipped > 0)

    def _search(
        self,
        closure: LossFn,
        measurement: Measurement,
        params: list[Tensor],
        direction: list[Tensor],
        factors: list[float],
        start: RandomState,
    ) -> None:
        """Run the line search along the direction that is really taken, multipliers included."""
        assert isinstance(self._rule, LineSearch)
        _scale_in_place(direction, factors)
        space = TensorListSpace()
        slope = space.vdot([p.grad for p in params if p.grad is not None], direction)
        here = [p.detach().clone() for p in params]
        trial = self._rule.init(measurement._replace(slope=slope), self._rate, self._rate)
        try:
            while not bool(trial.done):
                assign(params, space.add_scale(here, trial.step_size, direction))
                with without_trace(params, start):
                    loss = closure()
                check_scalar(loss, "closure")
                trial = self._rule.tell(trial, loss.detach().to(self._rate))
        finally:
            assign(params, here)
        unusable = ~torch.isfinite(slope)
        self._skipped = self._skipped + unusable.to(torch.int32)
        self._set_rate(trial.step_size)
        self.last = StepInfo(measurement.value, slope, None, trial.step_size, self._skipped)
        _move(params, direction, trial.step_size, [1.0] * len(params), skip=unusable)

    def _per_param(self, params: list[Tensor], key: str) -> list[float]:
        by_param = {p: float(group[key]) for group in self.param_groups for p in group["params"]}
        return [by_param[p] for p in params]


class CDAT(TunedOptimizer):
    """Any ``torch.optim`` optimizer at the CDAT learning rate (arXiv:2407.06183).

    `TunedOptimizer` with `cdat_core.tuners.cdat`.

    Parameters
    ----------
    base : torch.optim.Optimizer
        The optimizer that gives the direction.
    sigma, decay, eps, initial_learning_rate, max_growth, max_learning_rate
        See `cdat_core.tuners.cdat`.
    curvature, every
        See `TunedOptimizer`.

    Examples
    --------
    >>> import torch
    >>> from cdat_torch import CDAT
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = CDAT(torch.optim.Adam(model.parameters()), sigma=1.9)
    >>> loss = optimizer.step(lambda: (model(torch.ones(4, 3)) - 1.0).square().mean())
    """

    def __init__(
        self,
        base: Optimizer,
        sigma: Any = 2.0,
        decay: Any = 0.9,
        eps: Any = 0.0,
        *,
        initial_learning_rate: Any = None,
        max_growth: Any = None,
        max_learning_rate: Any = None,
        curvature: str = "auto",
        every: int = 1,
    ) -> None:
        tuner = tuners.cdat(
            sigma,
            decay,
            eps,
            initial_learning_rate=initial_learning_rate,
            max_growth=max_growth,
            max_learning_rate=max_learning_rate,
        )
        super().__init__(base, tuner, curvature=curvature, every=every)


def _check_base(base: Any) -> None:
    if not isinstance(base, Optimizer):
        msg = f"base must be a torch.optim.Optimizer, got {base!r}"
        raise TypeError(msg)
    if isinstance(base, torch.optim.LBFGS | TunedOptimizer):
        msg = f"base must not choose step lengths itself, got {type(base).__name__}"
        raise TypeError(msg)
    if hasattr(base.step, "_wrapped_by_lr_sched"):
        msg = (
            f"base {type(base).__name__} already has a learning-rate scheduler; wrap the optimizer "
            "first and attach the scheduler to the wrapper"
        )
        raise ValueError(msg)
    for group in base.param_groups:
        _check_params(group["params"])


def _check_params(params: Any) -> None:
    for p in [params] if isinstance(params, Tensor) else params:
        tensor = p[1] if isinstance(p, tuple) else p
        if isinstance(tensor, Tensor) and not tensor.is_floating_point():
            msg = f"params must be real floating tensors, got one of {tensor.dtype}"
            raise ValueError(msg)


def _multiplier(group: dict[str, Any], defaults: dict[str, Any]) -> float:
    """Return the group's learning rate over the default of the base."""
    lr, default = float(group["lr"]), float(defaults["lr"])
    if lr == default:
        return 1.0
    if not default > 0:
        msg = f"base must have a default lr > 0 when groups differ, got {default} (group: {lr})"
        raise ValueError(msg)
    return lr / default


def _adopt(group: dict[str, Any], multiplier: float, rate: Tensor) -> None:
    group["lr"] = group["direction_weight"] = multiplier
    group["tuned_lr"] = rate


def _refusing_backward(
    closure: LossFn, params: list[Tensor], before: list[tuple[Tensor | None, int | None]]
) -> LossFn:
    """Wrap the closure so that a call of backward inside it is an error."""

    def checked() -> Tensor:
        loss = closure()
        for p, (grad, version) in zip(params, before, strict=True):
            changed = p.grad is not None and (p.grad is not grad or p.grad._version != version)
            if changed and p.grad is not None and bool(torch.any(p.grad != 0)):
                msg = (
                    "closure must return the loss without calling backward, but it changed p.grad; "
                    "remove loss.backward() and write `return loss`: the optimizer differentiates it"
                )
                raise TypeError(msg)
        return loss

    return checked


def _all_finite(value: Tensor, grads: list[Tensor]) -> bool:
    """Return whether loss and gradients are finite: the one number a step reads from the device."""
    largest = torch._foreach_norm([g.detach() for g in grads], torch.inf)
    finite = [torch.isfinite(norm).to(value.device) for norm in largest]
    return bool(torch.stack([torch.isfinite(value), *finite]).all())


def _scale_in_place(tensors: list[Tensor], factors: list[float]) -> None:
    if any(factor != 1.0 for factor in factors):
        torch._foreach_mul_(tensors, factors)


def _move(
    params: list[Tensor],
    direction: list[Tensor],
    rate: Tensor,
    factors: list[float],
    *,
    skip: Tensor,
) -> None:
    """Add ``rate * factor * u`` to the parameters, or nothing at all if `skip` holds."""
    _scale_in_place(direction, factors)
    for p, u in zip(params, direction, strict=True):
        u.mul_(rate.to(u.device)).masked_fill_(skip.to(u.device), 0.0)
    torch._foreach_add_(params, direction)
