"""Sections of text and tables: header, verdicts, times and configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from cdat_lab import backends, provenance, table
from cdat_lab.bases import Base
from cdat_lab.claims import STATEMENTS
from cdat_lab.contenders import Contender
from cdat_lab.findings import Findings
from cdat_lab.registry import find_base, find_contender
from cdat_lab.report.rendering import render_template


class Section(NamedTuple):
    """A section of the page: id of its element, text of the link to it, content and title."""

    name: str
    link: str
    body: Markup
    title: str = ""  # by default the text of the link


def header(findings: Findings, sections: Sequence[Section]) -> Markup:
    """Return the title, what was done, what was left out, and the links to all sections."""
    return render_template(
        "header",
        title=findings.study.title,
        done=_done(findings),
        versions=_versions(findings),
        notices=[*findings.notices, *_doubts(findings)],
        sections=sections,
    )


def _done(findings: Findings) -> str:
    study, parts = findings.study, []
    if study.races:
        places = {(race.task, race.base, race.batch_size, race.backend) for race in study.races}
        count = len(places) if study.suite else len(study.races)
        races = f"{count} race" + ("s" if count > 1 else "")
        names = {name for race in study.races for name in race.contenders}
        rules = f"{len(names)} learning-rate rules" if len(names) > 1 else "one learning-rate rule"
        parts.append(f"{races} with {rules}")
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
        text += " The rates of the baselines were tuned on a grid, separately for each seed; the "
        text += "other rules have one setting and one run for each seed."
    return text


def _doubts(findings: Findings) -> list[str]:
    """Return notices about results that may not be comparable."""
    made = Counter(backend for backend, _, _ in identities(findings))
    if all(count == 1 for count in made.values()):
        return []
    return ["The results were made with different versions or code; see Configuration."]


def _versions(findings: Findings) -> str:
    """Return the versions behind the numbers, or behind the page if nothing was trained."""
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
    claims = []
    for letter in dict.fromkeys(verdict.claim for verdict in findings.verdicts):
        found = [verdict for verdict in findings.verdicts if verdict.claim == letter]
        claims.append(
            {
                "letter": letter,
                "statement": STATEMENTS.get(letter, ""),
                "tally": Counter(verdict.outcome for verdict in found),
                "verdicts": found,
            }
        )
    body = render_template("verdicts", claims=claims)
    return Section("verdicts", "Verdicts", body)


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
        race = f"{row['task']}, {row['base']}, {table.batch(row['batch_size'])}"
        rows.append(
            {
                "race": race if place != before else "",
                "contender": row["contender"],
                "numbers": [row[f"{name} {unit}"] for unit in ("ms", "compile") for name in names],
            }
        )
        before = place
    headings = (
        "race",
        "contender",
        *(f"ms per step, {label}" for label in labels),
        *(f"seconds of compilation, {label}" for label in labels),
    )
    body = render_template("times", headings=headings, rows=rows)
    return Section("times", "Times", body)


def configuration(findings: Findings) -> Section:
    """Return the section that says how to repeat the study."""
    study = findings.study
    races = list(dict.fromkeys(study.all_races()))
    names = dict.fromkeys(name for race in races for name in race.contenders)
    entrants = [find_contender(name) for name in names]
    entrants += [s.contender for s in findings.simulations if s.contender.name not in names]
    bases = {race.base: find_base(race.base) for race in races}
    body = render_template(
        "configuration",
        command=study.command,
        versions=[
            f"{backends.BACKENDS[backend].label}: {_packages(versions)}; code {code}"
            for backend, versions, code in identities(findings)
        ],
        races=[(race, bases[race.base].label) for race in races],
        bases=[describe_base(base) for base in bases.values()],
        contenders=[describe_contender(contender) for contender in entrants],
    )
    return Section("configuration", "Configuration", body)


def describe_base(base: Base) -> str:
    """Return a base optimizer with its coefficients in words."""
    settings = [f"momentum {base.momentum:g}"] if base.momentum else []
    if base.second_moment is not None:
        settings += [f"second moment {base.second_moment:g}, eps {base.eps:g}"]
    if base.weight_decay:
        settings.append(f"weight decay {base.weight_decay:g}")
    if not base.builtin:
        settings = ["custom optimizer"]
    edge = "unknown" if base.edge is None else f"{base.edge:.4g}"
    return f"{base.label}: {', '.join(settings) or 'no settings'}; edge of stability {edge}"


def describe_contender(contender: Contender) -> str:
    """Return a contender with its hyperparameters in words."""
    settings = [f"{k.replace('_', ' ')} {v:g}" for k, v in contender.hyperparameters.items()]
    if contender.tuned is not None:
        settings.append(f"{contender.tuned.replace('_', ' ')} tuned")
    if contender.curvature != "auto":
        settings.append(f"curvature {contender.curvature.replace('_', '-')}")
    if contender.optimizer is not None:
        settings.append("custom optimizer")
    return f"{contender.label} ({contender.name}): {', '.join(settings) or 'no settings'}"
