"""The adapters state the version of the core."""

import cdat_core
import cdat_jax
import cdat_torch


def test_the_adapters_have_the_version_of_the_core():
    assert cdat_jax.__version__ == cdat_torch.__version__ == cdat_core.__version__
