"""The joint model of rate and sharpness is the same in every backend, and under ``lax.scan``."""

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cdat_core import dynamics, linesearch, tuners

RULES = {
    "cdat": tuners.cdat(1.5),
    "cdat-no-memory": tuners.cdat(1.5, decay=0.0),
    "constant": tuners.constant(0.5),
    "backtracking": linesearch.backtracking(),
}
STEPS = 100
SHARPNESS = [0.5, 1.0, 3.0]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("asarray", [array_api_strict.asarray, jnp.asarray, torch.asarray])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_backends_agree(rule, asarray):
    """Up to the order of the roundings; sigma 1.5 does not amplify them in 100 steps."""
    dtype = {"torch": torch.float64, "array_api_strict": array_api_strict.float64}.get(
        asarray.__module__.split(".")[0], jnp.float64
    )
    expected = dynamics.simulate(rule, steps=STEPS, sharpness=np.asarray(SHARPNESS))
    found = dynamics.simulate(rule, steps=STEPS, sharpness=asarray(SHARPNESS, dtype=dtype))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-9, atol=1e-12)


def test_a_scan_over_its_parts_equals_simulate():
    tuner, model = tuners.cdat(1.5), dynamics.JointModel()

    @jax.jit
    def run(sharpness):
        def step(carry, _):
            state, tuner_state = carry
            rate, tuner_state = tuner.update(model.measure(state), tuner_state)
            return (model.advance(state, rate), tuner_state), (state.sharpness, rate)

        start = dynamics.ModelState(
            jnp.full_like(sharpness, 1e-3), sharpness, jnp.zeros_like(sharpness, dtype=jnp.int32)
        )
        return jax.lax.scan(step, (start, tuner.init(sharpness)), length=STEPS)[1]

    sharpness, rates = run(jnp.asarray(SHARPNESS))
    expected = dynamics.simulate(tuner, steps=STEPS, sharpness=np.asarray(SHARPNESS))
    np.testing.assert_allclose(sharpness, expected.sharpness[:-1], rtol=1e-9)
    np.testing.assert_allclose(rates, expected.learning_rate, rtol=1e-9)
