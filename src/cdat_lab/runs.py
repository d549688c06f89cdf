"""Runs: their configuration, their identity, and their files."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cdat_lab import backends, tasks
from cdat_lab.backends import Problem, Trajectory
from cdat_lab.bases import BASES
from cdat_lab.contenders import CONTENDERS
from cdat_lab.storage import whole

METADATA_KEY = "cdat"


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the numbers of a run, as plain values.

    Attributes
    ----------
    task, base, contender, backend : str
        Names in the registries.
    hyperparameters : mapping of str to float
        Arguments of the contender's rule.
    steps, seed : int
        Length of the run; seed of data, weights and probe.
    sharpness_every : int
        Steps from one sharpness to the next.
    """

    task: str
    base: str
    contender: str
    backend: str
    steps: int
    seed: int
    hyperparameters: Mapping[str, float] = field(default_factory=dict)
    sharpness_every: int = 10

    def identity(self) -> dict[str, Any]:
        """Return the configuration with the versions and the code that make the numbers."""
        backend = backends.BACKENDS[self.backend]
        return {
            "config": dataclasses.asdict(self),
            "versions": versions(self.backend),
            "code": code_fingerprint(("cdat_core", f"cdat_{backend.name}", "cdat_lab")),
        }

    def file_name(self) -> str:
        """Return a name that says what the run is and ends in the digest of its identity."""
        text = json.dumps(self.identity(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        tuned = CONTENDERS[self.contender].tuned
        setting = f"-{self.hyperparameters[tuned]:.6g}" if tuned else ""
        return f"{self.task}-{self.backend}-{self.base}-{self.contender}{setting}-{digest}.parquet"


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes
    ----------
    identity : dict
        Configuration, versions and code, as `RunConfig.identity` gave them.
    seconds_per_step, compile_seconds : float
        Wall-clock times.
    frame : polars.DataFrame
        One row for each step and one for the final weights (``steps + 1`` rows): step, loss,
        learning_rate, slope, curvature, sharpness, skipped. What was not measured is null.
    """

    identity: dict[str, Any]
    seconds_per_step: float
    compile_seconds: float
    frame: pl.DataFrame

    @property
    def hyperparameters(self) -> dict[str, float]:
        """The arguments of the contender's rule."""
        return dict(self.identity["config"]["hyperparameters"])

    @property
    def initial_loss(self) -> float:
        """The loss at the initial weights."""
        return float(self.frame["loss"][0])

    @property
    def final_loss(self) -> float:
        """The loss after the last step; infinity if it is not finite."""
        loss = float(self.frame["loss"][-1])
        return loss if np.isfinite(loss) else float("inf")

    @property
    def best_loss(self) -> float:
        """The lowest loss on the way."""
        losses = self.frame["loss"].to_numpy()
        return float(np.min(losses[np.isfinite(losses)], initial=np.inf))

    @property
    def diverged(self) -> bool:
        """Whether the run ended above the loss it started from, or at none at all."""
        return not (np.isfinite(self.final_loss) and self.final_loss <= self.initial_loss)

    @property
    def skipped(self) -> int:
        """How many steps were skipped because something was not finite."""
        return int(self.frame["skipped"][-1])

    def late(self, column: pl.Expr) -> float | None:
        """Return the median of an expression over the last tenth of the steps, nulls left out.

        Returns
        -------
        float or None
            None if nothing was measured there.
        """
        tenth = max(1, (self.frame.height - 1) // 10)
        values = self.frame[:-1].select(column).to_series().drop_nulls()
        recent = self.frame[-1 - tenth : -1].select(column).to_series().drop_nulls()
        median = (recent if len(recent) else values.tail(1)).median()
        return None if median is None else float(median)  # type: ignore[arg-type]


def execute(config: RunConfig, folder: Path, *, resume: bool = False) -> Run:
    """Run a configuration and write the result, whole or not at all.

    Parameters
    ----------
    config : RunConfig
        What to run.
    folder : Path
        Where the file goes.
    resume : bool
        Return the result that is already there if it came from the same configuration, versions
        and code.

    Returns
    -------
    Run
    """
    path = folder / config.file_name()
    if resume and path.exists():
        return read(path)
    problem = Problem(
        task=tasks.load(config.task, config.seed),
        base=BASES[config.base],
        contender=CONTENDERS[config.contender],
        hyperparameters=config.hyperparameters,
        steps=config.steps,
        sharpness_every=config.sharpness_every,
        seed=config.seed,
    )
    trajectory = backends.load(config.backend)(problem)
    run = Run(
        identity=config.identity(),
        seconds_per_step=trajectory.seconds_per_step,
        compile_seconds=trajectory.compile_seconds,
        frame=to_frame(trajectory),
    )
    write(run, path)
    return run


def to_frame(trajectory: Trajectory) -> pl.DataFrame:
    """Return the columns of `Run.frame`."""
    columns = {
        name: np.append(getattr(trajectory, name), np.nan)
        for name in ("learning_rate", "slope", "curvature", "sharpness")
    }
    frame = pl.DataFrame(
        {
            "step": np.arange(len(trajectory.loss)),
            "loss": trajectory.loss,
            **columns,
            "skipped": np.append(trajectory.skipped, trajectory.skipped[-1]),
        }
    )
    return frame.with_columns(pl.col(*columns).fill_nan(None))


def write(run: Run, path: Path) -> None:
    """Write a run as one Parquet file with its identity as metadata."""
    record = {
        **run.identity,
        "seconds_per_step": run.seconds_per_step,
        "compile_seconds": run.compile_seconds,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    with whole(path) as temporary:
        run.frame.write_parquet(temporary, metadata={METADATA_KEY: json.dumps(record)})


def read(path: Path) -> Run:
    """Read a run that `write` wrote.

    Raises
    ------
    ValueError
        If the file is not such a run.
    """
    metadata = pl.read_parquet_metadata(path)
    if METADATA_KEY not in metadata:
        msg = f"{path} is not a run of cdat: its metadata lack {METADATA_KEY!r}"
        raise ValueError(msg)
    record = json.loads(metadata[METADATA_KEY])
    return Run(
        identity={name: record[name] for name in ("config", "versions", "code")},
        seconds_per_step=record["seconds_per_step"],
        compile_seconds=record["compile_seconds"],
        frame=pl.read_parquet(path),
    )


def versions(backend: str) -> dict[str, str]:
    """Return the versions of Python, of this package and of what the numbers depend on."""
    names = ("cdat", "array-api-compat", "numpy", "scikit-learn")
    found = {name: version(name) for name in names}
    own = backends.BACKENDS[backend].versions()
    return {"python": platform.python_version()} | found | own


def version(package: str) -> str:
    """Return the version of an installed package, or that it is a source tree on the path."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "from a source tree"


@functools.cache
def code_fingerprint(packages: tuple[str, ...]) -> str:
    """Return a digest of the Python sources of the given packages."""
    digest = hashlib.sha256()
    for package in packages:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(path.relative_to(folder).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
