"""The suite `self-tuning`: end to end on two tasks, its standings, its check and its page."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from cdat_lab import backends, conduct, costs, self_tuning, standings, table
from cdat_lab.backends import Problem
from cdat_lab.backends import numpy as numpy_backend
from cdat_lab.bases import BASES
from cdat_lab.cli import app
from cdat_lab.contenders import CONTENDERS
from cdat_lab.findings import Findings
from cdat_lab.report import render
from cdat_lab.self_tuning import FULL, OURS, SETTINGS
from cdat_lab.tasks import Task
from tests.lab import made_up

TWO = ("counts", "tumours")
SHORT = 48


def installed() -> str:
    """The framework whose runs start fastest."""
    names = [backend.name for backend in backends.available()]
    return "torch" if "torch" in names else names[0]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Task, "budget", lambda self, base: SHORT)


def race(folder: Path, *arguments: str) -> Any:
    options = ["--backend", installed(), "--seeds", "1", "--jobs", "1", "--out", str(folder)]
    for name in TWO:
        options += ["--only", name]
    for name in ("constant", OURS, "self-tuning-average", "adamw-0.001"):
        options += ["--contender", name]
    return CliRunner().invoke(app, ["race", "self-tuning", *options, *arguments])


def test_a_race_runs_end_to_end_and_resumes(
    tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = race(tmp_path)
    assert outcome.exit_code == 0, outcome.output
    assert "geometric mean at most 1.3" in outcome.output
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in ("standings-figure", "CDAT, self-tuning, equal cost", *TWO):
        assert name in page

    findings = conduct.reopen(tmp_path)
    fewer = self_tuning.steps_at_equal_cost(SHORT, base="gd", backend=installed())
    assert {race.steps for race in findings.study.races} == {SHORT, fewer}
    for key, found in findings.results.items():
        frame, run = found.run.frame, found.run
        records = frame["validation_loss"].drop_nulls().to_numpy()
        assert len(records) == math.ceil(key.steps / (key.steps // 10)) + 1
        assert run.final_validation_loss == records[-1]
        assert run.final_loss == frame["full_loss"][-1]
        assert frame["sharpness"].null_count() == frame.height
    rows = list(csv.DictReader(io.StringIO((tmp_path / "standings.csv").read_text())))
    assert len(rows) == 2 * 5
    assert {row["side"] for row in rows} == {"development", "judgement"}
    assert all(float(row["validation_loss"]) > 0 for row in rows)

    def load(name: str) -> Any:
        raise AssertionError(name)

    monkeypatch.setattr(backends, "load", load)
    again = race(tmp_path, "--resume")
    assert again.exit_code == 0, again.output
    monkeypatch.setattr(standings, "LARGEST_MEAN", 0.01)
    failed = race(tmp_path, "--resume", "--check")
    assert failed.exit_code == 1
    assert "geometric mean at most 0.01" in failed.output


def test_only_known_suites_tasks_and_contenders(tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert run(app, ["race", "nothing"]).exit_code == 2
    for option, name in (("--only", "digits"), ("--contender", "nothing")):
        arguments = ["race", "self-tuning", option, name, "--out", str(tmp_path)]
        assert run(app, arguments).exit_code == 2


def test_the_plan_of_a_suite_comes_back_from_its_file(tmp_path: Path) -> None:
    plan, reasons = self_tuning.study(backend="numpy", seeds=(0, 1), full=True, command="x")
    assert len(reasons) == 7  # NumPy has no optimizers from other packages
    assert len(plan.races) == 2 * len(SETTINGS)
    conduct.save_plan(plan, tmp_path)
    assert conduct.load_plan(tmp_path) == plan


@pytest.mark.parametrize("steps", [30, 400, 1200])
def test_a_run_at_equal_cost_costs_what_a_plain_one_costs(steps: int) -> None:
    fewer = self_tuning.steps_at_equal_cost(steps, base="adam", backend="torch")
    ours, base = CONTENDERS[OURS], BASES["adam"]

    def cost(length: int) -> float:
        assert ours.rule is not None
        rule = ours.rule(length, **ours.settings(base))
        return float(np.sum(costs.of_steps("torch", length, rule, curvature="auto")))

    assert cost(fewer) <= steps < cost(fewer + 2)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_self_tuned_run_is_the_same_under_every_framework(backend: str) -> None:
    if backends.BACKENDS[backend].missing():
        pytest.skip(f"{backend} is not installed")
    ours = Problem(
        task=self_tuning.find_task("counts")(0),
        base=BASES["momentum"],
        contender=CONTENDERS[OURS],
        hyperparameters=CONTENDERS[OURS].settings(BASES["momentum"]),
        steps=60,
        record_every=30,
        sharpness=False,
        batch_size=64,
        seed=0,
    )
    expected, found = numpy_backend.run(ours), backends.load(backend)(ours)
    for name in ("learning_rate", "loss", "full_loss", "validation_loss"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-8)


def made_up_findings(ratios: dict[str, float], seeds: tuple[int, ...] = (0, 1)) -> Findings:
    """Findings in which each contender ends at a multiple of 0.1, the constant rate."""
    plan, _ = self_tuning.study(
        backend="jax", seeds=seeds, full=True, only=TWO, contenders=tuple(ratios), command="cdat x"
    )
    results = {}
    for job in plan.jobs():
        found = made_up.result(job.key)
        end = 0.1 * ratios[job.key.contender]
        losses = np.geomspace(1.0, 2.0 if math.isinf(end) else end, job.key.steps + 1)
        losses[-1] = end
        frame = found.run.frame.with_columns(
            full_loss=pl.Series(losses), validation_loss=pl.Series(2 * losses)
        )
        identity = dict(found.run.identity)
        identity["config"] = {**identity["config"], "last_part": 0.0}
        results[job.key] = dataclasses.replace(
            found, run=dataclasses.replace(found.run, identity=identity, frame=frame)
        )
    return Findings(plan, results)


def test_standings_are_geometric_means_over_the_tuned_constant() -> None:
    findings = made_up_findings({"constant": 1.0, OURS: 1.2, "adamw-0.001": 9.0, "dog": math.inf})
    frame = standings.ratios(findings)
    found = {row["entrant"]: row for row in standings.standings(frame).iter_rows(named=True)}
    assert list(found) == ["constant", OURS, f"{OURS}-equal-cost", "adamw-0.001", "dog"]
    ours, adamw, dog = found[OURS], found["adamw-0.001"], found["dog"]
    assert (ours["settings"], ours["runs"], ours["diverged"]) == (2, 4, 0)
    assert ours["mean"] == ours["worst"] == pytest.approx(1.2)
    assert ours["validation"] == pytest.approx(1.2)
    assert (ours["close"], found["constant"]["close"]) == (0, 1)
    assert (adamw["mean"], adamw["clipped"]) == pytest.approx((9, 4))
    assert dog["diverged"] == 4
    assert dog["mean"] == pytest.approx(100)  # ten times the initial loss
    judged = standings.standings(frame, side="judgement")
    assert judged["runs"].to_list() == [2] * 5
    assert [title for title, _ in standings.groups(frame)] == [
        "all settings", "development settings", "judgement settings",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "adamw", "passed"),
    [
        (1.29, 2.0, [True, True, True]),
        (1.31, 2.0, [True, False, True]),
        (1.1, 1.0, [True, True, False]),
        (math.inf, 2.0, [False, False, False]),
    ],
)
def test_the_check_is_on_divergence_the_mean_and_untuned_adamw(
    ours: float, adamw: float, passed: list[bool]
) -> None:
    findings = made_up_findings({"constant": 1.0, OURS: ours, "adamw-0.001": adamw})
    assert [c.passed for c in standings.checks(standings.ratios(findings))] == passed
    nothing = dataclasses.replace(findings, results={})
    assert standings.checks(standings.ratios(nothing)) == ()


def test_the_page_has_every_seed_and_is_the_same_again() -> None:
    ends = {name: 1 + 0.1 * index for index, name in enumerate(FULL)} | {"dog": math.inf}
    findings = made_up_findings(ends, seeds=(0, 1, 2))
    page = render(findings)
    assert page == render(findings)
    assert 'id="standings"' in page
    assert 'id="settings"' in page
    assert 'id="race-1"' not in page
    assert "2 races with" in page
    for name in FULL:
        assert CONTENDERS[name].label in page
    losses = ", ".join([table.number(0.13)] * 3)
    assert page.count(losses) >= 2
    empty = render(dataclasses.replace(findings, results={}))
    assert 'id="standings"' not in empty
