"""Sections with figures: races, sweeps, the joint model and the tuning grids."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from html import escape

from cdat_lab import backends, table
from cdat_lab.findings import Findings
from cdat_lab.races import Race
from cdat_lab.registry import find_base, find_contender, find_task
from cdat_lab.report import figures_grid, figures_model, figures_race, figures_sweep, markup
from cdat_lab.report.markup import words
from cdat_lab.report.sections import Section
from cdat_lab.report.styles import EDGE, Style
from cdat_lab.studies import Sweep

Styles = Mapping[str, Style]

HOW_TO_READ = (
    "Lines are medians over the seeds, bands go from the lowest to the highest seed. A click on a "
    "name hides its curves in all panels, a double click shows them alone."
)


def races(findings: Findings, styles: Styles) -> list[Section]:
    """Return a section for each race: its table and its figure."""
    several = _several_backends(findings)
    titles = [title(race, several_backends=several) for race in findings.study.races]
    found = []
    for number, (race, link) in enumerate(zip(findings.study.races, titles, strict=True), 1):
        longer = f"{link}, {race.steps} steps" if titles.count(link) > 1 else link
        found.append(_race(findings, race, styles, f"race-{number}", longer))
    return found


def _race(findings: Findings, race: Race, styles: Styles, name: str, link: str) -> Section:
    base = find_base(race.base)
    drawn = figures_race.race(findings, race, styles)
    parts = [f'<p class="lead">{_setting(race)}</p>', _results(findings, race, styles)]
    if drawn is None:
        parts.append('<p class="gap">No result of this race is there yet.</p>')
        return Section(name, link, markup.section(name, link, *parts))
    figure, arrangements = drawn
    there = [contender for contender in race.contenders if findings.of(race, contender)]
    legend = _legend(there, styles)
    if base.edge is not None and any(trace.legendgroup == "edge" for trace in figure.data):
        legend["edge"] = (f"edge of stability, {base.edge:.4g}", EDGE)
    chart = markup.chart(
        f"{name}-{_slug(race)}",
        figure,
        description=f"{link}: training loss, learning rate, sharpness, their product, and the loss "
        "against time and cost",
        legend=legend,
        arrangements=arrangements,
    )
    parts += [f'<p class="caption">{_sharpness(race)} {HOW_TO_READ}</p>', chart]
    return Section(name, link, markup.section(name, link, *parts))


def title(race: Race, *, several_backends: bool = False) -> str:
    """Return what tells a race from the others of a study."""
    found = f"{race.task}, {find_base(race.base).label}"
    if race.batch_size is not None:
        found += f", {table.batch(race.batch_size)}"
    return f"{found}, {race.backend}" if several_backends else found


def _several_backends(findings: Findings) -> bool:
    return len({race.backend for race in findings.study.all_races()}) > 1


def _setting(race: Race) -> str:
    description = find_task(race.task)(race.seeds[0]).description
    backend = backends.BACKENDS[race.backend].label
    seeds = "seed" if len(race.seeds) == 1 else "seeds"
    return escape(
        f"{description}. {find_base(race.base).label}, {table.batch(race.batch_size)}, "
        f"{race.steps} steps under {backend}, {seeds} {', '.join(map(str, race.seeds))}."
    )


def _sharpness(race: Race) -> str:
    base = find_base(race.base)
    what = "The sharpness is the largest eigenvalue of the Hessian of the loss on all data"
    if base.preconditioned:
        what += (
            ", preconditioned: of P<sup>&minus;1/2</sup> H P<sup>&minus;1/2</sup>, with the "
            f"diagonal P of {escape(base.label)} itself"
        )
    if base.edge is None:
        return f"{what}. The edge of stability of this optimizer is not known."
    return (
        f"{what}. A constant rate times the sharpness beyond {base.edge:.4g} makes a quadratic "
        "diverge: the edge of stability."
    )


def _results(findings: Findings, race: Race, styles: Styles) -> str:
    base = find_base(race.base)
    rows = []
    for row in table.results(findings, race).iter_rows(named=True):
        label, *rest = table.cells(row, base)
        classes = ["lowest"] if row["lowest"] else []
        classes += [] if row["seeds"] else ["gap"]
        look = markup.swatch(styles[row["contender"]])
        rows.append((" ".join(classes), [look + escape(label), *map(words, rest)]))
    caption = f'<p class="caption">{words(table.CAPTION)}</p>'
    return (
        markup.table(table.headings(base), rows, numbers=table.NUMBERS)
        + f"{markup.details('What the columns mean', caption)}"
    )


def _legend(names: Iterable[str], styles: Styles) -> dict[str, tuple[str, Style]]:
    return {name: (find_contender(name).label, styles[name]) for name in names}


def _slug(race: Race) -> str:
    batch = "" if race.batch_size is None else f"-batch{race.batch_size}"
    return f"{race.task}-{race.base}{batch}-{race.backend}"


def sweeps(findings: Findings) -> list[Section]:
    """Return a section for each sweep: its heat map, and its numbers."""
    return [
        _sweep(findings, plan, f"sweep-{number}")
        for number, plan in enumerate(findings.study.sweeps, 1)
    ]


def _sweep(findings: Findings, plan: Sweep, name: str) -> Section:
    base = find_base(plan.base).label
    link = f"Sigma and batch size: {plan.task}, {base}"
    memory = f"an EMA of {plan.decay:g}" if plan.decay else "no EMA"
    frame = table.sweep(findings, plan)
    seeds = "seed" if len(plan.seeds) == 1 else "seeds"
    text = (
        f"CDAT with {memory} on {plan.task} with {base} under "
        f"{backends.BACKENDS[plan.backend].label}, {plan.steps} steps, {seeds} "
        f"{', '.join(map(str, plan.seeds))}."
    )
    caption = (
        "Each cell is log10 of the final loss over that of the constant rate tuned for the same "
        "batch size and seed, as a geometric mean over the seeds: below 0 (blue) CDAT ended lower. "
        "A frame marks the best sigma of a batch size, a cross how many seeds diverged, a dash a "
        "result that is missing or has no constant rate to be set against."
    )
    rows = []
    for row in frame.iter_rows(named=True):
        ratio = None if row["log_ratio"] is None else 10 ** row["log_ratio"]
        marks = ["best of its batch size"] if row["best"] else []
        marks += [f"diverged in {row['diverged']} of {row['seeds']}"] if row["diverged"] else []
        marks += (
            []
            if row["seeds"] == len(plan.seeds)
            else [f"{row['seeds']} of {len(plan.seeds)} there"]
        )
        cells = [
            "full" if row["batch_size"] is None else str(row["batch_size"]),
            f"{row['sigma']:g}",
            "" if ratio is None else f"{row['log_ratio']:+.3f}".replace("-", "&minus;"),
            table.fixed(ratio),
            ", ".join(marks),
        ]
        rows.append(("lowest" if row["best"] else "", cells))
    headings = ("batch size", "sigma", "log10 of the ratio", "ratio", "note")
    html = markup.section(
        name,
        link,
        f'<p class="lead">{escape(text)}</p><p class="caption">{words(caption)}</p>',
        markup.chart(
            f"{name}-{plan.task}-{plan.base}",
            figures_sweep.heat_map(findings, plan),
            description=f"{link}: heat map of the final loss over that of the tuned constant rate",
        ).replace('class="chart"', 'class="chart heat"'),
        markup.details("All numbers", markup.table(headings, rows, numbers=range(4))),
    )
    return Section(name, link, html)


def joint_model(findings: Findings, styles: Styles) -> Section | None:
    """Return the section on the joint model; None if it was not run."""
    simulations = findings.simulations
    if not simulations:
        return None
    figure, arrangements = figures_model.joint_model(simulations, styles)
    legend = {
        run.contender.name: (run.contender.label, styles[run.contender.name]) for run in simulations
    }
    legend["edge"] = (figures_model.NAME_OF_EDGE, EDGE)
    starts = {run.sharpness.shape[1] for run in simulations}
    text = (
        "A model of the sharpness, of the weights along the sharpest direction and of all others "
        "together, moved by gradient descent under each rule. Its equations and constants are "
        "ours; that such a model explains the rules is the paper's claim."
    )
    caption = (
        "In phase space each curve begins at the circle and ends at the square (first initial "
        "displacement). Over the steps there is one curve for each of "
        f"{max(starts)} initial displacements. A curve along the lower border is a sharpness that "
        "has collapsed to 0. A click on a name hides its curves, a double click shows them alone."
    )
    name, link = "joint-model", "Joint model"
    html = markup.section(
        name,
        "Joint model of rate and sharpness",
        f'<p class="lead">{words(text)}</p><p class="caption">{words(caption)}</p>',
        markup.chart(
            name + "-figure",
            figure,
            description="Joint model: sharpness against learning rate, and both over the steps",
            legend=legend,
            arrangements=arrangements,
        ),
    )
    return Section(name, link, html)


def grids(findings: Findings, styles: Styles) -> Section | None:
    """Return the section on the tuning grids; None if nothing was tuned."""
    charts, rows, shown = [], [], set()
    several = _several_backends(findings)
    for number, race in enumerate(dict.fromkeys(findings.study.all_races()), 1):
        tuned = [
            name
            for name in race.contenders
            if any(r.grid is not None and r.key not in shown for r in findings.of(race, name))
        ]
        if not tuned:
            continue
        figure = figures_grid.grid([r for n in tuned for r in findings.of(race, n)], styles)
        where = title(race, several_backends=several) + f", {race.steps} steps"
        chart = markup.chart(
            f"grid-{number}-{_slug(race)}",
            figure,
            description=f"{where}: final loss at each rate",
            legend=_legend(tuned, styles),
        )
        charts.append(f"<div><h3>{escape(where)}</h3>{chart}</div>")
        for name in tuned:
            for result in findings.of(race, name):
                shown.add(result.key)
                if result.grid is not None:
                    tried = zip(result.grid.rates, result.grid.losses, strict=True)
                    cells = (where, find_contender(name).label, str(result.key.seed))
                    numbers = ", ".join(f"{table.power_of_two(k)}: {_loss(v)}" for k, v in tried)
                    rows.append(("", [*map(escape, cells), words(numbers)]))
    if not charts:
        return None
    caption = (
        "Every run that was made to choose a rate, one curve for each seed. A grid of factor 2 "
        "grows until the lowest final loss is inside it and is then refined by a factor of the "
        "square root of 2. Crosses at the top are rates that diverged."
    )
    headings = ("race", "contender", "seed", "final loss at each rate")
    name, link = "grids", "Tuning grids"
    html = markup.section(
        name,
        link,
        f'<p class="caption">{words(caption)}</p>',
        f'<div class="pairs">{"".join(charts)}</div>',
        markup.details("All numbers", markup.table(headings, rows, kind="long")),
    )
    return Section(name, link, html)


def _loss(loss: float) -> str:
    return table.number(loss) if math.isfinite(loss) else "diverged"
