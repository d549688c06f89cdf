"""The PyTorch backend: an eager loop over the wrapped optimizer, in float64."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import cdat_torch
from cdat_core import HessianVectorProduct, PowerIterationState, power_iteration
from cdat_lab.backends._trajectory import FIRST_MATVECS, MATVECS, Problem, Trajectory
from cdat_lab.bases import Base

Power = PowerIterationState[Sequence[Tensor]] | Sequence[Tensor]


def run(problem: Problem) -> Trajectory:
    """Train a task under PyTorch, on the CPU, in float64.

    Parameters
    ----------
    problem : Problem
        What to run.

    Returns
    -------
    Trajectory
    """
    task, steps = problem.task, problem.steps
    inputs, targets = torch.from_numpy(task.inputs), torch.from_numpy(task.targets)
    params = [torch.tensor(p, requires_grad=True) for p in task.params]
    probe: Power = [torch.from_numpy(p) for p in problem.probe()]
    rule = problem.contender.rule(steps, **problem.hyperparameters)
    base = _base_optimizer(problem.base, params)
    optimizer = cdat_torch.TunedOptimizer(base, rule)

    def loss() -> Tensor:
        value: Tensor = task.loss(params, inputs, targets)
        return value

    infos: list[cdat_torch.StepInfo] = []
    losses: list[Tensor] = []
    sharpness = np.full(steps, np.nan)
    started = time.perf_counter()
    for index in range(steps):
        due = index % problem.sharpness_every == 0
        before = [p.detach().clone().requires_grad_() for p in params] if due else []
        losses.append(optimizer.step(loss))
        assert optimizer.last is not None
        infos.append(optimizer.last)
        if due:
            # The preconditioner of this step exists only now; the weights are those before it.
            product = cdat_torch.hvp(functools.partial(task.loss, before, inputs, targets), before)
            probe = _sharpen(
                product,
                _inverse_sqrt(problem.base, base, params),
                probe,
                MATVECS if index else FIRST_MATVECS,
            )
            sharpness[index] = float(probe.eigenvalue)
    with torch.no_grad():
        losses.append(loss())
    seconds = time.perf_counter() - started
    return Trajectory(
        loss=np.array([float(value) for value in losses]),
        learning_rate=np.array([float(info.learning_rate) for info in infos]),
        slope=np.array([_number(info.slope) for info in infos]),
        curvature=np.array([_number(info.curvature) for info in infos]),
        sharpness=sharpness,
        skipped=np.array([int(info.skipped) for info in infos], dtype=np.int64),
        seconds_per_step=seconds / steps,
        compile_seconds=0.0,
    )


def _number(scalar: Tensor | None) -> float:
    return float("nan") if scalar is None else float(scalar)


def _base_optimizer(base: Base, params: list[Tensor]) -> torch.optim.Optimizer:
    if base.second_moment is not None:
        betas = (base.momentum, base.second_moment)
        return torch.optim.Adam(params, lr=1.0, betas=betas, eps=base.eps)
    return torch.optim.SGD(params, lr=1.0, momentum=base.momentum)


def _inverse_sqrt(
    base: Base, optimizer: torch.optim.Optimizer, params: list[Tensor]
) -> list[Tensor]:
    """Return the diagonal of P^-1/2, where the base steps along ``-P^-1 m``."""
    if base.second_moment is None or not optimizer.state:
        return [torch.ones_like(p) for p in params]
    diagonal = []
    for p in params:
        state = optimizer.state[p]
        correction = 1 - base.second_moment ** float(state["step"])
        diagonal.append(((state["exp_avg_sq"] / correction).sqrt() + base.eps).rsqrt())
    return diagonal


def _sharpen(
    product: HessianVectorProduct[Sequence[Tensor]],
    diagonal: list[Tensor],
    power: Power,
    num_matvecs: int,
) -> PowerIterationState[Sequence[Tensor]]:
    """Continue the power iteration on P^-1/2 H P^-1/2."""

    def operator(v: Sequence[Tensor], /) -> Sequence[Tensor]:
        inner = product([d * x for d, x in zip(diagonal, v, strict=True)])
        return [d * x for d, x in zip(diagonal, inner, strict=True)]

    return power_iteration(
        operator, power, num_matvecs=num_matvecs, space=cdat_torch.TensorListSpace()
    )
