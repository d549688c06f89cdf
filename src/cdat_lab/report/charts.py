"""Charts: a figure with its legend, and text inside a figure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import plotly.graph_objects as go

from cdat_lab.report.curve_styles import Style

TIMES, MINUS, CROSS, NOTHING = (
    "\N{MULTIPLICATION SIGN}",
    "\N{MINUS SIGN}",
    "\N{BALLOT X}",
    "\N{EN DASH}",
)


class Entry(NamedTuple):
    """An entry of a legend: a group of curves, its label and how the curves look."""

    group: str
    label: str
    style: Style


@dataclass(frozen=True, eq=False)
class Chart:
    """A figure as the page shows it.

    Attributes
    ----------
    name : str
        Id of the element and name of the downloaded file.
    figure : plotly.graph_objects.Figure
        Drawn by ``figures.js``.
    description : str
        Alternative text for screen readers.
    legend : tuple of Entry
        A click on an entry hides its curves in all panels.
    arrangements : mapping, optional
        Layouts that override the figure's own on "wide" and "narrow" screens.
    """

    name: str
    figure: go.Figure
    description: str
    legend: tuple[Entry, ...] = ()
    arrangements: Mapping[str, Any] | None = None

    def content(self) -> dict[str, Any]:
        """Return what ``figures.js`` reads."""
        return {**json.loads(self.figure.to_json()), "arrangements": self.arrangements}


def label(text: str) -> str:
    """Return text that Plotly, which interprets some HTML and templates, shows unchanged."""
    return escape(text, quote=False).replace("%{", "%&#123;").replace("$", "&#36;")
