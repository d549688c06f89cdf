"""Curvature-aware learning rates for PyTorch: wrap any ``torch.optim`` optimizer."""

try:
    import torch as _torch
except ImportError as error:
    msg = f'cdat_torch needs PyTorch ({error}); install it with: pip install "cdat[torch]"'
    raise ImportError(msg) from error

from cdat_core import __version__
from cdat_core.extend import StepInfo
from cdat_torch.cdat import CDAT
from cdat_torch.curvature.gauss_newton import CompositeLoss
from cdat_torch.curvature.measure import hvp, measure
from cdat_torch.kernels import further_differentiable
from cdat_torch.optimizer import TunedOptimizer
from cdat_torch.spaces import TensorListSpace
from cdat_torch.spectrum.spectrum import sharpness, spectral_density, top_eigenvalues, trace

__all__ = [
    "CDAT",
    "CompositeLoss",
    "StepInfo",
    "TensorListSpace",
    "TunedOptimizer",
    "__version__",
    "further_differentiable",
    "hvp",
    "measure",
    "sharpness",
    "spectral_density",
    "top_eigenvalues",
    "trace",
]

del _torch
