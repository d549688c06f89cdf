"""Comparisons of contenders on one task, from Python and for the command line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from cdat_lab import backends, conduct, registry
from cdat_lab.claims import STATEMENTS
from cdat_lab.findings import Findings
from cdat_lab.races import Race
from cdat_lab.report import write_report
from cdat_lab.studies import Study, eligible

BASES = ("adam", "momentum")
CONTENDERS = ("constant", "warmup-cosine", "armijo", "greedy", "cdat-1.9", "cdat-2-ema-0.9")


def study(
    task: str,
    *,
    bases: Iterable[str] = BASES,
    contenders: Iterable[str] = CONTENDERS,
    backend_names: Sequence[str],
    steps: int | None = None,
    batch_size: int | None = None,
    seeds: Sequence[int] = (0,),
    command: str = "cdat compare",
) -> tuple[Study, tuple[str, ...]]:
    """Return the study of one task, and a reason for each contender that cannot run.

    Parameters
    ----------
    task, bases, contenders
        Names in the registries.
    backend_names : sequence of str
        Names of backends; each base has one race under each of them.
    steps : int, optional
        Length of each run; by default the task's budget for the base.
    batch_size : int, optional
        Rows of a mini-batch; by default all data.
    seeds : sequence of int
        Each contender runs once for each seed.
    command : str
        The command line that repeats the study.

    Raises
    ------
    ValueError
        If a name is unknown, the batch is larger than the data, or nothing can run.
    """
    problem = registry.find_task(task)(seeds[0])
    problem.check_batch_size(batch_size)
    names = dict.fromkeys(registry.find_contender(name).name for name in contenders)
    races, reasons = [], []
    for base in dict.fromkeys(bases):
        for backend in backend_names:
            kept, left_out = eligible(names, base=base, backend=backend)
            reasons += left_out
            if kept:
                length = problem.budget(base) if steps is None else steps
                races.append(
                    Race(task, base, backend, tuple(kept), length, tuple(seeds), batch_size)
                )
    reasons = list(dict.fromkeys(reasons))
    if not races:
        msg = f"nothing to run: {'; '.join(reasons)}"
        raise ValueError(msg)
    plan = Study(
        title=f"Learning-rate tuners on {task}",
        command=command,
        races=tuple(races),
        claims=tuple(STATEMENTS),
    )
    return plan, tuple(reasons)


def compare(
    task: str,
    *,
    bases: Iterable[str] = BASES,
    contenders: Iterable[str] = CONTENDERS,
    backend: str | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    seeds: Sequence[int] = (0,),
    folder: Path | str = "cdat-results",
    processes: int = 1,
    resume: bool = False,
) -> Findings:
    """Train with every contender on a task and write the report, as ``cdat compare`` does.

    Parameters
    ----------
    task : str
        Name of a task, built-in or your own; see `register_task`.
    bases, contenders : iterable of str
        Names of base optimizers and of learning-rate rules.
    backend : str, optional
        "jax", "torch" or "numpy"; by default the first one installed.
    steps, batch_size, seeds
        See `study`.
    folder : Path or str
        Where the runs, the tables and the report are written.
    processes : int
        Worker processes.
    resume : bool
        Reuse finished runs with the same configuration, versions and code.

    Returns
    -------
    Findings
        ``findings.results[key].run.frame`` has the trajectory of each run.

    Raises
    ------
    ValueError
        If a name is unknown, the batch is larger than the data, or nothing can run.

    Examples
    --------
    >>> import tempfile
    >>> from cdat_lab import compare
    >>> rules = ["constant", "cdat-1.9"]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = compare("digits", bases=["adam"], contenders=rules, steps=30, folder=folder)
    >>> ends = {key.contender: result.run.final_loss for key, result in found.results.items()}
    >>> ends["cdat-1.9"] < 0.5
    True
    """
    if backend is not None and backend not in backends.BACKENDS:
        known = ", ".join(backends.BACKENDS)
        msg = f"there is no backend {backend!r}; choose one of: {known}"
        raise ValueError(msg)
    chosen = backends.available()[0].name if backend is None else backend
    plan, reasons = study(
        task,
        bases=bases,
        contenders=contenders,
        backend_names=(chosen,),
        steps=steps,
        batch_size=batch_size,
        seeds=seeds,
    )
    found = conduct.conduct(plan, Path(folder), resume=resume, processes=processes)
    findings = found.noted(*reasons)
    write_report(findings, Path(folder))
    return findings
