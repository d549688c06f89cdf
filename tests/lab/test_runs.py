"""Runs: what they remember, when they are used again, and how they end early."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cdat_lab import backends, compare, runs, summary, table
from cdat_lab.backends import Trajectory
from cdat_lab.runs import Run, RunConfig
from cdat_lab.tuning import Grid

STEPS = 30


def trajectory(final: float = 0.1, skipped: int = 0) -> Trajectory:
    sharpness = np.full(STEPS, np.nan)
    sharpness[::10] = [4.0, 3.0, 2.0]
    return Trajectory(
        loss=np.geomspace(1.0, final, STEPS + 1) if math.isfinite(final) else np.full(31, final),
        learning_rate=np.full(STEPS, 0.5),
        slope=np.full(STEPS, -1.0),
        curvature=np.full(STEPS, np.nan),
        sharpness=sharpness,
        skipped=np.full(STEPS, skipped),
        seconds_per_step=1e-3,
        compile_seconds=0.0,
    )


def config(**changes: object) -> RunConfig:
    plain = RunConfig("digits", "momentum", "cdat-1.9", installed(), STEPS, 0, {"sigma": 1.9})
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def installed() -> str:
    found = backends.available()
    if not found:
        pytest.skip("no framework is installed")
    return found[0].name


@pytest.fixture
def backend_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace training by a made-up trajectory; record the calls."""
    calls: list[str] = []

    def load(name: str) -> object:
        def run(problem: backends.Problem) -> Trajectory:
            calls.append(name)
            return trajectory()

        return run

    monkeypatch.setattr(backends, "load", load)
    return calls


def test_a_run_comes_back_as_it_was_written(tmp_path: Path) -> None:
    run = Run(config().identity(), 1e-3, 2.0, runs.to_frame(trajectory()))
    runs.write(run, tmp_path / "run.parquet")
    back = runs.read(tmp_path / "run.parquet")
    assert back.identity == run.identity
    assert back.identity["versions"]["numpy"] == np.__version__
    assert (back.seconds_per_step, back.compile_seconds) == (1e-3, 2.0)
    assert back.frame.equals(run.frame)
    assert back.frame.height == STEPS + 1
    assert back.frame["curvature"].null_count() == STEPS + 1


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    pl.DataFrame({"loss": [1.0]}).write_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="not a run of cdat"):
        runs.read(tmp_path / "other.parquet")


def test_results_are_used_again_only_on_request(tmp_path: Path, backend_calls: list[str]) -> None:
    runs.execute(config(), tmp_path)
    runs.execute(config(), tmp_path)
    assert len(backend_calls) == 2
    runs.execute(config(), tmp_path, resume=True)
    assert len(backend_calls) == 2
    runs.execute(config(seed=1), tmp_path, resume=True)
    runs.execute(config(hyperparameters={"sigma": 2.0}), tmp_path, resume=True)
    assert len(backend_calls) == 4


def test_results_of_other_code_are_not_used_again(
    tmp_path: Path, backend_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.execute(config(), tmp_path)
    monkeypatch.setattr(runs, "code_fingerprint", lambda packages: "changed")
    runs.execute(config(), tmp_path, resume=True)
    assert len(backend_calls) == 2


def test_late_values_are_medians_of_the_last_tenth() -> None:
    run = Run({}, 0.0, 0.0, runs.to_frame(trajectory()))
    assert run.late(pl.col("learning_rate")) == 0.5
    assert run.late(pl.col("sharpness")) == 2.0  # none in the last tenth: the last one there is
    assert run.late(pl.col("curvature")) is None


def comparison(final: dict[str, float]) -> compare.Comparison:
    """A made-up comparison with the given final losses; the constant rate is at its grid's edge."""
    backend = installed()
    jobs = compare.plan(
        "digits", backends=(backend,), steps=STEPS, seed=0, folder=Path(), resume=False
    )
    results = []
    for job in jobs:
        tuned = {"constant": "learning_rate", "warmup-cosine": "peak"}.get(job.contender)
        settings = {tuned: 0.5} if tuned else {}
        identity = config(contender=job.contender, hyperparameters=settings).identity()
        loss = final.get(job.contender, 0.1)
        run = Run(identity, 1e-3, 0.0, runs.to_frame(trajectory(loss, skipped=7)))
        grid = Grid((0.25, 0.5), (0.4, loss), 1) if tuned else None
        results.append(compare.Result(job, run, grid))
    return compare.Comparison("digits", "digits", STEPS, 0, (backend,), tuple(results))


def test_the_table_flags_what_went_wrong() -> None:
    frame = table.results(comparison({"greedy": math.nan, "armijo": 5.0, "cdat-1.9": 0.01}))
    notes = dict(frame.filter(pl.col("base") == "Adam").select("contender", "note").iter_rows())
    assert notes["quadratically greedy"] == "diverged, 7 skipped"
    assert notes["Armijo line search"] == "diverged, 7 skipped"
    assert notes["CDAT 1.9 (no EMA)"] == "lowest, 7 skipped"
    assert notes["constant rate"] == "7 skipped, grid edge"
    factors = dict(frame.select("contender", "over_constant").iter_rows())
    assert factors["CDAT 1.9 (no EMA)"] == pytest.approx(0.1)


def test_the_findings_say_it_when_every_constant_rate_diverged() -> None:
    found = dict(summary.findings(comparison({"constant": math.inf})))
    assert "every constant rate diverged" in found["Adam"]
    assert "not seen here" in found["CDAT"]
    assert "one seed (0)" in found["Limits"].lower()


def test_an_interrupt_ends_cleanly_and_keeps_whole_files(tmp_path: Path) -> None:
    code = f"""
        from cdat_lab.cli import app
        app(["compare", "digits", "--backend", {installed()!r}, "--out", {str(tmp_path)!r}])
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*.parquet")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume continues" in errors
    assert "Traceback" not in errors
    for path in tmp_path.glob("runs/*.parquet"):
        assert runs.read(path).frame.height > STEPS
