"""The figure of a race: six panels that share their contenders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import polars as pl

from cdat_lab.bases import Base
from cdat_lab.findings import Findings
from cdat_lab.measures import comparable
from cdat_lab.races import Race
from cdat_lab.registry import find_base, find_contender
from cdat_lab.report import curves, figure_layout
from cdat_lab.report.charts import TIMES, label
from cdat_lab.report.curve_styles import EDGE, Style
from cdat_lab.report.curves import STEP, Band
from cdat_lab.runs import Run

RISE = 30.0
"""Upper limit of the loss axes relative to the initial loss, for runs that diverged."""


@dataclass(frozen=True)
class Panel:
    """The content of a panel.

    Attributes
    ----------
    title, axis : str
        Text above the panel and below its horizontal axis.
    column, against : polars.Expr
        The vertical and the horizontal axis.
    quantiles : (float, float)
        Quantiles of each curve that must be inside the panel.
    curved, product : bool
        Whether it shows the sharpness; whether it shows the edge of stability.
    """

    title: str
    axis: str
    column: pl.Expr
    against: pl.Expr
    quantiles: tuple[float, float]
    curved: bool = False
    product: bool = False


def panels(base: Base) -> list[Panel]:
    """Return the six panels for a race with this base."""
    sharpness = "preconditioned sharpness" if base.preconditioned else "sharpness"
    loss, rate = pl.col("full_loss"), pl.col("learning_rate")
    curved = pl.col("sharpness")
    return [
        Panel("training loss", "step", loss, STEP, (0.0, 1.0)),
        Panel("learning rate", "step", rate, STEP, (0.12, 0.97)),
        Panel(sharpness, "step", curved, STEP, (0.01, 0.99), curved=True),
        Panel(f"rate {TIMES} {sharpness}", "step", rate * curved, STEP, (0.12, 0.97), True, True),
        Panel("training loss", "seconds on one thread", loss, pl.col("seconds"), (0.0, 1.0)),
        Panel("training loss", "gradient equivalents", loss, pl.col("gradients"), (0.0, 1.0)),
    ]


def race(
    findings: Findings, plan: Race, styles: Mapping[str, Style]
) -> tuple[go.Figure, dict[str, Any]] | None:
    """Return the figure of a race, and its arrangements for wide and narrow screens.

    Parameters
    ----------
    findings : Findings
        The findings of a study.
    plan : Race
        The race to draw.
    styles : mapping of str to Style
        For each contender.

    Returns
    -------
    tuple of Figure and dict, or None
        Panels without measurements are left out; None if there is no result at all.
    """
    base = find_base(plan.base)
    runs = {
        name: [result.run for result in findings.of(plan, name)]
        for name in plan.contenders
        if findings.of(plan, name)
    }
    figure = go.Figure()
    settings = figure_layout.common(annotations=[])
    shown = 0
    for panel in panels(base):
        found = {
            name: band
            for name, each in runs.items()
            if (not panel.curved or comparable(base, find_contender(name)))
            and (band := curves.over_seeds(each, panel.column, panel.against)) is not None
        }
        if not found:
            continue
        for name, band in found.items():
            title = label(find_contender(name).label)
            for trace in curves.traces(
                band, styles[name], group=name, name=title, **figure_layout.axes(shown)
            ):
                trace.showlegend = trace.showlegend is not False and shown == 0
                figure.add_trace(trace)
        ends = [float(band.x[-1]) for band in found.values()]
        last = float(plan.steps) if panel.axis == "step" else max(ends)
        if panel.product and base.edge is not None:
            figure.add_trace(edge_line([0, last], base.edge, shown))
        settings["annotations"].append(figure_layout.panel_title(shown, panel.title))
        suffix = figure_layout.suffix(shown)
        anchored = {"anchor": f"y{suffix}", "range": [0, last or 1], "rangemode": "nonnegative"}
        settings[f"xaxis{suffix}"] = figure_layout.axis(panel.axis, **anchored)
        limits = _range(
            panel, base, list(found.values()), [run for e in runs.values() for run in e]
        )
        settings[f"yaxis{suffix}"] = figure_layout.log_axis(limits, anchor=f"x{suffix}")
        shown += 1
    if not shown:
        return None
    figure.update_layout(settings)
    return figure, figure_layout.arrangements(shown)


def edge_line(x: Sequence[float], edge: float, panel: int) -> go.Scatter:
    """Return the line of the edge of stability in a panel."""
    return go.Scatter(
        x=list(x),
        y=[edge] * len(x),
        mode="lines",
        name=f"edge of stability, {edge:.4g}",
        legendgroup="edge",
        line={"color": EDGE.color, "width": EDGE.width, "dash": EDGE.dash},
        hovertemplate="edge of stability, %{y:.4~g}<extra></extra>",
        **figure_layout.axes(panel),
    )


def _range(
    panel: Panel, base: Base, bands: Sequence[Band], runs: Sequence[Run]
) -> list[float] | None:
    if panel.product:
        if base.edge is None:
            return curves.log_range(bands, quantiles=panel.quantiles)
        return curves.log_range(
            bands,
            quantiles=panel.quantiles,
            include=base.edge,
            lowest=base.edge / 100,
            highest=base.edge * 30,
        )
    if panel.title == "training loss":
        start = max(run.initial_loss for run in runs)
        return curves.log_range(bands, quantiles=panel.quantiles, highest=RISE * start)
    return curves.log_range(bands, quantiles=panel.quantiles)
