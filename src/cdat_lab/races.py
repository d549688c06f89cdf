"""Races: one job per contender and seed, run in worker processes and resumed from files."""

from __future__ import annotations

import contextlib
import functools
import signal
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing import current_process
from pathlib import Path
from typing import Any, NamedTuple

import joblib

from cdat_lab import backends, provenance, registry, runs
from cdat_lab.backends import Problem
from cdat_lab.bases import Base
from cdat_lab.contenders import Contender
from cdat_lab.runs import Recording, Run, RunConfig
from cdat_lab.tasks import Task
from cdat_lab.tuning import Grid, tune

USUAL = Recording()


class Key(NamedTuple):
    """Identifies a result; tasks, bases, contenders and backends by name."""

    task: str
    base: str
    contender: str
    backend: str
    batch_size: int | None
    steps: int
    seed: int


@dataclass(frozen=True)
class Race:
    """Contenders with one base optimizer on one task, over several seeds.

    Attributes
    ----------
    task, base, backend : str
        Names in the registries.
    contenders : tuple of str
        Names in the registry.
    steps : int
        Length of each run.
    seeds : tuple of int
        Each contender runs once per seed; rates are tuned separately for each seed.
    batch_size : int or None
        Rows of a mini-batch; None for the full batch.
    recording : Recording
        What is recorded in the runs, and which loss is the final one.
    """

    task: str
    base: str
    backend: str
    contenders: tuple[str, ...]
    steps: int
    seeds: tuple[int, ...]
    batch_size: int | None = None
    recording: Recording = USUAL

    def key(self, contender: str, seed: int) -> Key:
        """Return the key of the result for a contender and a seed."""
        return Key(self.task, self.base, contender, self.backend, self.batch_size, self.steps, seed)

    def result_keys(self) -> list[Key]:
        """Return the keys of all results, contenders first."""
        return [self.key(name, seed) for name in self.contenders for seed in self.seeds]

    def jobs(self) -> list[Job]:
        """Return the jobs that produce the results, in the order of their keys."""
        return [Job.of(key, self.recording) for key in self.result_keys()]


@dataclass(frozen=True)
class Job:
    """One contender with one seed: a single run, or a grid of runs and its best rate again.

    It holds the objects themselves, so that worker processes need no registry.
    """

    key: Key
    factory: Callable[[int], Task]
    base: Base
    contender: Contender
    recording: Recording = USUAL

    @classmethod
    def of(cls, key: Key, recording: Recording = USUAL) -> Job:
        """Look up the names in the registries."""
        return cls(
            key,
            registry.find_task(key.task),
            registry.find_base(key.base),
            registry.find_contender(key.contender),
            recording,
        )

    @property
    def expected_runs(self) -> int:
        """Number of runs, if the grid does not need to grow."""
        return len(self.base.first_grid) + 4 if self.contender.tuned else 1

    @property
    def expected_steps(self) -> int:
        """Number of training steps in those runs."""
        return self.expected_runs * self.key.steps

    def describe(self) -> str:
        """Return a description for the terminal."""
        batch = "" if self.key.batch_size is None else f", batch {self.key.batch_size}"
        return (
            f"{self.key.task}{batch}, {self.base.label}, {self.contender.label}, "
            f"seed {self.key.seed}, {self.key.backend}"
        )

    def definition(self) -> str:
        """Return the digest of the code that is not part of this package."""
        objects = (self.factory, self.contender.rule, self.base.optax, self.base.torch)
        return provenance.definition(objects)


@dataclass(frozen=True)
class Result:
    """The result of a job.

    Attributes
    ----------
    key : Key
        Identifies the job.
    run : Run
        The run; for a tuned rate, the run at the best rate, with the sharpness recorded.
    grid : Grid or None
        The rates that were tried, if a rate was tuned.
    files : tuple of str
        Names of the files that hold its runs.
    """

    key: Key
    run: Run
    grid: Grid | None
    files: tuple[str, ...]


Results = Mapping[Key, Result]


class MissingRunError(LookupError):
    """A run does not exist yet."""


def execute(
    jobs: Iterable[Job],
    folder: Path,
    *,
    resume: bool,
    processes: int,
    finished: Callable[[Job, Result], None] | None = None,
) -> dict[Key, Result]:
    """Run jobs in worker processes, longest first.

    Parameters
    ----------
    jobs : iterable of Job
        The jobs to run.
    folder : Path
        Where the files of the runs are written, each atomically.
    resume : bool
        Reuse existing runs with the same configuration, versions and code.
    processes : int
        Number of worker processes; with 1 everything runs in this process. To use another backend
        of joblib, put the call inside ``joblib.parallel_config("dask")``.
    finished : callable
        Called in this process with each job and its result when it is done.

    Returns
    -------
    dict of Key to Result
    """
    jobs = list(jobs)
    by_key = {job.key: job for job in jobs}
    parallel = joblib.Parallel(
        n_jobs=processes,
        return_as="generator_unordered",
        batch_size=1,
        pre_dispatch=2 * processes,
    )
    results: dict[Key, Result] = {}
    groups = _groups(jobs, processes)
    with warnings.catch_warnings():
        # loky replaces a worker whose memory has grown, here by compiling; no work is lost.
        warnings.filterwarnings("ignore", message="A worker stopped while some jobs")
        for group in parallel(joblib.delayed(_run_group)(jobs, folder, resume) for jobs in groups):
            for result in group:
                results[result.key] = result
                if finished is not None:
                    finished(by_key[result.key], result)
    return results


def _groups(jobs: list[Job], processes: int) -> list[list[Job]]:
    """Group jobs that share a compiled program, so that one process compiles it once.

    If that leaves processes idle, each job is a group. The longest group comes first.
    """
    by_program: dict[Any, list[Job]] = {}
    for job in jobs:
        c = job.contender
        program = (job.key._replace(contender="", seed=0), c.rule, c.curvature, c.optimizer)
        by_program.setdefault(program, []).append(job)
    groups = list(by_program.values())
    if len(groups) < 2 * processes:
        groups = [[job] for job in jobs]
    return sorted(groups, key=lambda group: -sum(job.expected_steps for job in group))


def _run_group(jobs: list[Job], folder: Path, resume: bool) -> list[Result]:
    return [run_job(job, folder, resume=resume) for job in jobs]


def collect(jobs: Iterable[Job], folder: Path) -> dict[Key, Result]:
    """Return the results of the jobs whose runs all exist, without training."""
    results = {}
    for job in jobs:
        with contextlib.suppress(MissingRunError):
            results[job.key] = run_job(job, folder, resume=True, train=False)
    return results


def run_job(job: Job, folder: Path, *, resume: bool, train: bool = True) -> Result:
    """Run one job; this is what a worker process executes.

    Raises
    ------
    MissingRunError
        If `train` is false and a run does not exist.
    """
    if current_process().name != "MainProcess":
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process stops the workers
    files: list[str] = []
    contender = job.contender

    def run(tuned: Mapping[str, float], *, sharpness: bool) -> Run:
        sharpness &= job.recording.sharpness
        config = _config(job, {**contender.settings(job.base), **tuned}, sharpness=sharpness)
        file = config.file_name()
        path = folder / file
        kept = _kept(path) if resume or file in files else None
        files.append(file)
        if kept is None and not train:
            msg = f"there is no {path}"
            raise MissingRunError(msg)
        if kept is None:
            kept = _train(job, config)
            runs.write(kept, path)
        return kept

    with backends.single_threaded():
        if contender.tuned is None:
            return Result(job.key, run({}, sharpness=True), None, tuple(files))
        name = contender.tuned

        def final_loss(rate: float) -> float:
            tried = run({name: rate}, sharpness=False)
            return float("inf") if tried.diverged else tried.final_loss

        grid = tune(final_loss, job.base.first_grid)
        best = run({name: grid.rates[grid.best]}, sharpness=True)
        return Result(job.key, best, grid, tuple(files))


def _config(job: Job, hyperparameters: Mapping[str, float], *, sharpness: bool) -> RunConfig:
    key = job.key
    return RunConfig(
        task=key.task,
        base=key.base,
        contender=key.contender,
        backend=key.backend,
        steps=key.steps,
        seed=key.seed,
        batch_size=key.batch_size,
        hyperparameters=hyperparameters,
        sharpness=sharpness,
        record_every=max(1, key.steps // job.recording.records),
        definition=job.definition(),
        last_part=job.recording.last_part,
    )


def _kept(path: Path) -> Run | None:
    """Return the run in a file; None if the file is missing or incomplete."""
    if not path.exists():
        return None
    try:
        return runs.read(path)
    except ValueError:
        return None


def _train(job: Job, config: RunConfig) -> Run:
    problem = Problem(
        task=_task(job.factory, job.key.task, config.seed),
        base=job.base,
        contender=job.contender,
        hyperparameters=config.hyperparameters,
        steps=config.steps,
        record_every=config.record_every,
        sharpness=config.sharpness,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    trajectory = backends.load(config.backend)(problem)
    frame = runs.to_frame(problem, trajectory, backend=config.backend)
    return Run(config.identity(), trajectory.compile_seconds, frame)


@functools.lru_cache(maxsize=8)
def _task(factory: Callable[[int], Task], name: str, seed: int) -> Task:
    task = factory(seed)
    if task.name != name:
        msg = f"the factory of task {name!r} returned task {task.name!r}; the names must be equal"
        raise ValueError(msg)
    return task
