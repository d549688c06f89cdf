"""The command line: ``cdat``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import joblib
import typer

from cdat_lab import backends, runs, tasks
from cdat_lab.compare import Comparison, execute, plan
from cdat_lab.contenders import CONTENDERS
from cdat_lab.report import write_report
from cdat_lab.tasks import TASKS
from cdat_lab.terminal import JobProgress, make_console, show

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

INTERRUPTED = 130


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cdat {runs.version('cdat')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Curvature-aware learning rates: reproduce and compare."""


def _known_task(name: str) -> str:
    if name not in TASKS:
        msg = f"there is no task {name!r}; choose one of: {', '.join(TASKS)}"
        raise typer.BadParameter(msg)
    return name


def _known_backend(name: str) -> str:
    if name not in {"all", *backends.BACKENDS}:
        msg = f"there is no backend {name!r}; choose one of: all, {', '.join(backends.BACKENDS)}"
        raise typer.BadParameter(msg)
    return name


@app.command()
def compare(
    task: Annotated[str, typer.Argument(callback=_known_task, help=f"One of: {', '.join(TASKS)}.")],
    backend: Annotated[
        str, typer.Option(callback=_known_backend, help="jax, torch, or all that are installed.")
    ] = "all",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = 400,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data and weights.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder of the results.  [default: cdat-results/TASK]"),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Worker processes.  [default: one for each CPU core]")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Keep finished runs of the same configuration, versions and code."
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing but the path of the report.")
    ] = False,
) -> None:
    """Train with every learning-rate rule on a task; write a table and an HTML report."""
    console = make_console(quiet=quiet)
    chosen = _choose(backend)
    described = "; ".join(b.describe() for b in backends.BACKENDS.values() if _shown(b, backend))
    console.print(f"backends: {described}", markup=False)

    folder = out or Path("cdat-results") / task
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"cannot write to {folder}: {error.strerror}"
        raise _failure(reason) from error
    work = plan(
        task,
        backends=tuple(b.name for b in chosen),
        steps=steps,
        seed=seed,
        folder=folder / "runs",
        resume=resume,
    )
    processes = min(jobs or joblib.cpu_count(), len(work))
    console.print(
        f"{task}: {steps} steps, seed {seed}, {len(CONTENDERS)} contenders, "
        f"{processes} process{'es' if processes > 1 else ''}",
        markup=False,
    )
    try:
        with JobProgress(console, work) as progress:
            results = execute(work, processes=processes, finished=progress.finished)
    except KeyboardInterrupt:
        typer.echo(
            f"interrupted; finished runs are in {folder / 'runs'}, --resume continues", err=True
        )
        raise typer.Exit(INTERRUPTED) from None
    comparison = Comparison(
        task=task,
        description=tasks.load(task, seed).description,
        steps=steps,
        seed=seed,
        backends=tuple(b.name for b in chosen),
        results=tuple(results),
    )
    show(console, comparison)
    report = write_report(comparison, folder)
    typer.echo(str(report) if quiet else f"\nreport: {report}")


def _choose(name: str) -> list[backends.Backend]:
    """Return the backends to use, or end with a message that says what to install."""
    if name != "all":
        wanted = backends.BACKENDS[name]
        if wanted.missing():
            raise _failure(wanted.describe())
        return [wanted]
    chosen = backends.available()
    if not chosen:
        described = "; ".join(b.describe() for b in backends.BACKENDS.values())
        reason = f"no backend is installed: {described}"
        raise _failure(reason)
    return chosen


def _shown(backend: backends.Backend, name: str) -> bool:
    return name in {"all", backend.name}


def _failure(message: str) -> typer.Exit:
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(1)
