"""What importing the core loads, and what it exports."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import cdat_core

FRAMEWORKS = {"jax", "numpy", "optax", "scipy", "torch"}


def loaded_by(statement):
    """Return the frameworks that a fresh interpreter has imported after `statement`."""
    script = f"import sys\n{statement}\nprint(*({FRAMEWORKS!r} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_import_loads_no_array_framework():
    assert loaded_by("import cdat_core, cdat_core.tuners, cdat_core.linesearch") == set()


def test_scipy_bridge_loads_no_other_framework():
    """Also shows that the probe sees a framework when one is loaded."""
    assert loaded_by("import cdat_core.scipy") == {"numpy", "scipy"}


def modules(package):
    """Yield the modules below a package by name, without those marked as internal."""
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if not found.name.rpartition(".")[2].startswith("_"):
            module = importlib.import_module(found.name)
            yield found.name, module
            if found.ispkg:
                yield from modules(module)


PUBLIC = {"cdat_core": cdat_core, **dict(modules(cdat_core))}


def test_public_modules_are_those_meant_to_be():
    assert PUBLIC.keys() == {
        "cdat_core",
        "cdat_core.dynamics",
        "cdat_core.extend",
        "cdat_core.extend.validation",
        "cdat_core.linesearch",
        "cdat_core.scipy",
        "cdat_core.testing",
        "cdat_core.tuners",
    }


@pytest.mark.parametrize("name", PUBLIC)
def test_all_is_sorted_and_resolves(name):
    module = PUBLIC[name]
    assert module.__all__ == sorted(set(module.__all__))
    assert [public for public in module.__all__ if not hasattr(module, public)] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_without_an_underscore_is_listed(name):
    """Only submodules are reached without being listed, once they are imported."""
    module = PUBLIC[name]
    defined = {
        public
        for public, value in vars(module).items()
        if not public.startswith("_") and getattr(value, "__module__", "").startswith("cdat_core")
    }
    assert defined <= {*module.__all__}


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_listed_is_documented(name):
    module = PUBLIC[name]
    assert module.__doc__
    assert [public for public in module.__all__ if not getattr(module, public).__doc__] == []
