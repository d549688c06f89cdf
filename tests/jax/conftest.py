"""Strict JAX settings for every test of the adapter."""

import jax
import pytest

STRICT = {"jax_enable_x64": True, "jax_numpy_rank_promotion": "raise"}


def _configure(settings):
    """Apply JAX settings and return what they were before."""
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    return before


@pytest.fixture(autouse=True, scope="module")
def strict_jax():
    """Float64 is available, and an operation that would silently broadcast ranks is an error."""
    before = _configure(STRICT)
    yield
    _configure(before)


@pytest.fixture(scope="module")
def quick_compilation():
    """Compile without most optimisations, for modules whose time is spent compiling."""
    before = _configure({"jax_disable_most_optimizations": True})
    yield
    _configure(before)


@pytest.fixture(scope="module")
def debug_nans(strict_jax):
    """A NaN among what a compiled function returns is an error, for modules that expect none."""
    before = _configure({"jax_debug_nans": True})
    yield
    _configure(before)


@pytest.fixture
def single_precision(strict_jax):
    """JAX as it comes: without float64."""
    before = _configure({"jax_enable_x64": False})
    yield
    _configure(before)
