"""What authors of tuners and of adapters import; everything here is public.

A tuner needs the helpers on scalars and `validation`; `cdat_core.tuners.from_rule` puts the rest
around it. An adapter needs `StepInfo`, and the pieces of the estimators that a framework may want
to drive with its own control flow.
"""

from cdat_core import _validation as validation
from cdat_core._arrays import cast, counter, filled, increment, namespace, safe_reciprocal
from cdat_core._curvature import displacement
from cdat_core._krylov import LanczosState, lanczos_start, lanczos_step
from cdat_core._step_info import StepInfo

__all__ = [
    "LanczosState",
    "StepInfo",
    "cast",
    "counter",
    "displacement",
    "filled",
    "increment",
    "lanczos_start",
    "lanczos_step",
    "namespace",
    "safe_reciprocal",
    "validation",
]
