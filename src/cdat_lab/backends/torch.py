"""The PyTorch backend: an eager loop over the wrapped optimizer, in float64."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch
from torch import Tensor

import cdat_torch
from cdat_core.linesearch import LineSearch
from cdat_core.tuners import average_weight
from cdat_lab.backends._sharpness import MATVECS, SharpnessTracker
from cdat_lab.backends._trajectory import Problem, Trajectory
from cdat_lab.bases import Base
from cdat_lab.contenders import ADAMW_DECAY, ADAMW_WARMUP, cosine_factor

NAN = float("nan")


def run(problem: Problem) -> Trajectory:
    """Train a task under PyTorch, on the CPU, in float64.

    Parameters
    ----------
    problem : Problem
        The run.

    Returns
    -------
    Trajectory
    """
    task, steps = problem.task, problem.steps
    data = (torch.from_numpy(task.inputs), torch.from_numpy(task.targets))
    params = [torch.tensor(p, requires_grad=True) for p in task.params]
    held_out = None if task.held_out is None else tuple(map(torch.from_numpy, task.held_out))
    rows = problem.batches()
    average = _Average(params) if problem.contender.average else None
    trainer = _Package(problem, params) if problem.contender.optimizer else _Tuned(problem, params)
    sharpness = _Sharpness(problem, params, data)
    columns: list[tuple[Any, ...]] = []
    full_loss, validation, sharp, seconds, spent = [], [], [], [], 0.0
    due = set(problem.record_steps().tolist())
    for index in range(steps + 1):
        if index in due:
            with average or contextlib.nullcontext():
                full_loss.append(trainer.full_loss(data))
                if held_out is not None:
                    validation.append(trainer.full_loss(held_out))
            sharp.append(sharpness(trainer.base, taken=index))
            seconds.append(spent)
        if index == steps:
            break
        batch = data if rows is None else tuple(x[torch.from_numpy(rows[index])] for x in data)
        noise = problem.noise(index, 1)
        if noise is not None:
            batch = (*batch, torch.from_numpy(noise[0]))
        began = time.perf_counter()
        columns.append(trainer.step(*batch))
        if average is not None:
            average.update(skipped=int(columns[-1][-1]))
        spent += time.perf_counter() - began
    loss, rate, slope, curvature, trials, skipped = zip(*columns, strict=True)
    return Trajectory(
        loss=np.array([_number(x) for x in loss]),
        learning_rate=np.array([_number(x) for x in rate]),
        slope=np.array([_number(x) for x in slope]),
        curvature=np.array([_number(x) for x in curvature]),
        trials=np.array(trials, dtype=np.int64),
        skipped=np.array([int(x) for x in skipped], dtype=np.int64),
        full_loss=np.array(full_loss),
        sharpness=np.array(sharp),
        seconds=np.array(seconds),
        compile_seconds=0.0,
        validation_loss=np.array(validation) if validation else None,
    )


def _number(scalar: Tensor | float | None) -> float:
    return NAN if scalar is None else float(scalar)


def optimizer(base: Base, params: list[Tensor]) -> torch.optim.Optimizer:
    """Return a base optimizer of torch.optim at learning rate 1."""
    if not base.builtin:
        if base.torch is None:
            msg = f"base {base.name!r} has no `torch` constructor, so it cannot run under PyTorch"
            raise ValueError(msg)
        built: torch.optim.Optimizer = base.torch(list(params))
        return built
    if base.second_moment is not None:
        betas = (base.momentum, base.second_moment)
        if base.weight_decay:
            return torch.optim.AdamW(
                params, lr=1.0, betas=betas, eps=base.eps, weight_decay=base.weight_decay
            )
        return torch.optim.Adam(params, lr=1.0, betas=betas, eps=base.eps)
    return torch.optim.SGD(params, lr=1.0, momentum=base.momentum)


class _Tuned:
    """A base optimizer with a learning-rate rule."""

    def __init__(self, problem: Problem, params: list[Tensor]) -> None:
        contender = problem.contender
        assert contender.rule is not None
        self._params, self._task = params, problem.task
        self.base = optimizer(problem.base, params)
        rule = contender.rule(problem.steps, **problem.hyperparameters)
        self._searches = isinstance(rule, LineSearch)
        self._optimizer = cdat_torch.TunedOptimizer(self.base, rule, curvature=contender.curvature)

    def step(self, inputs: Tensor, targets: Tensor, noise: Tensor | None = None) -> tuple[Any, ...]:
        calls = 0

        def outputs() -> Tensor:
            nonlocal calls
            calls += 1
            found: Tensor = self._task.outputs(xp, self._params, inputs, noise)
            return found

        def criterion(outputs: Tensor) -> Tensor:
            found: Tensor = self._task.criterion(xp, outputs, targets)
            return found

        loss = self._optimizer.step(cdat_torch.CompositeLoss(outputs, criterion))
        last = self._optimizer.last
        assert last is not None
        trials = calls - 1 if self._searches else 0
        return loss, last.learning_rate, last.slope, last.curvature, trials, last.skipped

    def full_loss(self, data: tuple[Tensor, ...]) -> float:
        with torch.no_grad():
            return float(self._task.loss(xp, self._params, *data))


class _Package:
    """A complete optimizer from another package."""

    def __init__(self, problem: Problem, params: list[Tensor]) -> None:
        self._params, self._task = params, problem.task
        self.base = _package_optimizer(problem, params)
        self._schedule = _schedule(problem, self.base)

    def step(self, inputs: Tensor, targets: Tensor, noise: Tensor | None = None) -> tuple[Any, ...]:
        self.base.zero_grad()
        loss = self._task.loss(xp, self._params, inputs, targets, noise)
        loss.backward()
        self.base.step()
        if self._schedule is not None:
            self._schedule.step()
        group = self.base.param_groups[0]
        return loss.detach(), group.get("d", NAN), NAN, NAN, 0, 0

    def full_loss(self, data: tuple[Tensor, ...]) -> float:
        # Schedule-free evaluates at an average of the weights, not where it takes gradients.
        switch: Callable[[], None] | None = getattr(self.base, "eval", None)
        if switch is not None:
            switch()
        with torch.no_grad():
            loss = float(self._task.loss(xp, self._params, *data))
        if switch is not None:
            self.base.train()  # type: ignore[attr-defined]
        return loss


def _package_optimizer(problem: Problem, params: list[Tensor]) -> torch.optim.Optimizer:
    name = problem.contender.optimizer
    if name == "adamw-cosine":
        peak = problem.hyperparameters["peak"]
        return torch.optim.AdamW(params, lr=peak, weight_decay=ADAMW_DECAY)
    if name in {"prodigy", "prodigy-cosine"}:
        prodigy: torch.optim.Optimizer = importlib.import_module("prodigyopt").Prodigy(params)
        return prodigy
    free: Any = importlib.import_module("schedulefree").AdamWScheduleFree(
        params, lr=problem.hyperparameters["learning_rate"]
    )
    free.train()
    return free  # type: ignore[no-any-return]


def _schedule(
    problem: Problem, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler | None:
    warmup = {"adamw-cosine": ADAMW_WARMUP, "prodigy-cosine": 0.0}.get(
        problem.contender.optimizer or ""
    )
    if warmup is None:
        return None
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: float(cosine_factor(np.asarray(step), problem.steps, warmup))
    )


class _Average:
    """A running average of the weights; inside the context the weights are the average."""

    def __init__(self, params: list[Tensor]) -> None:
        self._params, self._steps, self._skipped = params, 0, 0
        self._average = [p.detach().clone() for p in params]

    def update(self, *, skipped: int) -> None:
        """Include the weights after a step; `skipped` is the number of steps skipped so far."""
        if skipped == self._skipped:
            weight = average_weight(self._steps)
            for mean, new in zip(self._average, self._params, strict=True):
                mean.lerp_(new.detach(), weight)
            self._steps += 1
        self._skipped = skipped

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *error: object) -> None:
        self._swap()

    def _swap(self) -> None:
        with torch.no_grad():
            for mean, weights in zip(self._average, self._params, strict=True):
                kept = weights.clone()
                weights.copy_(mean)
                mean.copy_(kept)


class _Sharpness:
    """The largest eigenvalue of the Hessian on all data, tracked from record to record."""

    def __init__(self, problem: Problem, params: list[Tensor], data: tuple[Tensor, ...]) -> None:
        self._wanted = problem.sharpness
        self._preconditioned = problem.base.preconditioned and problem.contender.optimizer is None
        self._task, self._params, self._data = problem.task, params, data
        self._tracker = SharpnessTracker([torch.from_numpy(p) for p in problem.probe()])

    def __call__(self, base: torch.optim.Optimizer, *, taken: int) -> float:
        if not self._wanted or (self._preconditioned and taken == 0):
            return NAN
        if not all(bool(torch.isfinite(p).all()) for p in self._params):
            return NAN
        return self._tracker.measure(
            lambda start: cdat_torch.top_eigenvalues(
                lambda: self._task.loss(xp, self._params, *self._data),
                self._params,
                num_matvecs=MATVECS,
                start=start,
                inverse_sqrt=base if self._preconditioned else None,
            )
        )
