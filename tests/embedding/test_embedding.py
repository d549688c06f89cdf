"""The examples of docs/embedding: each passes the conformance kit and trains its model."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from cdat_core import ArraySpace, power_iteration, top_eigenvalues, tuners
from cdat_core.testing import check_hvp, check_oracle, check_space, check_tuner

FOLDER = Path(__file__).parents[2] / "docs" / "embedding"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))
STEPS = {"tinygrad_tensors": 30}  # without a compiler tinygrad runs its interpreter


class EagerSpace(ArraySpace):
    """Dask has no eigh: the scalars of estimators that need it are computed."""

    def vdot(self, x, y):
        return np.asarray(super().vdot(x, y))


@pytest.fixture(params=EXAMPLES, scope="module")
def example(request):
    """An example as a module."""
    # tinygrad looks for a C compiler or a GPU; its interpreter needs neither.
    os.environ.setdefault("DEV", "PYTHON")
    spec = importlib.util.spec_from_file_location(request.param, FOLDER / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vectors(example):
    return [example.random_parameters(seed) for seed in range(3)]


def test_there_is_an_example_for_each_framework():
    assert EXAMPLES == ["dask_arrays", "hips_autograd", "mlx_arrays", "tinygrad_tensors"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_has_at_most_60_lines(name):
    assert len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60


def test_the_space_passes_the_kit(example, vectors):
    check_space(example.space, vectors)


def test_the_product_passes_the_kit(example, vectors):
    hvp = example.hvp_at(example.random_parameters(7))
    check_hvp(hvp, vectors[:2], space=example.space)


def test_the_oracle_passes_the_kit(example, vectors):
    def value_fn(params):
        value = example.loss(params)
        return float(value.item() if hasattr(value, "item") else value)

    functions = value_fn, example.gradient, example.hvp_at
    check_oracle(*functions, vectors[0], vectors[1], space=example.space)


@pytest.mark.parametrize("tuner", [tuners.cdat(), tuners.polyak()], ids=["cdat", "polyak"])
def test_the_tuners_pass_the_kit_on_its_scalars(example, vectors, tuner):
    check_tuner(tuner, 0 * example.space.vdot(vectors[0], vectors[1]))


def test_estimators_run_on_its_vectors(example, vectors):
    """The residual bounds the distance to an eigenvalue, so it says that one was found."""
    hvp = example.hvp_at(example.random_parameters(7))
    space = EagerSpace() if example.__name__ == "dask_arrays" else example.space
    top = top_eigenvalues(hvp, vectors[0], num_matvecs=8, space=space)
    assert float(top.residual_norms[0]) < 0.05 * float(top.values[0])
    again = power_iteration(hvp, top.vectors[0], num_matvecs=1, space=space)
    assert float(again.eigenvalue) == pytest.approx(float(top.values[0]), rel=1e-3)


def test_the_model_trains(example):
    steps = STEPS.get(example.__name__, 100)
    losses = example.train(example.random_parameters(0), steps)
    assert len(losses) == steps
    assert np.all(np.isfinite(losses))
    assert losses[-1] < 0.5 * losses[0]
