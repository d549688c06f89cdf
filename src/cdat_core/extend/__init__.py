"""What authors of tuners, line searches and adapters import.

A tuner is a rule inside `cdat_core.tuners.from_rule`, which checks the input, skips measurements
that are not finite and keeps dtypes. Rules and line searches use the helpers on scalars below;
`cdat_core.extend.validation` checks hyperparameters, and `cdat_core.extend.Guards` limits the rate.

An adapter asks ``Tuner.measures`` whether to measure in a step. If so it calls ``Tuner.update``, if
not `cdat_core.extend.observe_or_hold`. It reports each step as a `cdat_core.extend.StepInfo`. To
drive an estimator with its own loop, it calls `cdat_core.extend.displacement` and the functions of
the Lanczos process.

The helpers on scalars take the namespace from their arguments, never branch on a value and work
elementwise: an array of any shape is a batch of scalars.
"""

from cdat_core._arrays import (
    cast,
    counter,
    filled,
    increment,
    namespace,
    require_floating,
    safe_reciprocal,
)
from cdat_core._curvature import displacement
from cdat_core._krylov import LanczosState, lanczos_start, lanczos_step
from cdat_core._step_info import StepInfo
from cdat_core.extend import validation
from cdat_core.tuners._base import observe_or_hold
from cdat_core.tuners._guards import Guards, name_guards

__all__ = [
    "Guards",
    "LanczosState",
    "StepInfo",
    "cast",
    "counter",
    "displacement",
    "filled",
    "increment",
    "lanczos_start",
    "lanczos_step",
    "name_guards",
    "namespace",
    "observe_or_hold",
    "require_floating",
    "safe_reciprocal",
    "validation",
]
