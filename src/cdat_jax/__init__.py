"""Curvature-aware learning rates for JAX, as Optax transformations."""

try:
    import jax as _jax
    import optax as _optax
except ImportError as error:
    msg = f'cdat_jax needs JAX and Optax ({error}); install them with: pip install "cdat[jax]"'
    raise ImportError(msg) from error

from cdat_jax.accumulation import accumulate
from cdat_jax.composite import CompositeLoss
from cdat_jax.curvature import hvp, measure
from cdat_jax.preconditioner import adam_inverse_sqrt
from cdat_jax.spaces import TreeSpace
from cdat_jax.spectrum import sharpness, spectral_density, top_eigenvalues, trace
from cdat_jax.transform import ScaleByTunerState, TunerInfo, scale_by_cdat, scale_by_tuner
from cdat_jax.wrapper import CDATState, TunedState, cdat, tuned

__all__ = [
    "CDATState",
    "CompositeLoss",
    "ScaleByTunerState",
    "TreeSpace",
    "TunedState",
    "TunerInfo",
    "accumulate",
    "adam_inverse_sqrt",
    "cdat",
    "hvp",
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
