"""The HTML page and the CSV files next to it."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from cdat_lab import standings, storage, table
from cdat_lab.claims import STATEMENTS
from cdat_lab.findings import Findings
from cdat_lab.measures import REFERENCE
from cdat_lab.report import results, sections, suite
from cdat_lab.report.curve_styles import Style, styles
from cdat_lab.report.rendering import render_template


def write_report(findings: Findings, folder: Path) -> Path:
    """Write ``report.html``, ``verdicts.csv`` and ``table.csv``, each atomically.

    A suite also has a ``standings.csv``: every run relative to the tuned constant rate.

    Parameters
    ----------
    findings : Findings
        The findings of a study; results may be missing.
    folder : Path
        Where the files are written; it is created.

    Returns
    -------
    Path
        The page. For the same results, the files are byte-identical.
    """
    storage.write_text(folder / "table.csv", table.to_csv(table.rows(findings)))
    storage.write_text(folder / "verdicts.csv", table.to_csv(verdicts(findings)))
    if findings.study.suite:
        frame = standings.ratios(findings).drop("time_per_step")
        storage.write_text(folder / "standings.csv", table.to_csv(frame))
    path = folder / "report.html"
    storage.write_text(path, render(findings))
    return path


def render(findings: Findings) -> str:
    """Return the page, with scripts, styles and data inside."""
    looks = _styles(findings)
    found = [
        sections.verdicts(findings),
        *(suite.sections if findings.study.suite else results.races)(findings, looks),
        *results.sweeps(findings),
        results.joint_model(findings, looks),
        results.grids(findings, looks),
        sections.times(findings),
        sections.configuration(findings),
    ]
    parts = [part for part in found if part is not None]
    page = render_template(
        "page",
        title=findings.study.title,
        plotly=Markup(get_plotlyjs()),
        header=sections.header(findings, parts),
        sections=parts,
    )
    return str(page)


def verdicts(findings: Findings) -> pl.DataFrame:
    """Return one row for each verdict; ``values`` are the numbers of the seeds, as JSON."""
    columns = ("claim", "statement", "setting", "expected", "measured", "outcome", "values")
    return pl.DataFrame(
        [
            (
                verdict.claim,
                STATEMENTS.get(verdict.claim, ""),
                verdict.setting,
                verdict.expected,
                verdict.measured,
                verdict.outcome,
                json.dumps([float(value) for value in verdict.values]),
            )
            for verdict in findings.verdicts
        ],
        schema=dict.fromkeys(columns, pl.String),
        orient="row",
    )


def _styles(findings: Findings) -> dict[str, Style]:
    names = [name for race in findings.study.races for name in race.contenders]
    names += [simulation.contender.name for simulation in findings.simulations]
    return styles([*names, REFERENCE])
