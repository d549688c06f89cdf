"""Curvature-aware learning-rate tuning for any array framework.

The core holds update rules (`tuners`, `linesearch`) on scalars and curvature estimators on opaque
vectors. It needs nothing but the array API: importing it loads no array framework.
"""

from cdat_core import linesearch, tuners
from cdat_core._types import HessianVectorProduct, InnerProductSpace, Measurement
from cdat_core.curvature import directional_curvature, finite_difference_hvp, measure
from cdat_core.eigenvalues import PowerIterationState, power_iteration
from cdat_core.spaces import ArraySpace, TupleSpace

__all__ = [
    "ArraySpace",
    "HessianVectorProduct",
    "InnerProductSpace",
    "Measurement",
    "PowerIterationState",
    "TupleSpace",
    "directional_curvature",
    "finite_difference_hvp",
    "linesearch",
    "measure",
    "power_iteration",
    "tuners",
]
