"""Learning-rate tuners: pure functions from measurements to rates.

A tuner is a pair of functions, ``init(like) -> state`` and
``update(measurement, state) -> (learning_rate, state)``, on scalars of any array framework. It may
also say in which steps it wants to be measured, and observe the loss of the others.
"""

from cdat_core.tuners._base import RateState, Tuner, TunerState, every, from_rule
from cdat_core.tuners._classical import hypergradient, polyak, sharpness_edge
from cdat_core.tuners._cooldown import CooldownState, average_weight, with_cooldown
from cdat_core.tuners._fixed import constant, scheduled
from cdat_core.tuners._guards import GuardOptions
from cdat_core.tuners._quadratic import (
    CDATState,
    cdat,
    full_batch,
    gen,
    on_edge,
    quadratically_greedy,
)
from cdat_core.tuners._self_tuning import SelfTuningState, self_tuning

__all__ = [
    "CDATState",
    "CooldownState",
    "GuardOptions",
    "RateState",
    "SelfTuningState",
    "Tuner",
    "TunerState",
    "average_weight",
    "cdat",
    "constant",
    "every",
    "from_rule",
    "full_batch",
    "gen",
    "hypergradient",
    "on_edge",
    "polyak",
    "quadratically_greedy",
    "scheduled",
    "self_tuning",
    "sharpness_edge",
    "with_cooldown",
]
