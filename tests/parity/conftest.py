"""Settings of the parity tests: double precision in JAX, one thread in torch."""

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
    with jax.enable_x64(True):
        yield
    torch.set_num_threads(threads)
