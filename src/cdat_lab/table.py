"""Tables of findings: results over the seeds and for each run, sweeps, and times."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from cdat_lab.bases import Base
from cdat_lab.findings import Findings
from cdat_lab.measures import REFERENCE, rate_times_sharpness, sharpness, sweep_ratios
from cdat_lab.races import Race, Result
from cdat_lab.registry import find_base, find_contender
from cdat_lab.studies import Sweep

RESULTS = {
    "contender": pl.String,
    "label": pl.String,
    "seeds": pl.Int64,
    "missing": pl.Int64,
    "diverged": pl.Int64,
    "tuned": pl.Float64,
    "tuning_runs": pl.Int64,
    "grid_edge": pl.Int64,
    "final_loss": pl.Float64,
    "final_low": pl.Float64,
    "final_high": pl.Float64,
    "over_constant": pl.Float64,
    "sharpness": pl.Float64,
    "product": pl.Float64,
    "edge_ratio": pl.Float64,
    "skipped": pl.Int64,
    "lowest": pl.Boolean,
}

ROWS = {
    "task": pl.String,
    "base": pl.String,
    "batch_size": pl.Int64,
    "backend": pl.String,
    "steps": pl.Int64,
    "contender": pl.String,
    "label": pl.String,
    "seed": pl.Int64,
    "status": pl.String,
    "tuned": pl.Float64,
    "tuning_runs": pl.Int64,
    "grid_edge": pl.Boolean,
    "initial_loss": pl.Float64,
    "final_loss": pl.Float64,
    "best_loss": pl.Float64,
    "validation_loss": pl.Float64,
    "over_constant": pl.Float64,
    "sharpness": pl.Float64,
    "product": pl.Float64,
    "edge": pl.Float64,
    "skipped": pl.Int64,
    "gradients": pl.Float64,
}

SWEEP = {
    "batch_size": pl.Int64,
    "sigma": pl.Float64,
    "seeds": pl.Int64,
    "diverged": pl.Int64,
    "log_ratio": pl.Float64,
    "best": pl.Boolean,
}

CAPTION = (
    "Numbers are medians over the seeds, with the lowest and the highest in brackets. Tuned rate: "
    "the constant rate, or the peak of a schedule. Tuning runs: total over all seeds. Final loss: "
    "on all training data, averaged over the last tenth of the steps. x constant: final loss "
    "divided by the final loss of the tuned constant rate with the same seed. Sharpness and "
    "rate x sharpness: medians over the last tenth of the steps; left out for optimizers with "
    "their own preconditioner, whose values cannot be compared. Skipped: steps skipped because a "
    "value was not finite, the maximum over the runs. Diverged: final loss above the initial loss, "
    "or not finite. Grid edge: a better rate may lie outside the grid."
)


def results(findings: Findings, race: Race) -> pl.DataFrame:
    """Return one row for each contender of a race, aggregated over its seeds.

    Parameters
    ----------
    findings : Findings
        The findings of a study.
    race : Race
        A race of the study.

    Returns
    -------
    polars.DataFrame
        The columns of `RESULTS`, medians over the seeds. ``seeds`` counts the results that exist,
        ``missing`` the others; ``tuned`` is null if nothing was tuned, ``over_constant`` if no
        tuned constant rate converged, ``edge_ratio`` (``product``, rate times sharpness, relative
        to the edge) if the edge is unknown. ``skipped`` is the maximum over the runs; ``lowest``
        marks the lowest final loss.
    """
    edge = find_base(race.base).edge
    rows: list[dict[str, Any]] = []
    for name in race.contenders:
        found = findings.of(race, name)
        losses = [result.run.final_loss for result in found]
        grids = [result.grid for result in found if result.grid is not None]
        ratios = [over_constant(findings, race, result) for result in found]
        products = [rate_times_sharpness(result) for result in found]
        product = _median(products)
        rows.append(
            {
                "contender": name,
                "label": find_contender(name).label,
                "seeds": len(found),
                "missing": len(race.seeds) - len(found),
                "diverged": sum(result.run.diverged for result in found),
                "tuned": _median(map(tuned_value, found)),
                "tuning_runs": sum(len(grid.rates) for grid in grids),
                "grid_edge": sum(grid.at_edge for grid in grids),
                "final_loss": _median(losses),
                "final_low": min(losses, default=None),
                "final_high": max(losses, default=None),
                "over_constant": _median(ratios),
                "sharpness": _median(map(sharpness, found)),
                "product": product,
                "edge_ratio": None if product is None or edge is None else product / edge,
                "skipped": max((result.run.skipped for result in found), default=None),
                "lowest": False,
            }
        )
    known = [row for row in rows if row["seeds"] and math.isfinite(row["final_loss"])]
    if len(known) > 1:
        min(known, key=lambda row: row["final_loss"])["lowest"] = True
    return pl.DataFrame(rows, schema=RESULTS, orient="row")


def rows(findings: Findings) -> pl.DataFrame:
    """Return one row for each result of a study, including sweeps.

    Returns
    -------
    polars.DataFrame
        The columns of `ROWS`; ``batch_size`` is null for the full batch, ``status`` "finished",
        "diverged" or "missing". No column depends on wall-clock time.
    """
    found: dict[Any, dict[str, Any]] = {}
    for race in findings.study.all_races():
        edge = find_base(race.base).edge
        for name in race.contenders:
            for seed in race.seeds:
                key = race.key(name, seed)
                row = {**key._asdict(), "label": find_contender(name).label, "edge": edge}
                result = findings.results.get(key)
                measured = {} if result is None else _measured(findings, race, result)
                found[key] = {"status": "missing", **row, **measured}
    return pl.DataFrame(list(found.values()), schema=ROWS, orient="row")


def _measured(findings: Findings, race: Race, result: Result) -> dict[str, Any]:
    run, grid = result.run, result.grid
    return {
        "status": "diverged" if run.diverged else "finished",
        "tuned": tuned_value(result),
        "tuning_runs": 0 if grid is None else len(grid.rates),
        "grid_edge": None if grid is None else grid.at_edge,
        "initial_loss": run.initial_loss,
        "final_loss": run.final_loss,
        "best_loss": run.best_loss,
        "validation_loss": run.final_validation_loss,
        "over_constant": over_constant(findings, race, result),
        "sharpness": sharpness(result),
        "product": rate_times_sharpness(result),
        "skipped": run.skipped,
        "gradients": float(run.frame["gradients"][-1]),
    }


def sweep(findings: Findings, plan: Sweep) -> pl.DataFrame:
    """Return one row for each batch size and sigma of a sweep.

    Returns
    -------
    polars.DataFrame
        The columns of `SWEEP`. ``log_ratio`` is log10 of the final loss relative to the tuned
        constant rate, averaged over the seeds; null if a run is missing or diverged, or if no
        constant rate converged. ``best`` marks the lowest of a complete batch size.
    """
    ratios = sweep_ratios(plan, findings.results)
    found: list[dict[str, Any]] = []
    for number, race in enumerate(plan.races()):
        column: list[dict[str, Any]] = []
        for row, sigma in enumerate(plan.sigmas):
            there = findings.of(race, plan.contender(sigma))
            ratio = ratios[row, number]
            column.append(
                {
                    "batch_size": race.batch_size,
                    "sigma": sigma,
                    "seeds": len(there),
                    "diverged": sum(result.run.diverged for result in there),
                    "log_ratio": math.log10(ratio) if 0 < ratio < math.inf else None,
                    "best": False,
                }
            )
        known = [cell for cell in column if cell["log_ratio"] is not None]
        if known and all(cell["seeds"] == len(race.seeds) for cell in column):
            min(known, key=lambda cell: cell["log_ratio"])["best"] = True
        found += column
    return pl.DataFrame(found, schema=SWEEP, orient="row")


def timings(findings: Findings) -> pl.DataFrame:
    """Return the wall-clock times of the races, which differ between executions.

    Returns
    -------
    polars.DataFrame
        task, base, batch_size and contender (a label), then for each backend the milliseconds per
        step, excluding compilation and records (median over the seeds), and the seconds of
        compilation (maximum over the seeds).
    """
    races = findings.study.races or findings.study.all_races()
    names = list(dict.fromkeys(race.backend for race in races))
    text = pl.String
    schema: dict[str, Any] = {"task": text, "base": text, "batch_size": pl.Int64, "contender": text}
    for unit in ("ms", "compile"):
        schema |= {f"{name} {unit}": pl.Float64 for name in names}
    found: dict[Any, dict[str, Any]] = {}
    for race in races:
        for name in race.contenders:
            runs = [result.run for result in findings.of(race, name)]
            if not runs:
                continue
            row: dict[str, Any] = {
                "task": race.task,
                "base": find_base(race.base).label,
                "batch_size": race.batch_size,
                "contender": find_contender(name).label,
            }
            same = (race.task, race.base, race.batch_size, name, race.steps)
            row[f"{race.backend} ms"] = _median(1e3 * run.seconds_per_step for run in runs)
            row[f"{race.backend} compile"] = max(run.compile_seconds for run in runs)
            found[same] = found.get(same, {}) | row
    return pl.DataFrame(list(found.values()), schema=schema, orient="row")


def tuned_value(result: Result) -> float | None:
    """Return the rate or peak that was chosen on the grid; None if nothing was tuned."""
    tuned = find_contender(result.key.contender).tuned
    return None if tuned is None else result.run.hyperparameters.get(tuned)


def over_constant(findings: Findings, race: Race, result: Result) -> float | None:
    """Return the final loss relative to the tuned constant rate; None without such a rate."""
    reference = findings.results.get(race.key(REFERENCE, result.key.seed))
    if reference is None or reference.run.diverged or not reference.run.final_loss:
        return None
    return result.run.final_loss / reference.run.final_loss


def headings(base: Base) -> tuple[str, ...]:
    """Return the headings of the columns of `cells` for a race with this base."""
    product = "rate x sharpness" + ("" if base.edge is None else " / edge")
    curved = "precond. sharpness" if base.preconditioned else "sharpness"
    return (
        "contender",
        "tuned rate",
        "tuning runs",
        "final loss",
        "x constant",
        curved,
        product,
        "skipped",
        "note",
    )


NUMBERS = range(1, 8)
"""The columns that are right-aligned."""


def cells(row: Mapping[str, Any], base: Base) -> list[str]:
    """Return a row of `results` as text, in the order of `headings`."""
    product = row["product"] if base.edge is None else row["edge_ratio"]
    if not row["seeds"]:
        return [row["label"], *([""] * 7), note(row)]
    return [
        row["label"],
        power_of_two(row["tuned"]),
        str(row["tuning_runs"]) if row["tuned"] is not None else "",
        ranged(row["final_loss"], row["final_low"], row["final_high"]),
        fixed(row["over_constant"]),
        number(row["sharpness"]),
        number(product),
        str(row["skipped"]),
        note(row),
    ]


def note(row: Mapping[str, Any]) -> str:
    """Return the note on a row of `results`: missing, lowest, diverged, grid edge."""
    seeds, missing = row["seeds"], row["missing"]
    parts = []
    if missing:
        parts.append(f"{missing} of {seeds + missing} missing" if seeds else "all missing")
    if row["lowest"]:
        parts.append("lowest")
    if row["diverged"]:
        parts.append("diverged" if seeds == 1 else f"diverged in {row['diverged']} of {seeds}")
    if row["grid_edge"]:
        parts.append("grid edge" if seeds == 1 else f"grid edge in {row['grid_edge']} of {seeds}")
    return ", ".join(parts)


def to_csv(frame: pl.DataFrame) -> str:
    """Return a table as CSV in which no text is a formula for a spreadsheet.

    Text that starts like a formula is prefixed with an apostrophe; numbers are unchanged.
    """
    defused = [
        pl.when(pl.col(name).str.contains(r"^[=+\-@\t\r]"))
        .then(pl.concat_str(pl.lit("'"), name))
        .otherwise(name)
        .alias(name)
        for name, kind in frame.schema.items()
        if kind == pl.String
    ]
    return frame.with_columns(defused).write_csv()


def batch(size: int | None) -> str:
    """Return the size of a batch in words."""
    return "full batch" if size is None else f"batch {size}"


def power_of_two(rate: float | None) -> str:
    """Return a rate as a power of two (also of half exponents) if it is one; empty for None."""
    if rate is None:
        return ""
    exponent = round(2 * math.log2(rate)) / 2
    return f"2^{exponent:g}" if math.isclose(2.0**exponent, rate) else number(rate)


def number(value: float | None, digits: int = 3) -> str:
    """Return a measured number with a few digits; empty for None."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "not finite" if math.isnan(value) else f"{'-' if value < 0 else ''}infinite"
    if value == 0 or 1e-2 <= abs(value) < 10**digits:
        return f"{value:#.{digits}g}".removesuffix(".")
    return f"{value:.0f}" if 10**digits <= abs(value) < 1e6 else f"{value:.{digits - 1}e}"


def ranged(value: float | None, low: float | None, high: float | None) -> str:
    """Return a number with the lowest and the highest if they differ from it."""
    text = number(value)
    ends = (number(low), number(high))
    return text if ends in {(text, text), ("", "")} else f"{text} ({' to '.join(ends)})"


def fixed(value: float | None) -> str:
    """Return a ratio with two decimals, or as `number` if very large or small; empty for None."""
    if value is None:
        return ""
    return f"{value:.2f}" if 0.095 <= value < 1000 else number(value)


def _median(values: Iterable[float | None]) -> float | None:
    known: Sequence[float] = [v for v in values if v is not None and not math.isnan(v)]
    return statistics.median(known) if known else None
