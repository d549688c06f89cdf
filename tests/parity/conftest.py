"""Settings of the parity tests: JAX in double precision, quick to compile; torch on one thread."""

import sys
from pathlib import Path

import jax
import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # the helper modules, whatever pytest's import mode


@pytest.fixture(scope="module", autouse=True)
def _settings():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    optimizations_off = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)  # time goes into compilation
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", optimizations_off)
    torch.set_num_threads(threads)
