"""The figure of the joint model: its phase space, and the sharpness over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from cdat_lab.model import Simulation
from cdat_lab.report import curves, figure_layout
from cdat_lab.report.charts import TIMES, label
from cdat_lab.report.curve_styles import EDGE, Style
from cdat_lab.report.curves import Floats
from cdat_lab.report.figures_race import edge_line

EDGE_OF_MODEL = 2.0
NAME_OF_EDGE = f"edge of stability, rate {TIMES} sharpness = 2"

EARLY = 120
"""Number of steps that are all drawn in phase space, since most movement is early."""

LOWEST = 1e-2
"""Lower end of the axes; a sharpness that has collapsed to 0 runs along the border."""


def joint_model(
    simulations: Sequence[Simulation], styles: Mapping[str, Style]
) -> tuple[go.Figure, dict[str, Any]]:
    """Return the joint model in phase space and over the steps, and its arrangements.

    Parameters
    ----------
    simulations : sequence of Simulation
        One for each rule, at least one.
    styles : mapping of str to Style
        For each contender.

    Returns
    -------
    tuple of Figure and dict
        Sharpness against rate for the first initial displacement, from a circle to a square; then
        sharpness and rate times sharpness against the step, one curve for each displacement.
    """
    rates = _range([run.learning_rate[:, 0] for run in simulations], (0.01, 0.995))
    heights = _range([run.sharpness for run in simulations], (0.0, 1.0))
    limits = _range([_product(run) for run in simulations], (0.01, 0.995), EDGE_OF_MODEL)
    last = max(run.steps for run in simulations)
    figure = go.Figure()
    for run in simulations:
        style = styles[run.contender.name]
        figure.add_traces(_phase(run, style, heights[0]))
        figure.add_traces(_over_steps(run, run.sharpness, style, 1, heights[0]))
        figure.add_traces(_over_steps(run, _product(run), style, 2, limits[0]))
    figure.add_trace(_edge(rates))
    line = edge_line([0, last], EDGE_OF_MODEL, 2)
    line.showlegend = False
    figure.add_trace(line)
    titles = ("sharpness against learning rate", "sharpness", f"rate {TIMES} sharpness")
    figure.update_layout(
        figure_layout.common(
            annotations=[figure_layout.panel_title(i, title) for i, title in enumerate(titles)],
            xaxis=figure_layout.log_axis(rates, "learning rate", anchor="y"),
            yaxis=figure_layout.log_axis(heights, "sharpness", anchor="x"),
            xaxis2=figure_layout.axis("step", anchor="y2", range=[0, last]),
            yaxis2=figure_layout.log_axis(heights, anchor="x2"),
            xaxis3=figure_layout.axis("step", anchor="y3", range=[0, last]),
            yaxis3=figure_layout.log_axis(limits, anchor="x3"),
        )
    )
    return figure, _arrangements()


def _product(run: Simulation) -> Floats:
    with np.errstate(invalid="ignore", over="ignore"):
        return run.learning_rate * run.sharpness[:-1]


def _range(
    values: Sequence[Floats], quantiles: tuple[float, float], include: float | None = None
) -> list[float]:
    """Return the range of an axis in log10; see `curves.log_range`."""
    bands = [
        curves.over_columns(np.arange(len(v), dtype=np.float64), v.reshape(len(v), -1))
        for v in values
    ]
    found = curves.log_range(
        bands, quantiles=quantiles, include=include, lowest=LOWEST, highest=1 / LOWEST
    )
    return [-1.0, 1.0] if found is None else found


def _phase(run: Simulation, style: Style, floor: float) -> list[go.Scatter]:
    """Return the curve of the first displacement in phase space, and its two ends."""
    kept = sorted({*range(min(EARLY, run.steps)), *curves.thinned(run.steps)})
    x = run.learning_rate[kept, 0]
    y = _above(run.sharpness[kept, 0], floor)
    common = {
        "name": label(run.contender.label),
        "legendgroup": run.contender.name,
        **figure_layout.axes(0),
    }
    hover = "rate %{x:.3~g}, sharpness %{y:.3~g}<extra></extra>"
    found = [
        go.Scatter(
            x=curves.compact(x),
            y=curves.compact(y),
            mode="lines",
            line={"color": style.color, "dash": style.dash, "width": 0.7 * style.width},
            hovertemplate="%{fullData.name}<br>" + hover,
            **common,
        )
    ]
    there = np.flatnonzero(np.isfinite(x) & (x > 0) & np.isfinite(y))
    if there.size:
        for index, symbol, where in ((there[0], "circle", "start"), (there[-1], "square", "end")):
            marker = {
                "symbol": symbol,
                "size": 11,
                "color": "#ffffff" if where == "start" else style.color,
                "line": {"width": 2, "color": style.color},
            }
            found.append(
                go.Scatter(
                    x=[float(x[index])],
                    y=[float(y[index])],
                    mode="markers",
                    showlegend=False,
                    marker=marker,
                    cliponaxis=False,
                    hovertemplate=f"%{{fullData.name}}, {where}<br>{hover}",
                    **common,
                )
            )
    return found


def _over_steps(
    run: Simulation, values: Floats, style: Style, panel: int, floor: float
) -> list[go.Scatter]:
    """Return a curve for each initial displacement."""
    kept = curves.thinned(len(values))
    return [
        go.Scatter(
            x=curves.compact(np.array(kept, dtype=np.float64)),
            y=curves.compact(_above(values[kept, index], floor)),
            mode="lines",
            name=label(run.contender.label),
            legendgroup=run.contender.name,
            showlegend=False,
            line={"color": style.color, "dash": style.dash, "width": 0.75 * style.width},
            hovertemplate="%{fullData.name}<br>at %{x}: %{y:.4~g}<extra></extra>",
            **figure_layout.axes(panel),
        )
        for index in range(values.shape[1])
    ]


def _above(values: Floats, floor: float) -> Floats:
    """Return the values clipped from below at the lower border of the panel."""
    return np.maximum(values, 10**floor)


def _edge(rates: Sequence[float]) -> go.Scatter:
    """Return the edge of stability in phase space."""
    ends = [10 ** (rates[0] - 1), 10 ** (rates[1] + 1)]
    return go.Scatter(
        x=ends,
        y=[EDGE_OF_MODEL / end for end in ends],
        mode="lines",
        name=NAME_OF_EDGE,
        legendgroup="edge",
        line={"color": EDGE.color, "width": EDGE.width, "dash": EDGE.dash},
        hovertemplate="edge of stability<extra></extra>",
        **figure_layout.axes(0),
    )


def _arrangements() -> dict[str, Any]:
    """Return the layouts: on wide screens the phase space is as high as two panels."""
    places, wide = figure_layout.boxes(4, 2, 230)
    (left, right, _, top), second, (_, _, bottom, _), fourth = places
    narrow_places, narrow = figure_layout.boxes(3, 1, 250)
    return {
        "wide": wide | figure_layout.placed([(left, right, bottom, top), second, fourth]),
        "narrow": narrow | figure_layout.placed(narrow_places),
    }
