"""A comparison: every contender with every base optimizer on every backend, one task and seed."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import current_process
from pathlib import Path

import joblib

from cdat_lab import runs
from cdat_lab.backends import single_threaded
from cdat_lab.bases import BASES
from cdat_lab.contenders import CONTENDERS
from cdat_lab.runs import Run, RunConfig
from cdat_lab.tuning import Grid, tune

FIRST_GRID = {"adam": range(-8, -2), "momentum": range(-5, 1)}
"""Exponents of 2 of the rates that are tried first, for each base optimizer."""


@dataclass(frozen=True)
class Job:
    """One contender with one base on one backend: a single run, or a grid of runs.

    The runs of a job go through one process one after another and share one compiled function.
    """

    task: str
    backend: str
    base: str
    contender: str
    steps: int
    seed: int
    folder: Path
    resume: bool

    @property
    def expected_runs(self) -> int:
        """How many runs this is, as long as the grid need not grow."""
        return len(FIRST_GRID[self.base]) if CONTENDERS[self.contender].tuned else 1

    def describe(self) -> str:
        """Return the job in words."""
        return f"{BASES[self.base].label}, {CONTENDERS[self.contender].label}, {self.backend}"


@dataclass(frozen=True)
class Result:
    """What came out of a job.

    Attributes
    ----------
    job : Job
        The job.
    run : Run
        Its run, or the best of its grid.
    grid : Grid or None
        The rates that were tried, if a rate was tuned.
    """

    job: Job
    run: Run
    grid: Grid | None


@dataclass(frozen=True)
class Comparison:
    """All results, in the order base, contender, backend.

    Attributes
    ----------
    task, description : str
        The task.
    steps, seed : int
        Length of each run, and the seed.
    backends : tuple of str
        The backends that were used.
    results : tuple of Result
        One for each base, contender and backend.
    """

    task: str
    description: str
    steps: int
    seed: int
    backends: tuple[str, ...]
    results: tuple[Result, ...]

    def of(self, base: str, backend: str) -> list[Result]:
        """Return the results of one base on one backend, in the order of the contenders."""
        return [r for r in self.results if (r.job.base, r.job.backend) == (base, backend)]

    def get(self, base: str, backend: str, contender: str) -> Result:
        """Return the result of one contender."""
        return next(r for r in self.of(base, backend) if r.job.contender == contender)


def plan(
    task: str, *, backends: tuple[str, ...], steps: int, seed: int, folder: Path, resume: bool
) -> list[Job]:
    """Return the jobs of a comparison, in the order base, contender, backend."""
    return [
        Job(task, backend, base, contender, steps, seed, folder, resume)
        for base in BASES
        for contender in CONTENDERS
        for backend in backends
    ]


def execute(jobs: list[Job], *, processes: int, finished: Callable[[Result], None]) -> list[Result]:
    """Run the jobs over processes, longest first.

    Parameters
    ----------
    jobs : list of Job
        What to run.
    processes : int
        How many worker processes; with 1 everything runs in this process.
    finished : callable
        Called in this process with each result as it comes in.

    Returns
    -------
    list of Result
        In the order of `jobs`.
    """
    queue = sorted(jobs, key=lambda job: -job.expected_runs)
    parallel = joblib.Parallel(
        n_jobs=processes,
        backend="loky",
        return_as="generator_unordered",
        batch_size=1,
        pre_dispatch=processes,
    )
    results: dict[Job, Result] = {}
    for result in parallel(joblib.delayed(run_job)(job) for job in queue):
        results[result.job] = result
        finished(result)
    return [results[job] for job in jobs]


def run_job(job: Job) -> Result:
    """Run one job; this is what a worker process executes."""
    if current_process().name != "MainProcess":
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    contender = CONTENDERS[job.contender]

    def run(**tuned: float) -> Run:
        config = RunConfig(
            task=job.task,
            base=job.base,
            contender=job.contender,
            backend=job.backend,
            steps=job.steps,
            seed=job.seed,
            hyperparameters={**contender.hyperparameters, **tuned},
        )
        return runs.execute(config, job.folder, resume=job.resume)

    with single_threaded():
        if contender.tuned is None:
            return Result(job, run(), None)
        tried: dict[float, Run] = {}

        def final_loss(rate: float) -> float:
            tried[rate] = run(**{str(contender.tuned): rate})
            return float("inf") if tried[rate].diverged else tried[rate].final_loss

        grid = tune(final_loss, FIRST_GRID[job.base])
        return Result(job, tried[grid.rates[grid.best]], grid)
