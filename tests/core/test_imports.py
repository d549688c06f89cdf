"""What importing the core loads, and what it exports."""

import importlib
import subprocess
import sys

import pytest

FRAMEWORKS = {"jax", "numpy", "optax", "scipy", "torch"}


def loaded_by(statement):
    """Return which frameworks a fresh interpreter holds after `statement`."""
    script = f"import sys\n{statement}\nprint(*({FRAMEWORKS!r} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_import_loads_no_array_framework():
    assert loaded_by("import cdat_core, cdat_core.tuners, cdat_core.linesearch") == set()


def test_scipy_bridge_loads_no_other_framework():
    """Also shows that the probe sees a framework when one is loaded."""
    assert loaded_by("import cdat_core.scipy") == {"numpy", "scipy"}


@pytest.mark.parametrize("name", ["cdat_core", "cdat_core.tuners", "cdat_core.linesearch"])
def test_all_is_sorted_and_resolves(name):
    module = importlib.import_module(name)
    assert module.__all__ == sorted(set(module.__all__))
    assert [public for public in module.__all__ if not hasattr(module, public)] == []
