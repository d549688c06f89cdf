"""Measurements of finished runs, for both tables and verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from cdat_lab.bases import Base
from cdat_lab.contenders import Contender
from cdat_lab.races import Result, Results
from cdat_lab.registry import find_base, find_contender
from cdat_lab.studies import Sweep

REFERENCE = "constant"
"""The contender that the others are compared with."""


def final_loss(result: Result) -> float:
    """Return the final loss; infinity if the run diverged."""
    return math.inf if result.run.diverged else result.run.final_loss


def comparable(base: Base, contender: Contender) -> bool:
    """Return whether the sharpness of a contender is measured as for other contenders of the base.

    A complete optimizer has its own preconditioner, and its sharpness is recorded without any.
    """
    return contender.optimizer is None or not base.preconditioned


def sharpness(result: Result) -> float | None:
    """Return the median sharpness over the last tenth; None if it is not `comparable`."""
    return _late(result, pl.col("sharpness"))


def rate_times_sharpness(result: Result) -> float | None:
    """Return the learning rate times the sharpness; see `sharpness`."""
    return _late(result, pl.col("learning_rate") * pl.col("sharpness"))


def _late(result: Result, column: pl.Expr) -> float | None:
    base, contender = find_base(result.key.base), find_contender(result.key.contender)
    return result.run.late(column) if comparable(base, contender) else None


def sweep_ratios(
    sweep: Sweep, results: Results, seeds: Sequence[int] | None = None
) -> NDArray[np.float64]:
    """Return final losses relative to the tuned constant rate, shape (sigmas, batch sizes).

    Parameters
    ----------
    sweep : Sweep
        The runs to compare.
    results : mapping of Key to Result
        Their results.
    seeds : sequence of int, optional
        Seeds of the geometric mean; by default all seeds of the sweep.

    Returns
    -------
    ndarray
        Infinity where a run diverged, NaN where one is missing or the constant rate diverged.
    """
    ratios = np.full((len(sweep.sigmas), len(sweep.batch_sizes)), np.nan)
    for column, race in enumerate(sweep.races()):
        for row, sigma in enumerate(sweep.sigmas):
            keys = [
                (race.key(sweep.contender(sigma), seed), race.key(REFERENCE, seed))
                for seed in (seeds or sweep.seeds)
            ]
            if all(key in results for pair in keys for key in pair):
                losses, constant = np.transpose(
                    [[final_loss(results[key]) for key in pair] for pair in keys]
                )
                if np.isfinite(constant).all():
                    with np.errstate(divide="ignore"):
                        ratios[row, column] = np.exp(np.mean(np.log(losses) - np.log(constant)))
    return ratios
