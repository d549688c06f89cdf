"""Run a study: from the plan in a folder to the findings, also after an interruption."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from cdat_lab import claims, model, provenance, races, runs, storage
from cdat_lab.findings import Findings
from cdat_lab.races import Job, Race, Result, Results
from cdat_lab.runs import Recording
from cdat_lab.studies import Study, Sweep

PLAN = "study.json"
RUNS = "runs"
FORMAT = 1


def conduct(
    study: Study,
    folder: Path,
    *,
    resume: bool,
    processes: int,
    finished: Callable[[Job, Result], None] | None = None,
) -> Findings:
    """Train everything in a study and return the findings.

    Parameters
    ----------
    study : Study
        The plan; it is saved in the folder for `reopen`.
    folder : Path
        Where the plan and the runs are written.
    resume, processes, finished
        See `races.execute`.

    Returns
    -------
    Findings
    """
    save_plan(study, folder)
    results = races.execute(
        study.jobs(), folder / RUNS, resume=resume, processes=processes, finished=finished
    )
    return gather(study, results, folder)


def reopen(folder: Path) -> Findings:
    """Return the findings of a study from the runs in its folder, without training.

    Raises
    ------
    ValueError
        If the folder holds no plan that this version can read.
    """
    study = load_plan(folder)
    jobs = study.jobs()
    results = races.collect(jobs, folder / RUNS)
    findings = gather(study, results, folder)
    missing = len(jobs) - len(results)
    if not missing:
        return findings
    notice = (
        f"{missing} of {len(jobs)} results are missing or come from another version (see the "
        f"tables); run `{study.command} --resume` to produce them"
    )
    return findings.noted(notice)


def gather(study: Study, results: Results, folder: Path) -> Findings:
    """Return the results with the joint model, the verdicts and notices about unused files."""
    simulations = tuple(model.simulate()) if study.simulated else ()
    used = {name for result in results.values() for name in result.files}
    return Findings(
        study=study,
        results=results,
        simulations=simulations,
        verdicts=claims.verdicts(study, results, simulations),
        notices=tuple(left_out(folder / RUNS, used)),
    )


def left_out(folder: Path, used: Collection[str]) -> list[str]:
    """Return a notice for each kind of unused file in a folder of runs.

    Runs of this version with other settings belong to other studies and are not mentioned.
    """
    damaged, foreign = [], []
    for path in sorted(folder.glob("*.parquet")):
        if path.name in used:
            continue
        try:
            identity = runs.read(path).identity
        except ValueError:
            damaged.append(path.name)
            continue
        if not _is_current(identity):
            foreign.append(path.name)
    notices = []
    if damaged:
        notices.append(f"{_files(damaged)} damaged or incomplete: left out")
    if foreign:
        notices.append(
            f"{_files(foreign)} from another version of the code or its packages: left out"
        )
    return notices


def _is_current(identity: dict[str, Any]) -> bool:
    """Return whether a run was made with the versions and the code of this process."""
    try:
        current = runs.RunConfig(**identity["config"]).identity()
    except (KeyError, TypeError):
        return False
    return all(current[part] == identity[part] for part in ("versions", "code"))


def _files(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {'file' if len(names) == 1 else 'files'} ({shown})"


def save_plan(study: Study, folder: Path) -> None:
    """Write the plan of a study atomically."""
    plan = {
        "format": FORMAT,
        "cdat": provenance.version("cdat"),
        "study": dataclasses.asdict(study),
    }
    storage.write_text(folder / PLAN, json.dumps(plan, indent=1) + "\n")


def load_plan(folder: Path) -> Study:
    """Read the plan of a study.

    Raises
    ------
    ValueError
        If there is none that this version can read.
    """
    path = folder / PLAN
    if not path.is_file():
        msg = f"{folder} has no {PLAN}; pass a folder that a cdat command wrote"
        raise ValueError(msg)
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        if plan["format"] != FORMAT:
            msg = f"{path} has format {plan['format']!r}, not {FORMAT}; another version wrote it"
            raise ValueError(msg)
        study = plan["study"]
        return Study(
            title=str(study["title"]),
            command=str(study["command"]),
            races=tuple(_race(race) for race in study["races"]),
            sweeps=tuple(Sweep(**_tuples(sweep)) for sweep in study["sweeps"]),
            simulated=bool(study["simulated"]),
            claims=tuple(study["claims"]),
            suite=str(study.get("suite", "")),
        )
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        msg = f"{path} is not a valid study plan ({type(error).__name__}: {error})"
        raise ValueError(msg) from error


def _race(values: dict[str, Any]) -> Race:
    recording = Recording(**values.get("recording", {}))
    return Race(**{**_tuples(values), "recording": recording})


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
