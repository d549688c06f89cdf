"""The figure of a tuning grid: the final loss at every rate that was tried."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import plotly.graph_objects as go

from cdat_lab.races import Result
from cdat_lab.registry import find_contender
from cdat_lab.report import figure_layout
from cdat_lab.report.charts import MINUS, label
from cdat_lab.report.curve_styles import Style


def grid(results: Iterable[Result], styles: Mapping[str, Style]) -> go.Figure:
    """Return the final loss against each rate or peak that was tried.

    Parameters
    ----------
    results : iterable of Result
        Results of a race, at least one with a tuned rate; others are left out.
    styles : mapping of str to Style
        For each contender.

    Returns
    -------
    plotly.graph_objects.Figure
        One curve for each seed; runs that diverged are crosses at the top.
    """
    tuned = [result for result in results if result.grid is not None]
    losses = [loss for r in tuned for loss in _grid(r)[1] if 0 < loss < math.inf]
    low, high = min(losses, default=0.1), max(losses, default=1.0)
    ceiling = high * (high / low) ** 0.12 * 1.15
    figure = go.Figure()
    named: set[str] = set()
    for result in tuned:
        for trace in _tried(result, styles[result.key.contender], ceiling):
            trace.showlegend = trace.showlegend is not False and result.key.contender not in named
            figure.add_trace(trace)
        named.add(result.key.contender)
    rates = [rate for r in tuned for rate in _grid(r)[0]]
    first, last = math.floor(math.log2(min(rates))), math.ceil(math.log2(max(rates)))
    exponents = range(first, last + 1, 1 + (last - first) // 9)
    pad = 0.04 * (last - first + 1) * math.log10(2)
    bottom, top = math.log10(low), math.log10(ceiling)
    figure.update_layout(
        figure_layout.common(
            height=330,
            margin={"l": 60, "r": 12, "t": 14, "b": 54},
            xaxis=figure_layout.axis(
                "learning rate, or peak",
                type="log",
                range=[math.log10(min(rates)) - pad, math.log10(max(rates)) + pad],
                tickvals=[2.0**k for k in exponents],
                ticktext=[f"2<sup>{k}</sup>".replace("-", MINUS) for k in exponents],
            ),
            yaxis=figure_layout.log_axis(
                [bottom - 0.06 * (top - bottom), top + 0.06 * (top - bottom)], "final loss"
            ),
        )
    )
    return figure


def _grid(result: Result) -> tuple[tuple[float, ...], tuple[float, ...]]:
    assert result.grid is not None
    return result.grid.rates, result.grid.losses


def _tried(result: Result, style: Style, ceiling: float) -> list[go.Scatter]:
    rates, losses = _grid(result)
    name = label(find_contender(result.key.contender).label)
    common = {"name": name, "legendgroup": result.key.contender}
    points = list(zip(rates, losses, strict=True))
    diverged = [rate for rate, loss in points if not math.isfinite(loss)]
    kept = [(rate, loss) for rate, loss in points if math.isfinite(loss)]
    where = f"%{{fullData.name}}, seed {result.key.seed}<br>rate %{{x:.4~g}}<br>"
    return [
        go.Scatter(
            x=[rate for rate, _ in kept],
            y=[loss for _, loss in kept],
            mode="lines+markers",
            line={"color": style.color, "dash": style.dash, "width": 1.3},
            marker={"symbol": "circle", "size": 5, "color": style.color},
            hovertemplate=where + "final loss %{y:.4~g}<extra></extra>",
            **common,
        ),
        go.Scatter(
            x=diverged,
            y=[ceiling] * len(diverged),
            mode="markers",
            showlegend=False,
            marker={"symbol": "x", "size": 8, "color": style.color},
            hovertemplate=where + "diverged<extra></extra>",
            **common,
        ),
    ]
