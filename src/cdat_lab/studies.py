"""Studies: the races, sweeps and simulations of one command."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cdat_lab import backends, registry
from cdat_lab.contenders import Contender, cdat_contender
from cdat_lab.races import Job, Race


@dataclass(frozen=True)
class Sweep:
    """CDAT for several sigmas and batch sizes, compared with the tuned constant rate.

    Attributes
    ----------
    task, base, backend : str
        Names in the registries.
    sigmas : tuple of float
        In increasing order.
    batch_sizes : tuple of int or None
        In increasing order; None is the full batch.
    decay : float
        Decay of CDAT's averages.
    steps : int
        Length of each run.
    seeds : tuple of int
        As in a race.
    """

    task: str
    base: str
    backend: str
    sigmas: tuple[float, ...]
    batch_sizes: tuple[int | None, ...]
    decay: float
    steps: int
    seeds: tuple[int, ...]

    def contender(self, sigma: float) -> str:
        """Return the name of CDAT with this sigma."""
        return cdat_contender(sigma, self.decay).name

    def races(self) -> list[Race]:
        """Return one race for each batch size."""
        names = ("constant", *map(self.contender, self.sigmas))
        return [
            Race(self.task, self.base, self.backend, names, self.steps, self.seeds, size)
            for size in self.batch_sizes
        ]


@dataclass(frozen=True)
class Study:
    """What a command runs.

    Attributes
    ----------
    title : str
        Title of the report.
    command : str
        The command line that repeats the study.
    races : tuple of Race
        Reported one by one.
    sweeps : tuple of Sweep
        Reported as heat maps.
    simulated : bool
        Whether to run the joint model.
    claims : tuple of str
        Letters of the claims to judge.
    suite : str
        Name of the suite whose summary the report shows instead of single races; empty for none.
    """

    title: str
    command: str
    races: tuple[Race, ...]
    sweeps: tuple[Sweep, ...] = ()
    simulated: bool = False
    claims: tuple[str, ...] = ()
    suite: str = ""

    def all_races(self) -> list[Race]:
        """Return all races, including those of the sweeps."""
        return [*self.races, *(race for sweep in self.sweeps for race in sweep.races())]

    def jobs(self) -> list[Job]:
        """Return the jobs to run, each once."""
        return list({job.key: job for race in self.all_races() for job in race.jobs()}.values())


def eligible(names: Iterable[str], *, base: str, backend: str) -> tuple[list[str], list[str]]:
    """Return the contenders that can run, and a reason for each that cannot.

    Parameters
    ----------
    names : iterable of str
        Names of contenders.
    base, backend : str
        Names of the base optimizer and the backend to run with.

    Returns
    -------
    tuple of two lists of str
    """
    kept, reasons = [], []
    for name in names:
        reason = _obstacle(registry.find_contender(name), base, backend)
        if reason is None:
            kept.append(name)
        else:
            reasons.append(reason)
    return kept, reasons


def _obstacle(contender: Contender, base: str, backend: str) -> str | None:
    found = registry.find_base(base)
    if not found.runs_under(backend):
        return f"{found.label} has no constructor for {backend}"
    if contender.optimizer is None:
        return None
    if base not in {"adam", "adamw"}:
        return f"{contender.label} belongs to the Adam family and runs with Adam only"
    return backends.package_obstacle(contender.optimizer, backend)
