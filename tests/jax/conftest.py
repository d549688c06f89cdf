"""Strict JAX settings for every test of the adapter."""

import jax
import pytest

STRICT = {"jax_enable_x64": True, "jax_numpy_rank_promotion": "raise"}


def _configure(settings):
    """Apply JAX settings and return the previous ones."""
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    return before


@pytest.fixture(autouse=True, scope="module")
def strict_jax():
    """Enable float64, and make implicit rank promotion an error."""
    before = _configure(STRICT)
    yield
    _configure(before)


@pytest.fixture(scope="module")
def quick_compilation():
    """Compile without most optimisations, for modules that spend most of their time compiling."""
    before = _configure({"jax_disable_most_optimizations": True})
    yield
    _configure(before)


@pytest.fixture(scope="module")
def debug_nans(strict_jax):
    """Make a NaN in the result of a compiled function an error, for modules that expect none."""
    before = _configure({"jax_debug_nans": True})
    yield
    _configure(before)


@pytest.fixture
def single_precision(strict_jax):
    """Disable float64, as is the default of JAX."""
    before = _configure({"jax_enable_x64": False})
    yield
    _configure(before)
