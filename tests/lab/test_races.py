"""Races: what runs store, when they are reused, and how they end early."""

from __future__ import annotations

import dataclasses
import importlib.metadata
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

from cdat_lab import backends, conduct, provenance, races, runs
from cdat_lab.backends import Problem, Trajectory
from cdat_lab.races import Job, Race
from cdat_lab.runs import Run, RunConfig
from cdat_lab.studies import Study
from cdat_lab.tuning import tune

STEPS = 30


def installed() -> str:
    return backends.available()[0].name


def race(**changes: object) -> Race:
    plain = Race("digits", "momentum", installed(), ("constant", "cdat-1.9"), STEPS, (0, 1))
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def jobs(**changes: object) -> list[Job]:
    return [Job.of(key) for key in race(**changes).result_keys()]


def made_up(problem: Problem, final: float = 0.1) -> Trajectory:
    steps, records = problem.steps, len(problem.record_steps())
    rate = problem.hyperparameters.get("learning_rate", 0.25)
    final *= 1 + abs(math.log2(rate / 0.25))  # the best rate is 1/4
    losses = np.geomspace(1.0, final, steps + 1)
    return Trajectory(
        loss=losses[:-1],
        learning_rate=np.full(steps, rate),
        slope=np.full(steps, -1.0),
        curvature=np.full(steps, np.nan),
        trials=np.zeros(steps, dtype=np.int64),
        skipped=np.zeros(steps, dtype=np.int64),
        full_loss=losses[problem.record_steps()],
        sharpness=np.linspace(4.0, 2.0, records) if problem.sharpness else np.full(records, np.nan),
        seconds=np.linspace(0.0, 1.0, records),
        compile_seconds=0.0,
    )


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """Replace training by made-up trajectories; record the problems."""
    problems: list[Problem] = []

    def load(name: str) -> object:
        def run(problem: Problem) -> Trajectory:
            problems.append(problem)
            return made_up(problem)

        return run

    monkeypatch.setattr(backends, "load", load)
    return problems


def test_a_run_comes_back_as_it_was_written(tmp_path: Path, trained: list[Problem]) -> None:
    (result,) = races.execute(
        jobs(contenders=("cdat-1.9",), seeds=(3,)), tmp_path, resume=False, processes=1
    ).values()
    back = runs.read(tmp_path / result.files[0])
    assert back.identity == result.run.identity
    assert back.identity["versions"]["numpy"] == np.__version__
    assert back.identity["versions"]["cdat"] == importlib.metadata.version("cdat")
    assert back.identity["config"]["seed"] == 3
    assert back.frame.equals(result.run.frame)
    assert back.frame.height == STEPS + 1
    assert back.frame["curvature"].null_count() == STEPS + 1
    assert back.frame["full_loss"].null_count() == 0  # full batch: every step is on all data
    assert back.final_loss == pytest.approx(np.mean(np.geomspace(1.0, 0.1, 31)[27:]))


def test_a_tuned_rate_is_chosen_inside_its_grid_and_run_again_with_the_sharpness(
    tmp_path: Path, trained: list[Problem]
) -> None:
    (result,) = races.execute(
        jobs(contenders=("constant",), seeds=(0,)), tmp_path, resume=False, processes=1
    ).values()
    assert result.grid is not None
    assert result.grid.rates[result.grid.best] == 0.25
    assert not result.grid.at_edge
    assert {2.0**-2.5, 2.0**-1.5} <= set(result.grid.rates)
    assert [problem.sharpness for problem in trained] == [False] * len(result.grid.rates) + [True]
    assert len(result.files) == len(set(result.files)) == len(trained)


@pytest.mark.parametrize("optimum", [-9, 0, 7])
def test_the_grid_grows_until_its_optimum_is_inside(optimum: int) -> None:
    tried: list[float] = []

    def final_loss(rate: float) -> float:
        tried.append(rate)
        return (math.log2(rate) - optimum) ** 2 if rate < 2.0 ** (optimum + 2) else math.nan

    grid = tune(final_loss, range(-2, 2))
    assert grid.rates[grid.best] == 2.0**optimum
    assert not grid.at_edge
    assert sorted(tried) == list(grid.rates)
    assert len(set(tried)) == len(tried)


def test_the_grid_is_refined_by_the_root_of_two() -> None:
    grid = tune(lambda rate: (math.log2(rate) - 0.4) ** 2, range(-1, 2))
    assert grid.rates[grid.best] == 2**0.5


def test_a_grid_that_cannot_grow_further_says_so() -> None:
    grid = tune(lambda rate: -rate, range(-1, 2), max_extensions=3)
    assert grid.at_edge


def test_results_are_reused_only_on_request_and_only_for_the_same_settings(
    tmp_path: Path, trained: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = jobs(contenders=("cdat-1.9",), seeds=(0,))
    for resume, expected in ((False, 1), (False, 2), (True, 2)):
        races.execute(plain, tmp_path, resume=resume, processes=1)
        assert len(trained) == expected
    others = [
        *jobs(contenders=("cdat-1.9",), seeds=(1,)),
        *jobs(contenders=("cdat-2",), seeds=(0,)),
        *jobs(contenders=("cdat-1.9",), seeds=(0,), batch_size=64),
        *jobs(contenders=("cdat-1.9",), seeds=(0,), steps=STEPS + 1),
    ]
    races.execute(others, tmp_path, resume=True, processes=1)
    assert len(trained) == 6
    monkeypatch.setattr(provenance, "code_fingerprint", lambda packages: "changed")
    races.execute(plain, tmp_path, resume=True, processes=1)
    assert len(trained) == 7


def test_a_damaged_file_is_reported_and_replaced(tmp_path: Path, trained: list[Problem]) -> None:
    study = Study("title", "command", (race(contenders=("cdat-1.9",), seeds=(0,)),))
    found = conduct.conduct(study, tmp_path, resume=False, processes=1)
    (result,) = found.results.values()
    path = tmp_path / "runs" / result.files[0]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])

    reopened = conduct.reopen(tmp_path)
    assert not reopened.results
    missing, damaged = reopened.notices
    assert "1 of 1 results are missing" in missing
    assert "damaged" in damaged

    again = conduct.conduct(study, tmp_path, resume=True, processes=1)
    assert len(trained) == 2
    assert again.notices == ()


def test_results_of_another_version_are_left_out_with_a_notice(
    tmp_path: Path, trained: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study("title", "command", (race(contenders=("cdat-1.9",), seeds=(0, 1)),))
    with monkeypatch.context() as other:
        other.setattr(provenance, "version", lambda package: "0.0.1")
        conduct.conduct(study, tmp_path, resume=False, processes=1)
    found = conduct.reopen(tmp_path)
    assert not found.results
    missing, foreign = found.notices
    assert "2 of 2 results are missing" in missing
    assert "2 files" in foreign
    assert "another version" in foreign


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no study.json"),
        ("{", "is not a valid study plan"),
        ("[]", "is not a valid study plan"),
        ('{"format": 99, "study": {}}', "format 99"),
        ('{"format": 1, "study": {"title": "x"}}', "is not a valid study plan"),
    ],
)
def test_a_folder_without_a_readable_plan_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "study.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        conduct.reopen(tmp_path)


def test_a_plan_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    from cdat_lab.reproduce import study

    plan = study(backend=installed(), seeds=(4, 5), command="cdat reproduce")
    conduct.save_plan(plan, tmp_path)
    assert conduct.load_plan(tmp_path) == plan


def test_a_run_that_diverges_has_no_final_loss(tmp_path: Path) -> None:
    problem = Problem(
        task=jobs()[0].factory(0),
        base=jobs()[0].base,
        contender=jobs()[-1].contender,
        hyperparameters={"sigma": 1.9, "decay": 0.0},
        steps=STEPS,
        record_every=10,
        sharpness=True,
        batch_size=None,
        seed=0,
    )
    trajectory = made_up(problem)
    trajectory.loss[20:] = np.nan
    trajectory.full_loss[-1] = np.nan
    config = RunConfig("digits", "momentum", "cdat-1.9", installed(), STEPS, 0)
    run = Run(config.identity(), 0.0, runs.to_frame(problem, trajectory, backend=installed()))
    assert run.diverged
    assert run.final_loss == math.inf
    assert run.best_loss < 1.0
    runs.write(run, tmp_path / "run.parquet")
    assert runs.read(tmp_path / "run.parquet").diverged


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    pl.DataFrame({"loss": [1.0]}).write_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="not a complete cdat run"):
        runs.read(tmp_path / "other.parquet")


def command(folder: Path, *arguments: str) -> list[str]:
    call = ["compare", "digits", "--backend", installed(), "--steps", "40", "--base", "momentum"]
    call += ["--contender", "constant", "--contender", "cdat-1.9", "--jobs", "1"]
    call += ["--out", str(folder), *arguments]
    return [sys.executable, "-c", f"from cdat_lab.cli import app; app({call!r})"]


def started(folder: Path) -> subprocess.Popen[str]:
    """A comparison that has written at least one run."""
    process = subprocess.Popen(
        command(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob("runs/*.parquet")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


def test_an_interrupt_ends_cleanly_and_keeps_complete_files(tmp_path: Path) -> None:
    process = started(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume continues" in errors
    assert "Traceback" not in errors
    for path in tmp_path.glob("runs/*.parquet"):
        assert runs.read(path).frame.height == 41


def test_a_killed_comparison_resumes_to_the_same_tables(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = started(killed)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "report.html").exists()
    kept = {path: path.stat().st_mtime_ns for path in killed.glob("runs/*.parquet")}
    for folder, arguments in ((killed, ["--resume"]), (whole, [])):
        subprocess.run(command(folder, *arguments), check=True, capture_output=True)
    assert (killed / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old and whole")
    code = f"""
        import os, signal
        from pathlib import Path
        from cdat_lab.storage import atomic
        with atomic(Path({str(path)!r})) as temporary:
            temporary.write_text("half a ")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old and whole"
