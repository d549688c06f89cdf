"""The two adapters have the same public shape."""

import optax
import pytest
import torch

import cdat_core
import cdat_jax
import cdat_torch


def test_the_adapters_have_the_version_of_the_core():
    assert cdat_jax.__version__ == cdat_torch.__version__ == cdat_core.__version__


def test_the_info_of_a_step_is_the_same():
    assert cdat_jax.StepInfo is cdat_torch.StepInfo
    fields = ("value", "slope", "curvature", "sharpness", "learning_rate", "skipped", "method")
    assert cdat_jax.StepInfo._fields == fields


@pytest.mark.parametrize("name", ["auto", "hvp", "gauss_newton", "finite_difference"])
def test_the_adapters_take_the_same_curvature_methods(name):
    cdat_jax.cdat(optax.sgd(1.0), curvature=name)
    cdat_torch.CDAT(torch.optim.SGD([torch.ones(2, requires_grad=True)]), curvature=name)
