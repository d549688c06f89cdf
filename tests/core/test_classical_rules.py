"""Polyak, hypergradient descent, sharpness_edge and GeN against their formulas."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdat_core import Measurement, tuners
from tests.examples import examples

few = examples(30)
moderate = st.floats(1e-2, 1e2)
signed = st.one_of(moderate, moderate.map(lambda x: -x))
histories = st.lists(st.tuples(moderate, signed, signed), min_size=1, max_size=8)
scales = st.floats(1e-3, 1e3)


def run(tuner, scalar, history):
    """Return the rates along a list of (value, slope, curvature), and the last state."""
    state, rates = tuner.init(scalar(0.0)), []
    for value, slope, curvature in history:
        model = Measurement(scalar(value), scalar(slope), scalar(curvature))
        rate, state = tuner.update(model, state)
        rates.append(float(rate))
    return rates, state


@few
@given(history=histories, f_min=st.floats(-1, 1))
def test_polyak_follows_its_formula(scalar, eps, history, f_min):
    rates, _ = run(tuners.polyak(f_min), scalar, history)
    bottom = float(scalar(f_min))
    for rate, (value, slope, _) in zip(rates, history, strict=True):
        gap = max(float(scalar(value)) - bottom, 0.0) if slope < 0 else 0.0
        # Rounding of value - f_min is relative to its terms, not to their difference.
        assert rate == pytest.approx(
            gap / abs(slope), rel=4 * eps, abs=4 * eps * (value + 1) / abs(slope)
        )


@few
@given(seed=st.integers(0, 2**32 - 1), sharp=st.floats(1, 100))
def test_polyak_never_moves_away_from_the_minimum_of_a_convex_quadratic(seed, sharp):
    """Polyak's law: with the true f_min every gradient step shortens the distance."""
    generator = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(generator.normal(size=(4, 4)))
    hessian = basis @ np.diag([1.0, 2.0, 5.0, sharp]) @ basis.T
    w, tuner = generator.normal(size=4), tuners.polyak()
    state = tuner.init(np.asarray(0.0))
    for _ in range(20):
        g = hessian @ w
        model = Measurement(np.asarray(0.5 * w @ g), np.asarray(-g @ g), None)
        rate, state = tuner.update(model, state)
        after = w - rate * g
        assert np.linalg.norm(after) < np.linalg.norm(w) * (1 + 1e-12)
        w = after


@few
@given(history=histories, beta=st.floats(0.01, 0.9), initial=st.none() | moderate)
def test_hypergradient_follows_its_formula(scalar, eps, history, beta, initial):
    rates, _ = run(tuners.hypergradient(beta, initial_learning_rate=initial), scalar, history)
    expected, previous = [], initial or 0.0
    for step, (_, slope, curvature) in enumerate(history):
        if previous > 0:
            bend = previous * curvature
            rate = previous * (1 - beta * (slope + bend) / (abs(slope) + abs(bend)))
            previous = min(rate, initial) if step == 0 else rate
        else:
            previous = max(-slope, 0.0) / abs(curvature)
        expected.append(previous)
    # slope + bend cancels near the greedy rate: the error is relative to its terms.
    assert rates == pytest.approx(expected, rel=16 * eps * len(history) / (1 - beta))


@pytest.mark.parametrize("start", [1e-3, 1e3])
def test_hypergradient_comes_to_rest_at_the_greedy_rate(start):
    tuner = tuners.hypergradient(0.1, initial_learning_rate=start)
    rates, _ = run(tuner, np.asarray, [(1.0, -3.0, 4.0)] * 500)
    assert rates[0] == pytest.approx(start, rel=0.1)
    assert rates[-1] == pytest.approx(0.75, rel=1e-6)


def test_hypergradient_is_the_derivative_of_the_loss_with_respect_to_the_rate():
    """On a quadratic, slope + rate * curvature is the next gradient times this update."""
    generator = np.random.default_rng(0)
    factor = generator.normal(size=(5, 5))
    hessian, w, u = factor @ factor.T, generator.normal(size=5), generator.normal(size=5)
    g, rate = hessian @ w, 0.3
    assert g @ u + rate * (u @ hessian @ u) == pytest.approx(hessian @ (w + rate * u) @ u)


@few
@given(history=histories, scale=scales)
@pytest.mark.parametrize(
    "tuner", [tuners.polyak(), tuners.hypergradient(0.3)], ids=["polyak", "hypergradient"]
)
def test_scaling_the_loss_or_the_direction(tuner, scalar, eps, history, scale):
    """Scaling the loss does not change the rate; scaling the direction scales it inversely."""
    # Where slope and bend cancel, rounding is relative to the terms; 0.3 bounds the gain of each
    # step.
    tolerance = 64 * eps * len(history)
    rates, _ = run(tuner, scalar, history)
    of_loss, _ = run(tuner, scalar, [(scale * f, scale * s, scale * c) for f, s, c in history])
    assert of_loss == pytest.approx(rates, rel=tolerance)
    of_direction, _ = run(tuner, scalar, [(f, scale * s, scale**2 * c) for f, s, c in history])
    assert of_direction == pytest.approx([r / scale for r in rates], rel=tolerance)


@few
@given(sharpness=moderate, sigma=moderate)
def test_sharpness_edge_keeps_the_product(scalar, eps, sharpness, sigma):
    tuner = tuners.sharpness_edge(sigma)
    model = Measurement(None, None, None, scalar(sharpness))
    rate, state = tuner.update(model, tuner.init(scalar(0.0)))
    assert float(rate) * sharpness == pytest.approx(sigma, rel=4 * eps)
    for nothing in (0.0, -sharpness):
        held, _ = tuner.update(model._replace(sharpness=scalar(nothing)), state)
        assert float(held) == float(rate)


@few
@given(history=st.lists(st.tuples(moderate, moderate.map(lambda x: -x), signed), min_size=1))
def test_gen_changes_the_greedy_rate_by_at_most_a_factor_two(scalar, eps, history):
    rates, _ = run(tuners.gen(0.5), scalar, history)
    free, _ = run(tuners.quadratically_greedy(0.5), scalar, history)
    expected = [free[0]]
    for rate in free[1:]:
        expected.append(min(max(rate, expected[-1] / 2), expected[-1] * 2))
    assert rates == pytest.approx(expected, rel=8 * eps)


def test_gen_stops_at_an_ascent_and_goes_on_from_the_last_rate(scalar):
    rates, _ = run(tuners.gen(0.0), scalar, [(0, -1, 1), (0, 1, 1), (0, -8, 1), (0, -0.1, 1)])
    assert rates == [1.0, 0.0, 2.0, 1.0]


def test_a_negative_rate_becomes_zero(scalar):
    state_of = tuners.constant(0.0).init
    tuner = tuners.from_rule(state_of, lambda m, s: (m.slope, s), needs=("slope",))
    assert run(tuner, scalar, [(0, -1, 0), (0, 2, 0), (0, -1, 0)])[0] == [0.0, 2.0, 0.0]
    rates, state = run(tuners.scheduled(lambda step: 1 - step), scalar, [(0, 0, 0)] * 3)
    assert rates == [1.0, 0.0, 0.0]
    assert (float(state.rate), int(state.skipped)) == (1.0, 0)


@pytest.mark.parametrize(
    ("tuner", "history", "expected"),
    [
        (tuners.polyak(), [(1.0, -2.0, 0), (1.0, -1e-310, 0), (1.0, 0.0, 0)], [0.5, 0.5, 0.0]),
        (tuners.hypergradient(), [(0, -1.0, 1e-310), (0, -1.0, 2.0)], [0.0, 0.5]),
        (tuners.hypergradient(), [(0, 1.0, 2.0), (0, -1.0, 2.0)], [0.0, 0.5]),
    ],
    ids=["polyak", "hypergradient", "hypergradient-ascent"],
)
def test_what_overflows_says_nothing(tuner, history, expected):
    with np.errstate(over="ignore"):
        rates, state = run(tuner, np.asarray, history)
    assert rates == expected
    assert int(state.skipped) == 0
    assert math.isfinite(float(state.rate))


@pytest.mark.parametrize(
    ("tuner", "field"),
    [
        (tuners.polyak(), "value"),
        (tuners.polyak(), "slope"),
        (tuners.hypergradient(), "slope"),
        (tuners.hypergradient(), "curvature"),
        (tuners.sharpness_edge(), "sharpness"),
    ],
)
def test_what_a_rule_needs_must_be_there(tuner, field, scalar):
    assert field in tuner.needs
    everything = Measurement(*(scalar(1.0) for _ in Measurement._fields))
    with pytest.raises(ValueError, match=rf"needs Measurement\.{field}, got None"):
        tuner.update(everything._replace(**{field: None}), tuner.init(scalar(0.0)))
