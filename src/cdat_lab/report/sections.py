"""Sections of text and tables: header, verdicts, times and configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from cdat_lab import backends, provenance, table
from cdat_lab.bases import Base
from cdat_lab.claims import STATEMENTS, Verdict
from cdat_lab.contenders import Contender
from cdat_lab.findings import Findings
from cdat_lab.registry import find_base, find_contender
from cdat_lab.report import markup
from cdat_lab.report.markup import words

PAPER = (
    "V. Roulet, A. Agarwala, J.-B. Grill, G. Swirszcz, M. Blondel, F. Pedregosa, “Stepping on the "
    "Edge: Curvature Aware Learning Rate Tuners”, 2024, arXiv:2407.06183"
)

SIGNS = {"holds": "✓", "in part": "~", "does not hold": "✗", "unknown": "?"}


class Section(NamedTuple):
    """A section of the page: name of its element, text of the link to it, and its HTML."""

    name: str
    link: str
    html: str


def header(findings: Findings, links: Iterable[tuple[str, str]]) -> str:
    """Return the title, what was done, what was left out, and the links to all sections."""
    study = findings.study
    notices = [*findings.notices, *_doubts(findings)]
    parts = [
        f"<header><h1>{escape(study.title)}</h1>",
        f'<p class="lead">{words(_done(findings))}</p>',
        '<p class="lead">CDAT sets the learning rate to sigma times &minus;slope over curvature of '
        f"the loss along the update of a base optimizer ({escape(PAPER)}).</p>",
        f'<p class="caption">{escape(_versions(findings))}</p>',
    ]
    if notices:
        items = "".join(f"<li>{escape(notice)}</li>" for notice in notices)
        parts.append(f'<div class="notices"><h2>Notices</h2><ul>{items}</ul></div>')
    items = "".join(f'<li><a href="#{name}">{escape(link)}</a></li>' for name, link in links)
    parts.append(f'<nav aria-label="Sections"><ul>{items}</ul></nav></header>')
    return "\n".join(parts)


def _done(findings: Findings) -> str:
    study, parts = findings.study, []
    if study.races:
        races = f"{len(study.races)} race" + ("s" if len(study.races) > 1 else "")
        names = {name for race in study.races for name in race.contenders}
        rules = f"{len(names)} rules" if len(names) > 1 else "one rule"
        parts.append(f"{races} between {rules} for the learning rate")
    if study.sweeps:
        count = len(study.sweeps)
        parts.append(
            f"{'a sweep' if count == 1 else f'{count} sweeps'} of CDAT over sigma and batch size"
        )
    if findings.simulations:
        parts.append(f"a joint model of rate and sharpness under {len(findings.simulations)} rules")
    text = "; ".join(parts) + "." if parts else "Nothing was run."
    text = text[0].upper() + text[1:]
    tuned = any(r.grid is not None for r in findings.results.values())
    if tuned:
        text += " Rates of the baselines were tuned on a grid for each seed; the other rules have "
        text += "one setting and one run."
    return text


def _doubts(findings: Findings) -> list[str]:
    """Return what a reader should know before the numbers: what is not alike."""
    made = Counter(backend for backend, _, _ in identities(findings))
    if all(count == 1 for count in made.values()):
        return []
    return ["The results were made with different versions or code; see Configuration."]


def _versions(findings: Findings) -> str:
    """Return what the numbers were made with, or what the page was, if nothing was trained."""
    found = identities(findings)
    if not found:
        return f"Made with cdat {provenance.version('cdat')}, numpy {provenance.version('numpy')}."
    packages = dict.fromkeys(_packages(versions) for _, versions, _ in found)
    return f"Made with {'; '.join(packages)}."


def _packages(versions: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions)


def identities(findings: Findings) -> list[tuple[str, tuple[tuple[str, str], ...], str]]:
    """Return the backends, versions and digests of code that the results were made with."""
    found = {
        (key.backend, tuple(r.run.identity["versions"].items()), str(r.run.identity["code"]))
        for key, r in findings.results.items()
    }
    return sorted(found)


def verdicts(findings: Findings) -> Section | None:
    """Return the section on the claims; None if there are no verdicts."""
    if not findings.verdicts:
        return None
    caption = (
        "The claims are the paper's, in our words. The quantities and ranges that stand for them "
        "here are ours, and were set before these runs, from a first study on other seeds. A "
        "verdict is about these small problems: it holds if every seed is in the range, in part if "
        "some are."
    )
    parts = [f'<p class="caption">{words(caption)}</p>']
    for claim in dict.fromkeys(verdict.claim for verdict in findings.verdicts):
        found = [verdict for verdict in findings.verdicts if verdict.claim == claim]
        rows = [("", _verdict(verdict)) for verdict in found]
        headings = ("setting", "what the claim asks for here", "measured", "outcome")
        statement = words(STATEMENTS.get(claim, ""))
        parts.append(
            f'<h3 class="claim"><b>{escape(claim)}</b> {statement}'
            f'<span class="tally">{_tally(found)}</span></h3>'
            + markup.table(headings, rows, kind="stack")
        )
    return Section("verdicts", "Verdicts", markup.section("verdicts", "Verdicts", *parts))


def _verdict(verdict: Verdict) -> list[str]:
    texts = (verdict.setting, verdict.expected, verdict.measured)
    return [*map(words, texts), _outcome(verdict.outcome, verdict.outcome)]


def _outcome(outcome: str, text: str) -> str:
    kind = outcome.replace(" ", "-")
    return f'<span class="outcome {escape(kind)}"><i>{SIGNS[outcome]}</i> {escape(text)}</span>'


def _tally(found: Sequence[Verdict]) -> str:
    count = Counter(verdict.outcome for verdict in found)
    return "".join(_outcome(name, f"{count[name]} {name}") for name in SIGNS if count[name])  # type: ignore[index]


def times(findings: Findings) -> Section | None:
    """Return the section on wall-clock times; None if nothing was trained."""
    frame = table.timings(findings)
    if frame.is_empty():
        return None
    names = [column.removesuffix(" ms") for column in frame.columns if column.endswith(" ms")]
    labels = [backends.BACKENDS[name].label for name in names]
    rows, before = [], None
    for row in frame.iter_rows(named=True):
        place = (row["task"], row["base"], row["batch_size"])
        where = f"{row['task']}, {row['base']}, {table.batch(row['batch_size'])}"
        cells = [escape(where) if place != before else "", escape(row["contender"])]
        for unit in ("ms", "compile"):
            values = (row[f"{name} {unit}"] for name in names)
            cells += ["" if value is None else f"{value:.2f}" for value in values]
        rows.append(("first" if place != before else "", cells))
        before = place
    headings = (
        "race",
        "contender",
        *(f"ms per step, {label}" for label in labels),
        *(f"seconds of compilation, {label}" for label in labels),
    )
    caption = (
        "Wall clock on one thread. Of a step: a median over the seeds, without compilation, loss "
        "on all data and sharpness. Of compilation: the most of a seed. These numbers change from "
        "one execution to the next, and with what else the machine does; a program that was "
        "compiled before is not compiled again."
    )
    html = markup.section(
        "times",
        "Times",
        f'<p class="caption">{words(caption)}</p>',
        markup.table(headings, rows, numbers=range(2, len(headings))),
    )
    return Section("times", "Times", html)


def configuration(findings: Findings) -> Section:
    """Return the section that says how to repeat the study."""
    study = findings.study
    races = list(dict.fromkeys(study.all_races()))
    parts = [f"<p>To repeat this: <code>{escape(study.command)}</code></p>"]
    if found := identities(findings):
        lines = [
            f"{backends.BACKENDS[backend].label}: {_packages(versions)}; code {code}"
            for backend, versions, code in found
        ]
        parts += ["<h3>Versions, and the digest of the code</h3>", _list(lines)]
    if races:
        headings = ("task", "base", "batch size", "backend", "steps", "seeds", "contenders")
        rows = [
            (
                "",
                [
                    escape(race.task),
                    escape(find_base(race.base).label),
                    "full" if race.batch_size is None else str(race.batch_size),
                    escape(race.backend),
                    str(race.steps),
                    ", ".join(map(str, race.seeds)),
                    escape(", ".join(race.contenders)),
                ],
            )
            for race in races
        ]
        parts += ["<h3>Races</h3>", markup.table(headings, rows, numbers=(4,), kind="long")]
        bases = dict.fromkeys(race.base for race in races)
        parts += ["<h3>Base optimizers</h3>", _list(describe_base(find_base(b)) for b in bases)]
    names = dict.fromkeys(name for race in races for name in race.contenders)
    entrants = [find_contender(name) for name in names]
    entrants += [s.contender for s in findings.simulations if s.contender.name not in names]
    if entrants:
        parts += ["<h3>Contenders</h3>", _list(map(describe_contender, entrants))]
    html = markup.section("configuration", "Configuration", *parts)
    return Section("configuration", "Configuration", html)


def describe_base(base: Base) -> str:
    """Return a base optimizer with its coefficients in words."""
    settings = [f"momentum {base.momentum:g}"] if base.momentum else []
    if base.second_moment is not None:
        settings += [f"second moment {base.second_moment:g}, eps {base.eps:g}"]
    if not base.builtin:
        settings = ["an optimizer of its own"]
    edge = "not known" if base.edge is None else f"{base.edge:.4g}"
    return f"{base.label}: {', '.join(settings) or 'no setting'}; edge of stability {edge}"


def describe_contender(contender: Contender) -> str:
    """Return a contender with its hyperparameters in words."""
    settings = [f"{k.replace('_', ' ')} {v:g}" for k, v in contender.hyperparameters.items()]
    if contender.tuned is not None:
        settings.append(f"{contender.tuned.replace('_', ' ')} tuned")
    if contender.curvature != "auto":
        settings.append(f"curvature {contender.curvature.replace('_', '-')}")
    if contender.optimizer is not None:
        settings.append("an optimizer of its own")
    return f"{contender.label} ({contender.name}): {', '.join(settings) or 'no setting'}"


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
