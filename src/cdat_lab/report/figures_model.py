"""The figure of the joint model: its phase space, and sharpness over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from cdat_lab.model import Simulation
from cdat_lab.report import curves, layout
from cdat_lab.report.figures_race import edge_line
from cdat_lab.report.markup import TIMES, label
from cdat_lab.report.styles import EDGE, Style

EDGE_OF_MODEL = 2.0
NAME_OF_EDGE = f"edge of stability, rate {TIMES} sharpness = 2"


def joint_model(
    simulations: Sequence[Simulation], styles: Mapping[str, Style]
) -> tuple[go.Figure, dict[str, Any]]:
    """Return the joint model in phase space and over the steps, and its arrangements.

    Parameters
    ----------
    simulations : sequence of Simulation
        One for each rule.
    styles : mapping of str to Style
        For each contender.

    Returns
    -------
    tuple of Figure and dict
        Sharpness against rate for the first initial displacement, from a circle to a square; then
        sharpness and rate times sharpness against the step, as medians with the range of all
        displacements.
    """
    figure = go.Figure()
    bands: dict[str, list[curves.Band]] = {"sharpness": [], "rate": [], "product": []}
    for run in simulations:
        name, steps = run.contender.name, run.steps
        title, style = label(run.contender.label), styles[name]
        with np.errstate(invalid="ignore", over="ignore"):
            product = run.learning_rate * run.sharpness[:-1]
        at = np.arange(steps + 1, dtype=np.float64)
        rate = curves.over_columns(at[:-1], run.learning_rate[:, :1])
        sharpness = curves.over_columns(at[:-1], run.sharpness[:-1, :1])
        phase = curves.Band(rate.middle, sharpness.middle, sharpness.low, sharpness.high, 1)
        over_time = curves.over_columns(at, run.sharpness)
        stability = curves.over_columns(at[:-1], product)
        bands["rate"].append(rate)
        bands["sharpness"].append(over_time)
        bands["product"].append(stability)
        line = curves.traces(phase, style, group=name, name=title, **layout.axes(0))[0]
        line.hovertemplate = (
            "%{fullData.name}<br>rate %{x:.3~g}, sharpness %{y:.3~g}<extra></extra>"
        )
        figure.add_trace(line)
        figure.add_traces(_ends(phase, style, name, title))
        for index, band in enumerate((over_time, stability), 1):
            for trace in curves.traces(band, style, group=name, name=title, **layout.axes(index)):
                trace.showlegend = False
                figure.add_trace(trace)
    last = max(run.steps for run in simulations)
    rates = curves.log_range(bands["rate"], quantiles=(0.02, 0.99))
    heights = curves.log_range(bands["sharpness"], quantiles=(0, 1), lowest=1e-4, highest=1e4)
    assert rates is not None
    across = np.geomspace(10 ** (rates[0] - 1), 10 ** (rates[1] + 1), 40)
    figure.add_trace(
        go.Scatter(
            x=across.tolist(),
            y=(EDGE_OF_MODEL / across).tolist(),
            mode="lines",
            name=NAME_OF_EDGE,
            legendgroup="edge",
            line={"color": EDGE.color, "width": EDGE.width, "dash": EDGE.dash},
            hovertemplate="edge of stability<extra></extra>",
            **layout.axes(0),
        )
    )
    line = edge_line([0, last], EDGE_OF_MODEL, 2)
    line.showlegend = False
    figure.add_trace(line)
    limits = curves.log_range(
        bands["product"], quantiles=(0.02, 0.99), include=EDGE_OF_MODEL, lowest=1e-2, highest=1e2
    )
    titles = ("sharpness against learning rate", "sharpness", f"learning rate {TIMES} sharpness")
    figure.update_layout(
        layout.common(
            annotations=[layout.panel_title(i, title) for i, title in enumerate(titles)],
            xaxis=layout.log_axis(rates, "learning rate", anchor="y"),
            yaxis=layout.log_axis(heights, "sharpness", anchor="x"),
            xaxis2=layout.axis("step", anchor="y2", range=[0, last]),
            yaxis2=layout.log_axis(heights, anchor="x2"),
            xaxis3=layout.axis("step", anchor="y3", range=[0, last]),
            yaxis3=layout.log_axis(limits, anchor="x3"),
        )
    )
    return figure, _arrangements()


def _ends(band: curves.Band, style: Style, group: str, name: str) -> list[go.Scatter]:
    """Return the marks at the start and at the end of a curve in phase space."""
    there = np.flatnonzero(np.isfinite(band.x) & (band.x > 0) & (band.middle > 0))
    found = []
    for index, symbol, where in zip(
        there[[0, -1]], ("circle", "square"), ("start", "end"), strict=True
    ):
        found.append(
            go.Scatter(
                x=[float(band.x[index])],
                y=[float(band.middle[index])],
                mode="markers",
                name=name,
                legendgroup=group,
                showlegend=False,
                marker={
                    "symbol": symbol,
                    "size": 11,
                    "color": "#ffffff" if where == "start" else style.color,
                    "line": {"width": 2, "color": style.color},
                },
                hovertemplate=f"%{{fullData.name}}, {where}<br>rate %{{x:.3~g}}, "
                "sharpness %{y:.3~g}<extra></extra>",
                **layout.axes(0),
            )
        )
    return found


def _arrangements() -> dict[str, Any]:
    """Return the layouts of the joint model: the phase plot is as high as the two others."""
    places, wide = layout.boxes(4, 2, 230)
    (left, right, _, top), second, (_, _, bottom, _), fourth = places
    narrow_places, narrow = layout.boxes(3, 1, 250)
    return {
        "wide": wide | layout.placed([(left, right, bottom, top), second, fourth]),
        "narrow": narrow | layout.placed(narrow_places),
    }
