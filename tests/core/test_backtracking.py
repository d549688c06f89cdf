"""The Armijo backtracking search, told the values of known functions."""

import math
from functools import partial

import array_api_strict
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cdat_core import Measurement, linesearch
from tests.examples import examples


def search_along(search, scalar, f, slope, previous=None):
    """Run `search` on ``f(eta)``; return the last state with the trials and their values."""
    start = Measurement(scalar(f(0.0)), scalar(slope), None)
    state = search.init(start, scalar(0.0), None if previous is None else scalar(previous))
    trials, values = [], []
    while not state.done:
        trials.append(float(state.step_size))
        values.append(float(scalar(f(trials[-1]))))
        state = search.tell(state, scalar(values[-1]))
    return state, trials, values


def outcome(state):
    return float(state.step_size), bool(state.done), bool(state.failed), int(state.trials)


wiggles = st.tuples(
    st.floats(-10, 10),  # value at 0
    st.floats(-10, -0.1),  # slope at 0
    st.floats(-10, 10),  # curvature of the parabola
    st.floats(0, 1),  # amplitude and frequency of a wave on top
    st.floats(0, 10),
)


@examples(100)
@given(wiggle=wiggles, first=st.floats(1e-2, 1e2), fraction=st.floats(1e-4, 0.9))
def test_armijo_holds_at_the_returned_step_and_at_no_trial_before(
    scalar, eps, wiggle, first, fraction
):
    value, slope, curvature, amplitude, frequency = wiggle

    def f(t):
        wave = amplitude * (math.cos(frequency * t) - 1)  # flat at 0, so the slope is not affected
        return value + slope * t + curvature * t * t / 2 + wave

    def excess(t, told):
        """Return how far a trial misses the condition, and the rounding error of that number."""
        terms = (abs(value), abs(fraction * t * slope), abs(told))
        return told - value - fraction * t * slope - 2 * eps * abs(value), 4 * eps * sum(terms)

    search = linesearch.backtracking(
        initial_step_size=first, decrease_factor=0.5, sufficient_decrease=fraction
    )
    state, trials, values = search_along(search, scalar, f, slope)
    assert outcome(state) == (trials[-1], True, False, len(trials))
    assert trials == [float(scalar(first)) * 0.5**k for k in range(len(trials))]
    for t, told in zip(trials[:-1], values[:-1], strict=True):
        missed, rounding = excess(t, told)
        assert missed >= -rounding
    missed, rounding = excess(trials[-1], values[-1])
    assert missed <= rounding


def test_first_trial_is_kept_when_it_is_good_enough(scalar):
    search = linesearch.backtracking(initial_step_size=1.0)
    state, trials, _ = search_along(search, scalar, lambda t: (1 - t) ** 2, -2.0)
    assert trials == [1.0]
    assert outcome(state) == (1.0, True, False, 1)


@pytest.mark.parametrize("slope", [0.0, 1.0, math.nan, math.inf, -math.inf])
def test_direction_that_does_not_descend_fails_at_once(scalar, slope):
    state, trials, _ = search_along(linesearch.backtracking(), scalar, lambda t: 1.0, slope)
    assert trials == []
    assert outcome(state) == (0.0, True, True, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_start_value_that_is_not_finite_fails_at_once(scalar, value):
    state, trials, _ = search_along(linesearch.backtracking(), scalar, lambda t: value, -1.0)
    assert trials == []
    assert outcome(state) == (0.0, True, True, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_trial_that_is_not_finite_counts_as_too_long(scalar, bad):
    """Even minus infinity, which an overflow can produce."""
    search = linesearch.backtracking(initial_step_size=8.0, decrease_factor=0.5)
    state, trials, _ = search_along(search, scalar, lambda t: bad if t > 1 else 1 - t, -1.0)
    assert trials == [8.0, 4.0, 2.0, 1.0]
    assert outcome(state) == (1.0, True, False, 4)


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ([2.0, 1.0, 3.0], 0.0),  # none lower than the start
        ([math.nan, math.inf, -math.inf], 0.0),
        ([0.75, 0.875, math.nan], 1.0),  # the first, the last, and the middle one the lowest
        ([0.99, 0.98, 0.97], 0.25),
        ([0.99, 0.75, 0.76], 0.5),
    ],
)
def test_exhausted_search_fails_with_the_lowest_trial(scalar, values, step):
    search = linesearch.backtracking(decrease_factor=0.5, sufficient_decrease=0.9, max_trials=3)
    start = Measurement(scalar(1.0), scalar(-10.0), None)
    state = search.init(start, scalar(0.0))
    for trial, value in enumerate(values):
        assert outcome(state) == (0.5**trial, False, False, trial)
        state = search.tell(state, scalar(value))
    assert outcome(state) == (step, True, True, 3)


def test_first_guess_grows_from_the_step_before(scalar):
    search = linesearch.backtracking(initial_step_size=3.0, increase_factor=2.0)
    start = Measurement(scalar(1.0), scalar(-1.0), None)

    def guess(previous):
        return float(search.init(start, scalar(0.0), scalar(previous)).step_size)

    assert guess(0.5) == 1.0
    # Without an accepted step the search falls back to the first guess.
    assert [guess(x) for x in (0.0, -1.0, math.nan, math.inf)] == [3.0, 3.0, 3.0, 3.0]
    assert float(search.init(start, scalar(0.0)).step_size) == 3.0
    search = linesearch.backtracking(initial_step_size=3.0, increase_factor=None)
    assert guess(0.5) == 3.0


@pytest.mark.parametrize("previous", [None, 0.5, 4.0])
def test_no_trial_exceeds_the_largest_step(scalar, previous):
    search = linesearch.backtracking(initial_step_size=8.0, increase_factor=2.0, max_step_size=2.0)
    _, trials, _ = search_along(search, scalar, lambda t: 1 - t, -1.0, previous)
    assert trials == [1.0 if previous == 0.5 else 2.0]


@examples(50)
@given(
    told=st.lists(st.floats(-10, 10), min_size=3, max_size=3),
    late=st.floats(allow_nan=True, allow_infinity=True, width=32),
)
def test_state_that_is_done_stays_as_it_is(scalar, told, late):
    search = linesearch.backtracking(max_trials=3)
    state = search.init(Measurement(scalar(0.0), scalar(-1.0), None), scalar(0.0))
    for value in told:
        state = search.tell(state, scalar(value))
    assert bool(state.done)
    after = search.tell(state, scalar(late))
    assert [float(field) for field in after] == [float(field) for field in state]


@pytest.mark.parametrize("value", [1.0, -1.0])
@pytest.mark.parametrize(("rtol", "failed"), [(None, False), (0.0, True)])
def test_rounding_of_the_loss_does_not_block_the_search(scalar, eps, value, rtol, failed):
    """Near a minimum every trial may come out one unit of rounding above the start."""
    search = linesearch.backtracking(value_rtol=rtol)
    state, _, _ = search_along(search, scalar, lambda t: value + eps * (t > 0), -1e-3 * eps)
    assert bool(state.failed) is failed
    assert float(state.step_size) == (0.0 if failed else 1.0)


def test_finishes_in_float32_at_a_minimum():
    """Descend on a mean of squares, all in float32, far beyond its resolution."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 4)).astype(np.float32)
    y = rng.standard_normal(64).astype(np.float32)
    w = np.zeros(4, np.float32)
    search = linesearch.backtracking()

    def loss(w):
        return np.mean((x @ w - y) ** 2)

    best = np.mean((x @ np.linalg.lstsq(x, y)[0] - y) ** 2)
    rate = None
    for _ in range(200):
        grad = 2 * x.T @ (x @ w - y) / np.float32(64)
        start = Measurement(loss(w), -grad @ grad, None)
        state = search.init(start, np.float32(0), rate)
        while not state.done:
            state = search.tell(state, loss(w - state.step_size * grad))
        assert not state.failed
        rate = state.step_size
        w = w - rate * grad
        assert w.dtype == np.float32
    assert loss(w) <= best * (1 + 1e-5)


values = st.one_of(st.floats(-2, 2, width=32), st.sampled_from([math.nan, math.inf, -math.inf]))


@pytest.mark.parametrize("name", ["float32", "float64"])
@examples(100)
@given(
    start=values,
    slope=values,
    previous=st.none() | values,
    told=st.lists(values, min_size=1, max_size=6),
)
def test_numpy_and_the_strict_namespace_decide_alike(name, start, slope, previous, told):
    """Bit for bit, whatever they are told."""
    search = linesearch.backtracking(max_trials=4, max_step_size=2.5)

    def states(xp):
        scalar = partial(xp.asarray, dtype=getattr(xp, name))
        start_of = Measurement(scalar(start), scalar(slope), None)
        state = search.init(start_of, scalar(0.0), None if previous is None else scalar(previous))
        yield state
        for value in told:
            state = search.tell(state, scalar(value))
            yield state

    with np.errstate(invalid="ignore"):  # inf - inf, when a failed search is told more values
        for left, right in zip(states(np), states(array_api_strict), strict=True):
            np.testing.assert_array_equal(
                [float(field) for field in left], [float(field) for field in right]
            )


def test_dtypes_are_kept_whatever_is_told(xp, dtype, scalar):
    search = linesearch.backtracking(max_trials=3)
    wide = partial(xp.asarray, dtype=xp.float64)
    state = search.init(Measurement(wide(1.0), wide(-1.0), None), scalar(0.0), wide(1.0))
    wanted = [dtype, xp.bool, xp.bool, dtype, dtype, dtype, dtype, xp.int32]
    for value in (math.nan, 2.0, 0.5, 0.5):
        assert [field.dtype for field in state] == wanted
        assert all(field.shape == () for field in state)
        state = search.tell(state, wide(value))
    assert [field.dtype for field in state] == wanted
    assert bool(state.done)


@examples(100)
@given(factors=st.tuples(st.floats(0.1, 0.9), st.floats(1, 3)), slope=st.floats(-5, -0.1))
def test_descent_on_a_parabola_never_raises_the_loss(scalar, eps, factors, slope):
    """Ten training steps, each search starting from the step of the last."""
    shrink, grow = factors
    assume(shrink * grow != 1)
    search = linesearch.backtracking(decrease_factor=shrink, increase_factor=grow)
    w, previous = slope, None  # the loss is w**2 / 2
    for _ in range(10):
        w_now = w
        state, _, _ = search_along(
            search, scalar, lambda t, w=w_now: (w - t * w) ** 2 / 2, -w_now * w_now, previous
        )
        if w == 0:
            assert bool(state.failed)
            break
        assert not bool(state.failed)
        previous = float(state.step_size)
        w = w - previous * w
        assert w * w <= w_now * w_now * (1 + 8 * eps)
