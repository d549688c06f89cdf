"""Figures of a comparison: trajectories in four panels, and tuning grids."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import polars as pl

from cdat_lab import table
from cdat_lab.bases import BASES, Base
from cdat_lab.compare import Comparison, Result
from cdat_lab.contenders import CONTENDERS


@dataclass(frozen=True)
class Style:
    """How the curves of a contender look: apart in colour, and in print by dash and width."""

    color: str
    dash: str
    width: float


# Okabe and Ito's palette, which colour-blind people can tell apart.
STYLES = {
    "constant": Style("#000000", "6px,3px", 1.8),
    "warmup-cosine": Style("#CC79A7", "2px,3px", 2.4),
    "armijo": Style("#E69F00", "9px,3px,2px,3px", 1.8),
    "greedy": Style("#D55E00", "13px,3px", 1.8),
    "cdat-1.9": Style("#0072B2", "solid", 2.8),
    "cdat-2.0": Style("#009E73", "solid", 1.4),
}

MARKERS = {"jax": "circle-open", "torch": "cross-thin-open"}


def trajectories(comparison: Comparison, base: str, backend: str) -> go.Figure:
    """Return loss, learning rate, sharpness and their product against the step.

    Parameters
    ----------
    comparison : Comparison
        The results.
    base, backend : str
        Which runs to show.

    Returns
    -------
    plotly.graph_objects.Figure
        Four panels in two columns; a click in the legend hides a contender in all of them.
    """
    figure = go.Figure()
    optimizer = BASES[base]
    product = pl.col("learning_rate") * pl.col("sharpness")
    panels = (pl.col("loss"), pl.col("learning_rate"), pl.col("sharpness"), product)
    for result in comparison.of(base, backend):
        for index, column in enumerate(panels):
            figure.add_trace(_curve(result, column, index))
    steps = comparison.steps
    figure.add_trace(
        go.Scatter(
            x=[0, steps],
            y=[optimizer.edge, optimizer.edge],
            xaxis="x4",
            yaxis="y4",
            mode="lines",
            line={"color": "#555555", "width": 1.4},
            name=f"edge of stability, {optimizer.edge:.3g}",
            hovertemplate="edge of stability, %{y:.3g}<extra></extra>",
        )
    )
    figure.update_layout(_style())
    sharpness = "preconditioned sharpness" if optimizer.preconditioned else "sharpness"
    titles = ("loss", "learning rate", sharpness, f"learning rate &times; {sharpness}")
    figure.update_layout(annotations=[_panel_title(*title) for title in enumerate(titles, 1)])
    figure.update_layout(**arrangement(2))
    for index in range(len(panels)):
        axis = str(index + 1) if index else ""
        figure.update_layout(
            {
                f"xaxis{axis}": _axis(anchor=f"y{axis}", range=[0, steps], title="step"),
                f"yaxis{axis}": _axis(anchor=f"x{axis}", type="log", tickformat="~g"),
            }
        )
    _set_ranges(figure, comparison.of(base, backend), optimizer)
    return figure


def arrangement(columns: int) -> dict[str, Any]:
    """Return the layout that puts the four panels of `trajectories` into one or two columns.

    Parameters
    ----------
    columns : int
        1 for narrow screens or 2.

    Returns
    -------
    dict
        Arguments of ``update_layout``; `flat` makes them those of ``Plotly.relayout``.
    """
    rows = 4 // columns
    gap_x, gap_y = 0.09, 0.12 if columns == 2 else 0.06
    width = (1 - gap_x * (columns - 1)) / columns
    height = (1 - gap_y * (rows - 1)) / rows
    layout: dict[str, Any] = {
        "height": 820 if columns == 2 else 1500,
        "margin": {
            "l": 60 if columns == 2 else 46,
            "r": 16,
            "t": 76 if columns == 2 else 160,
            "b": 44,
        },
    }
    for index in range(4):
        row, column = divmod(index, columns)
        left, top = column * (width + gap_x), 1 - row * (height + gap_y)
        axis = str(index + 1) if index else ""
        layout[f"xaxis{axis}"] = {"domain": [left, min(1.0, left + width)]}
        layout[f"yaxis{axis}"] = {"domain": [max(0.0, top - height), top]}
    return layout


def flat(layout: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested layout with dotted names, as ``Plotly.relayout`` takes it."""
    found: dict[str, Any] = {}
    for name, value in layout.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def grids(comparison: Comparison, base: str) -> go.Figure:
    """Return the final loss against each rate or peak that was tried.

    Parameters
    ----------
    comparison : Comparison
        The results.
    base : str
        The base optimizer.

    Returns
    -------
    plotly.graph_objects.Figure
        Runs that diverged are crosses on the line at the top.
    """
    figure = go.Figure()
    tuned = [r for r in comparison.results if r.grid is not None and r.job.base == base]
    ceiling = 4 * max(result.run.initial_loss for result in tuned)
    for result in tuned:
        assert result.grid is not None
        style, contender = STYLES[result.job.contender], CONTENDERS[result.job.contender]
        name = f"{contender.label}, {result.job.backend}"
        points = list(zip(result.grid.rates, result.grid.losses, strict=True))
        finite = [(rate, loss) for rate, loss in points if math.isfinite(loss)]
        diverged = [rate for rate, loss in points if not math.isfinite(loss)]
        figure.add_trace(
            go.Scatter(
                x=[rate for rate, _ in finite],
                y=[loss for _, loss in finite],
                mode="lines+markers",
                name=name,
                legendgroup=name,
                line={"color": style.color, "dash": style.dash, "width": 1.4},
                marker={
                    "symbol": MARKERS.get(result.job.backend, "circle-open"),
                    "size": 11,
                    "line": {"width": 1.8, "color": style.color},
                },
                hovertemplate=f"{name}<br>rate %{{x:.4g}}<br>final loss %{{y:.3e}}<extra></extra>",
            )
        )
        figure.add_trace(
            go.Scatter(
                x=diverged,
                y=[ceiling] * len(diverged),
                mode="markers",
                name=name,
                legendgroup=name,
                showlegend=False,
                marker={"symbol": "x", "size": 9, "color": style.color},
                hovertemplate=f"{name}<br>rate %{{x:.4g}}<br>diverged<extra></extra>",
            )
        )
    figure.update_layout(_style())
    rates = sorted({rate for result in tuned if result.grid for rate in result.grid.rates})
    figure.update_layout(
        height=430,
        margin={"l": 60, "r": 16, "t": 70, "b": 50},
        xaxis=_axis(
            type="log",
            title="learning rate (peak for warm-up + cosine)",
            minor={},
            tickvals=rates,
            ticktext=[f"2<sup>{math.log2(rate):.0f}</sup>" for rate in rates],
        ),
        yaxis=_axis(
            type="log", title="final loss (crosses at the top: diverged)", tickformat="~g", dtick=1
        ),
    )
    return figure


def _curve(result: Result, column: pl.Expr, panel: int) -> go.Scatter:
    style, label = STYLES[result.job.contender], legend_label(result)
    axis = str(panel + 1) if panel else ""
    points = result.run.frame.select("step", value=column).drop_nulls()
    return go.Scatter(
        x=points["step"].to_list(),
        y=[_shown(value) for value in points["value"]],
        xaxis=f"x{axis}",
        yaxis=f"y{axis}",
        mode="lines",
        name=label,
        legendgroup=result.job.contender,
        showlegend=panel == 0,
        line={"color": style.color, "dash": style.dash, "width": style.width},
        hovertemplate=f"{label}<br>step %{{x}}<br>%{{y:.4g}}<extra></extra>",
    )


def legend_label(result: Result) -> str:
    """Return the label of a contender with its tuned rate."""
    label, rate = CONTENDERS[result.job.contender].label, table.tuned_value(result)
    return label if rate is None else f"{label}, {rate:.3g}"


def _shown(value: float) -> float | None:
    """Return what a logarithmic axis can show, to six digits; None leaves a gap."""
    return float(f"{value:.5e}") if math.isfinite(value) and value > 0 else None


def _set_ranges(figure: go.Figure, results: Iterable[Result], base: Base) -> None:
    """Keep the tail of a schedule that falls to 0 from flattening the other curves."""
    peaks = [run.frame["learning_rate"].max() for run in (result.run for result in results)]
    highest = math.log10(max(float(peak) for peak in peaks if peak))  # type: ignore[arg-type]
    edge = math.log10(base.edge)
    figure.update_layout(yaxis_dtick=1, yaxis2_dtick=1, yaxis3_dtick="D2", yaxis4_dtick=1)
    figure.update_layout(
        yaxis2_range=[highest - 2.6, highest + 0.2], yaxis4_range=[edge - 1.5, edge + 0.8]
    )


def _panel_title(panel: int, text: str) -> dict[str, Any]:
    return {
        "text": f"<b>{text}</b>",
        "showarrow": False,
        "xref": f"x{panel} domain" if panel > 1 else "x domain",
        "yref": f"y{panel} domain" if panel > 1 else "y domain",
        "x": 0,
        "y": 1,
        "xanchor": "left",
        "yanchor": "bottom",
    }


def _axis(**settings: Any) -> dict[str, Any]:
    title = settings.pop("title", None)
    if title is not None:
        settings["title"] = {"text": title, "font": {"size": 12}, "standoff": 4}
    return {
        "gridcolor": "#e6e6e6",
        "linecolor": "#888888",
        "showline": True,
        "ticks": "outside",
        "minor": {"ticks": "outside", "ticklen": 2},
        "zeroline": False,
        **settings,
    }


def _style() -> dict[str, Any]:
    return {
        "template": None,
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#222222"},
        "hovermode": "closest",
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1,
            "yanchor": "top",
            "yref": "container",
            "font": {"size": 12},
        },
    }
