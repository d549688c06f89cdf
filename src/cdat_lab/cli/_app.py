"""The ``cdat`` command and its subcommands."""

from __future__ import annotations

from typing import Annotated

import typer

from cdat_lab import provenance
from cdat_lab.cli import _compare, _inspect, _race, _reproduce, _simulate

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cdat {provenance.version('cdat')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Curvature-aware learning rates: reproduce the paper, and compare learning-rate rules."""


app.command("compare")(_compare.compare)
app.command("reproduce")(_reproduce.reproduce)
app.command("race")(_race.race)
app.command("simulate")(_simulate.simulate)
app.command("sharpness")(_inspect.sharpness)
app.command("tasks")(_inspect.tasks)
app.command("report")(_inspect.report)
