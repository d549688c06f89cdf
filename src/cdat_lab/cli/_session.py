"""Shared by the commands that train: progress, interrupts, tables and the report."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import typer

from cdat_lab import backends, terminal
from cdat_lab.agreement import agreement
from cdat_lab.cli import _options
from cdat_lab.conduct import RUNS, conduct
from cdat_lab.findings import Findings
from cdat_lab.report import write_report
from cdat_lab.studies import Study


def carry_out(
    study: Study,
    folder: Path,
    *,
    jobs: int | None,
    resume: bool,
    quiet: bool,
    dask: str | None,
    notices: tuple[str, ...] = (),
) -> Findings:
    """Train, print the results, write the report; exit with status 130 on an interrupt."""
    console = terminal.make_console(quiet=quiet)
    _options.writable(folder)
    work = study.jobs()
    processes = _options.process_count(jobs, len(work))
    used = dict.fromkeys(race.backend for race in study.all_races())
    described = [backends.BACKENDS[name].describe() for name in used]
    others = [
        b.describe() for b in backends.BACKENDS.values() if b.name not in used and b.missing()
    ]
    if used:
        console.print(f"backends: {'; '.join([*described, *others])}", markup=False)
    for notice in notices:
        console.print(f"note: {notice}", markup=False)
    if work:
        where = f"dask at {dask}" if dask else f"{processes} process{'es'[: 2 * (processes > 1)]}"
        console.print(f"{len(work)} jobs, {where}; results in {folder}", markup=False)
    try:
        with _scheduled(dask), terminal.JobProgress(console, work) as progress:
            findings = conduct(
                study, folder, resume=resume, processes=processes, finished=progress.finished
            )
    except KeyboardInterrupt:
        typer.echo(
            f"interrupted; finished runs are in {folder / RUNS}, --resume continues", err=True
        )
        raise typer.Exit(_options.INTERRUPTED) from None
    agreed = agreement(findings)
    findings = findings.noted(*notices, *([agreed] if agreed else []))
    present(findings, folder, quiet=quiet)
    return findings


def present(findings: Findings, folder: Path, *, quiet: bool) -> None:
    """Print the findings and write the report."""
    terminal.show(terminal.make_console(quiet=quiet), findings)
    path = write_report(findings, folder)
    typer.echo(str(path) if quiet else f"\nreport: {path}")


@contextlib.contextmanager
def _scheduled(address: str | None) -> Iterator[None]:
    """Send the jobs started inside the block to a dask cluster, if there is an address."""
    if address is None:
        yield
        return
    try:
        distributed: Any = importlib.import_module("distributed")
    except ImportError:
        _options.fail("--dask needs the package distributed (pip install distributed)")
    try:
        client = distributed.Client(address, timeout=10)
    except (OSError, ValueError) as error:
        _options.fail(f"cannot reach a dask scheduler at {address}: {error}")
    with client, joblib.parallel_config("dask"):
        yield
