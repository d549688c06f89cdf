"""Contenders: the learning-rate rules that a race compares."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import array_api_compat

from cdat_core import linesearch, tuners
from cdat_core.linesearch import LineSearch
from cdat_core.tuners import Tuner
from cdat_lab.bases import Base

Rule = Tuner[Any] | LineSearch

WARMUP = 0.1
"""Fraction of the steps over which the schedules rise."""

ADAMW_WARMUP, ADAMW_DECAY = 0.05, 0.01
"""Warm-up and weight decay of AdamW as a complete optimizer; the decay is PyTorch's default."""


@dataclass(frozen=True)
class Contender:
    """A learning-rate rule with its settings, or a complete optimizer from another package.

    Attributes
    ----------
    name, label : str
        Name on the command line and in files; label in tables and figures.
    rule : callable or None
        ``rule(steps, **hyperparameters) -> Tuner or LineSearch``. The hyperparameters may be traced
        arrays, so that contenders with the same rule share a compiled function. None for an
        optimizer from another package.
    hyperparameters : mapping of str to float
        Those with fixed values.
    tuned : str or None
        The hyperparameter to tune on a grid, if any.
    curvature : str
        How the curvature is computed: "auto" or "gauss_newton".
    optimizer : str or None
        A complete optimizer that replaces base and rule: "adamw-cosine", "dog", "mechanic",
        "prodigy", "prodigy-cosine" or "schedule-free".
    reads : tuple of str
        Attributes of the base that the rule takes as further hyperparameters, such as "momentum".
    average : bool
        Whether the loss is evaluated at a running average of the weights; see
        `cdat_core.tuners.average_weight`.
    """

    name: str
    label: str
    rule: Callable[..., Rule] | None
    hyperparameters: Mapping[str, float] = field(default_factory=dict)
    tuned: str | None = None
    curvature: str = "auto"
    optimizer: str | None = None
    reads: tuple[str, ...] = ()
    average: bool = False

    def settings(self, base: Base) -> dict[str, float]:
        """Return the hyperparameters with fixed values, including those read from the base."""
        return {**self.hyperparameters, **{name: getattr(base, name) for name in self.reads}}


def constant(steps: int, learning_rate: Any) -> Rule:
    """Return a constant rate."""
    del steps
    return tuners.constant(learning_rate)


def warmup_constant(steps: int, peak: Any) -> Rule:
    """Return a rate that rises linearly over a tenth of the steps, then stays."""
    warmup = max(1, round(WARMUP * steps))

    def schedule(step: Any) -> Any:
        xp = array_api_compat.array_namespace(step)
        return peak * xp.where(step < warmup, (step + 1) / warmup, xp.ones_like(step / warmup))

    return tuners.scheduled(schedule)


def warmup_cosine(steps: int, peak: Any) -> Rule:
    """Return a rate that rises linearly over a tenth of the steps, then falls to 0 on a cosine."""
    return tuners.scheduled(lambda step: peak * cosine_factor(step, steps, WARMUP))


def cosine_factor(step: Any, steps: int, warmup: float) -> Any:
    """Return the factor of a schedule that rises linearly, then falls to 0 on a cosine.

    Parameters
    ----------
    step : array
        From 0.
    steps : int
        Length of the run.
    warmup : float
        The part of the run over which the factor rises.
    """
    xp = array_api_compat.array_namespace(step)
    first = max(1, round(warmup * steps))
    rising = (step + 1) / first
    falling = 0.5 * (1 + xp.cos(math.pi * (step + 1 - first) / max(1, steps - first)))
    return xp.where(step < first, rising, falling)


def warmup_stable_decay(steps: int, peak: Any) -> Rule:
    """Return `warmup_constant` that falls to 0 linearly over the last 30 % of the steps."""
    return tuners.with_cooldown(warmup_constant(steps, peak), steps)  # type: ignore[arg-type]


def armijo(steps: int) -> Rule:
    """Return a backtracking line search."""
    del steps
    return linesearch.backtracking()


def zoom(steps: int) -> Rule:
    """Return a search for a step that meets the strong Wolfe conditions."""
    del steps
    return linesearch.zoom()


def greedy(steps: int) -> Rule:
    """Return the minimiser of the quadratic model along the update."""
    del steps
    return tuners.quadratically_greedy()


def on_edge(steps: int) -> Rule:
    """Return the rate at which the quadratic model returns to the current loss."""
    del steps
    return tuners.on_edge()


def polyak(steps: int) -> Rule:
    """Return the Polyak step for a minimum loss of 0."""
    del steps
    return tuners.polyak(0.0)


def hypergradient(steps: int, initial_learning_rate: Any) -> Rule:
    """Return gradient descent on the rate itself."""
    del steps
    return tuners.hypergradient(initial_learning_rate=initial_learning_rate)


def cdat(steps: int, sigma: Any, decay: Any) -> Rule:
    """Return the CDAT rule, without a start rate, growth cap or upper bound."""
    del steps
    return tuners.cdat(sigma, decay)


def guarded_cdat(
    steps: int, sigma: Any, decay: Any, initial_learning_rate: Any, max_growth: Any
) -> Rule:
    """Return the CDAT rule with a start rate and a growth cap."""
    del steps
    return tuners.cdat(
        sigma, decay, initial_learning_rate=initial_learning_rate, max_growth=max_growth
    )


def self_tuning(steps: int, momentum: Any) -> Rule:
    """Return the self-tuning rule, with its cooldown at the end of the run."""
    return tuners.self_tuning(momentum, steps)


def self_tuning_open(steps: int, momentum: Any) -> Rule:
    """Return the self-tuning rule for a run of unknown length."""
    del steps
    return tuners.self_tuning(momentum)


def cdat_contender(sigma: float, decay: float) -> Contender:
    """Return CDAT with this sigma and decay of its averages."""
    memory = f"EMA {decay:g}" if decay else "no EMA"
    name = f"cdat-{sigma:.9g}" + (f"-ema-{decay:g}" if decay else "")
    return Contender(name, f"CDAT {sigma:g} ({memory})", cdat, {"sigma": sigma, "decay": decay})


def parse_cdat(name: str) -> Contender | None:
    """Return the contender for a name like ``cdat-1.5-ema-0.9``; None for other names."""
    found = re.fullmatch(r"cdat-(\d+(?:\.\d+)?)(?:-ema-(0\.\d+))?", name)
    return None if found is None else cdat_contender(float(found[1]), float(found[2] or 0.0))


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("constant", "constant rate", constant, tuned="learning_rate"),
        Contender("warmup-constant", "warm-up + constant", warmup_constant, tuned="peak"),
        Contender("warmup-cosine", "warm-up + cosine", warmup_cosine, tuned="peak"),
        Contender("wsd", "warm-up, stable, decay", warmup_stable_decay, tuned="peak"),
        Contender("self-tuning", "CDAT, self-tuning", self_tuning, reads=("momentum",)),
        Contender(
            "self-tuning-average",
            "CDAT, self-tuning, averaged",
            self_tuning_open,
            reads=("momentum",),
            average=True,
        ),
        Contender("armijo", "Armijo line search", armijo),
        Contender("zoom", "strong-Wolfe search", zoom),
        Contender("greedy", "quadratically greedy", greedy),
        Contender("on-edge", "on edge", on_edge),
        cdat_contender(1.0, 0.9),
        cdat_contender(1.9, 0.0),
        cdat_contender(1.9, 0.9),
        cdat_contender(2.0, 0.0),
        cdat_contender(2.0, 0.9),
        Contender(
            "cdat-guarded",
            "CDAT 2 (EMA 0.9), guarded",
            guarded_cdat,
            {"sigma": 2.0, "decay": 0.9, "initial_learning_rate": 1e-4, "max_growth": 1.1},
        ),
        Contender(
            "cdat-gauss-newton",
            "CDAT 2 (EMA 0.9), Gauss-Newton",
            cdat,
            {"sigma": 2.0, "decay": 0.9},
            curvature="gauss_newton",
        ),
        Contender("polyak", "Polyak step", polyak),
        Contender("hypergradient", "hypergradient", hypergradient, {"initial_learning_rate": 1e-3}),
        Contender("prodigy", "Prodigy", None, optimizer="prodigy"),
        Contender("prodigy-cosine", "Prodigy + cosine", None, optimizer="prodigy-cosine"),
        Contender(
            "schedule-free",
            "schedule-free AdamW",
            None,
            tuned="learning_rate",
            optimizer="schedule-free",
        ),
        Contender(
            "schedule-free-default",
            "schedule-free AdamW, default",
            None,
            {"learning_rate": 0.0025},
            optimizer="schedule-free",
        ),
        *(
            Contender(
                f"adamw-{peak:g}",
                f"AdamW {peak:g} + cosine",
                None,
                {"peak": peak},
                optimizer="adamw-cosine",
            )
            for peak in (0.001, 0.01)
        ),
        Contender("dog", "DoG, averaged", None, optimizer="dog", average=True),
        Contender("mechanic", "Mechanic AdamW + cosine", None, optimizer="mechanic"),
    )
}
