"""Learning-rate tuners: pure functions from measurements to rates.

A tuner is a pair of functions, ``init(like) -> state`` and
``update(measurement, state) -> (learning_rate, state)``, on scalars of any array framework.
"""

from cdat_core.tuners._base import RateState, Tuner, TunerState, from_rule
from cdat_core.tuners._classical import hypergradient, polyak, sharpness_edge
from cdat_core.tuners._fixed import constant, scheduled
from cdat_core.tuners._guards import GuardOptions
from cdat_core.tuners._quadratic import CDATState, cdat, gen, on_edge, quadratically_greedy

__all__ = [
    "CDATState",
    "GuardOptions",
    "RateState",
    "Tuner",
    "TunerState",
    "cdat",
    "constant",
    "from_rule",
    "gen",
    "hypergradient",
    "on_edge",
    "polyak",
    "quadratically_greedy",
    "scheduled",
    "sharpness_edge",
]
