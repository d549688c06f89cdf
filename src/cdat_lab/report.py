"""The report of a comparison: one HTML page that needs nothing else, and a table as CSV."""

from __future__ import annotations

import importlib.resources
import json
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from cdat_lab import backends, figures, storage, summary, table
from cdat_lab.bases import BASES
from cdat_lab.compare import Comparison
from cdat_lab.contenders import CONTENDERS

PAPER = (
    'V. Roulet, A. Agarwala, J.-B. Grill, G. Swirszcz, M. Blondel, F. Pedregosa, "Stepping on the '
    'Edge: Curvature Aware Learning Rate Tuners", 2024, arXiv:2407.06183'
)


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write ``report.html`` and ``table.csv``, each whole or not at all.

    Parameters
    ----------
    comparison : Comparison
        The results.
    folder : Path
        Where the files go.

    Returns
    -------
    Path
        The page.
    """
    storage.write_text(folder / "table.csv", table.results(comparison).write_csv())
    path = folder / "report.html"
    storage.write_text(path, render(comparison))
    return path


def render(comparison: Comparison) -> str:
    """Return the page; scripts, styles and data are all inside."""
    title = f"Learning-rate tuners on {comparison.task}"
    sections = [
        _header(comparison, title),
        _results(comparison),
        *(_trajectories(comparison, base) for base in BASES),
        _grids(comparison),
        _times(comparison),
        _configuration(comparison),
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title>",
            f"<style>{_asset('report.css')}</style>",
            f"<script>{get_plotlyjs()}</script>",
            "</head><body>",
            *sections,
            f'<script type="module">{_asset("report.js")}</script>',
            "</body></html>\n",
        ]
    )


def _header(comparison: Comparison, title: str) -> str:
    labels = " and ".join(backends.BACKENDS[name].label for name in comparison.backends)
    links = [("results", "Results"), *((base, BASES[base].label) for base in BASES)]
    links += [("grids", "Tuning grids"), ("times", "Times"), ("configuration", "Configuration")]
    return "\n".join(
        [
            f"<header><h1>{escape(title)}</h1>",
            f'<p class="lead">{len(CONTENDERS)} rules for the learning rate, each on top of '
            f"{' and '.join(base.label for base in BASES.values())}, trained under {labels}. "
            f"The task: {escape(comparison.description)}. {comparison.steps} steps, "
            f"seed {comparison.seed}.</p>",
            f'<p class="lead">CDAT sets the rate to sigma times &minus;slope over curvature of the '
            f"loss along the update ({escape(PAPER)}). The two baselines with a rate to choose, "
            "constant and warm-up + cosine, were tuned on a grid; the other rules have one setting "
            "and one run.</p>",
            "<nav>"
            + " ".join(f'<a href="#{to}">{escape(text)}</a>' for to, text in links)
            + "</nav>",
            "</header>",
            '<section class="findings" aria-label="What was seen"><ul>',
            *(
                f"<li><b>{_html(topic)}.</b> {_html(text)}</li>"
                for topic, text in summary.findings(comparison)
            ),
            "</ul></section>",
        ]
    )


def _results(comparison: Comparison) -> str:
    rows: list[tuple[str, list[str]]] = []
    before = ""
    frame = table.results(comparison)
    for row, result in zip(frame.iter_rows(named=True), comparison.results, strict=True):
        classes = ["first"] if before and before != row["base"] else []
        classes += ["lowest"] if "lowest" in row["note"] else []
        before = row["base"]
        base, contender, *rest = map(_html, table.cells(row))
        cells = [base, _swatch(result.job.contender) + contender, *rest]
        rows.append((" ".join(classes), cells))
    return (
        '<section id="results"><h2>Results</h2>'
        + _table(table.HEADINGS, rows, numbers=table.NUMBERS)
        + f'<p class="caption">{_html(table.CAPTION)}</p></section>'
    )


def _trajectories(comparison: Comparison, base: str) -> str:
    optimizer = BASES[base]
    what = (
        "The sharpness is the largest eigenvalue of P<sup>&minus;1/2</sup> H "
        "P<sup>&minus;1/2</sup>, with Adam's own diagonal P"
        if optimizer.preconditioned
        else "The sharpness is the largest eigenvalue of the Hessian"
    )
    parts = [
        f'<section id="{base}"><h2>{escape(optimizer.label)}</h2>',
        f'<p class="caption">{what}, tracked by power iteration; where an eigenvalue of larger '
        "magnitude is negative, no point is shown. A constant rate times the sharpness beyond "
        f"{optimizer.edge:.3g} makes a quadratic diverge: the edge of stability. Click a name in "
        "the legend to hide its curves in all four panels, double-click to see it alone.</p>",
    ]
    for backend in comparison.backends:
        label = backends.BACKENDS[backend].label
        parts.append(f"<h3>{escape(optimizer.label)} under {escape(label)}</h3>")
        figure = figures.trajectories(comparison, base, backend)
        arrangements = {
            "wide": figures.flat(figures.arrangement(2)),
            "narrow": figures.flat(figures.arrangement(1)),
        }
        parts.append(_figure(f"trajectories-{base}-{backend}", figure, arrangements))
    return "\n".join([*parts, "</section>"])


def _grids(comparison: Comparison) -> str:
    parts = [
        '<section id="grids"><h2>Tuning grids</h2>',
        '<p class="caption">Every run that was made to choose a rate. A grid of factor 2 grows '
        "until the lowest final loss is inside it.</p>",
    ]
    for name, base in BASES.items():
        parts.append(f"<h3>{escape(base.label)}</h3>")
        parts.append(_figure(f"grid-{name}", figures.grids(comparison, name), None))
    rows = [
        (
            "",
            [
                escape(BASES[result.job.base].label),
                escape(CONTENDERS[result.job.contender].label),
                escape(result.job.backend),
                ", ".join(
                    _html(f"{table.power_of_two(rate)}: {_loss(loss)}")
                    for rate, loss in zip(result.grid.rates, result.grid.losses, strict=True)
                ),
            ],
        )
        for result in comparison.results
        if result.grid is not None
    ]
    headings = ("base", "contender", "backend", "final loss at each rate")
    parts.append(f"<details><summary>All numbers</summary>{_table(headings, rows)}</details>")
    return "\n".join([*parts, "</section>"])


def _loss(loss: float) -> str:
    return table.number(loss) if math.isfinite(loss) else "diverged"


def _times(comparison: Comparison) -> str:
    frame = table.timings(comparison)
    rows = [("", [*map(escape, row[:2]), *(f"{x:.2f}" for x in row[2:])]) for row in frame.rows()]
    return (
        '<section id="times"><h2>Milliseconds per step</h2>'
        '<p class="caption">Wall clock on one thread, without compilation, sharpness included. '
        "These figures change from one execution to the next, all others on this page do not.</p>"
        + _table(frame.columns, rows, numbers=range(2, len(frame.columns)))
        + "</section>"
    )


def _configuration(comparison: Comparison) -> str:
    lines = []
    for name in comparison.backends:
        identity = comparison.get(next(iter(BASES)), name, "constant").run.identity
        found = ", ".join(f"{package} {v}" for package, v in identity["versions"].items())
        lines.append(f"{backends.BACKENDS[name].label}: {found}; code {identity['code']}")
    for base in BASES.values():
        settings = f"momentum {base.momentum}"
        if base.preconditioned:
            settings += f", second moment {base.second_moment}, eps {base.eps}"
        lines.append(f"{base.label}: {settings}; edge of stability {base.edge:.3g}")
    for contender in CONTENDERS.values():
        fixed = ", ".join(f"{k} {v:g}" for k, v in contender.hyperparameters.items())
        tuned = f"{contender.tuned.replace('_', ' ')} tuned" if contender.tuned else ""
        lines.append(f"{contender.label}: {fixed or tuned or 'no setting'}")
    chosen = "all" if len(comparison.backends) > 1 else comparison.backends[0]
    command = (
        f"cdat compare {comparison.task} --backend {chosen} --steps {comparison.steps} "
        f"--seed {comparison.seed}"
    )
    return "\n".join(
        [
            '<section id="configuration"><h2>Configuration</h2>',
            f"<p>To repeat this: <code>{escape(command)}</code></p><ul>",
            *(f"<li>{escape(line)}</li>" for line in lines),
            "</ul></section>",
        ]
    )


def _table(
    headings: Sequence[str],
    rows: Iterable[tuple[str, Sequence[str]]],
    *,
    numbers: Iterable[int] = (),
) -> str:
    """Return a table of cells that are HTML already; `numbers` are the columns set to the right."""
    right = set(numbers)

    def line(tag: str, cells: Sequence[str], classes: str = "") -> str:
        plain, number = f"<{tag}>", f'<{tag} class="number">'
        content = "".join(
            f"{number if index in right else plain}{cell}</{tag}>"
            for index, cell in enumerate(cells)
        )
        return f'<tr class="{classes}">{content}</tr>' if classes else f"<tr>{content}</tr>"

    head = line("th", [_html(heading) for heading in headings])
    body = "\n".join(line("td", cells, classes) for classes, cells in rows)
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _swatch(contender: str) -> str:
    style = figures.STYLES[contender]
    dash = {"solid": "solid", "2px,3px": "dotted"}.get(style.dash, "dashed")
    border = f"{style.width + 1:g}px {dash} {style.color}"
    return f'<span class="swatch" style="border-top: {border}"></span>'


def _figure(name: str, figure: go.Figure, arrangements: dict[str, Any] | None) -> str:
    content = {**json.loads(figure.to_json()), "arrangements": arrangements}
    data = json.dumps(content, allow_nan=False).replace("</", "<\\/")
    return (
        f'<div class="figure" data-source="{name}-data"></div>'
        f'<script type="application/json" id="{name}-data">{data}</script>'
    )


def _html(text: str) -> str:
    """Return the text escaped, with the signs a terminal may lack."""
    marked = escape(text).replace(" x ", " &times; ").replace("x constant", "&times; constant")
    return re.sub(r"2\^(-?\d+)", r"2<sup>\1</sup>", marked)


def _asset(name: str) -> str:
    return (importlib.resources.files("cdat_lab") / "assets" / name).read_text(encoding="utf-8")
