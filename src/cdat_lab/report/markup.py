"""Pieces of HTML: tables, charts with their legends and buttons, and what is escaped how."""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from cdat_lab.report.styles import Style

TIMES, MINUS, CROSS, NOTHING = (
    "\N{MULTIPLICATION SIGN}",
    "\N{MINUS SIGN}",
    "\N{BALLOT X}",
    "\N{EN DASH}",
)

Legend = Mapping[str, tuple[str, Style]]
"""For each group of curves its label and its style."""


def words(text: str) -> str:
    """Return text of this package as HTML: escaped, with the signs a terminal may lack."""
    marked = re.sub(r"(?<![^\s])x (?=[a-z])", "&times; ", escape(text))
    return re.sub(r"2\^(-?[\d.]+)", r"2<sup>\1</sup>", marked).replace("<sup>-", "<sup>&minus;")


def section(name: str, title: str, *parts: str) -> str:
    """Return a section of the page; the title is escaped, the parts are HTML."""
    head = f'<section id="{escape(name)}"><h2>{escape(title)}</h2>'
    return "\n".join([head, *parts, "</section>"])


def table(
    headings: Sequence[str],
    rows: Iterable[tuple[str, Sequence[str]]],
    *,
    numbers: Iterable[int] = (),
    kind: str = "",
) -> str:
    """Return a table.

    Parameters
    ----------
    headings : sequence of str
        As `words` takes them.
    rows : iterable of (str, sequence of str)
        The classes of each row and its cells, which are HTML already.
    numbers : iterable of int
        The columns that are set to the right.
    kind : str
        Class of the table; "stack" puts the cells of a row below one another on a phone.

    Returns
    -------
    str
    """
    right = set(numbers)

    def cell(tag: str, index: int, content: str, extra: str = "") -> str:
        number = ' class="number"' if index in right else ""
        return f"<{tag}{number}{extra}>{content}</{tag}>"

    head = "".join(
        cell("th", i, words(heading), ' scope="col"') for i, heading in enumerate(headings)
    )
    body = []
    for classes, cells in rows:
        content = "".join(
            cell("td", i, text, f' data-label="{escape(headings[i])}"' if kind else "")
            for i, text in enumerate(cells)
        )
        body.append(f'<tr class="{classes}">{content}</tr>' if classes else f"<tr>{content}</tr>")
    opening = f'<table class="{kind}">' if kind else "<table>"
    return (
        f'<div class="scroll">{opening}<thead><tr>{head}</tr></thead><tbody>'
        + "\n".join(body)
        + "</tbody></table></div>"
    )


def details(summary: str, content: str) -> str:
    """Return content that is folded away."""
    return f"<details><summary>{words(summary)}</summary>{content}</details>"


def swatch(style: Style) -> str:
    """Return a short piece of the curve as it is drawn."""
    dash = "" if style.dash == "solid" else f' stroke-dasharray="{style.dash}"'
    return (
        '<svg class="swatch" viewBox="0 0 34 8" width="34" height="8" aria-hidden="true">'
        f'<path d="M0 4H34" stroke="{style.color}" stroke-width="{style.width:g}"{dash}/></svg>'
    )


def chart(
    name: str,
    figure: go.Figure,
    *,
    description: str,
    legend: Legend | None = None,
    arrangements: Mapping[str, Any] | None = None,
) -> str:
    """Return a figure with its legend and the buttons that download it.

    Parameters
    ----------
    name : str
        For the element and the downloaded file: letters, digits, ``.``, ``_`` and ``-``.
    figure : plotly.graph_objects.Figure
        Drawn by report.js.
    description : str
        What it shows, for those who cannot see it.
    legend : mapping, optional
        Its groups of curves: a click hides one in all panels.
    arrangements : mapping, optional
        Layouts that are laid over that of the figure, "wide" and "narrow".

    Returns
    -------
    str
    """
    buttons = "".join(
        f'<button type="button" data-group="{escape(group)}" aria-pressed="true">'
        f"{swatch(style)}{escape(label)}</button>"
        for group, (label, style) in (legend or {}).items()
    )
    tools = "".join(
        f'<button type="button" data-format="{kind}" title="Download as {kind.upper()}">'
        f"{kind.upper()}</button>"
        for kind in ("png", "svg")
    )
    content = {**json.loads(figure.to_json()), "arrangements": arrangements}
    return (
        f'<figure class="chart" id="{name}"><div class="bar"><div class="legend">{buttons}</div>'
        f'<div class="tools">{tools}</div></div>'
        f'<div class="figure" role="img" aria-label="{escape(description)}"></div>'
        f'<script type="application/json">{embedded(content)}</script></figure>'
    )


def embedded(content: Any) -> str:
    """Return JSON in which nothing can end the script element that holds it."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def label(text: str) -> str:
    """Return text so that Plotly, which knows some HTML and templates, shows it as it is."""
    return escape(text, quote=False).replace("%{", "%&#123;").replace("$", "&#36;")


def asset(name: str) -> str:
    """Return a file of the package's assets."""
    return (importlib.resources.files("cdat_lab") / "assets" / name).read_text(encoding="utf-8")
