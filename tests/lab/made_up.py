"""Findings made up from formulas, to test reports without training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from cdat_lab import runs
from cdat_lab.backends import Problem, Trajectory
from cdat_lab.claims import Verdict
from cdat_lab.findings import Findings
from cdat_lab.races import Key, Race, Result
from cdat_lab.registry import find_base, find_contender
from cdat_lab.runs import Run, RunConfig
from cdat_lab.studies import Study, Sweep
from cdat_lab.tasks import Task
from cdat_lab.tuning import Grid

CONTENDERS = ("constant", "warmup-cosine", "armijo", "greedy", "cdat-1.9", "cdat-2-ema-0.9")
RATES = tuple(2.0**k for k in (-6, -5, -4.5, -4, -3.5, -3))


def race(base: str = "gd", contenders: Iterable[str] = CONTENDERS, **changes: Any) -> Race:
    plain = Race("digits", base, "jax", tuple(contenders), steps=120, seeds=(0, 1, 2))
    return dataclasses.replace(plain, **changes)


def sweep(**changes: Any) -> Sweep:
    plain = Sweep("digits", "adam", "jax", (0.5, 1.0, 1.9, 2.1), (32, 128, None), 0.9, 60, (0, 1))
    return dataclasses.replace(plain, **changes)


def verdicts() -> tuple[Verdict, ...]:
    return (
        Verdict("A", "digits, GD, full batch", "greedy: at least 3", "5 (4 to 6)", "holds", (5, 4)),
        Verdict("B", "digits, Adam, full batch", "CDAT: at most 1", "0.9", "in part", (0.9, 2)),
        Verdict("B", "digits, GD, full batch", "CDAT: at most 1", "3", "does not hold", (3,)),
        Verdict("C", "digits, Adam, mini-batches", "rising", "not measured", "unknown", ()),
    )


def findings(
    *,
    races: Iterable[Race] = (),
    sweeps: Iterable[Sweep] = (),
    diverged: Collection[tuple[str, int]] = (),
    missing: Collection[tuple[str, int]] = (),
    title: str = "A study",
    **others: Any,
) -> Findings:
    """Findings in which contenders diverge or are missing for some seeds."""
    study = Study(title, "cdat compare digits", tuple(races), tuple(sweeps))
    keys = dict.fromkeys(key for each in study.all_races() for key in each.result_keys())
    results = {
        key: result(key, diverged=(key.contender, key.seed) in diverged)
        for key in keys
        if (key.contender, key.seed) not in missing
    }
    return Findings(study, results, **others)


def result(key: Key, *, diverged: bool = False) -> Result:
    contender = find_contender(key.contender)
    tuned = {} if contender.tuned is None else {contender.tuned: RATES[3]}
    config = RunConfig(
        key.task,
        key.base,
        key.contender,
        key.backend,
        key.steps,
        key.seed,
        key.batch_size,
        {**contender.settings(find_base(key.base)), **tuned},
    )
    problem = Problem(
        task=TASK,
        base=find_base(key.base),
        contender=contender,
        hyperparameters=config.hyperparameters,
        steps=key.steps,
        record_every=max(1, key.steps // 60),
        sharpness=True,
        batch_size=key.batch_size,
        seed=key.seed,
    )
    frame = runs.to_frame(problem, trajectory(problem, diverged=diverged), backend=key.backend)
    identity = {
        "config": dataclasses.asdict(config),
        "versions": {"python": "3.99", "cdat": "0.1.0", key.backend: "9.9"},
        "code": "0123456789abcdef",
    }
    losses = (0.9, 0.4, 0.2, 0.1, 0.3, math.inf)
    grid = Grid(RATES, losses, losses.index(min(losses))) if contender.tuned else None
    return Result(key, Run(identity, 1.5 + 0.1 * key.seed, frame), grid, ("a.parquet",))


def trajectory(problem: Problem, *, diverged: bool = False) -> Trajectory:
    """A loss that falls at a pace set by contender and seed, with the rate at the edge."""
    name, steps = problem.contender.name, problem.steps
    generator = np.random.default_rng([problem.seed, *name.encode()])
    pace = 0.02 + 0.03 * (sum(name.encode()) % 7) / 7 + 0.004 * generator.random()
    t = np.arange(steps + 1)
    loss = 2.3 * np.exp(-pace * t) * np.exp(0.1 * generator.standard_normal(steps + 1)) + 1e-3
    edge = problem.base.edge or 2.0
    sharpness = 4.0 + 20 * (1 - np.exp(-pace * t)) + generator.random(steps + 1)
    rate = 0.9 * edge / sharpness * np.exp(0.2 * generator.standard_normal(steps + 1))
    skipped = np.zeros(steps + 1, dtype=np.int64)
    if diverged:
        loss[steps // 2 :] = np.nan
        sharpness[steps // 2 :] = np.nan
        skipped[steps // 2 :] = np.arange(1, steps - steps // 2 + 2)
    records = problem.record_steps()
    if problem.base.preconditioned:
        sharpness[0] = np.nan
    return Trajectory(
        loss=loss[:-1],
        learning_rate=rate[:-1],
        slope=np.full(steps, -1.0),
        curvature=np.full(steps, np.nan),
        trials=np.full(steps, 2 if "armijo" in name else 0),
        skipped=skipped[:-1],
        full_loss=loss[records],
        sharpness=sharpness[records],
        seconds=records * 1e-3 * (1 + 0.2 * problem.seed),
        compile_seconds=1.0,
    )


TASK = Task(
    name="made-up",
    description="numbers made up",
    inputs=np.zeros((256, 1)),
    targets=np.zeros((256, 1)),
    params=(np.zeros(1),),
    model=lambda xp, params, inputs: inputs * params[0],
    criterion=lambda xp, outputs, targets: xp.mean((outputs - targets) ** 2),
)
