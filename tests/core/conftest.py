"""The namespaces and dtypes that the core is tested under.

The fixtures have session scope because Hypothesis runs many examples in one test call.
"""

import array_api_strict
import numpy as np
import pytest


@pytest.fixture(params=[np, array_api_strict], ids=["numpy", "strict"], scope="session")
def xp(request):
    """An array namespace."""
    return request.param


@pytest.fixture(params=["float32", "float64"], scope="session")
def dtype(request, xp):
    """A real floating dtype of `xp`."""
    return getattr(xp, request.param)


@pytest.fixture(scope="session")
def scalar(xp, dtype):
    """Make a 0-d array of `xp` and `dtype`."""
    return lambda value: xp.asarray(value, dtype=dtype)


@pytest.fixture(scope="session")
def eps(xp, dtype):
    """The machine epsilon of `dtype`."""
    return float(xp.finfo(dtype).eps)
