"""Curvature-aware learning-rate tuning for any array framework.

The core holds tuners and line searches, which see scalars, and curvature estimators, which see
opaque vectors. It needs only the array API: importing it loads no array framework.
"""

from cdat_core import dynamics, extend, linesearch, testing, tuners
from cdat_core._curvature import (
    directional_curvature,
    finite_difference_hvp,
    measure,
    preconditioned,
)
from cdat_core._density import SpectralDensity, spectral_density
from cdat_core._eigenvalues import (
    PowerIterationState,
    TopEigenvalues,
    power_iteration,
    top_eigenvalues,
)
from cdat_core._krylov import LanczosResult, lanczos
from cdat_core._spaces import ArraySpace, TupleSpace
from cdat_core._trace import TraceEstimate, hutchinson_trace, hutchpp_trace
from cdat_core._types import HessianVectorProduct, InnerProductSpace, Measurement
from cdat_core._version import __version__

__all__ = [
    "ArraySpace",
    "HessianVectorProduct",
    "InnerProductSpace",
    "LanczosResult",
    "Measurement",
    "PowerIterationState",
    "SpectralDensity",
    "TopEigenvalues",
    "TraceEstimate",
    "TupleSpace",
    "__version__",
    "directional_curvature",
    "dynamics",
    "extend",
    "finite_difference_hvp",
    "hutchinson_trace",
    "hutchpp_trace",
    "lanczos",
    "linesearch",
    "measure",
    "power_iteration",
    "preconditioned",
    "spectral_density",
    "testing",
    "top_eigenvalues",
    "tuners",
]
