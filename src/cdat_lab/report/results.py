"""Sections with figures: races, sweeps, the joint model and the tuning grids."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from cdat_lab import backends, table
from cdat_lab.findings import Findings
from cdat_lab.races import Race
from cdat_lab.registry import find_base, find_contender, find_task
from cdat_lab.report import figures_grid, figures_model, figures_race, figures_sweep
from cdat_lab.report.charts import MINUS, Chart, Entry
from cdat_lab.report.curve_styles import EDGE, Style
from cdat_lab.report.rendering import render_template
from cdat_lab.report.sections import Section
from cdat_lab.studies import Sweep

Styles = Mapping[str, Style]


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
    body = render_template(
        "race",
        race=race,
        base=base,
        description=find_task(race.task)(race.seeds[0]).description,
        batch=table.batch(race.batch_size),
        backend=backends.BACKENDS[race.backend].label,
        headings=table.headings(base),
        numbers=table.NUMBERS,
        rows=_results(findings, race, styles),
        caption=table.CAPTION,
        chart=_race_chart(findings, race, styles, name, link),
    )
    return Section(name, link, body)


def _results(findings: Findings, race: Race, styles: Styles) -> list[dict[str, Any]]:
    """Return the rows of the table of a race."""
    rows = []
    for row in table.results(findings, race).iter_rows(named=True):
        label, *numbers, note = table.cells(row, find_base(race.base))
        classes = ["lowest"] if row["lowest"] else []
        classes += [] if row["seeds"] else ["gap"]
        rows.append(
            {
                "classes": " ".join(classes),
                "style": styles[row["contender"]],
                "label": label,
                "numbers": numbers,
                "note": note,
            }
        )
    return rows


def _race_chart(
    findings: Findings, race: Race, styles: Styles, name: str, link: str
) -> Chart | None:
    drawn = figures_race.race(findings, race, styles)
    if drawn is None:
        return None
    figure, arrangements = drawn
    there = [contender for contender in race.contenders if findings.of(race, contender)]
    legend = _legend(there, styles)
    edge = find_base(race.base).edge
    if edge is not None and any(trace.legendgroup == "edge" for trace in figure.data):
        legend += (Entry("edge", f"edge of stability, {edge:.4g}", EDGE),)
    return Chart(
        f"{name}-{_slug(race)}",
        figure,
        f"{link}: training loss, learning rate, sharpness, their product, and the loss "
        "against time and cost",
        legend,
        arrangements,
    )


def title(race: Race, *, several_backends: bool = False) -> str:
    """Return a title that distinguishes a race from the others of its study."""
    found = f"{race.task}, {find_base(race.base).label}"
    if race.batch_size is not None:
        found += f", {table.batch(race.batch_size)}"
    return f"{found}, {race.backend}" if several_backends else found


def _several_backends(findings: Findings) -> bool:
    return len({race.backend for race in findings.study.all_races()}) > 1


def _legend(names: Iterable[str], styles: Styles) -> tuple[Entry, ...]:
    return tuple(Entry(name, find_contender(name).label, styles[name]) for name in names)


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
    chart = Chart(
        f"{name}-{plan.task}-{plan.base}",
        figures_sweep.heat_map(findings, plan),
        f"{link}: heat map of the final loss relative to the tuned constant rate",
    )
    frame = table.sweep(findings, plan)
    body = render_template(
        "sweep",
        sweep=plan,
        base=base,
        backend=backends.BACKENDS[plan.backend].label,
        chart=chart,
        rows=[_cell(row, len(plan.seeds)) for row in frame.iter_rows(named=True)],
    )
    return Section(name, link, body)


def _cell(row: Mapping[str, Any], seeds: int) -> dict[str, Any]:
    """Return a cell of the heat map as a row of the table below it."""
    ratio = None if row["log_ratio"] is None else 10 ** row["log_ratio"]
    notes = ["best of its batch size"] if row["best"] else []
    notes += [f"diverged in {row['diverged']} of {row['seeds']}"] if row["diverged"] else []
    notes += [] if row["seeds"] == seeds else [f"{seeds - row['seeds']} of {seeds} missing"]
    return {
        "best": row["best"],
        "numbers": [
            "full" if row["batch_size"] is None else str(row["batch_size"]),
            f"{row['sigma']:g}",
            "" if ratio is None else f"{row['log_ratio']:+.3f}".replace("-", MINUS),
            table.fixed(ratio),
        ],
        "note": ", ".join(notes),
    }


def joint_model(findings: Findings, styles: Styles) -> Section | None:
    """Return the section on the joint model; None if it was not run."""
    simulations = findings.simulations
    if not simulations:
        return None
    figure, arrangements = figures_model.joint_model(simulations, styles)
    entrants = [run.contender for run in simulations]
    chart = Chart(
        "joint-model-figure",
        figure,
        "Joint model: sharpness against learning rate, and both over the steps",
        (
            *(Entry(rule.name, rule.label, styles[rule.name]) for rule in entrants),
            Entry("edge", figures_model.NAME_OF_EDGE, EDGE),
        ),
        arrangements,
    )
    body = render_template(
        "joint_model",
        chart=chart,
        displacements=max(run.sharpness.shape[1] for run in simulations),
    )
    return Section("joint-model", "Joint model", body, "Joint model of rate and sharpness")


def grids(findings: Findings, styles: Styles) -> Section | None:
    """Return the section on the tuning grids; None if nothing was tuned."""
    found, rows, shown = [], [], set()
    several = _several_backends(findings)
    for number, race in enumerate(dict.fromkeys(findings.study.all_races()), 1):
        tuned = [
            name
            for name in race.contenders
            if any(r.grid is not None and r.key not in shown for r in findings.of(race, name))
        ]
        if not tuned:
            continue
        where = title(race, several_backends=several) + f", {race.steps} steps"
        results = [result for name in tuned for result in findings.of(race, name)]
        chart = Chart(
            f"grid-{number}-{_slug(race)}",
            figures_grid.grid(results, styles),
            f"{where}: final loss at each rate",
            _legend(tuned, styles),
        )
        found.append({"race": where, "chart": chart})
        for result in results:
            shown.add(result.key)
            if result.grid is not None:
                tried = zip(result.grid.rates, result.grid.losses, strict=True)
                rows.append(
                    {
                        "race": where,
                        "contender": find_contender(result.key.contender).label,
                        "seed": result.key.seed,
                        "losses": ", ".join(
                            f"{table.power_of_two(rate)}: {_loss(loss)}" for rate, loss in tried
                        ),
                    }
                )
    if not found:
        return None
    body = render_template("grids", grids=found, rows=rows)
    return Section("grids", "Tuning grids", body)


def _loss(loss: float) -> str:
    return table.number(loss) if math.isfinite(loss) else "diverged"
