"""Runs: their configuration, their identity, and their files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cdat_lab import costs, provenance
from cdat_lab.backends import Problem, Trajectory
from cdat_lab.storage import atomic

METADATA_KEY = "cdat"
NUMBERS = (
    "cdat_core",
    "cdat_lab.backends",
    "cdat_lab.bases",
    "cdat_lab.contenders",
    "cdat_lab.tasks",
)
"""The code that the numbers of a run depend on, besides the adapter of its framework."""

LAST_PART = 0.1
"""Fraction of a run, at its end, over which its results are averaged."""


@dataclass(frozen=True)
class Recording:
    """What is recorded in a run, and which loss is its final one.

    Attributes
    ----------
    records : int
        Approximate number of records of the loss on all data.
    sharpness : bool
        Whether to record the sharpness too, in the run at the best rate.
    last_part : float
        Fraction of the run, at its end, over which the final loss is averaged. With 0 it is the
        loss at the last weights, as for schedules that decay to 0.
    """

    records: int = 60
    sharpness: bool = True
    last_part: float = LAST_PART


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines the numbers of a run, as plain values.

    Attributes
    ----------
    task, base, contender, backend : str
        Names in the registries.
    steps, seed : int
        Length of the run; seed of the data, weights, mini-batches and probe.
    batch_size : int or None
        Rows of a mini-batch; None for the full batch.
    hyperparameters : mapping of str to float
        Arguments of the contender's rule.
    sharpness : bool
        Whether to record the sharpness.
    record_every : int
        Number of steps between records of the full loss and the sharpness.
    definition : str
        Digest of the user's code for task, base and contender; empty if they are built in.
    last_part : float
        See `Recording`.
    """

    task: str
    base: str
    contender: str
    backend: str
    steps: int
    seed: int
    batch_size: int | None = None
    hyperparameters: Mapping[str, float] = field(default_factory=dict)
    sharpness: bool = True
    record_every: int = 10
    definition: str = ""
    last_part: float = LAST_PART

    def identity(self) -> dict[str, Any]:
        """Return the configuration, versions and digest of the code that determine the numbers."""
        return {
            "config": dataclasses.asdict(self),
            "versions": provenance.versions(self.backend),
            "code": provenance.code_fingerprint((*NUMBERS, *self._adapter())),
        }

    def _adapter(self) -> tuple[str, ...]:
        return () if self.backend == "numpy" else (f"cdat_{self.backend}",)

    def file_name(self) -> str:
        """Return a descriptive name that ends in the digest of the identity."""
        text = json.dumps(self.identity(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        batch = "" if self.batch_size is None else f"-batch{self.batch_size}"
        parts = (self.task + batch, self.backend, self.base, self.contender, f"seed{self.seed}")
        return f"{'-'.join(parts)}-{digest}.parquet"


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes
    ----------
    identity : dict
        Configuration, versions and digest of the code, from `RunConfig.identity`.
    compile_seconds : float
        Time spent compiling.
    frame : polars.DataFrame
        One row for each step and one for the final weights (``steps + 1`` rows): step, loss (of the
        batch), full_loss (on all data), validation_loss (on held-out data), learning_rate, slope,
        curvature, sharpness, trials, skipped, gradients and seconds (both cumulative). Values not
        measured are null.
    """

    identity: dict[str, Any]
    compile_seconds: float
    frame: pl.DataFrame

    @property
    def hyperparameters(self) -> dict[str, float]:
        """The arguments of the contender's rule."""
        return dict(self.identity["config"]["hyperparameters"])

    @property
    def steps(self) -> int:
        """The length of the run."""
        return self.frame.height - 1

    @property
    def initial_loss(self) -> float:
        """The loss on all data at the initial weights."""
        return float(self.frame["full_loss"][0])

    @property
    def final_loss(self) -> float:
        """The loss on all data, averaged over the last part; infinity if it is not finite."""
        return self._final("full_loss")

    @property
    def final_validation_loss(self) -> float | None:
        """The loss on the held-out data, averaged as `final_loss`; None if there are none."""
        return None if self.initial_validation_loss is None else self._final("validation_loss")

    @property
    def initial_validation_loss(self) -> float | None:
        """The loss on the held-out data at the initial weights; None if there are none."""
        loss: float | None = self.frame["validation_loss"][0]
        return loss

    def _final(self, column: str) -> float:
        part = self.identity["config"].get("last_part", LAST_PART)
        first = int((1 - part) * self.steps)
        losses = self.frame[column][first:].drop_nulls().to_numpy()
        with np.errstate(over="ignore"):
            loss = float(np.mean(losses))
        return loss if np.isfinite(loss) else float("inf")

    @property
    def best_loss(self) -> float:
        """The lowest loss on all data during the run."""
        losses = self.frame["full_loss"].drop_nulls().to_numpy()
        return float(np.min(losses[np.isfinite(losses)], initial=np.inf))

    @property
    def diverged(self) -> bool:
        """Whether the final loss is above the initial loss or not finite."""
        return not (np.isfinite(self.final_loss) and self.final_loss <= self.initial_loss)

    @property
    def skipped(self) -> int:
        """Number of steps skipped because a value was not finite."""
        return int(self.frame["skipped"][-1])

    @property
    def seconds_per_step(self) -> float:
        """Wall-clock time of a step, excluding compilation and records."""
        return float(self.frame["seconds"].max() or 0.0) / self.steps  # type: ignore[arg-type]

    def late(self, column: pl.Expr) -> float | None:
        """Return the median of an expression over the last tenth of the steps, ignoring nulls.

        Returns
        -------
        float or None
            None if nothing was measured there.
        """
        first = int((1 - LAST_PART) * self.steps)
        values = self.frame.select(column).to_series()
        median = values[first:].drop_nulls().median()
        return None if median is None else float(median)  # type: ignore[arg-type]


def to_frame(problem: Problem, trajectory: Trajectory, *, backend: str) -> pl.DataFrame:
    """Return the columns of `Run.frame`."""
    steps, records = problem.steps, problem.record_steps()
    rule = problem.contender.rule
    made = rule(steps, **problem.hyperparameters) if rule is not None else None
    trial = costs.of_trial(slope="slope" in getattr(made, "trial_needs", ()))
    gradients = np.cumsum(
        costs.of_steps(backend, steps, made, curvature=problem.contender.curvature)
        + trial * trajectory.trials.astype(float)
    )

    def recorded(values: Any) -> Any:
        column = np.full(steps + 1, np.nan)
        column[records] = values
        return column

    full_loss, known = recorded(trajectory.full_loss), np.isin(np.arange(steps + 1), records)
    if problem.measures_full_loss:
        full_loss[:-1], known[:] = trajectory.loss, True
    optional = {
        name: np.append(getattr(trajectory, name), np.nan)
        for name in ("learning_rate", "slope", "curvature")
    }
    optional["sharpness"] = recorded(trajectory.sharpness)
    optional["seconds"] = recorded(trajectory.seconds)
    frame = pl.DataFrame(
        {
            "step": np.arange(steps + 1),
            "loss": np.append(trajectory.loss, trajectory.full_loss[-1]),
            **optional,
            "trials": np.append(trajectory.trials, 0),
            "skipped": np.append(trajectory.skipped, trajectory.skipped[-1]),
            "gradients": np.append(0.0, gradients),
        }
    )
    # A loss that is not finite is a result, not a gap.
    full = pl.Series("full_loss", full_loss).set(~pl.Series(known), None)
    held_out = pl.Series("validation_loss", [None] * (steps + 1), dtype=pl.Float64)
    if trajectory.validation_loss is not None:
        at_records = pl.Series(np.isin(np.arange(steps + 1), records))
        losses = recorded(trajectory.validation_loss)
        held_out = pl.Series("validation_loss", losses).set(~at_records, None)
    return frame.with_columns(pl.col(*optional).fill_nan(None), full, held_out)


def write(run: Run, path: Path) -> None:
    """Write a run as one Parquet file with its identity as metadata."""
    record = {
        **run.identity,
        "compile_seconds": run.compile_seconds,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    with atomic(path) as temporary:
        run.frame.write_parquet(temporary, metadata={METADATA_KEY: json.dumps(record)})


def read(path: Path) -> Run:
    """Read a run that `write` wrote.

    Raises
    ------
    ValueError
        If the file is not a complete run.
    """
    try:
        metadata = pl.read_parquet_metadata(path)
        record = json.loads(metadata[METADATA_KEY])
        frame = pl.read_parquet(path)
        identity = {name: record[name] for name in ("config", "versions", "code")}
        return Run(identity, float(record["compile_seconds"]), frame)
    except (KeyError, TypeError, ValueError, OSError, pl.exceptions.PolarsError) as error:
        msg = f"{path} is not a complete cdat run ({type(error).__name__}: {error})"
        raise ValueError(msg) from error
