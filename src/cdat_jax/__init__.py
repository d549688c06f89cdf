"""Curvature-aware learning rates for JAX, as Optax transformations."""

import warnings as _warnings
from typing import Any as _Any

try:
    import jax as _jax
    import optax as _optax
except ImportError as error:
    msg = f'cdat_jax needs JAX and Optax ({error}); install them with: pip install "cdat[jax]"'
    raise ImportError(msg) from error

from cdat_core import __version__
from cdat_core.extend import StepInfo
from cdat_jax._accumulation import accumulate
from cdat_jax._average import AverageParamsState, average_params, averaged_params
from cdat_jax._composite import CompositeLoss
from cdat_jax._curvature import hvp, measure
from cdat_jax._make_step import make_step
from cdat_jax._preconditioner import adam_inverse_sqrt
from cdat_jax._rate import ScaleByTunerState
from cdat_jax._spaces import TreeSpace
from cdat_jax._spectrum import sharpness, spectral_density, top_eigenvalues, trace
from cdat_jax._transform import scale_by_cdat, scale_by_tuner
from cdat_jax._wrapper import TunedState, cdat, tuned

__all__ = [
    "AverageParamsState",
    "CompositeLoss",
    "ScaleByTunerState",
    "StepInfo",
    "TreeSpace",
    "TunedState",
    "__version__",
    "accumulate",
    "adam_inverse_sqrt",
    "average_params",
    "averaged_params",
    "cdat",
    "hvp",
    "make_step",
    "measure",
    "scale_by_cdat",
    "scale_by_tuner",
    "sharpness",
    "spectral_density",
    "top_eigenvalues",
    "trace",
    "tuned",
]

del _jax, _optax


def __getattr__(name: str) -> _Any:
    if name == "TunerInfo":
        msg = "cdat_jax.TunerInfo is deprecated; use cdat_jax.StepInfo"
        _warnings.warn(msg, DeprecationWarning, stacklevel=2)
        return StepInfo
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
