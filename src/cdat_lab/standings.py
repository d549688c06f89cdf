"""Standings of the suite `self-tuning`: every loss relative to the tuned constant rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl

from cdat_lab import self_tuning, table
from cdat_lab.findings import Findings
from cdat_lab.races import Race, Result
from cdat_lab.registry import find_base, find_contender
from cdat_lab.self_tuning import OURS, REFERENCE, UNTUNED

CEILING = 10.0
"""A loss counts as ten times the initial one at most, also if it is not finite."""
CLIP = 4.0
"""Clipped means replace ratios beyond 4 or below 1/4 by these."""
CLOSE = 1.05
"""A ratio up to here counts as equal to the tuned constant rate."""
LARGEST_MEAN = 1.3
"""The geometric mean that `checks` allows."""
EQUAL_COST = "equal-cost"
"""Suffix of an entrant that runs fewer steps, for the cost of the plain ones."""

RATIOS = {
    "side": pl.String,
    "task": pl.String,
    "base": pl.String,
    "batch_size": pl.Int64,
    "entrant": pl.String,
    "label": pl.String,
    "seed": pl.Int64,
    "steps": pl.Int64,
    "diverged": pl.Boolean,
    "tuned": pl.Float64,
    "final_loss": pl.Float64,
    "ratio": pl.Float64,
    "validation_loss": pl.Float64,
    "validation_ratio": pl.Float64,
    "gradients_per_step": pl.Float64,
    "time_per_step": pl.Float64,
}

STANDINGS = {
    "entrant": pl.String,
    "label": pl.String,
    "settings": pl.Int64,
    "runs": pl.Int64,
    "diverged": pl.Int64,
    "mean": pl.Float64,
    "clipped": pl.Float64,
    "validation": pl.Float64,
    "validation_clipped": pl.Float64,
    "close": pl.Float64,
    "worst": pl.Float64,
    "gradients": pl.Float64,
    "time": pl.Float64,
}


class Check(NamedTuple):
    """One requirement of the verdict on the self-tuning rule."""

    required: str
    measured: str
    passed: bool


def ratios(findings: Findings) -> pl.DataFrame:
    """Return one row for each run that counts, in the order of the suite.

    Parameters
    ----------
    findings : Findings
        Of the suite; results may be missing.

    Returns
    -------
    polars.DataFrame
        The columns of `RATIOS`. ``ratio`` and ``validation_ratio`` are relative to the tuned
        constant rate with the same seed; ``time_per_step`` too, so it differs between executions.
        They are null if that run is missing or diverged.
    """
    rows: list[dict[str, Any]] = []
    longest: dict[Any, Race] = {}
    for race in findings.study.races:
        place = (race.task, race.base, race.batch_size)
        if race.steps >= longest.setdefault(place, race).steps:
            longest[place] = race
    for race in findings.study.races:
        plain = longest[race.task, race.base, race.batch_size]
        for name in race.contenders:
            for result in findings.of(race, name):
                reference = findings.results.get(plain.key(REFERENCE, result.key.seed))
                rows.append(_row(race, plain, name, result, reference))
    return pl.DataFrame(rows, schema=RATIOS, orient="row")


def _row(
    race: Race, plain: Race, name: str, result: Result, reference: Result | None
) -> dict[str, Any]:
    run, contender = result.run, find_contender(name)
    shorter = race.steps < plain.steps
    known = None if reference is None or reference.run.diverged else reference.run
    held_out, initial = run.final_validation_loss, run.initial_validation_loss
    validation = None
    if known is not None and held_out is not None and initial is not None:
        validation = _ratio(held_out, initial, known.final_validation_loss)
    return {
        "side": self_tuning.side(race.task),
        "task": race.task,
        "base": race.base,
        "batch_size": race.batch_size,
        "entrant": f"{name}-{EQUAL_COST}" if shorter else name,
        "label": contender.label + (", equal cost" if shorter else ""),
        "seed": result.key.seed,
        "steps": race.steps,
        "diverged": run.diverged,
        "tuned": None if contender.tuned is None else run.hyperparameters[contender.tuned],
        "final_loss": run.final_loss,
        "ratio": None
        if known is None
        else _ratio(run.final_loss, run.initial_loss, known.final_loss),
        "validation_loss": held_out,
        "validation_ratio": validation,
        "gradients_per_step": float(run.frame["gradients"][-1]) / run.steps,
        "time_per_step": None
        if known is None or not known.seconds_per_step
        else run.seconds_per_step / known.seconds_per_step,
    }


def _ratio(loss: float, initial: float, reference: float | None) -> float | None:
    if reference is None or not math.isfinite(reference) or reference <= 0:
        return None
    return min(loss, CEILING * initial) / reference


def standings(
    frame: pl.DataFrame, *, side: str | None = None, bases: Iterable[str] = ()
) -> pl.DataFrame:
    """Return one row for each entrant.

    Parameters
    ----------
    frame : polars.DataFrame
        From `ratios`.
    side : str, optional
        "development" or "judgement"; by default both.
    bases : iterable of str
        Base optimizers of the settings that count; by default all.

    Returns
    -------
    polars.DataFrame
        The columns of `STANDINGS`: geometric means over settings and seeds, plain and clipped, for
        training and validation; the part of the runs within 1.05; the largest ratio; gradients and
        time of a step relative to a plain step.
    """
    if side is not None:
        frame = frame.filter(pl.col("side") == side)
    if bases := tuple(bases):
        frame = frame.filter(pl.col("base").is_in(bases))
    found = []
    for entrant in entrants(frame):
        runs = frame.filter(pl.col("entrant") == entrant)
        known = runs["ratio"].drop_nulls()
        held_out = runs["validation_ratio"].drop_nulls()
        found.append(
            {
                "entrant": entrant,
                "label": runs["label"][0],
                "settings": runs.select("task", "base", "batch_size").n_unique(),
                "runs": runs.height,
                "diverged": int(runs["diverged"].sum()),
                "mean": _mean(known),
                "clipped": _mean(known.clip(1 / CLIP, CLIP)),
                "validation": _mean(held_out),
                "validation_clipped": _mean(held_out.clip(1 / CLIP, CLIP)),
                "close": (known <= CLOSE).mean(),
                "worst": known.max(),
                "gradients": runs["gradients_per_step"].mean(),
                "time": _mean(runs["time_per_step"].drop_nulls()),
            }
        )
    return pl.DataFrame(found, schema=STANDINGS, orient="row")


def entrants(frame: pl.DataFrame) -> list[str]:
    """Return the entrants in the order of the suite, the one at equal cost next to its twin."""
    names = list(frame["entrant"].unique(maintain_order=True))
    twin = f"{OURS}-{EQUAL_COST}"
    if twin in names and OURS in names:
        names.remove(twin)
        names.insert(names.index(OURS) + 1, twin)
    return names


def by_setting(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the geometric mean over the seeds of each entrant in each setting.

    Returns
    -------
    polars.DataFrame
        side, task, base, batch_size, entrant, ratio, validation_ratio, diverged (the number of
        runs), in the order of `ratios`.
    """
    place = ("side", "task", "base", "batch_size", "entrant")
    return frame.group_by(place, maintain_order=True).agg(
        pl.col("ratio", "validation_ratio").log().mean().exp(), pl.col("diverged").sum()
    )


def _mean(values: pl.Series) -> float | None:
    """Return the geometric mean; None if there are no values."""
    logarithm = values.log().mean()
    return None if logarithm is None else math.exp(float(logarithm))  # type: ignore[arg-type]


def checks(frame: pl.DataFrame) -> tuple[Check, ...]:
    """Return whether the self-tuning rule does what is said of it.

    Parameters
    ----------
    frame : polars.DataFrame
        From `ratios`.

    Returns
    -------
    tuple of Check
        Empty if the rule did not run.
    """
    ours = frame.filter(pl.col("entrant") == OURS)
    if ours.is_empty():
        return ()
    diverged = int(ours["diverged"].sum())
    mean = _mean(ours["ratio"].drop_nulls())
    found = [
        Check("no run diverges", f"{diverged} of {ours.height} runs", diverged == 0),
        Check(
            f"geometric mean at most {LARGEST_MEAN:g} times the tuned constant rate",
            "not measured" if mean is None else f"{mean:.2f}",
            mean is not None and mean <= LARGEST_MEAN,
        ),
    ]
    lower, settings = _lower(by_setting(frame), OURS, UNTUNED)
    label = find_contender(UNTUNED).label
    found.append(
        Check(
            f"lower loss than {label}, untuned, in most settings",
            f"{lower} of {settings} settings",
            2 * lower > settings,
        )
    )
    return tuple(found)


def _lower(frame: pl.DataFrame, first: str, second: str) -> tuple[int, int]:
    """Return in how many settings the first entrant ended lower, and how many have both."""
    place = ["task", "base", "batch_size"]
    pairs = frame.filter(pl.col("entrant") == first).join(
        frame.filter(pl.col("entrant") == second), on=place
    )
    pairs = pairs.filter(pl.col("ratio").is_not_null() & pl.col("ratio_right").is_not_null())
    return int((pairs["ratio"] < pairs["ratio_right"]).sum()), pairs.height


def groups(frame: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    """Return the tables of standings with their titles, those without a setting left out."""
    sides: Sequence[str] = ("development", "judgement")
    found = [("all settings", standings(frame))]
    found += [(f"{side} settings", standings(frame, side=side)) for side in sides]
    adam = [
        name for name in frame["base"].unique().sort() if find_base(name).label.startswith("Adam")
    ]
    found.append(("settings with Adam or AdamW", standings(frame, bases=adam or ("none",))))
    return [(title, rows) for title, rows in found if not rows.is_empty()]


HEADINGS = (
    "contender",
    "training",
    "clipped",
    "validation",
    "clipped",
    "within 1.05",
    "worst",
    "diverged",
    "cost",
    "time",
)


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return a row of `standings` as text, in the order of `HEADINGS`."""
    return [
        row["label"],
        table.fixed(row["mean"]),
        table.fixed(row["clipped"]),
        table.fixed(row["validation"]),
        table.fixed(row["validation_clipped"]),
        "" if row["close"] is None else f"{100 * row['close']:.0f} %",
        table.fixed(row["worst"]),
        f"{row['diverged']} of {row['runs']}",
        table.fixed(row["gradients"]),
        table.fixed(row["time"]),
    ]
