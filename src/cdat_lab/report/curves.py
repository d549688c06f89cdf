"""Curves over several seeds: the median, and the band from the lowest to the highest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
from numpy.typing import NDArray

from cdat_lab.report.curve_styles import Style
from cdat_lab.runs import Run

POINTS = 300
"""Approximate maximum number of points that are drawn of a curve."""

CEILING, FLOOR = 1e30, 1e-30
"""Where an unbounded band ends on a logarithmic axis."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Band:
    """Median, lowest and highest of several runs at the same steps.

    Attributes
    ----------
    x, middle, low, high : ndarray of float64, shape (points,)
        Not finite where nothing is drawn.
    runs : int
        Number of runs; the band is drawn for two or more.
    """

    x: Floats
    middle: Floats
    low: Floats
    high: Floats
    runs: int


STEP = pl.col("step").cast(pl.Float64)


def over_seeds(runs: Sequence[Run], column: pl.Expr, against: pl.Expr = STEP) -> Band | None:
    """Aggregate a column over runs that have the same steps.

    Parameters
    ----------
    runs : sequence of Run
        One for each seed.
    column : polars.Expr
        What to show; null values were not measured, and NaN counts as infinity.
    against : polars.Expr
        The horizontal axis: its median over the seeds at the same step, since time and cost may
        differ between seeds.

    Returns
    -------
    Band or None
        Thinned to about `POINTS` points; None if nothing was measured.
    """
    frames = [
        run.frame.select("step", x=against, y=column.cast(pl.Float64)).drop_nulls() for run in runs
    ]
    if not any(frame.height for frame in frames):
        return None
    y = pl.col("y").fill_nan(math.inf)
    joint = (
        pl.concat(frames)
        .group_by("step")
        .agg(pl.col("x").median(), middle=y.median(), low=y.min(), high=y.max())
        .sort("step")
    )
    joint = joint[thinned(joint.height)]
    x, middle, low, high = (joint[name].to_numpy() for name in ("x", "middle", "low", "high"))
    return Band(x, middle, low, high, len(runs))


def over_columns(x: Floats, values: Floats) -> Band:
    """Aggregate the columns of an array of shape (points, runs), as `over_seeds` does for runs."""
    kept = thinned(len(values))
    with np.errstate(invalid="ignore", over="ignore"):
        y = np.nan_to_num(values[kept], nan=np.inf, posinf=np.inf, neginf=-np.inf)
        middle = np.median(y, axis=1)
    return Band(x[kept], middle, y.min(axis=1), y.max(axis=1), values.shape[1])


def thinned(points: int) -> list[int]:
    """Return the indices of the points to draw, including the first and the last.

    The stride is odd: at the edge of stability, values oscillate with period 2.
    """
    stride = -(-points // POINTS)
    stride += 1 - stride % 2
    kept = list(range(0, points, stride))
    return kept if points - 1 in kept else [*kept, points - 1]


def traces(band: Band, style: Style, *, group: str, name: str, **axes: Any) -> list[go.Scatter]:
    """Return the line of the median and, for several runs, the band behind it.

    Parameters
    ----------
    band : Band
        Drawn on a logarithmic axis.
    style : Style
        How the line looks.
    group : str
        Curves of a group are hidden together.
    name : str
        What Plotly calls the line.
    **axes : str
        ``xaxis`` and ``yaxis``.

    Returns
    -------
    list of plotly.graph_objects.Scatter
    """
    line = go.Scatter(
        x=compact(band.x),
        y=compact(_drawable(band.middle)),
        mode="lines",
        name=name,
        legendgroup=group,
        line={"color": style.color, "dash": style.dash, "width": style.width},
        hovertemplate="%{fullData.name}<br>at %{x:.4~g}: %{y:.4~g}<extra></extra>",
        **axes,
    )
    if band.runs < 2:
        return [line]
    x, y = _outline(band)
    shade = go.Scatter(
        x=compact(x),
        y=compact(y),
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=style.shade(0.16),
        name=name,
        legendgroup=group,
        showlegend=False,
        hoverinfo="skip",
        **axes,
    )
    return [shade, line]


def compact(values: Floats) -> NDArray[np.float32]:
    """Return the values as float32; values too large become gaps."""
    with np.errstate(over="ignore"):
        found = values.astype(np.float32)
    return np.where(np.isfinite(found), found, np.float32(np.nan))


def log_range(
    bands: Iterable[Band],
    *,
    quantiles: tuple[float, float],
    include: float | None = None,
    lowest: float = 0.0,
    highest: float = math.inf,
) -> list[float] | None:
    """Return the range of a logarithmic axis that shows all curves.

    Parameters
    ----------
    bands : iterable of Band
        The curves.
    quantiles : (float, float)
        Quantiles of each curve that must be inside, so that a spike, or the tail of a schedule
        that falls to 0, does not flatten the other curves.
    include : float, optional
        A value that must be inside.
    lowest, highest : float
        Bounds of the range.

    Returns
    -------
    list of two float, or None
        log10 of the ends; None if there is no positive value.
    """
    ends: list[float] = []
    for band in bands:
        known = np.concatenate([band.low, band.high])
        known = known[np.isfinite(known) & (known > 0)]
        if known.size:
            ends += [float(v) for v in np.quantile(known, quantiles)]
    kept = [min(max(end, lowest), highest) for end in ends]
    if include is not None:
        kept.append(include)
    if not kept:
        return None
    low, high = math.log10(min(kept)), math.log10(max(kept))
    pad = max(0.05 * (high - low), 0.04)
    return [low - pad, high + pad]


def _drawable(values: Floats) -> Floats:
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _outline(band: Band) -> tuple[Floats, Floats]:
    """Return the outline of the band: one polygon for each piece without a gap."""
    low, high = np.clip(band.low, FLOOR, CEILING), np.clip(band.high, FLOOR, CEILING)
    there = np.isfinite(band.low) & (band.high > 0) & np.isfinite(band.x)
    parts_x, parts_y = [], []
    bounds = np.flatnonzero(np.diff(np.concatenate([[False], there, [False]])))
    for start, end in bounds.reshape(-1, 2):
        piece = slice(start, end)
        parts_x += [band.x[piece], band.x[piece][::-1], [np.nan]]
        parts_y += [low[piece], high[piece][::-1], [np.nan]]
    empty = np.empty(0)
    return np.concatenate([empty, *parts_x]), np.concatenate([empty, *parts_y])
