"""Findings: a study with its results, its simulations and its verdicts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cdat_lab.claims import Verdict
from cdat_lab.model import Simulation
from cdat_lab.races import Race, Result, Results
from cdat_lab.studies import Study


@dataclass(frozen=True, eq=False)
class Findings:
    """A study and its results.

    Attributes
    ----------
    study : Study
        What was run.
    results : mapping of Key to Result
        The results; incomplete if the study was interrupted.
    simulations : tuple of Simulation
        Runs of the joint model, if requested.
    verdicts : tuple of Verdict
        Verdicts on the claims.
    notices : tuple of str
        What was left out, and why.
    """

    study: Study
    results: Results
    simulations: tuple[Simulation, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    notices: tuple[str, ...] = ()

    def of(self, race: Race, contender: str) -> list[Result]:
        """Return the available results of a contender, in the order of the seeds."""
        keys = (race.key(contender, seed) for seed in race.seeds)
        return [self.results[key] for key in keys if key in self.results]

    def noted(self, *notices: str) -> Findings:
        """Return a copy with further notices, each once."""
        return replace(self, notices=tuple(dict.fromkeys((*notices, *self.notices))))
