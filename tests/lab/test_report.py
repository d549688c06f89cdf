"""The report: what is on the page, and what is in its tables."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import math
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from cdat_lab import model, table
from cdat_lab.bases import BASES, Base
from cdat_lab.claims import STATEMENTS, Verdict
from cdat_lab.contenders import CONTENDERS
from cdat_lab.findings import Findings
from cdat_lab.report import curves, render, write_report
from cdat_lab.report.curve_styles import BUILT_IN, styles
from cdat_lab.tasks import TASKS
from tests.lab import made_up

Element = tuple[str, dict[str, str]]


class Page(HTMLParser):
    """The elements of a page, its text, and the figures in its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self.figures: dict[str, dict[str, Any]] = {}
        self.text = ""
        self._inside: Element = ("", {})
        self._chart = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = (tag, {name: value or "" for name, value in attrs})
        self.elements.append(self._inside)
        if self._inside[1].get("class", "").startswith("chart"):
            self._chart = self._inside[1]["id"]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ("", {})

    def handle_data(self, data: str) -> None:
        tag, attributes = self._inside
        if attributes.get("type") == "application/json":
            self.figures[self._chart] = json.loads(data)
        elif tag not in {"script", "style"}:
            self.text += data

    def ids(self, tag: str) -> list[str]:
        return [attributes["id"] for name, attributes in self.elements if name == tag]


def page(findings: Findings) -> Page:
    return Page(render(findings))


def figure(page: Page, start: str) -> dict[str, Any]:
    (name,) = [name for name in page.figures if name.startswith(start)]
    return page.figures[name]


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture(scope="module")
def simulations() -> tuple[model.Simulation, ...]:
    return tuple(model.simulate(("constant", "cdat-1.9", "cdat-2.0625"), steps=60))


@pytest.fixture(scope="module")
def everything(simulations: tuple[model.Simulation, ...]) -> Findings:
    return made_up.findings(
        races=[made_up.race("gd"), made_up.race("adam", batch_size=64)],
        sweeps=[made_up.sweep()],
        simulations=simulations,
        verdicts=made_up.verdicts(),
        notices=("something was left out",),
        diverged={("greedy", 1), ("cdat-2.1-ema-0.9", 0)},
        missing={("cdat-1.9", 2), ("armijo", 0), ("armijo", 1), ("armijo", 2)},
    )


@pytest.fixture(scope="module")
def html(everything: Findings) -> str:
    return render(everything)


def test_the_page_loads_nothing_from_elsewhere(html: str) -> None:
    found = Page(html)
    for tag, attributes in found.elements:
        for name in ("src", "href", "data", "action", "srcset"):
            target = attributes.get(name, "")
            assert not target or target.startswith(("#", "data:")), (tag, target)
        assert tag not in {"iframe", "object", "embed", "base"}
    styles_ = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert styles_
    assert not any("url(" in style or "@import" in style for style in styles_)


def test_each_kind_of_study_has_its_sections(
    everything: Findings, html: str, simulations: tuple[model.Simulation, ...]
) -> None:
    compared = page(made_up.findings(races=[made_up.race("momentum")]))
    assert compared.ids("section") == ["race-1", "grids", "times", "configuration"]

    simulated = page(made_up.findings(simulations=simulations))
    assert simulated.ids("section") == ["joint-model", "configuration"]

    reproduced = Page(html)
    expected = ["verdicts", "race-1", "race-2", "sweep-1", "joint-model", "grids", "times"]
    assert reproduced.ids("section") == [*expected, "configuration"]
    for verdict in everything.verdicts:
        for text in (STATEMENTS[verdict.claim], verdict.setting, verdict.measured, verdict.outcome):
            assert text in reproduced.text
    assert all(sign in reproduced.text for sign in "✓~✗?")
    assert "something was left out" in reproduced.text

    for found in (compared, simulated, reproduced):
        links = [a["href"][1:] for tag, a in found.elements if tag == "a"]
        assert links == found.ids("section")
        charts = [a for tag, a in found.elements if a.get("class", "").startswith("chart")]
        assert len(charts) == len(found.figures) == len(set(found.figures))


def test_text_from_users_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    text = """</script><img src=x onerror="alert(1)"> %{x} <b>"""
    task = dataclasses.replace(made_up.TASK, description="<script>alert(2)</script> & more")
    own = dataclasses.replace(CONTENDERS["cdat-2"], name="mine", label=text)
    formula = dataclasses.replace(own, name="formula", label='=HYPERLINK("x")')
    base = Base("own", "<i>own</i>", edge=3.0)
    monkeypatch.setitem(TASKS, "made-up", lambda seed: task)
    monkeypatch.setitem(CONTENDERS, "mine", own)
    monkeypatch.setitem(CONTENDERS, "formula", formula)
    monkeypatch.setitem(BASES, "own", base)
    race = made_up.race("own", ("constant", "mine", "formula"), task="made-up")
    html = render(made_up.findings(races=[race], title=text, notices=(text,)))

    found = Page(html)
    tags = [tag for tag, _ in found.elements]
    figures = len(found.figures)
    assert tags.count("script") == 2 + figures  # Plotly, the script of the page, and the data
    assert not {"img", "i"} & set(tags)
    assert found.text.count(text) >= 4  # title, notice, table and legend
    assert task.description in found.text
    names = {trace.get("name") for trace in figure(found, "race-1")["data"]}
    assert '&lt;/script&gt;&lt;img src=x onerror="alert(1)"&gt; %&#123;x} &lt;b&gt;' in names


def test_names_are_escaped_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registration refuses such names; the page does not rely on it."""
    task, mine, base = (f"{name}\"'><script>{name}()</script>" for name in ("task", "mine", "base"))
    contender = dataclasses.replace(CONTENDERS["cdat-2"], name=mine, label=mine)
    monkeypatch.setitem(TASKS, task, lambda seed: made_up.TASK)
    monkeypatch.setitem(CONTENDERS, mine, contender)
    monkeypatch.setitem(BASES, base, Base("own", base, edge=3.0))
    race = made_up.race(base, ("constant", mine), task=task)
    verdict = Verdict("A", task, mine, base, "holds", (1.0,))
    html = render(made_up.findings(races=[race], verdicts=(verdict,), notices=(task, mine)))

    found = Page(html)
    assert "<script>task" not in html
    assert [tag for tag, _ in found.elements].count("script") == 2 + len(found.figures)
    known = {"scope", "id", "href", "title", "lang", "charset", "name", "content", "rel", "class"}
    known |= {"aria-label", "aria-hidden", "aria-pressed", "role", "type", "data-label"}
    known |= {"data-group", "data-format", "width", "height", "viewbox", "d", "stroke"}
    known |= {"stroke-width", "stroke-dasharray"}
    assert {name for _, attributes in found.elements for name in attributes} <= known
    groups = [a["data-group"] for _, a in found.elements if "data-group" in a]
    assert mine in groups
    names = [a["id"] for tag, a in found.elements if tag == "figure"]
    assert f"race-1-{task}-{base}-jax" in names
    links = [a["href"][1:] for tag, a in found.elements if tag == "a"]
    assert links == found.ids("section")
    for text in (task, mine, base):
        assert found.text.count(text) >= 2


def test_no_cell_is_a_formula() -> None:
    texts = ["=1+1", "+1", "-1", "@x", "\tx", "plain", "a=b", None]
    frame = pl.DataFrame({"text": texts, "number": [-1.5] * len(texts)})
    found = rows(table.to_csv(frame))
    assert [row["text"] for row in found] == [
        "'=1+1", "'+1", "'-1", "'@x", "'\tx", "plain", "a=b", "",
    ]  # fmt: skip
    assert {row["number"] for row in found} == {"-1.5"}


def test_the_table_of_a_race_has_medians_over_the_seeds() -> None:
    race = made_up.race("gd")
    findings = made_up.findings(races=[race])
    found = {row["contender"]: row for row in table.results(findings, race).iter_rows(named=True)}
    assert list(found) == list(race.contenders)
    reference = [result.run.final_loss for result in findings.of(race, "constant")]
    for name, row in found.items():
        runs = [result.run for result in findings.of(race, name)]
        losses = [run.final_loss for run in runs]
        assert row["final_loss"] == statistics.median(losses)
        assert (row["final_low"], row["final_high"]) == (min(losses), max(losses))
        ratios = [loss / other for loss, other in zip(losses, reference, strict=True)]
        assert row["over_constant"] == pytest.approx(statistics.median(ratios), rel=1e-14)
        products = []
        for run in runs:
            late = run.frame[int(0.9 * race.steps) :]
            products.append((late["learning_rate"] * late["sharpness"]).drop_nulls().median())
        assert row["edge_ratio"] == pytest.approx(statistics.median(products) / 2, rel=1e-14)
    assert found["constant"]["tuned"] == made_up.RATES[3]
    assert found["constant"]["tuning_runs"] == 3 * len(made_up.RATES)
    assert found["greedy"]["tuned"] is None
    lowest = [name for name, row in found.items() if row["lowest"]]
    assert lowest == [min(found, key=lambda name: found[name]["final_loss"])]


def test_the_sweep_has_the_geometric_mean_and_the_best_of_each_batch() -> None:
    sweep = made_up.sweep()
    findings = made_up.findings(sweeps=[sweep], diverged={("cdat-2.1-ema-0.9", 0)})
    frame = table.sweep(findings, sweep)
    for race in sweep.races():
        of_batch = frame.filter(pl.col("batch_size").eq_missing(pl.lit(race.batch_size)))
        for row in of_batch.iter_rows(named=True):
            if row["sigma"] == 2.1:
                assert (row["log_ratio"], row["diverged"], row["best"]) == (None, 1, False)
                continue
            ratios = [
                ours.run.final_loss / constant.run.final_loss
                for ours, constant in zip(
                    findings.of(race, sweep.contender(row["sigma"])),
                    findings.of(race, "constant"),
                    strict=True,
                )
            ]
            assert 10 ** row["log_ratio"] == pytest.approx(statistics.geometric_mean(ratios))
        best = of_batch.filter("best")
        assert best["log_ratio"].to_list() == [of_batch["log_ratio"].min()]


def test_runs_that_diverged_are_shown(everything: Findings, html: str) -> None:
    found = Page(html)
    assert found.text.count("diverged in 1 of 3") == 2
    kept = rows(table.to_csv(table.rows(everything)))
    status = {(r["base"], r["contender"], r["batch_size"], r["seed"]): r["status"] for r in kept}
    assert status["gd", "greedy", "", "1"] == "diverged"
    assert status["gd", "greedy", "", "0"] == "finished"
    assert status["adam", "greedy", "64", "1"] == "diverged"
    assert status["gd", "armijo", "", "2"] == "missing"
    assert len(kept) == len(everything.study.jobs())

    cells = [note["text"] for note in figure(found, "sweep-1")["layout"]["annotations"]]
    assert cells.count("✗ 1/2") == 3
    crosses = [
        trace for trace in figure(found, "grid-1")["data"] if trace["marker"]["symbol"] == "x"
    ]
    assert [trace["x"] for trace in crosses] == [[made_up.RATES[-1]]] * len(crosses)


def test_an_incomplete_study_has_a_page(everything: Findings, html: str) -> None:
    assert "1 of 3 missing" in Page(html).text

    nothing = dataclasses.replace(everything, results={}, simulations=(), verdicts=())
    empty = page(nothing)
    assert empty.ids("section") == ["race-1", "race-2", "sweep-1", "configuration"]
    assert empty.text.count("This race has no results yet") == 2
    assert "all missing" in empty.text


@pytest.mark.parametrize("base", BASES)
def test_the_edge_of_stability_is_drawn_where_it_is(base: str) -> None:
    found = figure(page(made_up.findings(races=[made_up.race(base)])), "race-1")
    (line,) = [trace for trace in found["data"] if trace["legendgroup"] == "edge"]
    assert line["y"] == [BASES[base].edge] * 2
    title = found["layout"]["annotations"][3]["text"]
    assert "rate" in title
    assert "sharpness" in title
    assert (line["xaxis"], line["yaxis"]) == ("x4", "y4")
    low, high = found["layout"]["yaxis4"]["range"]
    assert low < math.log10(BASES[base].edge or 0) < high


def test_a_base_without_a_known_edge_has_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BASES, "own", Base("own", "Own", edge=None))
    found = page(made_up.findings(races=[made_up.race("own")]))
    drawn = figure(found, "race-1")
    assert not [trace for trace in drawn["data"] if trace["legendgroup"] == "edge"]
    assert len(drawn["layout"]["annotations"]) == 6
    assert "is not known" in found.text


def test_an_optimizer_with_its_own_preconditioner_is_not_compared_with_the_edge() -> None:
    race = made_up.race("adam", ("constant", "schedule-free"))
    findings = made_up.findings(races=[race])
    constant, other = table.results(findings, race).iter_rows(named=True)
    assert None not in (constant["sharpness"], constant["edge_ratio"])
    assert (other["sharpness"], other["edge_ratio"]) == (None, None)
    drawn = figure(page(findings), "race-1")["data"]
    panels = {trace.get("yaxis") for trace in drawn if trace["legendgroup"] == "schedule-free"}
    assert panels == {"y", "y2", "y5", "y6"}


def test_a_band_spans_the_seeds_and_a_loss_that_is_not_finite_is_high() -> None:
    race = made_up.race("gd", ("greedy",))
    findings = made_up.findings(races=[race], diverged={("greedy", 1)})
    runs = [result.run for result in findings.of(race, "greedy")]
    band = curves.over_seeds(runs, pl.col("full_loss"))
    assert band is not None
    for index, step in enumerate(band.x.astype(int)):
        losses = [run.frame["full_loss"][int(step)] for run in runs]
        losses = sorted(math.inf if math.isnan(loss) else loss for loss in losses)
        assert (band.low[index], band.middle[index], band.high[index]) == tuple(losses)
    assert math.isinf(band.high[-1])
    assert band.x[-1] == race.steps


@pytest.mark.parametrize("points", [1, 2, 299, 300, 301, 601, 3001, 10001])
def test_long_curves_are_thinned_by_an_odd_stride(points: int) -> None:
    kept = curves.thinned(points)
    assert (kept[0], kept[-1]) == (0, points - 1)
    assert len(kept) <= curves.POINTS + 1
    strides = set(np.diff(kept[:-1]).tolist())
    assert len(strides) <= 1
    assert all(stride % 2 for stride in strides)


def test_every_contender_has_its_own_style() -> None:
    assert set(CONTENDERS) <= set(BUILT_IN)
    names = [*CONTENDERS, *(f"own-{i}" for i in range(12))]
    found = styles(names)
    assert list(found) == names
    looks = {(style.color, style.dash) for style in found.values()}
    assert len(looks) == len(names)
    assert set(styles(f"own-{i}" for i in range(100))) == {f"own-{i}" for i in range(100)}


def test_the_page_contains_the_measured_curves() -> None:
    race = made_up.race("gd", ("constant",), seeds=(0,))
    findings = made_up.findings(races=[race])
    trace = figure(page(findings), "race-1")["data"][0]
    assert trace["y"]["dtype"] == "f4"
    shown = np.frombuffer(base64.b64decode(trace["y"]["bdata"]), dtype="<f4")
    expected = findings.of(race, "constant")[0].run.frame["full_loss"].to_numpy()
    np.testing.assert_allclose(shown, expected, rtol=1e-6)


def test_the_same_results_give_the_same_files(everything: Findings, tmp_path: Path) -> None:
    shuffled = dict(reversed(everything.results.items()))
    again = dataclasses.replace(everything, results=shuffled)
    first, second = (
        write_report(findings, tmp_path / name).parent
        for findings, name in ((everything, "first"), (again, "second"))
    )
    for name in ("report.html", "table.csv", "verdicts.csv"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    kept = rows((first / "verdicts.csv").read_text())
    assert [row["outcome"] for row in kept] == ["holds", "in part", "does not hold", "unknown"]
    assert json.loads(kept[1]["values"]) == [0.9, 2]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0.0, "0.00"),
        (0.0123456, "0.0123"),
        (1.5, "1.50"),
        (123.4, "123"),
        (12345.6, "12346"),
        (1e-5, "1.00e-05"),
        (math.inf, "infinite"),
        (math.nan, "not finite"),
    ],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert table.number(value) == text
