"""Contenders: the rules for the learning rate that a comparison sets against each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import array_api_compat

from cdat_core import linesearch, tuners
from cdat_core.linesearch import LineSearch
from cdat_core.tuners import Tuner

Rule = Tuner[Any] | LineSearch


@dataclass(frozen=True)
class Contender:
    """A rule for the rate with its setting.

    Attributes
    ----------
    name, label : str
        For files and for people.
    rule : callable
        ``rule(steps, **hyperparameters) -> Tuner or LineSearch``. The hyperparameters may be arrays
        that are being traced, so contenders with the same rule share a compiled function.
    hyperparameters : mapping of str to float
        The fixed ones.
    tuned : str or None
        The hyperparameter to be tuned on a grid.
    """

    name: str
    label: str
    rule: Callable[..., Rule]
    hyperparameters: Mapping[str, float] = field(default_factory=dict)
    tuned: str | None = None


def constant(steps: int, learning_rate: Any) -> Rule:
    """Return a constant rate."""
    del steps
    return tuners.constant(learning_rate)


def warmup_cosine(steps: int, peak: Any) -> Rule:
    """Return a rate that rises linearly over a tenth of the steps, then falls to 0 on a cosine."""
    warmup = max(1, steps // 10)

    def schedule(step: Any) -> Any:
        xp = array_api_compat.array_namespace(step)
        rising = (step + 1) / warmup
        falling = 0.5 * (1 + xp.cos(math.pi * (step + 1 - warmup) / max(1, steps - warmup)))
        return peak * xp.where(step < warmup, rising, falling)

    return tuners.scheduled(schedule)


def armijo(steps: int) -> Rule:
    """Return a backtracking line search."""
    del steps
    return linesearch.backtracking()


def greedy(steps: int) -> Rule:
    """Return the minimiser of the quadratic model along the update."""
    del steps
    return tuners.quadratically_greedy()


def cdat(steps: int, sigma: Any, decay: Any) -> Rule:
    """Return the CDAT rule, without a start rate, growth cap or upper bound."""
    del steps
    return tuners.cdat(sigma, decay)


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("constant", "constant rate", constant, tuned="learning_rate"),
        Contender("warmup-cosine", "warm-up + cosine", warmup_cosine, tuned="peak"),
        Contender("armijo", "Armijo line search", armijo),
        Contender("greedy", "quadratically greedy", greedy),
        Contender("cdat-1.9", "CDAT 1.9 (no EMA)", cdat, {"sigma": 1.9, "decay": 0.0}),
        Contender("cdat-2.0", "CDAT 2.0 (EMA 0.9)", cdat, {"sigma": 2.0, "decay": 0.9}),
    )
}
