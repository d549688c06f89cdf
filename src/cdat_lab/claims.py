"""The claims of the paper, the settings they are tested in, and the verdicts.

A check measures one number for each seed and says beforehand in which range the claim asks for it.
The ranges come from a first study on other seeds; they are not adjusted to what is measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from cdat_lab.bases import BASES
from cdat_lab.model import Simulation
from cdat_lab.races import Race, Result, Results
from cdat_lab.studies import Study, Sweep

Outcome = Literal["holds", "in part", "does not hold", "unknown"]

ARMIJO, GREEDY, CONSTANT = "armijo", "greedy", "constant"
CDAT_19, CDAT_2, CDAT_21 = "cdat-1.9", "cdat-2-ema-0.9", "cdat-2.1-ema-0.9"

STATEMENTS = {
    "A": "Full batch: rules that do best at each step lose to a tuned constant rate, because under "
    "them the sharpness keeps growing.",
    "B": "Full batch: CDAT with sigma near 2 beats a tuned constant rate and stays at the edge of "
    "stability.",
    "C": "Mini-batches: the best sigma falls as the batch shrinks.",
    "D": "A joint model of rate and sharpness shows why.",
}


@dataclass(frozen=True)
class Verdict:
    """What is said of a claim in one setting.

    Attributes
    ----------
    claim : str
        Its letter.
    setting : str
        Task, base optimizer, batch.
    expected : str
        What the claim asks for in this setting, with the range.
    measured : str
        What was measured: median, and lowest to highest over the seeds.
    outcome : str
        "holds" if every seed is in the range, "in part" if some are, "does not hold" if none is,
        "unknown" if nothing was measured.
    values : tuple of float
        The number of each seed.
    """

    claim: str
    setting: str
    expected: str
    measured: str
    outcome: Outcome
    values: tuple[float, ...]


@dataclass(frozen=True)
class Check:
    """One number to be measured for each seed of a race, and the range the claim asks for.

    Attributes
    ----------
    claim : str
        Its letter.
    task, base : str
        Which race.
    quantity : str
        What is measured, in words.
    measure : callable
        ``measure(result of a contender) -> number``, given a function from the name of a contender
        to its result for the seed.
    low, high : float
        The range, ends included.
    """

    claim: str
    task: str
    base: str
    quantity: str
    measure: Callable[[Callable[[str], Result]], float]
    low: float = -math.inf
    high: float = math.inf

    def expected(self) -> str:
        """Return the quantity with its range."""
        if math.isinf(self.high):
            return f"{self.quantity} at least {self.low:g}"
        if math.isinf(self.low):
            return f"{self.quantity} at most {self.high:g}"
        return f"{self.quantity} from {self.low:g} to {self.high:g}"


def loss_ratio(contender: str, reference: str = CONSTANT) -> Callable[..., float]:
    """Return the measure of one final loss over another; infinity if the first diverged."""

    def measure(of: Callable[[str], Result]) -> float:
        return _ratio(_final(of(contender)), _final(of(reference)))

    return measure


def sharpness_ratio(contender: str, reference: str) -> Callable[..., float]:
    """Return the measure of one late sharpness over another."""

    def measure(of: Callable[[str], Result]) -> float:
        return _ratio(_late(of(contender)), _late(of(reference)))

    return measure


def at_the_edge(contender: str) -> Callable[..., float]:
    """Return the measure of the late rate times sharpness."""

    def measure(of: Callable[[str], Result]) -> float:
        found = of(contender).run.late(pl.col("learning_rate") * pl.col("sharpness"))
        return math.nan if found is None else found

    return measure


CHECKS = (
    Check("A", "teacher-student", "gd", "Armijo: loss over that of the tuned constant", loss_ratio(ARMIJO), 3),
    Check("A", "teacher-student", "gd", "greedy: loss over that of the tuned constant", loss_ratio(GREEDY), 3),
    Check("A", "teacher-student", "gd", "Armijo: final sharpness over that of CDAT 2", sharpness_ratio(ARMIJO, CDAT_2), 4),
    Check("A", "teacher-student", "gd", "greedy: final sharpness over that of CDAT 2", sharpness_ratio(GREEDY, CDAT_2), 4),
    Check("A", "teacher-student", "rmsprop", "greedy: loss over that of the tuned constant", loss_ratio(GREEDY), 5),
    Check("A", "digits", "adam", "greedy: loss over that of the tuned constant", loss_ratio(GREEDY), 1),
    Check("A", "digits", "momentum", "greedy: loss over that of the tuned constant", loss_ratio(GREEDY), 1),
    Check("B", "teacher-student", "rmsprop", "CDAT 2: loss over that of the tuned constant", loss_ratio(CDAT_2), high=0.5),
    Check("B", "teacher-student", "rmsprop", "CDAT 2.1: loss over that of the tuned constant", loss_ratio(CDAT_21), high=0.5),
    Check("B", "digits", "adam", "CDAT 1.9 without EMA: loss over that of the tuned constant", loss_ratio(CDAT_19), high=0.65),
    Check("B", "digits", "momentum", "CDAT 1.9 without EMA: loss over that of the tuned constant", loss_ratio(CDAT_19), high=0.65),
    Check("B", "digits", "adam", "CDAT 2: loss over that of the tuned constant", loss_ratio(CDAT_2), high=1),
    Check("B", "digits", "momentum", "CDAT 2: loss over that of the tuned constant", loss_ratio(CDAT_2), high=1),
    Check("B", "teacher-student", "gd", "CDAT 2: loss over that of the tuned constant", loss_ratio(CDAT_2), high=1),
    Check("B", "digits", "adam", "CDAT 2: rate x sharpness (edge 38)", at_the_edge(CDAT_2), 0.9 * 38, 1.1 * 38),
    Check("B", "digits", "momentum", "CDAT 2: rate x sharpness (edge 3.8)", at_the_edge(CDAT_2), 0.95 * 3.8, 1.05 * 3.8),
)  # fmt: skip
"""In the order of the claims; ranges as a first study on other seeds suggested them."""


def verdicts(
    study: Study, results: Results, simulations: Sequence[Simulation] = ()
) -> tuple[Verdict, ...]:
    """Return the verdicts on the claims of a study.

    Parameters
    ----------
    study : Study
        Its claims, races and sweeps.
    results : mapping of Key to Result
        What was trained.
    simulations : sequence of Simulation
        The joint model under its rules.

    Returns
    -------
    tuple of Verdict
        In the order of the claims.
    """
    found = [
        _checked(check, race, results)
        for check in CHECKS
        for race in study.races
        if (race.task, race.base, race.batch_size) == (check.task, check.base, None)
    ]
    found += [_best_sigma(sweep, results) for sweep in study.sweeps]
    found += _joint_model(simulations)
    return tuple(v for v in sorted(found, key=lambda v: v.claim) if v.claim in study.claims)


def _checked(check: Check, race: Race, results: Results) -> Verdict:
    values = []
    for seed in race.seeds:

        def of(contender: str, seed: int = seed) -> Result:
            return results[race.key(contender, seed)]

        try:
            values.append(check.measure(of))
        except KeyError:  # an interrupted study
            continue
    setting = f"{race.task}, {BASES[race.base].label}, full batch"
    return _verdict(check.claim, setting, check.expected(), values, check.low, check.high)


def _verdict(
    claim: str, setting: str, expected: str, values: Sequence[float], low: float, high: float
) -> Verdict:
    inside = [low <= value <= high for value in values]
    return Verdict(claim, setting, expected, spread(values), _outcome(inside), tuple(values))


def _outcome(inside: Sequence[bool]) -> Outcome:
    if not inside:
        return "unknown"
    if all(inside):
        return "holds"
    return "in part" if any(inside) else "does not hold"


def spread(values: Sequence[float]) -> str:
    """Return the median of some values, with the lowest and the highest if there are several."""
    if not values:
        return "not measured"
    text = f"{statistics.median(values):.3g}"
    if len(values) > 1:
        text += f" ({min(values):.3g} to {max(values):.3g}, {len(values)} seeds)"
    return text


def sweep_ratios(
    sweep: Sweep, results: Results, seeds: Sequence[int] | None = None
) -> NDArray[np.float64]:
    """Return final losses over those of the tuned constant rate, shape (sigmas, batch sizes).

    Parameters
    ----------
    sweep : Sweep
        Which runs.
    results : mapping of Key to Result
        Where they are.
    seeds : sequence of int, optional
        Over which to take the geometric mean; by default all of the sweep.

    Returns
    -------
    ndarray
        Infinity where a run diverged, NaN where one is missing.
    """
    ratios = np.full((len(sweep.sigmas), len(sweep.batch_sizes)), np.nan)
    for column, race in enumerate(sweep.races()):
        for row, sigma in enumerate(sweep.sigmas):
            keys = [
                (race.key(sweep.contender(sigma), seed), race.key(CONSTANT, seed))
                for seed in (seeds or sweep.seeds)
            ]
            if all(key in results for pair in keys for key in pair):
                logarithms = [
                    np.log(_final(results[ours])) - np.log(_final(results[constant]))
                    for ours, constant in keys
                ]
                ratios[row, column] = np.exp(np.mean(logarithms))
    return ratios


def _best_sigma(sweep: Sweep, results: Results) -> Verdict:
    """Say whether the best sigma never falls as the batch grows."""
    setting = f"{sweep.task}, {BASES[sweep.base].label}, mini-batches"
    expected = "the best sigma does not fall as the batch grows, and is not the same for all"
    every = [sweep_ratios(sweep, results, seeds) for seeds in (None, *([s] for s in sweep.seeds))]
    if any(np.isnan(ratios).any() for ratios in every):
        return Verdict("C", setting, expected, "not measured", "unknown", ())
    joint, *each = [[sweep.sigmas[i] for i in np.argmin(ratios, axis=0)] for ratios in every]
    sizes = ", ".join("full" if s is None else f"{s}" for s in sweep.batch_sizes)
    rising = sum(_rises(sigmas) for sigmas in each)
    measured = (
        f"{', '.join(f'{s:g}' for s in joint)} for batches of {sizes} (mean over the seeds; "
        f"so in {rising} of {len(each)} seeds alone)"
    )
    outcome: Outcome = "holds" if _rises(joint) else "does not hold"
    return Verdict("C", setting, expected, measured, outcome, tuple(joint))


def _rises(sigmas: Sequence[float]) -> bool:
    steps = np.diff(sigmas)
    return bool(np.all(steps >= 0) and np.any(steps > 0))


def _joint_model(simulations: Sequence[Simulation]) -> list[Verdict]:
    """Return the verdicts on the joint model, one number for each initial displacement."""
    by_name = {s.contender.name: s for s in simulations}
    if not by_name:
        return []

    def late(name: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return by_name[name].sharpness[-1]

    def growth(name: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        sharpness = by_name[name].sharpness
        return sharpness[-1] / sharpness[len(sharpness) // 2]

    edge = late(CONSTANT) * by_name[CONSTANT].learning_rate[-1]
    above = [name for name in by_name if name.startswith("cdat-2.")]
    rows = [
        ("constant rate: rate x sharpness at the end", edge, 1.9, 2.1),
        ("Armijo: sharpness at the end over that halfway", growth("armijo"), 1.1, math.inf),
        ("sigma 1: sharpness at the end over that halfway", growth("cdat-1"), 1.1, math.inf),
        ("sigma 2: final sharpness over that of sigma 1", late("cdat-2") / late("cdat-1"), -math.inf, 0.25),
        ("sigma 2: final sharpness over that of the constant rate", late("cdat-2") / late(CONSTANT), -math.inf, 0.5),
        *((f"sigma {name[5:]}: final sharpness", late(name), -math.inf, 1e-2) for name in above),
    ]  # fmt: skip
    found = []
    for quantity, values, low, high in rows:
        check = Check("D", "", "", quantity, lambda of: math.nan, low, high)
        numbers = [float(value) for value in values]
        found.append(_verdict("D", "joint model", check.expected(), numbers, low, high))
    return found


def _final(result: Result) -> float:
    return math.inf if result.run.diverged else result.run.final_loss


def _late(result: Result) -> float:
    found = result.run.late(pl.col("sharpness"))
    return math.nan if found is None else found


def _ratio(value: float, reference: float) -> float:
    if math.isinf(reference) and math.isinf(value):
        return math.nan
    return value / reference if reference else math.inf
