"""Tables of a comparison: what was reached, and, apart from it, how long it took."""

from __future__ import annotations

import math
from typing import Any

import polars as pl

from cdat_lab.bases import BASES
from cdat_lab.compare import Comparison, Result
from cdat_lab.contenders import CONTENDERS

SCHEMA = {
    "base": pl.String,
    "contender": pl.String,
    "backend": pl.String,
    "tuned": pl.Float64,
    "runs": pl.Int64,
    "final_loss": pl.Float64,
    "over_constant": pl.Float64,
    "best_loss": pl.Float64,
    "sharpness": pl.Float64,
    "edge_ratio": pl.Float64,
    "skipped": pl.Int64,
    "note": pl.String,
}

HEADINGS = (
    "base",
    "contender",
    "backend",
    "tuned rate",
    "runs",
    "final loss",
    "x constant",
    "best loss",
    "sharpness",
    "rate x sharpness / edge",
    "note",
)
NUMBERS = range(3, 10)
"""Which of them are set to the right."""

CAPTION = (
    "Tuned rate: the constant rate, or the peak. Runs: how many were spent on the setting. "
    "x constant: final loss over that of the tuned constant rate. Sharpness (preconditioned for "
    "Adam) and rate x sharpness over the edge of stability are medians over the last tenth of the "
    "steps. Skipped: steps that were not taken because something was not finite. Grid edge: a "
    "better rate may lie outside the grid."
)


def results(comparison: Comparison) -> pl.DataFrame:
    """Return one row for each base, contender and backend; the same seed gives the same table.

    Parameters
    ----------
    comparison : Comparison
        The results.

    Returns
    -------
    polars.DataFrame
        The columns of `SCHEMA`. ``tuned`` is the rate or peak, null where nothing was tuned;
        ``over_constant`` the final loss over that of the tuned constant rate.
    """
    rows = []
    for result in comparison.results:
        job, run, base = result.job, result.run, BASES[result.job.base]
        product = run.late(pl.col("learning_rate") * pl.col("sharpness"))
        rows.append(
            (
                base.label,
                CONTENDERS[job.contender].label,
                job.backend,
                tuned_value(result),
                1 if result.grid is None else len(result.grid.rates),
                run.final_loss,
                over_constant(comparison, result),
                run.best_loss,
                run.late(pl.col("sharpness")),
                None if product is None else product / base.edge,
                run.skipped,
                note(comparison, result),
            )
        )
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def timings(comparison: Comparison) -> pl.DataFrame:
    """Return the wall-clock times, which differ from one execution to the next.

    Returns
    -------
    polars.DataFrame
        base, contender, then milliseconds per step for each backend. Compilation is left out; the
        sharpness is included.
    """
    rows = [
        {
            "base": BASES[base].label,
            "contender": CONTENDERS[contender].label,
            **{
                backend: 1e3 * comparison.get(base, backend, contender).run.seconds_per_step
                for backend in comparison.backends
            },
        }
        for base in BASES
        for contender in CONTENDERS
    ]
    return pl.DataFrame(rows)


def winner(comparison: Comparison, base: str, backend: str) -> Result:
    """Return the result of lowest final loss."""
    return min(comparison.of(base, backend), key=lambda result: result.run.final_loss)


def tuned_value(result: Result) -> float | None:
    """Return the rate or peak that was chosen on the grid; None where nothing was tuned."""
    tuned = CONTENDERS[result.job.contender].tuned
    return None if tuned is None else result.run.hyperparameters[tuned]


def over_constant(comparison: Comparison, result: Result) -> float | None:
    """Return the final loss over that of the tuned constant rate; None if the latter diverged."""
    reference = comparison.get(result.job.base, result.job.backend, "constant").run
    return None if reference.diverged else result.run.final_loss / reference.final_loss


def note(comparison: Comparison, result: Result) -> str:
    """Return what else there is to say about a result, in a few words."""
    run = result.run
    parts = []
    if run.diverged:
        parts.append("diverged")
    elif result is winner(comparison, result.job.base, result.job.backend):
        parts.append("lowest")
    if run.skipped:
        parts.append(f"{run.skipped} skipped")
    if result.grid is not None and result.grid.at_edge:
        parts.append("grid edge")
    return ", ".join(parts)


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row of `results` as people read it, in the order of `HEADINGS`."""
    return [
        row["base"],
        row["contender"],
        row["backend"],
        power_of_two(row["tuned"]),
        str(row["runs"]),
        number(row["final_loss"]),
        fixed(row["over_constant"]),
        number(row["best_loss"]),
        number(row["sharpness"]),
        fixed(row["edge_ratio"]),
        row["note"],
    ]


def power_of_two(rate: float | None) -> str:
    """Return a rate as the power of two that it is; nothing for None."""
    if rate is None:
        return ""
    exponent = math.log2(rate)
    return f"2^{exponent:.0f}" if exponent.is_integer() else f"{rate:.4g}"


def number(value: float | None, digits: int = 3) -> str:
    """Return a measured number with a few digits; nothing for None."""
    if value is None:
        return ""
    if value == 0 or 1e-2 <= abs(value) < 10**digits:
        return f"{value:#.{digits}g}".removesuffix(".")
    return f"{value:.0f}" if 10**digits <= abs(value) < 1e6 else f"{value:.{digits - 1}e}"


def fixed(value: float | None) -> str:
    """Return a ratio with two decimals; nothing for None."""
    return "" if value is None else f"{value:.2f}"
