"""Bridges to SciPy: tuners as methods of `scipy.optimize.minimize`, and linear operators.

The direction of a minimisation is steepest descent; the tuner or line search chooses the length of
the step. This is the only part of the core that imports numpy and scipy.
"""

from cdat_core.scipy._minimize import minimize, tuned
from cdat_core.scipy._operator import as_linear_operator, from_linear_operator

__all__ = ["as_linear_operator", "from_linear_operator", "minimize", "tuned"]
