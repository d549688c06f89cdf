"""Learning-rate tuners: pure rules from measurements to rates.

A tuner is a pair of functions, ``init(like) -> state`` and
``update(measurement, state) -> (learning_rate, state)``, on scalars of any array framework.
"""

from cdat_core.tuners._base import Tuner, TunerState, from_rule
from cdat_core.tuners._fixed import ScheduledState, constant, scheduled
from cdat_core.tuners._quadratic import CDATState, cdat, on_edge, quadratically_greedy

__all__ = [
    "CDATState",
    "ScheduledState",
    "Tuner",
    "TunerState",
    "cdat",
    "constant",
    "from_rule",
    "on_edge",
    "quadratically_greedy",
    "scheduled",
]
