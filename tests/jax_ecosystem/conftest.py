"""Four devices of the host and float64 for every test of this folder."""

import os

# XLA runs the devices of a host on a pool of threads, as many as cores; where those are fewer than
# programs in flight, each waiting for the others in a collective, it would hang.
os.environ["NPROC"] = "16"

import jax
import pytest
from jax.sharding import AxisType

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)  # time goes into compilation


@pytest.fixture
def mesh():
    """Four devices in a row, the axis "data"."""
    return jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
