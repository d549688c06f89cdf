"""The figure of a sweep: a heat map over batch size and sigma."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

from cdat_lab import table
from cdat_lab.findings import Findings
from cdat_lab.report import figure_layout
from cdat_lab.report.charts import CROSS, MINUS, NOTHING
from cdat_lab.report.curve_styles import BLACK, BLUE, VERMILLION
from cdat_lab.studies import Sweep

BETTER_OR_WORSE = [
    [0, BLUE],
    [0.25, "#7FB2D9"],
    [0.5, "#F7F7F7"],
    [0.75, "#EFAE7F"],
    [1, VERMILLION],
]
"""Blue and orange, which colour-blind people can tell apart, and white for no change."""


def heat_map(findings: Findings, plan: Sweep) -> go.Figure:
    """Return log10 of the final loss relative to the tuned constant, by batch size and sigma.

    Parameters
    ----------
    findings : Findings
        The findings of a study.
    plan : Sweep
        The sweep to draw.

    Returns
    -------
    plotly.graph_objects.Figure
        Each cell contains its number; the best sigma of a batch size has a frame; a cross marks
        runs that diverged, a dash missing ones.
    """
    frame = table.sweep(findings, plan)
    limit = _limit(frame)
    sizes, sigmas = list(plan.batch_sizes), list(plan.sigmas)
    values = np.full((len(sigmas), len(sizes)), np.nan)
    notes, frames = [], []
    for index, row in enumerate(frame.iter_rows(named=True)):
        x, y = divmod(index, len(sigmas))
        if row["log_ratio"] is not None:
            values[y, x] = row["log_ratio"]
        text = cell(row, len(plan.seeds))
        dark = row["log_ratio"] is not None and abs(row["log_ratio"]) > 0.7 * limit
        notes.append(
            {
                "x": x,
                "y": y,
                "text": f"<b>{text}</b>" if row["best"] else text,
                "showarrow": False,
                "font": {"size": 14, "color": "#ffffff" if dark else "#111111"},
            }
        )
        if row["best"]:
            frames.append(
                {
                    "type": "rect",
                    "x0": x - 0.47,
                    "x1": x + 0.47,
                    "y0": y - 0.46,
                    "y1": y + 0.46,
                    "line": {"color": BLACK, "width": 3},
                }
            )
    ratios = np.where(np.isfinite(values), 10**values, np.nan)
    heat = go.Heatmap(
        x=list(range(len(sizes))),
        y=list(range(len(sigmas))),
        z=[[_or_none(value) for value in line] for line in values],
        customdata=[[_or_none(value) for value in line] for line in ratios],
        colorscale=BETTER_OR_WORSE,
        zmin=-limit,
        zmax=limit,
        xgap=3,
        ygap=3,
        hoverongaps=False,
        hovertemplate="%{customdata:.3~g} times the loss of the tuned constant<extra></extra>",
        colorbar={
            "thickness": 14,
            "title": {"text": "log<sub>10</sub>"},
            "len": 1,
            "outlinewidth": 0,
        },
    )
    figure = go.Figure(heat)
    figure.update_layout(
        figure_layout.common(
            height=110 + 46 * len(sigmas),
            margin={"l": 62, "r": 10, "t": 16, "b": 58},
            plot_bgcolor="#d4d4d4",
            annotations=notes,
            shapes=frames,
            xaxis=figure_layout.axis(
                "batch size",
                tickvals=list(range(len(sizes))),
                ticktext=["full" if size is None else f"{size}" for size in sizes],
                showgrid=False,
                range=[-0.5, len(sizes) - 0.5],
            ),
            yaxis=figure_layout.axis(
                "sigma",
                tickvals=list(range(len(sigmas))),
                ticktext=[f"{sigma:g}" for sigma in sigmas],
                showgrid=False,
                range=[-0.5, len(sigmas) - 0.5],
            ),
        )
    )
    return figure


def cell(row: Mapping[str, Any], seeds: int) -> str:
    """Return the text of a cell of the heat map."""
    if row["diverged"]:
        return f"{CROSS} {row['diverged']}/{row['seeds']}" if seeds > 1 else CROSS
    if row["log_ratio"] is None:
        return NOTHING
    text = f"{row['log_ratio']:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", MINUS)


def _limit(frame: pl.DataFrame) -> float:
    """Return the end of the colour scale: the largest number, within bounds."""
    largest = frame["log_ratio"].abs().max()
    return min(max(float(largest or 0.0), 0.1), 2.0)  # type: ignore[arg-type]


def _or_none(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None
