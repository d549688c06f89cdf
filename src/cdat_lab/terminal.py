"""What a comparison prints: progress while it runs, tables when it is done."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

import polars as pl
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cdat_lab import summary, table
from cdat_lab.bases import BASES, Base
from cdat_lab.compare import Comparison, Job, Result

PLAIN_WIDTH = 110
"""Characters in a line where the output is no terminal."""

WIDE_ONLY = {"runs", "best loss", "sharpness"}
"""Columns that are left out on a terminal with shorter lines than that."""


def make_console(*, quiet: bool = False) -> Console:
    """Return the console on standard output."""
    console = Console(quiet=quiet, highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


class JobProgress:
    """Progress over jobs: a live bar on a terminal, plain lines elsewhere.

    Parameters
    ----------
    console : Console
        Where to print.
    jobs : list of Job
        The work ahead.
    """

    def __init__(self, console: Console, jobs: list[Job]) -> None:
        self._console = console
        self._total = len(jobs)
        self._done = 0
        self._started = time.monotonic()
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left   {task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=sum(j.expected_runs for j in jobs))

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

    def finished(self, result: Result) -> None:
        """Show that a job is done."""
        self._done += 1
        text = f"{result.job.describe()}: final loss {table.number(result.run.final_loss)}"
        if self._console.is_terminal:
            self._bar.update(self._task, advance=result.job.expected_runs, description=text)
        else:
            seconds = time.monotonic() - self._started
            self._console.print(
                f"[{self._done}/{self._total}] {seconds:.0f} s  {text}", markup=False
            )


def show(console: Console, comparison: Comparison) -> None:
    """Print the results, the times and the summary."""
    for base in BASES.values():
        console.print(_results(comparison, base, wide=console.width >= PLAIN_WIDTH))
    console.print(table.CAPTION, style="dim")
    console.print()
    console.print(_timings(table.timings(comparison)))
    console.print()
    for topic, text in summary.findings(comparison):
        console.print(Text.assemble((f"{topic}: ", "bold"), text))


def _results(comparison: Comparison, base: Base, *, wide: bool) -> Table:
    kept = [i for i, name in enumerate(table.HEADINGS) if wide or name not in WIDE_ONLY]
    kept = kept[1:]  # the base is in the title
    frame = table.results(comparison).filter(pl.col("base") == base.label)
    rows = [[table.cells(row)[index] for index in kept] for row in frame.iter_rows(named=True)]
    shown = Table(
        title=f"{base.label}: {comparison.task}, {comparison.steps} steps, seed {comparison.seed}",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        padding=(0, 0, 0, 1),
    )
    for column, index in enumerate(kept):
        heading = table.HEADINGS[index]
        whole = [*heading.split(), *(row[column] for row in rows)]  # only headings are wrapped
        width = None if heading == "note" else max(map(len, whole))
        right = index in table.NUMBERS
        shown.add_column(heading, justify="right" if right else "left", width=width)
    before = ""
    for contender, *rest in rows:
        style = "bold" if "lowest" in rest[-1] else ""
        shown.add_row("" if contender == before else contender, *rest, style=style)
        before = contender
    return shown


def _timings(frame: pl.DataFrame) -> Table:
    shown = Table(
        title="Milliseconds per step (wall clock, no compilation; not part of the results)",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    for name in frame.columns:
        shown.add_column(name, justify="left" if name in {"base", "contender"} else "right")
    before = ""
    for row in frame.iter_rows():
        if before and before != row[0]:
            shown.add_section()
        shown.add_row("" if row[0] == before else row[0], row[1], *(f"{x:.2f}" for x in row[2:]))
        before = row[0]
    return shown
