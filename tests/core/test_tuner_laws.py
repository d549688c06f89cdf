"""The laws of the tuners: one test each, over every tuner for which it holds."""

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cdat_core import ArraySpace, Measurement, measure, tuners
from tests.examples import examples


def newton_step():
    """Make a tuner from a user's formula that does not protect against division by zero."""

    def rule(measurement, state):
        return -measurement.slope / measurement.curvature, state

    return tuners.from_rule(tuners.constant(0.0).init, rule, needs=("slope", "curvature"))


QUADRATIC = {
    "cdat": tuners.cdat(),
    "cdat-1.5-long-memory": tuners.cdat(1.5, 0.99),
    "cdat-0.5-no-memory": tuners.cdat(0.5, 0.0),
    "greedy": tuners.quadratically_greedy(),
    "greedy-averaged": tuners.quadratically_greedy(0.5),
    "on-edge": tuners.on_edge(),
}
GUARDED = {
    "cdat-guarded": tuners.cdat(initial_learning_rate=1e-3, max_growth=1.1, max_learning_rate=0.5),
    "on-edge-capped": tuners.on_edge(max_learning_rate=2.0),
    "greedy-capped-growth": tuners.quadratically_greedy(max_growth=1.5),
    "gen": tuners.gen(),
    "full-batch": tuners.full_batch(),
}
WITH_EPS = {"cdat-eps": tuners.cdat(eps=0.1), "greedy-eps": tuners.quadratically_greedy(eps=1e-8)}
CLASSICAL = {
    "polyak": tuners.polyak(),
    "polyak-guarded": tuners.polyak(0.5, max_growth=2.0, max_learning_rate=1.0),
    "hypergradient": tuners.hypergradient(),
    "hypergradient-started": tuners.hypergradient(0.5, initial_learning_rate=0.1),
    "sharpness-edge": tuners.sharpness_edge(),
    "sharpness-edge-guarded": tuners.sharpness_edge(1.0, initial_learning_rate=0.1, max_growth=1.1),
}
SELF_TUNING = {"self-tuning": tuners.self_tuning(), "self-tuning-sgd": tuners.self_tuning(0.0)}
FIXED = {
    "constant": tuners.constant(0.1),
    "scheduled": tuners.scheduled(lambda step: 0.1 / (1 + step)),
}


def over(*tables):
    """Parametrise a test over the tuners of `tables`."""
    named = {name: tuner for table in tables for name, tuner in table.items()}
    return pytest.mark.parametrize("tuner", list(named.values()), ids=list(named))


# Each law meets every tuner, namespace and dtype, so a few examples for each add up to hundreds.
few = examples(20)

moderate = st.floats(1e-3, 1e3)
negative = moderate.map(lambda x: -x)
curvatures = st.one_of(moderate, negative)
slopes = st.one_of(moderate, negative, st.just(0.0))
descents = st.lists(st.tuples(negative, curvatures), min_size=1, max_size=6)
histories = st.lists(st.tuples(slopes, curvatures), min_size=1, max_size=6)


def model(scalar, slope, curvature, value=1.0):
    return Measurement(scalar(value), scalar(slope), scalar(curvature), scalar(abs(curvature)))


def run(tuner, scalar, history):
    """Return the rates along `history` and the last state."""
    state, rates = tuner.init(scalar(0.0)), []
    for slope, curvature in history:
        rate, state = tuner.update(model(scalar, slope, curvature), state)
        rates.append(float(rate))
    return rates, state


def same_state(left, right, *, apart_from=()):
    """Return whether two states are equal bit for bit."""
    return type(left) is type(right) and all(
        float(getattr(left, name)) == float(getattr(right, name))
        for name in left._fields
        if name not in apart_from
    )


@over(QUADRATIC, GUARDED, WITH_EPS, CLASSICAL, SELF_TUNING, FIXED)
@few
@given(data=st.data())
def test_rate_is_nonnegative_and_finite(tuner, scalar, dtype, data):
    """For all finite input: zeros, denormals, and the largest numbers of the dtype."""
    finite = st.floats(
        allow_nan=False, allow_infinity=False, width=32 if "float32" in str(dtype) else 64
    )
    history = data.draw(st.lists(st.tuples(finite, finite, finite), min_size=1, max_size=5))
    state = tuner.init(scalar(0.0))
    with np.errstate(over="ignore", under="ignore"):  # numpy warns where other backends do not
        for value, slope, curvature in history:
            rate, state = tuner.update(model(scalar, slope, curvature, value), state)
            assert 0 <= float(rate) < math.inf
            assert all(math.isfinite(float(field)) for field in state)
    assert int(state.skipped) == 0


@over(QUADRATIC, GUARDED, FIXED)
@few
@given(history=histories, scale=st.floats(1e-6, 1e6))
def test_invariant_to_scaling_the_loss(tuner, scalar, eps, history, scale):
    """Rounding: each average adds at most 4 roundings a step, their ratio 2 more, on both sides."""
    rates, _ = run(tuner, scalar, history)
    scaled, _ = run(tuner, scalar, [(scale * s, scale * c) for s, c in history])
    assert scaled == pytest.approx(rates, rel=(8 * len(history) + 8) * eps)


@over(QUADRATIC)
@few
@given(history=histories, scale=st.floats(1e-4, 1e4))
def test_scaling_the_direction_scales_the_rate_inversely(tuner, scalar, eps, history, scale):
    rates, _ = run(tuner, scalar, history)
    scaled, _ = run(tuner, scalar, [(scale * s, scale**2 * c) for s, c in history])
    expected = [rate / scale for rate in rates]
    assert scaled == pytest.approx(expected, rel=(8 * len(history) + 8) * eps)


integers = st.integers(-3, 3)


@pytest.mark.parametrize(
    ("tuner", "sigma"),
    [
        (tuners.quadratically_greedy(), 1),
        (tuners.cdat(1.0), 1),
        (tuners.on_edge(), 2),
        (tuners.cdat(2.0), 2),
    ],
    ids=["greedy", "cdat-1", "on-edge", "cdat-2"],
)
@few
@given(
    factor=st.lists(st.lists(integers, min_size=3, max_size=3), min_size=3, max_size=3),
    start=st.lists(integers, min_size=3, max_size=3),
    offset=st.lists(integers, min_size=3, max_size=3),
)
def test_sigma_one_minimises_a_quadratic_and_sigma_two_returns_to_its_value(
    tuner, sigma, xp, dtype, eps, factor, start, offset
):
    """The problem has small integer entries, so slope and curvature are exact in every dtype."""
    matrix = np.array(factor).T @ np.array(factor) + np.eye(3, dtype=int)
    w, b = np.array(start), np.array(offset)
    g = matrix @ w + b
    assume(np.any(g))
    hessian, gradient = xp.asarray(matrix, dtype=dtype), xp.asarray(g, dtype=dtype)
    value = xp.asarray(0.5 * (w @ matrix @ w) + b @ w, dtype=dtype)
    measurement = measure(value, gradient, lambda v: hessian @ v, -gradient, space=ArraySpace())
    rate, _ = tuner.update(measurement, tuner.init(xp.zeros((), dtype=dtype)))
    # The model moves by rate * (slope + rate / 2 * curvature), its slope by rate * curvature.
    slope, curvature = -float(g @ g), float(g @ matrix @ g)
    assert float(rate) * curvature == pytest.approx(-sigma * slope, rel=8 * eps)
    after = w - float(rate) * g
    change = (0.5 * (after @ matrix @ after) + b @ after) - (0.5 * (w @ matrix @ w) + b @ w)
    expected = 0.0 if sigma == 2 else -(slope**2) / (2 * curvature)
    gain = slope**2 / curvature  # the scale of both terms of the model
    assert change == pytest.approx(expected, abs=32 * eps * gain + 1e-12)


@over(QUADRATIC, GUARDED)
@few
@given(history=descents, slope=negative)
def test_zero_curvature_holds_the_last_rate(tuner, scalar, history, slope):
    rates, state = run(tuner, scalar, history)
    rate, after = tuner.update(model(scalar, slope, 0.0), state)
    assert float(rate) == rates[-1] > 0
    assert same_state(after, state)


@over(QUADRATIC)
@few
@given(slope=slopes)
def test_zero_curvature_before_any_rate_gives_zero(tuner, scalar, slope):
    rate, state = tuner.update(model(scalar, slope, 0.0), tuner.init(scalar(0.0)))
    assert float(rate) == 0
    assert int(state.skipped) == 0


def test_zero_curvature_holds_no_rate_along_an_ascent(scalar):
    """Without memory; an average that still contains descents keeps the last rate."""
    _, state = run(tuners.on_edge(), scalar, [(-1.0, 2.0)])
    for slope in (1.0, 0.0):
        rate, after = tuners.on_edge().update(model(scalar, slope, 0.0), state)
        assert float(rate) == 0
        assert same_state(after, state)
    rates, state = run(tuners.cdat(), scalar, [(-1.0, 2.0)])
    rate, _ = tuners.cdat().update(model(scalar, 1.0, 0.0), state)
    assert float(rate) == rates[-1] == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", Measurement._fields)
@over(QUADRATIC, GUARDED, WITH_EPS, CLASSICAL, SELF_TUNING, FIXED)
def test_non_finite_measurement_is_skipped(tuner, scalar, field, bad):
    """In any field, also one the tuner does not need."""
    rates, state = run(tuner, scalar, [(-1.0, 2.0), (-0.5, 1.0)])
    good = Measurement(scalar(1.0), scalar(-1.0), scalar(2.0), scalar(3.0))
    rate, after = tuner.update(good._replace(**{field: scalar(bad)}), state)
    assert float(rate) == 0
    assert same_state(after, state, apart_from=("skipped",))
    assert (int(state.skipped), int(after.skipped)) == (0, 1)
    assert float(after.rate) == rates[-1]
    resumed, _ = tuner.update(good, after)
    assert float(resumed) == float(tuner.update(good, state)[0]) > 0


@pytest.mark.parametrize("field", ["value", "slope", "curvature"])
@over(QUADRATIC, GUARDED, WITH_EPS, CLASSICAL, SELF_TUNING, FIXED)
def test_measurement_beyond_the_dtype_of_the_state_is_skipped(tuner, xp, field):
    """A float64 measurement may overflow a float32 state: it must not enter the averages."""
    wide, narrow = (partial(xp.asarray, dtype=dtype) for dtype in (xp.float64, xp.float32))
    _, state = run(tuner, narrow, [(-1.0, 2.0)])
    with np.errstate(over="ignore"):
        huge = model(wide, -1.0, 2.0)._replace(**{field: wide(-1e300)})
        rate, after = tuner.update(huge, state)
    assert float(rate) == 0
    assert same_state(after, state, apart_from=("skipped",))
    assert int(after.skipped) == 1


def test_rule_whose_rate_is_not_finite_is_skipped(scalar):
    tuner = newton_step()
    _, state = run(tuner, scalar, [(-1.0, 2.0)])
    with np.errstate(divide="ignore"):
        rate, after = tuner.update(model(scalar, -1.0, 0.0), state)
    assert (float(rate), float(after.rate), int(after.skipped)) == (0.0, 0.5, 1)


@over(QUADRATIC, GUARDED, WITH_EPS, CLASSICAL, SELF_TUNING, FIXED)
@pytest.mark.parametrize("measured", ["float32", "float64"])
def test_dtype_and_array_type_are_kept(tuner, xp, dtype, scalar, measured):
    """Whatever the dtype of the measurements; numpy may return its scalars for 0-d arrays."""
    array_type = (np.ndarray, np.generic) if xp is np else type(xp.zeros(()))
    state = tuner.init(scalar(0.0))
    wanted = [field.dtype for field in state]
    assert state.rate.dtype == dtype
    for step in range(20):
        slope = xp.asarray(-1.0 - 0.1 * step, dtype=getattr(xp, measured))
        rate, state = tuner.update(Measurement(slope, slope, -slope, -slope), state)
        assert rate.dtype == dtype
        assert [field.dtype for field in state] == wanted
        assert all(isinstance(field, array_type) for field in (rate, *state))
        assert all(field.shape == () for field in (rate, *state))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("offset", [0.0, 0.25])
@few
@given(history=histories, sigma=st.floats(0.1, 4))
def test_rate_follows_the_formula(scalar, eps, decay, offset, history, sigma):
    """Weights written out in plain Python; eps is added to the bias-corrected average."""
    rates, _ = run(tuners.cdat(sigma, decay, offset), scalar, history)
    for t, rate in enumerate(rates):
        weights = [(1 - decay) * decay ** (t - k) for k in range(t + 1)]
        numerator = sum(w * max(-s, 0.0) for w, (s, _) in zip(weights, history, strict=False))
        denominator = sum(w * abs(c) for w, (_, c) in zip(weights, history, strict=False))
        total = 1 - decay ** (t + 1)
        expected = sigma * (numerator / total) / (denominator / total + offset)
        assert rate == pytest.approx(expected, rel=(8 * t + 16) * eps)


def test_named_rules_are_special_cases_of_cdat(scalar):
    history = [(-1.0, 2.0), (0.5, -1.0), (-3.0, 0.5)]
    assert run(tuners.quadratically_greedy(0.3, 0.1), scalar, history) == run(
        tuners.cdat(1.0, 0.3, 0.1), scalar, history
    )
    assert run(tuners.on_edge(0.3, 0.1), scalar, history) == run(
        tuners.cdat(2.0, 0.3, 0.1), scalar, history
    )
    assert run(tuners.on_edge(), scalar, history)[0] == pytest.approx([1.0, 0.0, 12.0])


@over(QUADRATIC, GUARDED, CLASSICAL, SELF_TUNING, FIXED)
def test_batch_of_tuners_equals_single_tuners(tuner, xp, dtype, scalar):
    """A `like` with a shape runs independent tuners, here with one skip and one hold among them."""
    table = [
        [(-1.0, 2.0), (-2.0, 1.0), (1.0, math.nan)],
        [(-1.0, 0.5), (math.inf, 1.0), (1.0, -3.0)],
        [(1.0, 0.5), (-3.0, 0.0), (-1.0, -3.0)],
    ]
    single = [run(tuner, scalar, history) for history in table]
    state = tuner.init(xp.zeros((3,), dtype=dtype))
    for step in range(3):
        slope = xp.asarray([history[step][0] for history in table], dtype=dtype)
        curvature = xp.asarray([history[step][1] for history in table], dtype=dtype)
        ones = xp.ones_like(slope)
        measurement = Measurement(ones, slope, curvature, xp.abs(curvature))
        rate, state = tuner.update(measurement, state)
        assert [float(rate[i]) for i in range(3)] == [rates[step] for rates, _ in single]
    assert [int(state.skipped[i]) for i in range(3)] == [int(last.skipped) for _, last in single]


def test_update_leaves_its_arguments_alone(scalar):
    tuner = tuners.cdat(initial_learning_rate=0.1, max_growth=2.0)
    state = tuner.init(scalar(0.0))
    measurement = model(scalar, -1.0, 2.0)
    first, second = tuner.update(measurement, state), tuner.update(measurement, state)
    assert float(first[0]) == float(second[0])
    assert same_state(first[1], second[1])
    assert same_state(state, tuner.init(scalar(0.0)))
    assert [float(field) for field in measurement] == [1.0, -1.0, 2.0, 2.0]
