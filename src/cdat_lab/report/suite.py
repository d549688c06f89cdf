"""Sections of the suite `self-tuning`: verdict, picture, standings and every setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from cdat_lab import self_tuning, standings, table
from cdat_lab.findings import Findings
from cdat_lab.registry import find_base, find_task
from cdat_lab.report import figures_standings
from cdat_lab.report.charts import CROSS, Chart
from cdat_lab.report.curve_styles import BLUE, MIXED, Style
from cdat_lab.report.rendering import render_template
from cdat_lab.report.sections import Section

Styles = Mapping[str, Style]


def sections(findings: Findings, styles: Styles) -> list[Section]:
    """Return the sections; none if nothing was trained."""
    frame = standings.ratios(findings)
    if frame["ratio"].is_null().all():
        return []
    looks = dict(styles)
    looks[f"{self_tuning.OURS}-{standings.EQUAL_COST}"] = Style(BLUE, MIXED, 2.0)
    return [_summary(frame, looks), _settings(findings, frame)]


def _summary(frame: pl.DataFrame, styles: Styles) -> Section:
    figure, arrangements = figures_standings.strips(frame, styles)
    chart = Chart(
        "standings-figure",
        figure,
        "Final training loss of every run relative to the tuned constant rate, by contender",
        arrangements=arrangements,
    )
    tables = [
        {
            "title": f"{title[0].upper()}{title[1:]} ({max(rows['settings'].to_list())})",
            "rows": [_row(row, styles) for row in rows.iter_rows(named=True)],
        }
        for title, rows in standings.groups(frame)
    ]
    body = render_template(
        "standings",
        checks=standings.checks(frame),
        chart=chart,
        tables=tables,
        headings=standings.HEADINGS,
        ceiling=standings.CEILING,
        clip=standings.CLIP,
        close=standings.CLOSE,
    )
    return Section("standings", "Standings", body, "Everything relative to the tuned constant rate")


def _row(row: Mapping[str, Any], styles: Styles) -> dict[str, Any]:
    label, *numbers = standings.cells(row)
    ours = row["entrant"].startswith(self_tuning.OURS)
    style = styles[row["entrant"]]
    return {"style": style, "label": label, "numbers": numbers, "ours": ours}


def _settings(findings: Findings, frame: pl.DataFrame) -> Section:
    names = standings.entrants(frame)  # the tuned constant rate first
    labels = dict(frame.select("entrant", "label").unique().iter_rows())
    means = standings.by_setting(frame)
    place = ["side", "task", "base", "batch_size"]
    rows = []
    for (side, task, base, size), there in means.group_by(place, maintain_order=True):
        found = {row["entrant"]: row for row in there.iter_rows(named=True)}
        runs = frame.filter((pl.col("task") == task) & (pl.col("base") == base))
        rows.append(
            {
                "side": side,
                "setting": f"{task}, {find_base(str(base)).label}, {table.batch(size)}",
                "description": find_task(str(task))(findings.study.races[0].seeds[0]).description,
                "ratios": [_ratio(found.get(name), "ratio") for name in names[1:]],
                "validation": [_ratio(found.get(name), "validation_ratio") for name in names[1:]],
                "runs": [(labels[name], *_seeds(runs, name)) for name in names],
            }
        )
    body = render_template(
        "settings",
        headings=("setting", *(labels[name] for name in names[1:])),
        rows=rows,
    )
    return Section("settings", "Every setting", body)


def _ratio(row: Mapping[str, Any] | None, column: str) -> str:
    if row is None:
        return ""
    crosses = f" {CROSS}{row['diverged']}" if row["diverged"] and column == "ratio" else ""
    return table.fixed(row[column]) + crosses


def _seeds(runs: pl.DataFrame, name: str) -> tuple[str, str, str, str]:
    """Return steps, tuned rates, training losses and validation losses of each seed."""
    found = runs.filter(pl.col("entrant") == name).sort("seed")
    tuned = [table.power_of_two(rate) for rate in found["tuned"]]
    return (
        ", ".join(dict.fromkeys(str(steps) for steps in found["steps"])),
        ", ".join(filter(None, tuned)),
        ", ".join(table.number(loss) for loss in found["final_loss"]),
        ", ".join(table.number(loss) for loss in found["validation_loss"]),
    )
