"""Layouts of figures: panels in columns, axes, and the common look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

TITLE, TICKS = 34, 62
"""Pixels above a panel for its title, and below it for the labels of its axis."""

Box = tuple[float, float, float, float]
"""Left, right, bottom and top of a panel, as fractions of the figure."""


def boxes(
    count: int, columns: int, panel: int, gap: float = 0.075
) -> tuple[list[Box], dict[str, Any]]:
    """Return the boxes of the panels, row by row, and the height and margins they need.

    Parameters
    ----------
    count, columns : int
        Number of panels and of columns.
    panel : int
        Height of a panel in pixels.
    gap : float
        Space between columns, as a fraction of the width.

    Returns
    -------
    tuple of a list of Box and a dict
    """
    rows = -(-count // columns)
    inner = rows * panel + (rows - 1) * (TITLE + TICKS)
    width = (1 - gap * (columns - 1)) / columns
    found = []
    for index in range(count):
        row, column = divmod(index, columns)
        left = column * (width + gap)
        top = 1 - row * (panel + TITLE + TICKS) / inner
        found.append((left, min(1.0, left + width), max(0.0, top - panel / inner), top))
    margin = {"l": 66 if columns > 1 else 58, "r": 14, "t": TITLE, "b": TICKS}
    return found, {"height": inner + TITLE + TICKS, "margin": margin}


def placed(places: Sequence[Box]) -> dict[str, Any]:
    """Return the layout that places the axes of each panel in its box."""
    layout: dict[str, Any] = {}
    for index, (left, right, bottom, top) in enumerate(places):
        layout[f"xaxis{suffix(index)}"] = {"domain": [left, right]}
        layout[f"yaxis{suffix(index)}"] = {"domain": [bottom, top]}
    return layout


def arrangements(count: int) -> dict[str, dict[str, Any]]:
    """Return the layouts of `count` panels in two columns and, for narrow screens, in one."""
    found = {}
    for name, columns, panel in (("wide", 2, 260), ("narrow", 1, 230)):
        places, layout = boxes(count, columns, panel)
        found[name] = layout | placed(places)
    return found


def suffix(index: int) -> str:
    """Return the suffix of Plotly's axis names in panel `index`."""
    return str(index + 1) if index else ""


def axes(index: int) -> dict[str, str]:
    """Return the axes of a trace in panel `index`."""
    return {"xaxis": f"x{suffix(index)}", "yaxis": f"y{suffix(index)}"}


def panel_title(index: int, text: str) -> dict[str, Any]:
    """Return the annotation above panel `index`."""
    return {
        "text": f"<b>{text}</b>",
        "showarrow": False,
        "xref": f"x{suffix(index)} domain",
        "yref": f"y{suffix(index)} domain",
        "x": 0,
        "y": 1,
        "xanchor": "left",
        "yanchor": "bottom",
        "yshift": 3,
    }


def axis(title: str | None = None, **settings: Any) -> dict[str, Any]:
    """Return an axis in the common look."""
    if title is not None:
        settings["title"] = {"text": title, "font": {"size": 12}, "standoff": 6}
    return {
        "gridcolor": "#e8e8e8",
        "linecolor": "#888888",
        "showline": True,
        "ticks": "outside",
        "zeroline": False,
        **settings,
    }


def log_axis(
    range_: Sequence[float] | None = None, title: str | None = None, **settings: Any
) -> dict[str, Any]:
    """Return a logarithmic axis with as many labels as its range allows."""
    found = axis(title, type="log", tickformat="~g", exponentformat="power", **settings)
    if range_ is None:
        return found
    found["range"] = [float(end) for end in range_]
    span = range_[1] - range_[0]
    if span > 1.8:
        found["dtick"] = float(np.ceil(span / 7))
    elif span > 0.9:
        found["dtick"] = "D2"
    elif span > 0.6:
        found["dtick"] = "D1"
    return found


def common(**settings: Any) -> dict[str, Any]:
    """Return the layout that all figures share."""
    return {
        "template": None,
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#222222"},
        "hovermode": "closest",
        "showlegend": False,
        **settings,
    }
