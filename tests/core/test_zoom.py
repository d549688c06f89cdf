"""The strong-Wolfe search, told values and slopes of known functions."""

import itertools
import math
import warnings
from functools import partial

import array_api_strict
import numpy as np
import pytest
import scipy.optimize
from hypothesis import example, given
from hypothesis import strategies as st

from cdat_core import Measurement, linesearch
from tests.examples import examples


def start_of(scalar, f, df):
    return Measurement(scalar(f(0.0)), scalar(df(0.0)), None)


def search_along(search, scalar, f, df, previous=None):
    """Run `search` on f; return the last state with the trials and what it was told of them."""
    previous = None if previous is None else scalar(previous)
    state = search.init(start_of(scalar, f, df), scalar(0.0), previous)
    trials, told = [], []
    while not state.done:
        trials.append(float(state.step_size))
        told.append((float(scalar(f(trials[-1]))), float(scalar(df(trials[-1])))))
        state = search.tell(state, *map(scalar, told[-1]))
    return state, trials, told


def outcome(state):
    return float(state.step_size), bool(state.done), bool(state.failed), int(state.trials)


def scalars(state, prefix=""):
    """Return the arrays of a state, nested ones included, with their names."""
    return [
        leaf
        for name, field in zip(state._fields, state, strict=True)
        for leaf in (
            scalars(field, f"{prefix}{name}.")
            if isinstance(field, tuple)
            else [(prefix + name, field)]
        )
    ]


# The six functions of Moré and Thuente (1994), section 5, with their constants and the numbers of
# trials in their tables. The paper sets both constants to the same number in five of six; here
# curvature_condition must be the greater, so the other one is 0.1 % smaller.


def rational(t):
    return -t / (t * t + 2), (t * t - 2) / (t * t + 2) ** 2


def quintic(t):
    s = t + 0.004
    return s**5 - 2 * s**4, 5 * s**4 - 8 * s**3


def rough(t, beta=0.01, waves=39):
    if abs(t - 1) >= beta:
        hull, slope = abs(t - 1), math.copysign(1.0, t - 1)
    else:
        hull, slope = (t - 1) ** 2 / (2 * beta) + beta / 2, (t - 1) / beta
    angle = waves * math.pi / 2 * t
    wave = 2 * (1 - beta) / (waves * math.pi) * math.sin(angle)
    return hull + wave, slope + (1 - beta) * math.cos(angle)


def yanai(t, left, right):
    def gamma(beta):
        return math.sqrt(1 + beta * beta) - beta

    a, b = math.hypot(1 - t, right), math.hypot(t, left)
    value = gamma(left) * a + gamma(right) * b
    return value, gamma(left) * (t - 1) / a + gamma(right) * t / b


MORE_THUENTE = {
    "1": (rational, 1e-3, 1e-1, (6, 3, 1, 4)),
    "2": (quintic, 1e-1, 1e-1, (12, 8, 8, 11)),
    "3": (rough, 1e-1, 1e-1, (12, 12, 10, 13)),
    "4": (partial(yanai, left=1e-3, right=1e-3), 1e-3, 1e-3, (4, 1, 3, 4)),
    "5": (partial(yanai, left=1e-2, right=1e-3), 1e-3, 1e-3, (6, 3, 7, 8)),
    "6": (partial(yanai, left=1e-3, right=1e-2), 1e-3, 1e-3, (13, 11, 8, 11)),
}


@pytest.mark.parametrize("name", MORE_THUENTE)
@pytest.mark.parametrize(("place", "first"), [(0, 1e-3), (1, 1e-1), (2, 1e1), (3, 1e3)])
def test_functions_of_more_and_thuente(xp, name, place, first):
    """The strong Wolfe conditions hold after as few trials as in the paper."""
    both, decrease, curvature, published = MORE_THUENTE[name]
    decrease = decrease * (0.999 if decrease == curvature else 1)
    search = linesearch.zoom(
        initial_step_size=first, sufficient_decrease=decrease, curvature_condition=curvature
    )
    state, trials, _ = search_along(
        search, partial(xp.asarray, dtype=xp.float64), lambda t: both(t)[0], lambda t: both(t)[1]
    )
    assert outcome(state) == (trials[-1], True, False, len(trials))
    value, slope = both(trials[-1])
    value0, slope0 = both(0.0)
    rounding = 2 * np.finfo(float).eps * abs(value0)
    assert value <= value0 + decrease * trials[-1] * slope0 + rounding
    assert abs(slope) <= curvature * abs(slope0)
    assert len(trials) <= published[place]


# Functions with several minima: a hull that grows like |t|, t**2 or t**4, and waves on it.


class Waves:
    def __init__(self, scale, power, offset, waves):
        self.scale, self.power, self.offset = scale, power, offset
        self.waves = waves  # of (amplitude, frequency, phase)

    def value(self, t):
        s = t / self.scale
        hull = (1 + (s - 1) ** 2) ** self.power / (2 * self.power)
        return self.offset + hull + sum(a * math.sin(w * s + p) / w for a, w, p in self.waves)

    def slope(self, t):
        s = t / self.scale
        hull = (1 + (s - 1) ** 2) ** (self.power - 1) * (s - 1)
        return (hull + sum(a * math.cos(w * s + p) for a, w, p in self.waves)) / self.scale


def waves_of(scale, power, offset, *waves):
    return Waves(10.0**scale, power, offset, waves)


wave = st.tuples(st.floats(0, 0.15), st.floats(0.5, 6), st.floats(0, 2 * math.pi))
# Amplitudes sum up to 0.45, less than the slope of the flattest hull at 0: all of them descend.
smooth = st.builds(
    waves_of,
    st.floats(-3, 3),
    st.sampled_from([0.75, 1.0, 2.0]),
    st.floats(-10, 10),
    wave,
    wave,
    wave,
)


@examples(40)
@given(
    function=smooth,
    decrease=st.floats(1e-4, 0.1),
    curvature=st.sampled_from([0.9, 0.5, 0.11]),
)
def test_strong_wolfe_holds_at_the_returned_step(scalar, eps, function, decrease, curvature):
    """Checked in float64; each earlier trial missed one of the conditions."""
    search = linesearch.zoom(sufficient_decrease=decrease, curvature_condition=curvature)
    state, trials, told = search_along(search, scalar, function.value, function.slope)
    assert outcome(state) == (trials[-1], True, False, len(trials))
    value0, slope0 = float(scalar(function.value(0.0))), float(scalar(function.slope(0.0)))

    def excess(t, value, slope):
        """Return how far each condition is missed, and the rounding errors of these numbers."""
        bound = value0 + decrease * t * slope0 + 2 * eps * abs(value0)
        rounding = 4 * eps * (abs(value0) + abs(decrease * t * slope0) + abs(value))
        flatness = abs(slope) - curvature * abs(slope0)
        return value - bound, rounding, flatness, 4 * eps * abs(slope0)

    for t, (value, slope) in zip(trials[:-1], told[:-1], strict=True):
        high, rounding, steep, slope_rounding = excess(t, value, slope)
        assert high >= -rounding or steep >= -slope_rounding
    # The conditions hold for the function itself, up to its rounding in this dtype.
    last = trials[-1]
    high, rounding, steep, slope_rounding = excess(last, function.value(last), function.slope(last))
    assert high <= rounding
    assert steep <= slope_rounding + eps * abs(function.slope(last))


def random_waves(count):
    generator = np.random.default_rng(7)
    for _ in range(count):
        waves = zip(
            generator.uniform(0, 0.15, 3),
            generator.uniform(0.5, 6, 3),
            generator.uniform(0, 2 * math.pi, 3),
            strict=True,
        )
        power = generator.choice([0.75, 1.0, 2.0])
        yield waves_of(generator.uniform(-3, 3), power, 0.0, *waves)


def evaluations_of_scipy(function, decrease, curvature):
    """Count the distinct points, besides 0, at which SciPy asks for value or slope."""
    points = set()

    def value(x):
        points.add(float(x[0]))
        return function.value(float(x[0]))

    def gradient(x):
        points.add(float(x[0]))
        return np.array([function.slope(float(x[0]))])

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The line search algorithm did not converge")
        scipy.optimize.line_search(
            value,
            gradient,
            np.zeros(1),
            np.ones(1),
            gfk=gradient([0.0]),
            old_fval=value([0.0]),
            c1=decrease,
            c2=curvature,
            maxiter=30,
        )
    return len(points - {0.0})


@pytest.mark.parametrize("curvature", [0.9, 0.1])
def test_evaluates_no_more_often_than_scipy(curvature):
    """Both start from the step 1 and stop at the first step that meets the same conditions."""
    search = linesearch.zoom(curvature_condition=curvature)
    ours, theirs = [], []
    for function in random_waves(200):
        state, trials, _ = search_along(search, np.asarray, function.value, function.slope)
        assert not state.failed
        ours.append(len(trials))
        theirs.append(evaluations_of_scipy(function, 1e-4, curvature))
    assert np.median(ours) <= np.median(theirs)
    assert np.mean(ours) <= np.mean(theirs)


def test_first_trial_is_kept_when_it_is_good_enough(scalar):
    search = linesearch.zoom(initial_step_size=1.0)
    state, trials, _ = search_along(search, scalar, lambda t: (1 - t) ** 2, lambda t: 2 * t - 2)
    assert trials == [1.0]
    assert outcome(state) == (1.0, True, False, 1)


def test_short_step_is_lengthened_and_a_long_one_shortened(scalar):
    """On a parabola the last trial is its minimiser, as soon as it is not too far from the others.

    From 0.5 the shortest stride allowed goes a little too far, to 1.05.
    """
    for first, count in [(0.4, 2), (0.5, 3), (64.0, 2), (1e-3, 6)]:
        search = linesearch.zoom(initial_step_size=first, curvature_condition=1e-3)
        state, trials, _ = search_along(search, scalar, lambda t: 0.5 * t * t - t, lambda t: t - 1)
        assert not bool(state.failed)
        assert float(state.step_size) == pytest.approx(1.0, abs=1e-3)
        assert len(trials) == count
        assert all(later <= 5.001 * t for t, later in zip(trials[:-1], trials[1:], strict=True))


@pytest.mark.parametrize("slope", [0.0, 1.0, math.nan, math.inf, -math.inf])
def test_direction_that_does_not_descend_fails_at_once(scalar, slope):
    state, trials, _ = search_along(linesearch.zoom(), scalar, lambda t: 1.0, lambda t: slope)
    assert trials == []
    assert outcome(state) == (0.0, True, True, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_start_value_that_is_not_finite_fails_at_once(scalar, value):
    state, trials, _ = search_along(linesearch.zoom(), scalar, lambda t: value, lambda t: -1.0)
    assert trials == []
    assert outcome(state) == (0.0, True, True, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["value", "slope"])
def test_trial_that_is_not_finite_counts_as_too_long(scalar, bad, field):
    """Even a loss of minus infinity, which an overflow may produce."""
    search = linesearch.zoom(initial_step_size=8.0, curvature_condition=0.1)

    def told(name, number):
        return lambda t: bad if t > 1.75 and field == name else number(t)

    state, trials, _ = search_along(
        search, scalar, told("value", lambda t: (t - 1) ** 2), told("slope", lambda t: 2 * t - 2)
    )
    assert trials[:2] == [8.0, 2.0]
    assert all(t < 2.0 for t in trials[2:])  # between the last good trial and the bad one
    assert not bool(state.failed)
    assert float(state.step_size) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_search_that_finds_no_finite_trial_fails_with_step_zero(scalar, bad):
    search = linesearch.zoom(max_trials=7)
    state, trials, _ = search_along(
        search, scalar, lambda t: bad if t else 1.0, lambda t: bad if t else -1.0
    )
    assert trials == [0.25**k for k in range(7)]
    assert outcome(state) == (0.0, True, True, 7)


def test_loss_that_is_unbounded_below_fails_with_the_longest_trial(scalar, eps):
    state, trials, _ = search_along(linesearch.zoom(), scalar, lambda t: -t, lambda t: -1.0)
    assert len(trials) == 30
    assert outcome(state) == (trials[-1], True, True, 30)
    # Each stride is four times the one before; the sum is rounded at every trial.
    strides = [4.0**k for k in range(30)]
    assert trials == pytest.approx(list(itertools.accumulate(strides)), rel=30 * eps)


@pytest.mark.parametrize("first", [0.01, 1.0, 100.0])
def test_loss_that_still_descends_at_the_largest_step_fails_there(scalar, first):
    search = linesearch.zoom(initial_step_size=first, max_step_size=4.0)
    state, trials, _ = search_along(search, scalar, lambda t: -t, lambda t: -1.0)
    assert max(trials) == 4.0
    assert outcome(state) == (4.0, True, True, len(trials))


def test_longest_step_of_the_dtype_is_an_end_too(scalar, eps):
    """Nothing overflows: a warning would be an error here."""
    largest = (3e38 if eps > 1e-8 else 1e308) * eps / 64
    search = linesearch.zoom(initial_step_size=largest / 30)
    state, trials, _ = search_along(search, scalar, lambda t: -t / 1e30, lambda t: -1e-30)
    assert outcome(state)[1:3] == (True, True)
    assert len(trials) < 6
    assert largest <= float(state.step_size) < math.inf


def test_kink_shrinks_the_bracket_to_the_resolution(scalar, eps):
    """No step meets the second condition at a minimum with slopes of -1 and 1."""
    search = linesearch.zoom(max_trials=200)
    state, trials, _ = search_along(
        search, scalar, lambda t: abs(t - 0.7), lambda t: 1.0 if t > 0.7 else -1.0
    )
    assert outcome(state)[1:3] == (True, True)
    assert len(trials) < 60
    # The loss is 0.7 at the start, so its rounding hides an error of a few eps in the step.
    assert float(state.step_size) == pytest.approx(0.7, abs=math.sqrt(eps))
    best = min(range(len(trials)), key=lambda k: abs(trials[k] - 0.7))
    assert float(state.step_size) == trials[best]


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ([2.0, 1.0, 3.0], 0),  # none lower than the start
        ([math.nan, math.inf, -math.inf], 0),
        ([0.9, 0.8, math.nan], 2),  # the second, the last, and the middle one the lowest
        ([0.9, 0.8, 0.7], 3),
        ([0.9, 0.7, 0.8], 2),
        ([0.999, 1.5, 1.5], 0),  # lower, but not low enough
    ],
)
def test_exhausted_search_fails_with_the_lowest_trial_that_is_low_enough(scalar, values, step):
    search = linesearch.zoom(initial_step_size=0.01, sufficient_decrease=0.5, max_trials=3)
    state = search.init(Measurement(scalar(1.0), scalar(-1.0), None), scalar(0.0))
    trials = [0.0]
    for value in values:
        assert outcome(state)[1:] == (False, False, len(trials) - 1)
        trials.append(float(state.step_size))
        state = search.tell(state, scalar(value), scalar(-1.0))
    assert outcome(state) == (trials[step], True, True, 3)


@pytest.mark.parametrize(("slope", "failed"), [(-0.9, False), (-0.95, True), (0.95, True)])
def test_one_trial_is_enough_or_the_search_has_failed(scalar, slope, failed):
    search = linesearch.zoom(max_trials=1, curvature_condition=0.91)
    state = search.init(Measurement(scalar(1.0), scalar(-1.0), None), scalar(0.0))
    state = search.tell(state, scalar(0.5), scalar(slope))
    assert outcome(state) == (1.0, True, failed, 1)


def test_first_guess_comes_from_the_step_before(scalar):
    search = linesearch.zoom(initial_step_size=3.0, increase_factor=2.0)

    def guess(search, previous):
        start = Measurement(scalar(1.0), scalar(-1.0), None)
        return float(search.init(start, scalar(0.0), scalar(previous)).step_size)

    assert guess(search, 0.5) == 1.0
    assert guess(linesearch.zoom(), 0.5) == 0.5
    assert guess(linesearch.zoom(initial_step_size=3.0, increase_factor=None), 0.5) == 3.0
    # Without an accepted step the search falls back to the first guess.
    assert [guess(search, x) for x in (0.0, -1.0, math.nan, math.inf)] == [3.0, 3.0, 3.0, 3.0]


@examples(50)
@given(
    told=st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=3, max_size=3),
    late=st.floats(allow_nan=True, allow_infinity=True, width=32),
)
def test_state_that_is_done_stays_as_it_is(scalar, told, late):
    search = linesearch.zoom(max_trials=3)
    state = search.init(Measurement(scalar(0.0), scalar(-1.0), None), scalar(0.0))
    for value, slope in told:
        state = search.tell(state, scalar(value), scalar(slope))
    assert bool(state.done)
    after = search.tell(state, scalar(late), scalar(late))
    assert [float(field) for _, field in scalars(after)] == [
        float(field) for _, field in scalars(state)
    ]


@pytest.mark.parametrize(("rtol", "failed"), [(None, False), (0.0, True)])
def test_rounding_of_the_loss_does_not_block_the_search(scalar, eps, rtol, failed):
    """Near a minimum the loss may come out one unit of rounding above the start."""
    search = linesearch.zoom(value_rtol=rtol)
    slope = -1e-3 * eps
    state, trials, _ = search_along(
        search, scalar, lambda t: 1 + eps * (t > 0), lambda t: slope * (1 - t / 2)
    )
    assert bool(state.failed) is failed
    assert (float(state.step_size), len(trials) == 1) == ((0.0, False) if failed else (1.0, True))


@pytest.mark.parametrize("zero", [0.3, 3.0])
@pytest.mark.parametrize("noise", [-1, 0, 1])
def test_slopes_decide_where_the_loss_is_all_rounding(scalar, eps, zero, noise):
    """The loss is off by a unit of rounding in each trial, while the slope is a straight line."""
    search = linesearch.zoom(curvature_condition=0.01)
    slope = -1e-3 * eps
    state, trials, _ = search_along(
        search, scalar, lambda t: 1 + eps * noise * (t > 0), lambda t: slope * (1 - t / zero)
    )
    assert not bool(state.failed)
    assert float(state.step_size) == pytest.approx(zero, rel=0.01)
    assert len(trials) == 2


def test_decrease_that_only_short_steps_reach_is_found(scalar):
    """Far out the loss is lower still and keeps descending, but less than required."""

    def f(t):
        return -0.2 * t - 0.08 * (1 - math.exp(-10 * t))

    def df(t):
        return -0.2 - 0.8 * math.exp(-10 * t)

    search = linesearch.zoom(
        initial_step_size=5.0, sufficient_decrease=0.3, curvature_condition=0.35
    )
    state, _, _ = search_along(search, scalar, f, df)
    assert not bool(state.failed)
    assert math.log(0.8 / 0.15) / 10 <= float(state.step_size) <= 0.8


@pytest.mark.parametrize("curvature", [0.9, 0.1])
def test_finishes_in_float32_at_a_minimum(curvature):
    """Descend on a mean of squares, all in float32, far beyond its resolution."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 4)).astype(np.float32)
    y = rng.standard_normal(64).astype(np.float32)
    w = np.zeros(4, np.float32)
    search = linesearch.zoom(curvature_condition=curvature)

    def loss(w):
        return np.mean((x @ w - y) ** 2)

    def gradient(w):
        return 2 * x.T @ (x @ w - y) / np.float32(64)

    best = np.mean((x @ np.linalg.lstsq(x, y)[0] - y) ** 2)
    rate, failed, trials = None, [], []
    for _ in range(100):
        g = gradient(w)
        state = search.init(Measurement(loss(w), -g @ g, None), np.float32(0), rate)
        while not state.done:
            there = w - state.step_size * g
            state = search.tell(state, loss(there), -gradient(there) @ g)
        failed.append(bool(state.failed))
        trials.append(int(state.trials))
        assert np.isfinite(state.step_size)
        rate = state.step_size
        w = w - rate * g
        assert w.dtype == np.float32
    assert loss(w) <= best * (1 + 1e-5)
    # While the loss can still decrease, no search fails. Then gradients are noise and most of them
    # do, but before the bracket has shrunk to single numbers.
    assert not any(failed[:5])
    assert max(trials) < 25


values = st.one_of(st.floats(-2, 2, width=32), st.sampled_from([math.nan, math.inf, -math.inf]))


@pytest.mark.parametrize("name", ["float32", "float64"])
@examples(40)
@given(
    start=values,
    slope=values,
    previous=st.none() | values,
    told=st.lists(st.tuples(values, values), min_size=1, max_size=6),
)
def test_numpy_and_the_strict_namespace_decide_alike(name, start, slope, previous, told):
    """Bit for bit, whatever they are told; and the step is always one that can be taken."""
    search = linesearch.zoom(max_trials=4, max_step_size=2.5)

    def states(xp):
        scalar = partial(xp.asarray, dtype=getattr(xp, name))
        start_of = Measurement(scalar(start), scalar(slope), None)
        state = search.init(start_of, scalar(0.0), None if previous is None else scalar(previous))
        yield state
        for both in told:
            state = search.tell(state, *map(scalar, both))
            yield state

    for left, right in zip(states(np), states(array_api_strict), strict=True):
        np.testing.assert_array_equal(
            [float(field) for _, field in scalars(left)],
            [float(field) for _, field in scalars(right)],
        )
        assert 0 <= left.step_size <= 2.5


# In float32 they lead to a bracket of two neighbouring numbers below the smallest normal one.
SUBNORMAL = [(0.0, x) for x in (0.0, -1e20)] + [(1.0, 0.0)]
SUBNORMAL += [(0.0, x) for x in (0.25, math.nan, -1.0, -2.0, 1.0)]
extremes = values | st.sampled_from([1e-20, -1e-20, 1e20, -1e20])


@examples(100)
@given(told=st.lists(st.tuples(extremes, extremes), min_size=3, max_size=12))
@example(told=[(-0.2, -0.01), (1e20, 1.0), (0.0, 0.0)])  # a parabola of no width
@example(told=SUBNORMAL)
def test_trial_lies_inside_the_bracket_whatever_is_told(scalar, told):
    """Also where values and slopes contradict each other, as rounding makes them."""
    search = linesearch.zoom(sufficient_decrease=1e-4, curvature_condition=2e-4, max_trials=12)
    state = search.init(Measurement(scalar(0.0), scalar(-1.0), None), scalar(0.0))
    for value, slope in told:
        state = search.tell(state, scalar(value), scalar(slope))
        if bool(state.done):
            break
        bracket = state.bracket
        low, high = float(bracket.low.step), float(bracket.high.step)
        if bool(bracket.closed):
            assert min(low, high) < float(state.step_size) < max(low, high)
        else:
            assert float(state.step_size) > low


def test_batch_of_searches_equals_the_single_ones(xp, dtype):
    """Bit for bit, although they end after different numbers of trials."""
    functions = list(random_waves(40))
    search = linesearch.zoom(curvature_condition=0.1)
    scalar = partial(xp.asarray, dtype=dtype)
    singles = [search_along(search, scalar, f.value, f.slope)[0] for f in functions]
    start = Measurement(
        scalar([f.value(0.0) for f in functions]), scalar([f.slope(0.0) for f in functions]), None
    )
    state = search.init(start, xp.zeros(40, dtype=dtype))
    for _ in range(30):
        if bool(xp.all(state.done)):
            break
        steps = [float(state.step_size[k]) for k in range(40)]
        state = search.tell(
            state,
            scalar([f.value(t) for f, t in zip(functions, steps, strict=True)]),
            scalar([f.slope(t) for f, t in zip(functions, steps, strict=True)]),
        )
    assert len({int(single.trials) for single in singles}) > 3
    for k, single in enumerate(singles):
        batched = [(name, float(field[k])) for name, field in scalars(state)]
        assert batched == [(name, float(field)) for name, field in scalars(single)]


def test_dtypes_are_kept_whatever_is_told(xp, dtype, scalar):
    search = linesearch.zoom(max_trials=3)
    wide = partial(xp.asarray, dtype=xp.float64)
    state = search.init(Measurement(wide(1.0), wide(-1.0), None), scalar(0.0), wide(1.0))
    kinds = {"done": xp.bool, "failed": xp.bool, "bracket.closed": xp.bool, "tilted": xp.bool}
    kinds["trials"] = xp.int32
    wanted = [(name, kinds.get(name, dtype)) for name, _ in scalars(state)]
    assert set(kinds) < dict(wanted).keys()
    for value in (math.nan, 2.0, 0.5, 0.5):
        assert [(name, field.dtype) for name, field in scalars(state)] == wanted
        assert all(field.shape == () for _, field in scalars(state))
        state = search.tell(state, wide(value), wide(-1.0))
    assert [(name, field.dtype) for name, field in scalars(state)] == wanted
    assert bool(state.done)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initial_step_size": 0.0}, "initial_step_size must be a finite number > 0, got 0.0"),
        ({"increase_factor": -1.0}, "increase_factor must be a finite number > 0, got -1.0"),
        ({"sufficient_decrease": 0.0}, r"sufficient_decrease must be in \(0, 1\), got 0.0"),
        ({"curvature_condition": 1.0}, r"curvature_condition must be in \(0, 1\), got 1.0"),
        (
            {"curvature_condition": 0.1, "sufficient_decrease": 0.2},
            "curvature_condition must be greater than sufficient_decrease, got 0.1 and 0.2",
        ),
        (
            {"curvature_condition": 0.1, "sufficient_decrease": 0.1},
            "curvature_condition must be greater than sufficient_decrease, got 0.1 and 0.1",
        ),
        ({"value_rtol": -1.0}, "value_rtol must be a finite number >= 0, got -1.0"),
        ({"max_step_size": math.inf}, "max_step_size must be a finite number > 0, got inf"),
        ({"max_trials": 0}, "max_trials must be an integer >= 1, got 0"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        linesearch.zoom(**arguments)


def test_measurements_that_are_missing_are_refused(scalar):
    search = linesearch.zoom()
    assert search.needs == search.trial_needs == {"value", "slope"}
    assert linesearch.backtracking().trial_needs == {"value"}
    with pytest.raises(ValueError, match=r"zoom needs Measurement.value and .slope"):
        search.init(Measurement(scalar(1.0), None, None), scalar(0.0))
    with pytest.raises(TypeError, match="like must have a real floating dtype"):
        search.init(Measurement(scalar(1.0), scalar(-1.0), None), np.asarray(1))
    state = search.init(Measurement(scalar(1.0), scalar(-1.0), None), scalar(0.0))
    with pytest.raises(TypeError, match="zoom needs the slope at the trial"):
        search.tell(state, scalar(0.5))
