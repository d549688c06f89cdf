"""The claims of the paper, the settings they are tested in, and the verdicts.

A check measures one number for each seed and states in advance the range that the claim requires.
The ranges come from a pilot study with other seeds; they are not adjusted to the results.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cdat_lab.measures import (
    REFERENCE,
    final_loss,
    rate_times_sharpness,
    sharpness,
    sweep_ratios,
)
from cdat_lab.model import Simulation
from cdat_lab.races import Race, Result, Results
from cdat_lab.registry import find_base, find_contender
from cdat_lab.studies import Study, Sweep

Outcome = Literal["holds", "in part", "does not hold", "unknown"]

ARMIJO, GREEDY, CONSTANT = "armijo", "greedy", REFERENCE
CDAT_19, CDAT_2, CDAT_21 = "cdat-1.9", "cdat-2-ema-0.9", "cdat-2.1-ema-0.9"

STATEMENTS = {
    "A": "Full batch: greedy rules, which do best at each single step, lose to a tuned constant "
    "rate because the sharpness keeps growing.",
    "B": "Full batch: CDAT with sigma near 2 beats a tuned constant rate and stays at the edge of "
    "stability.",
    "C": "Mini-batches: the best sigma falls as the batch shrinks.",
    "D": "A joint model of rate and sharpness shows why.",
}


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim in one setting.

    Attributes
    ----------
    claim : str
        Its letter.
    setting : str
        Task, base optimizer, batch.
    expected : str
        What the claim requires in this setting, with the range.
    measured : str
        The median over the seeds, with the lowest and the highest.
    outcome : str
        "holds" if every seed is in the range, "in part" if some are, "does not hold" if none is,
        "unknown" if nothing was measured or the reference diverged.
    values : tuple of float
        The measured number for each seed.
    """

    claim: str
    setting: str
    expected: str
    measured: str
    outcome: Outcome
    values: tuple[float, ...]


@dataclass(frozen=True)
class Check:
    """One number to measure for each seed of a race, and the range that the claim requires.

    Attributes
    ----------
    claim : str
        Its letter.
    task, base : str
        Of the race, which uses the full batch.
    contender : str
        The contender to measure.
    quantity : str
        What is measured, in words.
    measure : callable
        ``measure(result, reference) -> number``; None if the reference diverged.
    low, high : float
        The range, ends included.
    reference : str
        The contender to compare with.
    """

    claim: str
    task: str
    base: str
    contender: str
    quantity: str
    measure: Callable[[Result, Result], float | None]
    low: float = -math.inf
    high: float = math.inf
    reference: str = CONSTANT

    def applies(self, race: Race) -> bool:
        """Return whether this check applies to a race."""
        place = (self.task, self.base)
        here = (race.task, race.base, race.batch_size) == (*place, None)
        return (
            here
            and race.steps == STEPS[place]
            and {self.contender, self.reference} <= set(race.contenders)
        )

    def expected(self) -> str:
        """Return the quantity with its required range."""
        label = find_contender(self.contender).label
        return f"{label}: {in_range(self.quantity, self.low, self.high)}"


def in_range(quantity: str, low: float, high: float) -> str:
    """Return a quantity with its required range."""
    if math.isinf(high):
        return f"{quantity} at least {low:g}"
    if math.isinf(low):
        return f"{quantity} at most {high:g}"
    return f"{quantity} from {low:.3g} to {high:.3g}"


def loss_ratio(result: Result, reference: Result) -> float | None:
    """Return the ratio of the final losses; infinity if the first diverged, None if the second."""
    return _ratio(final_loss(result), final_loss(reference))


def sharpness_ratio(result: Result, reference: Result) -> float | None:
    """Return the ratio of the late sharpnesses; None if the second run has none."""
    return _ratio(_number(sharpness(result)), _number(sharpness(reference)))


def product(result: Result, reference: Result) -> float:
    """Return the late rate times sharpness."""
    del reference
    return _number(rate_times_sharpness(result))


LOSS = "loss relative to the tuned constant"
SHARPNESS = "final sharpness relative to CDAT 2"
PRODUCT = "rate x sharpness"

STEPS = {
    ("teacher-student", "gd"): 3000,
    ("teacher-student", "rmsprop"): 1000,
    ("digits", "adam"): 600,
    ("digits", "momentum"): 800,
}
"""The run length that the ranges apply to."""

CHECKS = (
    Check("A", "teacher-student", "gd", ARMIJO, LOSS, loss_ratio, 3),
    Check("A", "teacher-student", "gd", GREEDY, LOSS, loss_ratio, 3),
    Check("A", "teacher-student", "gd", ARMIJO, SHARPNESS, sharpness_ratio, 4, reference=CDAT_2),
    Check("A", "teacher-student", "gd", GREEDY, SHARPNESS, sharpness_ratio, 4, reference=CDAT_2),
    Check("A", "teacher-student", "rmsprop", GREEDY, LOSS, loss_ratio, 5),
    Check("A", "digits", "adam", GREEDY, LOSS, loss_ratio, 1),
    Check("A", "digits", "momentum", GREEDY, LOSS, loss_ratio, 1),
    Check("B", "teacher-student", "rmsprop", CDAT_2, LOSS, loss_ratio, high=0.5),
    Check("B", "teacher-student", "rmsprop", CDAT_21, LOSS, loss_ratio, high=0.5),
    Check("B", "teacher-student", "gd", CDAT_2, LOSS, loss_ratio, high=1),
    Check("B", "digits", "adam", CDAT_19, LOSS, loss_ratio, high=0.65),
    Check("B", "digits", "momentum", CDAT_19, LOSS, loss_ratio, high=0.65),
    Check("B", "digits", "adam", CDAT_2, LOSS, loss_ratio, high=1),
    Check("B", "digits", "momentum", CDAT_2, LOSS, loss_ratio, high=1),
    Check("B", "digits", "adam", CDAT_2, PRODUCT, product, 0.9 * 38, 1.1 * 38),
    Check("B", "digits", "momentum", CDAT_2, PRODUCT, product, 3.61, 3.99),
)
"""In the order of the claims; the ranges come from a pilot study with other seeds.

The edge of stability is at 38 for Adam and at 3.8 for the heavy ball.
"""


def verdicts(
    study: Study, results: Results, simulations: Sequence[Simulation] = ()
) -> tuple[Verdict, ...]:
    """Return the verdicts on the claims of a study.

    Parameters
    ----------
    study : Study
        Its claims, races and sweeps.
    results : mapping of Key to Result
        The results of the races and sweeps.
    simulations : sequence of Simulation
        Runs of the joint model, one for each rule.

    Returns
    -------
    tuple of Verdict
        In the order of the claims.
    """
    several = len({race.backend for race in study.races}) > 1
    found = [
        _checked(check, race, results, f", {race.backend}" if several else "")
        for check in CHECKS
        for race in study.races
        if check.applies(race)
    ]
    found += [_best_sigma(sweep, results) for sweep in study.sweeps]
    found += _joint_model(simulations)
    return tuple(v for v in sorted(found, key=lambda v: v.claim) if v.claim in study.claims)


def _checked(check: Check, race: Race, results: Results, where: str) -> Verdict:
    values = []
    for seed in race.seeds:
        result, reference = (
            results.get(race.key(name, seed)) for name in (check.contender, check.reference)
        )
        if result is not None and reference is not None:  # missing if interrupted
            number = check.measure(result, reference)
            if number is not None:
                values.append(number)
    setting = f"{race.task}, {find_base(race.base).label}, full batch{where}"
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
        text += f" ({min(values):.3g} to {max(values):.3g}, {len(values)} runs)"
    return text


def _best_sigma(sweep: Sweep, results: Results) -> Verdict:
    """Say whether the best sigma never falls as the batch grows."""
    setting = f"{sweep.task}, {find_base(sweep.base).label}, mini-batches"
    expected = "the best sigma does not fall as the batch grows, and is not the same for all sizes"
    every = [sweep_ratios(sweep, results, seeds) for seeds in (None, *([s] for s in sweep.seeds))]
    if any(np.isnan(ratios).any() for ratios in every):
        return Verdict("C", setting, expected, "not measured", "unknown", ())
    joint, *each = [[sweep.sigmas[i] for i in np.argmin(ratios, axis=0)] for ratios in every]
    sizes = ", ".join("full" if s is None else f"{s}" for s in sweep.batch_sizes)
    rising = sum(_rises(sigmas) for sigmas in each)
    measured = (
        f"{', '.join(f'{s:g}' for s in joint)} for batches of {sizes} (mean over the seeds; "
        f"holds for {rising} of {len(each)} seeds alone)"
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

    def late(name: str) -> NDArray[np.float64]:
        last: NDArray[np.float64] = by_name[name].sharpness[-1]
        return last

    def growth(name: str) -> NDArray[np.float64]:
        halfway: NDArray[np.float64] = by_name[name].sharpness[by_name[name].steps // 2]
        return late(name) / halfway

    edge = late(CONSTANT) * by_name[CONSTANT].learning_rate[-1]
    above = [name for name in by_name if name.startswith("cdat-2.")]
    over_constant, over_greedy = late("cdat-2") / late(CONSTANT), late("cdat-2") / late("cdat-1")
    none = math.inf
    rows = [
        ("constant rate: final rate x sharpness", edge, 1.9, 2.1),
        ("Armijo: final sharpness relative to halfway", growth("armijo"), 1.1, none),
        ("sigma 1: final sharpness relative to halfway", growth("cdat-1"), 1.1, none),
        ("sigma 2: final sharpness relative to sigma 1", over_greedy, -none, 0.25),
        ("sigma 2: final sharpness relative to the constant rate", over_constant, -none, 0.5),
        ("sigma 2: final sharpness (no collapse)", late("cdat-2"), 1e-2, none),
    ]
    rows += [
        (f"sigma {name[5:]}: final sharpness (collapse)", late(name), -none, 1e-2) for name in above
    ]
    found = []
    for quantity, values, low, high in rows:
        numbers = [float(value) for value in values]
        expected = in_range(quantity, low, high)
        found.append(_verdict("D", "joint model", expected, numbers, low, high))
    return found


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _ratio(value: float, reference: float) -> float | None:
    if not math.isfinite(reference):
        return None
    return value / reference if reference else math.inf
