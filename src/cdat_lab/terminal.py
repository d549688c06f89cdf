"""What a command prints: progress while it runs, tables and verdicts when it is done."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

import polars as pl
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cdat_lab import claims, measures, registry, self_tuning, standings, table
from cdat_lab.backends import Problem
from cdat_lab.findings import Findings
from cdat_lab.races import Job, Race, Result
from cdat_lab.studies import Sweep

PLAIN_WIDTH = 118
"""Line width if the output is not a terminal."""

WIDE_ONLY = {"tuning runs", "skipped"}
"""Columns that are left out on narrower terminals."""

SIGNS = {"holds": "+", "in part": "~", "does not hold": "-", "unknown": "?"}
STYLES = {"holds": "green", "in part": "yellow", "does not hold": "red", "unknown": "dim"}


def make_console(*, quiet: bool = False) -> Console:
    """Return the console on standard output."""
    console = Console(quiet=quiet, highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


class JobProgress:
    """Progress over jobs: a live bar with the time left on a terminal, plain lines elsewhere.

    Parameters
    ----------
    console : Console
        Where to print.
    jobs : list of Job
        The jobs to run; the time left is estimated from their training steps.
    """

    def __init__(self, console: Console, jobs: list[Job]) -> None:
        self._console = console
        self._total = len(jobs)
        self._done = 0
        self._started = time.monotonic()
        self._bar = Progress(
            BarColumn(),
            TextColumn("{task.fields[jobs]}"),
            TimeRemainingColumn(),
            TextColumn("left   {task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal or not jobs,
        )
        self._task = self._bar.add_task(
            "starting", total=sum(job.expected_steps for job in jobs), jobs=f"0/{self._total}"
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def finished(self, job: Job, result: Result) -> None:
        """Show that a job is done."""
        self._done += 1
        text = f"{job.describe()}: loss {table.number(result.run.final_loss)}"
        done = f"{self._done}/{self._total}"
        if self._console.is_terminal:
            self._bar.update(self._task, advance=job.expected_steps, description=text, jobs=done)
        else:
            seconds = time.monotonic() - self._started
            self._console.print(f"[{done}] {seconds:.0f} s  {text}", markup=False)


def show(console: Console, findings: Findings) -> None:
    """Print a table for each race, the joint model, the verdicts and the notices."""
    if findings.study.suite:
        _show_standings(console, findings)
    else:
        for race in findings.study.races:
            console.print(_race_table(findings, race, wide=console.width >= PLAIN_WIDTH))
        if findings.study.races:
            console.print(table.CAPTION, style="dim", markup=False)
    for sweep in findings.study.sweeps:
        console.print(_sweep_table(findings, sweep))
    if findings.simulations:
        console.print(_simulation_table(findings))
    if findings.verdicts:
        console.print(_verdict_table(findings))
    for notice in findings.notices:
        console.print(f"note: {notice}", markup=False)


def _show_standings(console: Console, findings: Findings) -> None:
    """Print the standings of a suite and the verdict on the self-tuning rule."""
    frame = standings.ratios(findings)
    for title, rows in standings.groups(frame):
        shown = _table(f"{title}: final loss relative to the tuned constant rate")
        for index, heading in enumerate(standings.HEADINGS):
            shown.add_column(heading, justify="right" if index else "left", no_wrap=not index)
        for row in rows.iter_rows(named=True):
            cells = standings.cells(row)
            style = "bold" if row["entrant"].startswith(self_tuning.OURS) else ""
            shown.add_row(*map(Text, cells), style=style)
        console.print(shown)
    for check in standings.checks(frame):
        sign = SIGNS["holds" if check.passed else "does not hold"]
        console.print(f"{sign} {check.required}: {check.measured}", markup=False)


def show_list(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print names with their descriptions."""
    shown = _table(title)
    shown.add_column("name", no_wrap=True)
    shown.add_column("description")
    for name, text in rows:
        shown.add_row(Text(name), Text(text))
    console.print(shown)


def show_sharpness(console: Console, problem: Problem, frame: pl.DataFrame) -> None:
    """Print loss, rate, sharpness and rate times sharpness at the records of a run."""
    base = problem.base
    kind = "preconditioned sharpness" if base.preconditioned else "sharpness"
    shown = _table(f"{problem.task.name}, {base.label}, {problem.contender.label}")
    product = pl.col("learning_rate") * pl.col("sharpness")
    names = ["step", "loss on all data", "learning rate", kind, "rate x sharpness"]
    columns = [pl.col("full_loss"), pl.col("learning_rate"), pl.col("sharpness"), product]
    if base.edge is not None:
        names.append("relative to edge")
        columns.append(product / base.edge)
    for name in names:
        shown.add_column(name, justify="right")
    rows = frame[problem.record_steps().tolist()].select(
        "step", *(column.alias(f"column{index}") for index, column in enumerate(columns))
    )
    for step, *numbers in rows.iter_rows():
        shown.add_row(f"{step}", *("" if x is None else table.number(x) for x in numbers))
    console.print(shown)
    if base.edge is not None:
        console.print(f"edge of stability: rate x sharpness = {base.edge:.3g}", markup=False)


def _race_table(findings: Findings, race: Race, *, wide: bool) -> Table:
    """Return the table of a race; on a narrow terminal some columns are left out."""
    base = registry.find_base(race.base)
    seeds = f"seed {race.seeds[0]}" if len(race.seeds) == 1 else f"{len(race.seeds)} seeds"
    shown = _table(
        f"{race.task}, {base.label}, {table.batch(race.batch_size)}, {race.backend}: "
        f"{race.steps} steps, {seeds}"
    )
    headings = table.headings(base)
    kept = [i for i, heading in enumerate(headings) if wide or heading not in WIDE_ONLY]
    for index in kept:
        right = index in table.NUMBERS
        shown.add_column(headings[index], justify="right" if right else "left", overflow="fold")
    for row in table.results(findings, race).iter_rows(named=True):
        cells = table.cells(row, base)
        style = "bold" if row["lowest"] else ""
        shown.add_row(*(Text(cells[index]) for index in kept), style=style)
    return shown


def _verdict_table(findings: Findings) -> Table:
    shown = _table("Verdicts (claims: arXiv:2407.06183; settings and ranges: ours)")
    for heading in ("claim", "setting", "required", "measured", "verdict"):
        shown.add_column(heading, overflow="fold")
    before = ""
    for verdict in findings.verdicts:
        if before and before != verdict.claim:
            shown.add_section()
        shown.add_row(
            "" if verdict.claim == before else verdict.claim,
            Text(verdict.setting),
            Text(verdict.expected),
            Text(verdict.measured),
            Text(f"{SIGNS[verdict.outcome]} {verdict.outcome}", style=STYLES[verdict.outcome]),
        )
        before = verdict.claim
    shown.caption = "\n".join(
        f"{claim}: {claims.STATEMENTS[claim]}"
        for claim in dict.fromkeys(verdict.claim for verdict in findings.verdicts)
    )
    shown.caption_justify = "left"
    return shown


def _sweep_table(findings: Findings, sweep: Sweep) -> Table:
    """Return the table of CDAT's loss relative to the tuned constant rate, by sigma and batch."""
    label = registry.find_base(sweep.base).label
    shown = _table(
        f"{sweep.task}, {label}, {sweep.backend}: loss of CDAT (EMA {sweep.decay:g}) relative to "
        "the tuned constant rate"
    )
    shown.add_column("sigma", justify="right")
    for size in sweep.batch_sizes:
        shown.add_column("full batch" if size is None else f"batch {size}", justify="right")
    ratios = measures.sweep_ratios(sweep, findings.results)
    for sigma, row in zip(sweep.sigmas, ratios, strict=True):
        shown.add_row(f"{sigma:g}", *map(table.number, row))
    return shown


def _simulation_table(findings: Findings) -> Table:
    shown = _table("Joint model: sharpness, and rate x sharpness at the end")
    first = findings.simulations[0]
    times = (f"at step {first.steps // 2}", f"at step {first.steps}")
    for heading in ("rule", *times, "rate x sharpness"):
        shown.add_column(heading, justify="left" if heading == "rule" else "right")
    for run in findings.simulations:
        halfway, last = run.sharpness[run.steps // 2], run.sharpness[-1]
        product = run.learning_rate[-1] * run.sharpness[-2]
        shown.add_row(run.contender.label, *map(_range, (halfway, last, product)))
    return shown


def _range(values: Sequence[float]) -> str:
    low, high = (f"{value:.3g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 0, 0, 1))
