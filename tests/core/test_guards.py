"""Guards on the rate, and the tuners that ignore the loss."""

import inspect
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdat_core import Measurement, tuners
from tests.examples import examples

NOTHING = Measurement(None, None, None)

negative = st.floats(-1e3, -1e-3)
histories = st.lists(st.tuples(negative, st.floats(1e-3, 1e3)), min_size=1, max_size=8)
limits = st.one_of(st.none(), st.floats(1e-3, 1e1))


def follow(tuner, scalar, history):
    """Return the rates along a list of (slope, curvature)."""
    state, rates = tuner.init(scalar(0.0)), []
    for slope, curvature in history:
        rate, state = tuner.update(Measurement(None, scalar(slope), scalar(curvature)), state)
        rates.append(float(rate))
    return rates


def greedy_rates(*rates):
    """Return measurements whose quadratically greedy rates are `rates`."""
    return [(-rate, 1.0) for rate in rates]


@examples(50)
@given(history=histories, initial=limits, growth=st.none() | st.floats(1, 3), ceiling=limits)
def test_guards_combine_as_written(scalar, history, initial, growth, ceiling):
    """The guards apply in turn to the bare rate, in the dtype of the state, and to nothing else."""
    bare = follow(tuners.cdat(1.9, 0.9), scalar, history)
    guarded = tuners.cdat(
        1.9,
        0.9,
        initial_learning_rate=initial,
        max_growth=growth,
        max_learning_rate=ceiling,
    )
    expected, previous = [], None
    for rate in bare:
        if previous is None and initial is not None:
            rate = min(rate, float(scalar(initial)))
        if previous is not None and growth is not None:
            rate = min(rate, float(scalar(growth) * scalar(previous)))
        if ceiling is not None:
            rate = min(rate, float(scalar(ceiling)))
        expected.append(rate)
        previous = rate
    assert follow(guarded, scalar, history) == expected


def test_start_rate_caps_the_first_rate_only(scalar):
    tuner = tuners.quadratically_greedy(initial_learning_rate=0.25)
    assert follow(tuner, scalar, greedy_rates(4.0, 4.0)) == [0.25, 4.0]


def test_start_rate_does_not_raise_a_lower_first_rate(scalar):
    tuner = tuners.quadratically_greedy(initial_learning_rate=0.25)
    assert follow(tuner, scalar, greedy_rates(0.125)) == [0.125]


def test_start_rate_holds_until_a_curvature_is_known(scalar):
    """And the first rate from a curvature is still the first."""
    tuner = tuners.quadratically_greedy(initial_learning_rate=0.25)
    history = [(-1.0, 0.0), (-3.0, 0.0), *greedy_rates(4.0, 4.0)]
    assert follow(tuner, scalar, history) == [0.25, 0.25, 0.25, 4.0]


def test_start_rate_survives_a_skip(scalar):
    tuner = tuners.quadratically_greedy(initial_learning_rate=0.25)
    history = [(math.nan, 1.0), *greedy_rates(4.0)]
    assert follow(tuner, scalar, history) == [0.0, 0.25]


def test_growth_is_measured_from_the_last_positive_rate(scalar):
    """An ascent (rate 0) and a skip in between change nothing."""
    tuner = tuners.quadratically_greedy(max_growth=2.0)
    history = [*greedy_rates(1.0), (1.0, 1.0), (-1.0, math.inf), *greedy_rates(8.0, 8.0, 0.5, 8.0)]
    assert follow(tuner, scalar, history) == [1.0, 0.0, 0.0, 2.0, 4.0, 0.5, 1.0]


def test_growth_without_start_rate_leaves_the_first_rate_free(scalar):
    tuner = tuners.quadratically_greedy(max_growth=2.0)
    assert follow(tuner, scalar, greedy_rates(8.0, 32.0)) == [8.0, 16.0]


def test_upper_bound_holds_from_the_first_rate_on(scalar):
    tuner = tuners.quadratically_greedy(initial_learning_rate=8.0, max_learning_rate=2.0)
    history = [(-1.0, 0.0), *greedy_rates(4.0, 1.0, 4.0)]
    assert follow(tuner, scalar, history) == [2.0, 2.0, 1.0, 2.0]


@examples(50)
@given(history=histories, growth=st.floats(1, 2))
def test_growth_cap_bounds_every_ratio(scalar, eps, history, growth):
    rates = follow(tuners.cdat(2.0, 0.0, max_growth=growth), scalar, history)
    assert all(b <= a * growth * (1 + 2 * eps) for a, b in pairwise(rates))


def test_guard_options_are_those_of_cdat():
    keyword_only = [
        name
        for name, parameter in inspect.signature(tuners.cdat).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    assert list(tuners.GuardOptions.__annotations__) == keyword_only


FORWARDING = [
    tuners.quadratically_greedy,
    tuners.on_edge,
    tuners.polyak,
    tuners.hypergradient,
    tuners.sharpness_edge,
]


@pytest.mark.parametrize("build", FORWARDING)
def test_unknown_guard_is_refused(build):
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'max_grwth'"):
        build(max_grwth=2.0)


@pytest.mark.parametrize("build", FORWARDING)
@pytest.mark.parametrize("guard", list(tuners.GuardOptions.__annotations__))
def test_every_guard_is_checked(build, guard):
    with pytest.raises(ValueError, match=guard + r" must be a finite number >.* got -1\.0"):
        build(**{guard: -1.0})


@pytest.mark.parametrize("rate", [0.0, 0.25, 1])
def test_constant_always_returns_its_rate(scalar, rate):
    tuner = tuners.constant(rate)
    assert tuner.needs == frozenset()
    state = tuner.init(scalar(0.0))
    for step in range(3):
        assert int(state.step) == step
        returned, state = tuner.update(NOTHING, state)
        assert float(returned) == float(state.rate) == rate


def test_scheduled_counts_steps_from_zero(scalar):
    seen = []

    def schedule(step):
        seen.append((float(step), step.dtype))
        return 0.5 / (1 + step)

    tuner = tuners.scheduled(schedule)
    state = tuner.init(scalar(0.0))
    rates = []
    for _ in range(3):
        rate, state = tuner.update(NOTHING, state)
        rates.append(float(rate))
    assert rates == [0.5, 0.25, pytest.approx(0.5 / 3)]
    assert seen == [(float(step), scalar(0.0).dtype) for step in range(3)]


def test_scheduled_accepts_a_python_float_and_an_array_of_another_dtype(xp, scalar):
    for value in (0.25, xp.asarray(0.25, dtype=xp.float64), xp.asarray(0.25, dtype=xp.float32)):
        tuner = tuners.scheduled(lambda step, value=value: value)
        rate, _ = tuner.update(NOTHING, tuner.init(scalar(0.0)))
        assert (float(rate), rate.dtype) == (0.25, scalar(0.0).dtype)


def test_scheduled_skips_a_rate_that_is_not_finite(xp, scalar):
    """The step does not advance: skipped steps are not counted."""
    tuner = tuners.scheduled(lambda step: xp.where(step == 1, xp.nan * step, 0.5 + 0 * step))
    state = tuner.init(scalar(0.0))
    first, state = tuner.update(NOTHING, state)
    second, state = tuner.update(NOTHING, state)
    assert (float(first), float(second)) == (0.5, 0.0)
    assert (float(state.rate), int(state.step), int(state.skipped)) == (0.5, 1, 1)


@pytest.mark.parametrize("schedule", [0.1, None, "cosine"])
def test_schedule_that_is_not_callable_is_refused(schedule):
    with pytest.raises(TypeError, match=r"schedule must be callable.*got " + repr(schedule)):
        tuners.scheduled(schedule)
