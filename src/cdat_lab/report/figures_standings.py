"""The figure of the suite `self-tuning`: every run relative to the tuned constant rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

from cdat_lab import standings
from cdat_lab.report import figure_layout
from cdat_lab.report.charts import TIMES, label
from cdat_lab.report.curve_styles import Style

LOWEST, HIGHEST = 1 / 16, 64.0
"""The range of the axis; points beyond it are triangles at its ends."""
ROW = 30
"""Pixels for each entrant."""
SIDES = ("development", "judgement")


def strips(
    frame: pl.DataFrame, styles: Mapping[str, Style]
) -> tuple[go.Figure, dict[str, dict[str, Any]]]:
    """Return the ratios of all entrants, a panel for each side of the split.

    Parameters
    ----------
    frame : polars.DataFrame
        From `standings.ratios`.
    styles : mapping of str to Style
        For each entrant.

    Returns
    -------
    tuple of plotly.graph_objects.Figure and dict
        In each row a small dot for each run, a circle for each setting (the geometric mean of its
        seeds), a bar at the geometric mean of all of them and a cross for a run that diverged; and
        the layouts for wide and narrow screens.
    """
    names = standings.entrants(frame)
    sides = [side for side in SIDES if side in set(frame["side"])]
    figure = go.Figure()
    notes = []
    for panel, side in enumerate(sides):
        rows = frame.filter(pl.col("side") == side)
        settings = rows.select("task", "base", "batch_size").n_unique()
        notes.append(figure_layout.panel_title(panel, f"{side}, {settings} settings"))
        means = standings.by_setting(rows)
        for place, name in enumerate(names):
            of_name = pl.col("entrant") == name
            for trace in _row(rows.filter(of_name), means.filter(of_name), place, styles[name]):
                figure.add_trace(trace.update(**figure_layout.axes(panel)))
    labels = dict(frame.select("entrant", "label").unique().iter_rows())
    ticks = [label(labels[name]) for name in names]
    figure.update_layout(
        figure_layout.common(
            annotations=notes,
            shapes=[_even(panel) for panel in range(len(sides))],
            **{name: axis for panel in range(len(sides)) for name, axis in _axes(panel, ticks)},
        )
    )
    return figure, _arrangements(len(sides), len(names))


def _even(panel: int) -> dict[str, Any]:
    """Return the line at the loss of the tuned constant rate."""
    suffix = figure_layout.suffix(panel)
    return {
        "type": "line",
        "xref": f"x{suffix}",
        "yref": f"y{suffix} domain",
        "x0": 1,
        "x1": 1,
        "y0": 0,
        "y1": 1,
        "line": {"color": "#444444", "width": 1.4, "dash": "3px,3px"},
        "layer": "below",
    }


def _axes(panel: int, ticks: list[str]) -> list[tuple[str, dict[str, Any]]]:
    suffix = figure_layout.suffix(panel)
    powers = range(round(math.log2(LOWEST)), round(math.log2(HIGHEST)) + 1, 2)
    marks = [2.0**k for k in (*powers, -1, 1)]
    pad = 0.06 * math.log10(HIGHEST / LOWEST)
    across = figure_layout.axis(
        "loss relative to the tuned constant",
        type="log",
        range=[math.log10(LOWEST) - pad, math.log10(HIGHEST) + pad],
        tickvals=marks,
        ticktext=[f"{TIMES}{mark:g}" if mark >= 1 else f"1/{1 / mark:g}" for mark in marks],
        anchor=f"y{suffix}",
    )
    down = figure_layout.axis(
        tickvals=list(range(len(ticks))),
        ticktext=ticks,
        range=[len(ticks) - 0.5, -0.5],
        anchor=f"x{suffix}",
        showgrid=False,
    )
    return [(f"xaxis{suffix}", across), (f"yaxis{suffix}", down)]


def _arrangements(panels: int, rows: int) -> dict[str, dict[str, Any]]:
    """Return both panels side by side, and for narrow screens one below the other."""
    found = {}
    for name, columns in (("wide", panels), ("narrow", 1)):
        places, layout = figure_layout.boxes(panels, columns, ROW * rows, gap=0.03)
        layout["margin"]["l"] = 215
        placed = figure_layout.placed(places)
        for panel in range(panels):
            shown = panel == 0 or columns == 1
            placed[f"yaxis{figure_layout.suffix(panel)}"]["showticklabels"] = shown
        found[name] = layout | placed
    return found


def _row(runs: pl.DataFrame, means: pl.DataFrame, place: int, style: Style) -> list[go.Scatter]:
    """Return the traces of an entrant on one side."""
    traces = []
    for diverged in (False, True):
        chosen = runs.filter((pl.col("diverged") == diverged) & pl.col("ratio").is_not_null())
        if chosen.is_empty():
            continue
        values = chosen["ratio"].to_numpy()
        beyond = (values < LOWEST) | (values > HIGHEST)
        symbols = np.where(
            beyond, np.where(values > 1, "triangle-right", "triangle-left"), "circle"
        )
        traces.append(
            _points(
                np.clip(values, LOWEST, HIGHEST),
                place + _jitter(chosen),
                [
                    f"{_where(row)}, seed {row['seed']}: {row['ratio']:.3g}"
                    for row in chosen.iter_rows(named=True)
                ],
                symbol="x" if diverged else list(symbols),
                size=7 if diverged else 4,
                color=style.shade(1.0 if diverged else 0.45),
            )
        )
    known = means.filter(pl.col("ratio").is_not_null())
    if known.is_empty():
        return traces
    values = known["ratio"].to_numpy()
    traces.append(
        _points(
            np.clip(values, LOWEST, HIGHEST),
            np.full(len(values), float(place)) + _jitter(known),
            [
                f"{_where(row)}, mean of the seeds: {row['ratio']:.3g}"
                for row in known.iter_rows(named=True)
            ],
            symbol="circle-open",
            size=8,
            color=style.shade(0.9),
        )
    )
    mean = math.exp(float(np.mean(np.log(runs["ratio"].drop_nulls().to_numpy()))))
    traces.append(
        go.Scatter(
            x=[min(max(mean, LOWEST), HIGHEST)] * 2,
            y=[place - 0.4, place + 0.4],
            mode="lines",
            line={"color": style.color, "width": 5},
            hovertemplate=f"geometric mean {mean:.3g}<extra></extra>",
            showlegend=False,
        )
    )
    return traces


def _points(
    x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], texts: list[str], **marker: Any
) -> go.Scatter:
    return go.Scatter(
        x=x.tolist(),
        y=y.tolist(),
        mode="markers",
        marker=marker,
        text=[label(text) for text in texts],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )


def _jitter(rows: pl.DataFrame) -> np.ndarray[Any, Any]:
    """Return a small vertical offset for each row, the same for all runs of a setting."""
    order = {task: i for i, task in enumerate(rows["task"].unique(maintain_order=True))}
    count = max(1, len(order) - 1)
    return np.array([0.56 * order[task] / count - 0.28 for task in rows["task"]])


def _where(row: Mapping[str, Any]) -> str:
    return f"{row['task']}, {row['base']}, batch {row['batch_size']}"
