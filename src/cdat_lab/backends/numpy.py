"""The NumPy backend: a plain loop over the core, with derivatives by HIPS autograd."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from autograd.builtins import tuple as traced_tuple
from autograd.differential_operators import make_hvp, make_vjp, value_and_grad
from numpy.typing import NDArray

from cdat_core import (
    HessianVectorProduct,
    Measurement,
    TupleSpace,
    directional_curvature,
    preconditioned,
    top_eigenvalues,
)
from cdat_core.extend import observe_or_hold
from cdat_core.linesearch import LineSearch
from cdat_core.tuners import Tuner, average_weight
from cdat_lab.backends import _autograd_namespace as xp
from cdat_lab.backends._sharpness import MATVECS, SharpnessTracker
from cdat_lab.backends._trajectory import Problem, Trajectory
from cdat_lab.bases import Base
from cdat_lab.tasks import Task

Params: TypeAlias = tuple[NDArray[np.float64], ...]
Product: TypeAlias = HessianVectorProduct[Params]

SPACE = TupleSpace()


def run(problem: Problem) -> Trajectory:
    """Train a task under NumPy, in float64.

    Parameters
    ----------
    problem : Problem
        The run.

    Returns
    -------
    Trajectory

    Raises
    ------
    ValueError
        If the contender is a complete optimizer or has an unknown curvature, or if the base
        optimizer is built for other frameworks.
    """
    contender, base = problem.contender, problem.base
    if contender.rule is None or contender.optimizer is not None:
        msg = (
            f"contender {contender.name!r} is an optimizer from another package, which the numpy "
            "backend does not support; run it under jax or torch"
        )
        raise ValueError(msg)
    if contender.curvature not in {"auto", "gauss_newton"}:
        msg = (
            "curvature must be 'auto' or 'gauss_newton' under the numpy backend, "
            f"contender {contender.name!r} has {contender.curvature!r}"
        )
        raise ValueError(msg)
    if not base.builtin:
        msg = (
            f"base {base.name!r} is built for other frameworks; the numpy backend supports "
            "optimizers described by coefficients, such as gd, momentum, rmsprop and adam"
        )
        raise ValueError(msg)
    rule = contender.rule(problem.steps, **problem.hyperparameters)
    rate: Rate
    if isinstance(rule, LineSearch):
        rate = SearchedRate(rule)
    else:
        rate = TunedRate(rule, contender.curvature, SharpnessTracker(problem.probe()))
    with np.errstate(all="ignore"):  # a run may diverge
        return _train(problem, rate)


def _train(problem: Problem, rate: Rate) -> Trajectory:
    """Run the steps and take the records."""
    task, base = problem.task, problem.base
    whole, batches = Objective(task), problem.batches()
    record_steps = set(problem.record_steps().tolist())
    tracker = SharpnessTracker(problem.probe())
    held_out = None if task.held_out is None else Objective(task, data=task.held_out)
    params, state, seconds = task.params, start(base, task.params), 0.0
    average = params if problem.contender.average else None
    decisions: list[Decision] = []
    records: list[tuple[float, ...]] = []

    for step in range(problem.steps + 1):
        if step in record_steps:
            found = float("nan")
            if problem.sharpness and (state.step > 0 or not base.preconditioned):
                found = sharpness(tracker, whole.hvp(params), inverse_sqrt(base, state))
            evaluated = params if average is None else average
            validation = float("nan") if held_out is None else float(held_out.value(evaluated))
            records.append((float(whole.value(evaluated)), validation, found, seconds))
        if step == problem.steps:
            break
        started = time.perf_counter()
        objective = whole
        if batches is not None or task.noise is not None:
            rows, noise = None if batches is None else batches[step], problem.noise(step, 1)
            objective = Objective(task, rows, None if noise is None else noise[0])
        value, grads, hvp = objective.derivatives(params, second=rate.uses_hessian)
        direction, proposed = advance(base, grads, state, params)
        scale = inverse_sqrt(base, proposed)
        decision = rate.decide(Point(objective, params, value, grads, hvp, direction, scale))
        if not decision.skip:
            params = SPACE.add_scale(params, decision.learning_rate, direction)
            if average is not None:
                weight = average_weight(state.step)
                moved = SPACE.add_scale(params, -1.0, average)
                average = SPACE.add_scale(average, weight, moved)
            state = proposed
        decisions.append(decision)
        seconds += time.perf_counter() - started

    taken = Decision(*np.array(decisions, dtype=np.float64).T)
    full_loss, validation_loss, sharpnesses, times = np.array(records).T
    return Trajectory(
        loss=taken.value,
        learning_rate=taken.learning_rate,
        slope=taken.slope,
        curvature=taken.curvature,
        trials=taken.trials.astype(np.int64),
        skipped=np.cumsum(taken.skip).astype(np.int64),
        full_loss=full_loss,
        sharpness=sharpnesses,
        seconds=times,
        compile_seconds=0.0,
        validation_loss=None if held_out is None else validation_loss,
    )


class Objective:
    """The loss of a task on some rows of its data, or of `data`, and its derivatives."""

    def __init__(
        self,
        task: Task,
        rows: NDArray[np.int64] | None = None,
        noise: NDArray[np.float64] | None = None,
        *,
        data: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
    ) -> None:
        inputs, targets = data or (task.inputs, task.targets)
        self.task, self.noise = task, noise
        self.inputs = inputs if rows is None else inputs[rows]
        self.targets = targets if rows is None else targets[rows]

    def outputs(self, params: Any) -> Any:
        """Return the outputs of the model; `params` may be traced."""
        # autograd's stand-in for a tuple is not a tuple; the model gets a list of arrays.
        weights = [params[i] for i in range(len(params))]
        return self.task.outputs(xp, weights, self.inputs, self.noise)

    def value(self, params: Any) -> Any:
        """Return the loss; `params` may be traced."""
        return self.task.criterion(xp, self.outputs(params), self.targets)

    def derivatives(self, params: Params, *, second: bool) -> tuple[Any, Params, Product | None]:
        """Return the loss, its gradient and, if `second`, the Hessian-vector product."""
        if not second:
            value, grads = value_and_grad(self.value)(params)
            return value, grads, None
        # One trace of loss and gradient together; each product is then one backward pass.
        pull_back, (value, grads) = make_vjp(
            lambda params: traced_tuple(value_and_grad(self.value)(params))
        )(params)
        return value, grads, lambda v: pull_back((0.0, v))

    def hvp(self, params: Params) -> Product:
        """Return the Hessian-vector product."""
        product: Product = make_hvp(self.value)(params)[0]
        return product

    def gauss_newton(self, params: Params, direction: Params) -> Any:
        """Return <J u, H_out J u>: the curvature if the model were linear in its weights."""
        # The pullback is linear, so its own pullback is the push-forward. autograd's forward mode
        # lacks rules for some functions that its reverse mode has.
        pull_back, outputs = make_vjp(self.outputs)(params)
        push_forward, _ = make_vjp(pull_back)(np.zeros_like(outputs))
        change = push_forward(direction)
        product, _ = make_hvp(lambda z: self.task.criterion(xp, z, self.targets))(outputs)
        return np.sum(change * product(change))


class BaseState(NamedTuple):
    """State of a base optimizer: steps taken, first and second moment of the gradient."""

    step: int
    first: Params
    second: Params


def start(base: Base, params: Params) -> BaseState:
    """Return the state of a base optimizer before its first step."""
    zeros = tuple(np.zeros_like(p) for p in params)
    return BaseState(0, zeros, zeros if base.preconditioned else ())


def advance(
    base: Base, grads: Params, state: BaseState, params: Params
) -> tuple[Params, BaseState]:
    """Return the update at learning rate 1 and the state after it."""
    update, state = _undecayed(base, grads, state)
    if base.weight_decay:
        update = SPACE.add_scale(update, -base.weight_decay, params)
    return update, state


def _undecayed(base: Base, grads: Params, state: BaseState) -> tuple[Params, BaseState]:
    count, beta = state.step + 1, base.momentum
    if base.second_moment is None:
        first = tuple(beta * m + g for m, g in zip(state.first, grads, strict=True))
        return tuple(-m for m in first), BaseState(count, first, ())
    decay = base.second_moment
    first = tuple(beta * m + (1 - beta) * g for m, g in zip(state.first, grads, strict=True))
    second = tuple(
        decay * v + (1 - decay) * g * g for v, g in zip(state.second, grads, strict=True)
    )
    state = BaseState(count, first, second)
    pairs = zip(first, preconditioner(base, state), strict=True)
    return tuple(-m / (1 - beta**count) / p for m, p in pairs), state


def preconditioner(base: Base, state: BaseState) -> Params:
    """Return the diagonal P of the last update ``-P^-1 m``, m the corrected first moment."""
    assert base.second_moment is not None
    correction = 1 - base.second_moment**state.step
    return tuple(np.sqrt(v / correction) + base.eps for v in state.second)


def inverse_sqrt(base: Base, state: BaseState) -> Callable[[Params], Params] | None:
    """Return ``v -> P^-1/2 v``, or None if the base has no preconditioner."""
    if not base.preconditioned:
        return None
    diagonal = tuple(1 / np.sqrt(p) for p in preconditioner(base, state))
    return lambda v: tuple(d * x for d, x in zip(diagonal, v, strict=True))


def sharpness(
    tracker: SharpnessTracker, hvp: Product, scale: Callable[[Params], Params] | None
) -> float:
    """Return the largest eigenvalue of H, or of P^-1/2 H P^-1/2; NaN if it is not finite."""
    operator = hvp if scale is None else preconditioned(hvp, scale, space=SPACE)
    return tracker.measure(
        lambda start: top_eigenvalues(operator, start, num_matvecs=MATVECS, space=SPACE)
    )


class Point(NamedTuple):
    """What a rate is chosen from: the loss, its derivatives and the update at rate 1."""

    objective: Objective
    params: Params
    value: Any
    grads: Params
    hvp: Product | None
    direction: Params
    scale: Callable[[Params], Params] | None

    @property
    def slope(self) -> Any:
        """The directional derivative."""
        return SPACE.vdot(self.grads, self.direction)


class Decision(NamedTuple):
    """The rate of a step, what it was chosen from, and whether the step is skipped."""

    value: Any
    learning_rate: Any
    slope: Any
    curvature: Any
    trials: Any
    skip: Any


class Rate(Protocol):
    """Chooses the rate of each step."""

    @property
    def uses_hessian(self) -> bool:
        """Whether the next step needs the Hessian."""
        ...

    def decide(self, point: Point) -> Decision:
        """Return the rate of the next step."""
        ...


class TunedRate:
    """Rates chosen by a tuner."""

    def __init__(self, tuner: Tuner[Any], curvature: str, tracker: SharpnessTracker) -> None:
        self.tuner, self.state = tuner, tuner.init(np.zeros(()))
        self.curvature, self.tracker = curvature, tracker
        by_hessian = "curvature" in tuner.needs and curvature != "gauss_newton"
        self._second_order = by_hessian or "sharpness" in tuner.needs
        self._scheduled = tuner.measures if tuner.needs & {"curvature", "sharpness"} else None
        self._step, self._due = 0, False

    @property
    def uses_hessian(self) -> bool:
        """Whether the next step needs the Hessian."""
        return self._second_order and self._measures()

    def _measures(self) -> bool:
        """Return whether the next step is measured: by schedule, or because the last try failed."""
        return self._due or self._scheduled is None or bool(self._scheduled(self._step))

    def decide(self, point: Point) -> Decision:
        """Return the tuner's rate; the tuner skips measurements that are not finite."""
        measures = self._measures()
        decision = self._measured(point) if measures else self._observed(point)
        self._step, self._due = self._step + 1, measures and decision.skip
        return decision

    def _observed(self, point: Point) -> Decision:
        """Return the rate of a step without a measurement."""
        before = int(self.state.skipped)
        rate, self.state = observe_or_hold(self.tuner, point.value, self.state)
        skip = int(self.state.skipped) > before or not np.isfinite(point.value)
        return Decision(point.value, rate, point.slope, np.nan, 0, skip)

    def _measured(self, point: Point) -> Decision:
        curvature = largest = None
        if "curvature" in self.tuner.needs:
            curvature = self._curvature(point)
        if "sharpness" in self.tuner.needs:
            assert point.hvp is not None
            largest = np.asarray(sharpness(self.tracker, point.hvp, point.scale))
        before = int(self.state.skipped)
        measurement = Measurement(point.value, point.slope, curvature, largest)
        rate, self.state = self.tuner.update(measurement, self.state)
        return Decision(
            value=point.value,
            learning_rate=rate,
            slope=point.slope,
            curvature=np.nan if curvature is None else curvature,
            trials=0,
            skip=int(self.state.skipped) > before,
        )

    def _curvature(self, point: Point) -> Any:
        if self.curvature == "gauss_newton":
            return point.objective.gauss_newton(point.params, point.direction)
        assert point.hvp is not None
        return directional_curvature(point.hvp, point.direction, space=SPACE)


class SearchedRate:
    """Rates chosen by a line search, each starting from the last one."""

    uses_hessian = False

    def __init__(self, search: LineSearch) -> None:
        self.search, self.last = search, np.zeros(())

    def decide(self, point: Point) -> Decision:
        """Return the final rate of the search; skip if loss or slope is not finite."""
        slope = point.slope
        start = Measurement(point.value, slope, None)
        state = self.search.init(start, np.zeros(()), self.last)
        while not state.done:
            moved = SPACE.add_scale(point.params, state.step_size, point.direction)
            state = self.search.tell(state, *self._trial(point, moved))
        self.last = state.step_size
        return Decision(
            value=point.value,
            learning_rate=state.step_size,
            slope=slope,
            curvature=np.nan,
            trials=state.trials,
            skip=not (np.isfinite(point.value) and np.isfinite(slope)),
        )

    def _trial(self, point: Point, moved: Params) -> tuple[Any, ...]:
        """Return the loss at a trial and, if the search needs it, the slope."""
        if "slope" not in self.search.trial_needs:
            return (point.objective.value(moved),)
        value, grads, _ = point.objective.derivatives(moved, second=False)
        return value, SPACE.vdot(grads, point.direction)
