"""The rules under the transformations of JAX, and on torch tensors that have no values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax

from cdat_core import (
    ArraySpace,
    Measurement,
    finite_difference_hvp,
    linesearch,
    measure,
    power_iteration,
    tuners,
)

GUARDS = {"initial_learning_rate": 1e-2, "max_growth": 1.1, "max_learning_rate": 1.0}
TUNERS = {
    "cdat": tuners.cdat(),
    "cdat-eps": tuners.cdat(eps=0.1),
    "guarded": tuners.cdat(**GUARDS),
    "greedy": tuners.quadratically_greedy(),
    "on-edge": tuners.on_edge(),
    "gen": tuners.gen(),
    "polyak": tuners.polyak(),
    "hypergradient": tuners.hypergradient(),
    "sharpness-edge": tuners.sharpness_edge(**GUARDS),
    "constant": tuners.constant(0.1),
    "scheduled": tuners.scheduled(lambda step: 0.1 / (1 + step)),
}

STEPS = 12
# Slopes and curvatures with an ascent, a zero, a negative, and two that are not finite.
_rng = np.random.default_rng(0)
SLOPES = -_rng.exponential(size=STEPS)
CURVATURES = _rng.exponential(size=STEPS)
SLOPES[4], SLOPES[7] = 0.5, np.nan
CURVATURES[2], CURVATURES[5], CURVATURES[9] = 0.0, -0.7, np.inf


def history(dtype):
    slopes, curvatures = jnp.asarray(SLOPES, dtype), jnp.asarray(CURVATURES, dtype)
    return Measurement(jnp.ones(STEPS, dtype), slopes, curvatures, jnp.abs(curvatures))


def loop(tuner, measurements):
    """Run a Python loop of compiled updates; return the rates and the last state."""
    update = jax.jit(tuner.update)
    state, rates = tuner.init(jnp.zeros((), measurements.slope.dtype)), []
    for step in range(STEPS):
        rate, state = update(
            Measurement(*(None if field is None else field[step] for field in measurements)), state
        )
        rates.append(rate)
    return jnp.stack(rates), state


def scan(tuner, measurements):
    """Run the same in ``lax.scan``."""

    def body(state, measurement):
        rate, state = tuner.update(measurement, state)
        return state, rate

    start = tuner.init(jnp.zeros((), measurements.slope.dtype))
    state, rates = lax.scan(body, start, measurements)
    return rates, state


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("tuner", TUNERS.values(), ids=TUNERS)
def test_scan_equals_the_loop(tuner, dtype):
    """Up to what the compiler may fuse differently."""
    (rates, state), (expected, expected_state) = (
        scan(tuner, history(dtype)),
        loop(tuner, history(dtype)),
    )
    rtol = 16 * np.finfo(dtype).eps
    assert rates.dtype == dtype
    assert np.count_nonzero(expected) >= 8
    np.testing.assert_allclose(rates, expected, rtol=rtol)
    np.testing.assert_array_equal(rates == 0, expected == 0)
    np.testing.assert_allclose(state, expected_state, rtol=rtol)
    assert int(state.skipped) == int(expected_state.skipped) == 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_vmap_over_hyperparameters_equals_the_loop(dtype):
    sigmas, decays = jnp.asarray([0.5, 1.0, 2.0], dtype), jnp.asarray([0.0, 0.5, 0.9], dtype)

    @jax.jit
    @jax.vmap
    def rates_of(sigma, decay):
        return scan(tuners.cdat(sigma, decay, **GUARDS), history(dtype))[0]

    rates = rates_of(sigmas, decays)
    assert rates.shape == (3, STEPS)
    for row, sigma, decay in zip(rates, sigmas, decays, strict=True):
        expected, _ = loop(tuners.cdat(float(sigma), float(decay), **GUARDS), history(dtype))
        # A traced decay is rounded to the dtype before 1 - decay is taken.
        np.testing.assert_allclose(row, expected, rtol=64 * np.finfo(dtype).eps)


def test_vmap_over_measurements_equals_the_loop():
    tuner = tuners.cdat(1.5, 0.5)
    batch = Measurement(None, jnp.asarray(SLOPES), jnp.asarray(CURVATURES))
    state = tuner.init(jnp.zeros(()))
    rates, states = jax.vmap(tuner.update, in_axes=(0, None))(batch, state)
    for step in range(STEPS):
        rate, after = tuner.update(
            Measurement(None, batch.slope[step], batch.curvature[step]), state
        )
        np.testing.assert_allclose(rates[step], rate, rtol=1e-15)
        assert int(states.skipped[step]) == int(after.skipped)


def loss_along(eta, stiffness):
    return 0.5 * stiffness * eta**2 - eta


@pytest.mark.parametrize("stiffness", [0.1, 3.0, 40.0])
def test_line_search_in_a_while_loop_equals_the_loop(stiffness):
    search = linesearch.backtracking(initial_step_size=4.0)
    start = Measurement(jnp.asarray(0.0), jnp.asarray(-1.0), None)
    state = search.init(start, jnp.asarray(0.0))
    while not state.done:
        state = search.tell(state, loss_along(state.step_size, stiffness))

    @jax.jit
    def compiled(stiffness):
        return lax.while_loop(
            lambda s: ~s.done,
            lambda s: search.tell(s, loss_along(s.step_size, stiffness)),
            search.init(start, jnp.asarray(0.0)),
        )

    found = compiled(stiffness)
    assert not found.failed
    assert int(found.trials) == int(state.trials)
    np.testing.assert_allclose(found, state, rtol=1e-14)


def test_line_search_in_a_vmapped_scan_keeps_those_that_are_done():
    """A fixed number of tells for a batch of searches that end at different times."""
    search = linesearch.backtracking(initial_step_size=4.0)
    stiffness = jnp.asarray([0.1, 3.0, 40.0])

    def run(stiffness):
        start = search.init(
            Measurement(jnp.asarray(0.0), jnp.asarray(-1.0), None), jnp.asarray(0.0)
        )
        return lax.scan(
            lambda s, _: (search.tell(s, loss_along(s.step_size, stiffness)), None),
            start,
            length=50,
        )[0]

    states = jax.jit(jax.vmap(run))(stiffness)
    assert bool(jnp.all(states.done & ~states.failed))
    assert len(set(np.asarray(states.trials).tolist())) == 3
    for index, value in enumerate(stiffness):
        state = search.init(
            Measurement(jnp.asarray(0.0), jnp.asarray(-1.0), None), jnp.asarray(0.0)
        )
        while not state.done:
            state = search.tell(state, loss_along(state.step_size, value))
        np.testing.assert_allclose([field[index] for field in states], state, rtol=1e-14)


# A meta tensor has a shape and a dtype but no value: whatever asks for one raises. On a GPU such a
# question would stop the host until the device has answered.


def meta(dtype=torch.float32, shape=()):
    return torch.zeros(shape, dtype=dtype, device="meta")


def test_meta_tensors_refuse_to_be_asked():
    with pytest.raises(RuntimeError):
        bool(meta())


def on_meta(fields):
    leaves = jax.tree.leaves(fields)  # the bracket of a zoom is a tuple of its own
    return [(leaf.device.type, leaf.dtype, tuple(leaf.shape)) for leaf in leaves]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tuner", TUNERS.values(), ids=TUNERS)
def test_update_does_not_synchronise(tuner, dtype):
    state = tuner.init(meta(dtype))
    before = on_meta(state)
    for measured in (dtype, torch.float32):
        rate, state = tuner.update(Measurement(*(meta(measured) for _ in range(4))), state)
        assert on_meta([rate]) == [("meta", dtype, ())]
        assert on_meta(state) == before


def test_tensor_hyperparameters_do_not_synchronise():
    tuner = tuners.cdat(
        meta(),
        meta(),
        meta(),
        initial_learning_rate=meta(),
        max_growth=meta(),
        max_learning_rate=meta(),
    )
    rate, _ = tuner.update(Measurement(None, meta(), meta()), tuner.init(meta()))
    assert rate.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("previous", [None, torch.float64])
@pytest.mark.parametrize("build", [linesearch.backtracking, linesearch.zoom])
def test_line_search_does_not_synchronise(build, dtype, previous):
    search = build(max_step_size=1.0)
    start = Measurement(meta(), meta(), None)
    state = search.init(start, meta(dtype), None if previous is None else meta(previous))
    after = search.tell(state, meta(), meta())
    assert on_meta(after) == on_meta(state)
    assert after.step_size.dtype == dtype


def test_estimators_do_not_synchronise():
    space = ArraySpace()
    w = meta(shape=(3,))
    hvp = finite_difference_hvp(lambda p: p * 2, w, space=space)
    measurement = measure(meta(), w, hvp, w, space=space)
    assert on_meta(measurement[:3]) == [("meta", torch.float32, ())] * 3
    found = power_iteration(hvp, w, num_matvecs=2, space=space)
    assert on_meta([found.vector]) == [("meta", torch.float32, (3,))]
