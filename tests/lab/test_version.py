"""The laboratory states the version of the core."""

import cdat_core
import cdat_lab


def test_the_laboratory_has_the_version_of_the_core() -> None:
    assert cdat_lab.__version__ == cdat_core.__version__
