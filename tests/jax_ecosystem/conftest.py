"""Four host devices and float64 for every test of this folder."""

import os

# XLA runs host devices on a pool with one thread per core. With fewer threads than programs in
# flight, which wait for each other in a collective, it would hang.
os.environ["NPROC"] = "16"

import jax
import pytest
from jax.sharding import AxisType

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)  # most of the time is spent compiling


@pytest.fixture
def mesh():
    """Four devices in a row, the axis "data"."""
    return jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
