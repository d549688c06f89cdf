"""The rules on scalars: any history of measurements gives the same rates in every backend."""

import math
from functools import partial

import numpy as np
import pytest
from backends import BACKENDS, DTYPES
from hypothesis import given
from hypothesis import strategies as st

from cdat_core import Measurement, linesearch, tuners
from tests.examples import examples

TUNERS = {
    "cdat": tuners.cdat(),
    "cdat-eps": tuners.cdat(1.5, 0.5, 0.25),
    "guarded": tuners.cdat(initial_learning_rate=1e-2, max_growth=1.1, max_learning_rate=1.0),
    "greedy": tuners.quadratically_greedy(),
    "on-edge": tuners.on_edge(),
    "gen": tuners.gen(0.5),
    "polyak": tuners.polyak(),
    "hypergradient": tuners.hypergradient(0.1),
    "sharpness-edge": tuners.sharpness_edge(),
    "constant": tuners.constant(0.1),
    "scheduled": tuners.scheduled(lambda step: 0.1 / (1 + step)),
}
SEARCH = linesearch.backtracking(max_trials=4, max_step_size=2.0)

# Compiled once, not once for each example.
UPDATES = {
    name: {backend: BACKENDS[backend].wrap(tuner.update) for backend in BACKENDS}
    for name, tuner in TUNERS.items()
}
START = {backend: BACKENDS[backend].wrap(SEARCH.init) for backend in BACKENDS}
TELL = {backend: BACKENDS[backend].wrap(SEARCH.tell) for backend in BACKENDS}

sizes = st.floats(2**-10, 2**10, width=32)
special = st.sampled_from([0.0, math.nan, math.inf, -math.inf])
scalars = st.one_of(sizes, sizes, sizes.map(lambda x: -x), special)
histories = st.lists(st.tuples(scalars, scalars, scalars, scalars), min_size=1, max_size=8)


def states_of(backend, dtype, tuner, history):
    """Yield the rate and the state after each measurement, as Python numbers."""
    scalar = partial(BACKENDS[backend].asarray, dtype=dtype)
    state = TUNERS[tuner].init(scalar(0.0))
    for measured in history:
        rate, state = UPDATES[tuner][backend](Measurement(*map(scalar, measured)), state)
        assert str(rate.dtype).endswith(dtype)
        yield float(rate), [float(field) for field in state]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tuner", TUNERS)
@examples(25)
@given(history=histories)
def test_rates_and_states_agree(tuner, dtype, history):
    """Zeros and counts exactly; the rest up to the order of the roundings (fused, or not)."""
    runs = [list(states_of(backend, dtype, tuner, history)) for backend in BACKENDS]
    tolerance = (8 * len(history) + 8) * float(np.finfo(dtype).eps)
    for run in runs[1:]:
        for (rate, state), (expected_rate, expected_state) in zip(run, runs[0], strict=True):
            assert rate == pytest.approx(expected_rate, rel=tolerance, abs=0)
            assert state == pytest.approx(expected_state, rel=tolerance, abs=0)
            assert state[-1] == expected_state[-1]  # skipped


@pytest.mark.parametrize("dtype", DTYPES)
@examples(50)
@given(
    start=st.tuples(scalars, scalars),
    previous=st.integers(-2, 2),
    told=st.lists(st.integers(-64, 64) | special, min_size=1, max_size=6),
)
def test_line_searches_decide_alike(dtype, start, previous, told):
    """Bit for bit, because no told value (in units of 1/8) is within rounding of the bound."""
    start = tuple(math.floor(8 * x) / 8 + 1 / 16 if math.isfinite(x) else x for x in start)

    def states(backend):
        scalar = partial(BACKENDS[backend].asarray, dtype=dtype)
        measurement = Measurement(scalar(start[0]), scalar(start[1]), None)
        state = START[backend](measurement, scalar(0.0), scalar(previous))
        yield [float(field) for field in state]
        for value in told:
            state = TELL[backend](state, scalar(value / 8))
            yield [float(field) for field in state]

    with np.errstate(invalid="ignore"):  # inf - inf, when a failed search is told more values
        expected = list(states("numpy"))
        for backend in BACKENDS:
            np.testing.assert_array_equal(list(states(backend)), expected, err_msg=backend)
