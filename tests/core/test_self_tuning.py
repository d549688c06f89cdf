"""The self-tuning rule: against its formula in plain Python, and its laws."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdat_core import Measurement, tuners
from tests.examples import examples

few = examples(20)


def reference(losses, slopes, curvatures, measured, beta):
    """Return the rates of the rule, written out in Python floats."""
    sigma = 1.4 / (1 + beta)
    eta, s, log_usual, rates = 0.0, 0.0, 0.0, []
    fast = slow = variance = best = best_variance = 0.0
    for t, (loss, slope, curvature) in enumerate(zip(losses, slopes, curvatures, strict=True)):
        pace = 50 / max(50, t / 10)
        if t >= 20:
            loss = min(loss, slow + 10 * math.sqrt(variance))
        short, long = max(0.2 * pace, 1 / (t + 1)), max(0.02 * pace, 1 / (t + 1))
        old = slow
        fast += short * (loss - fast)
        slow += long * (loss - slow)
        variance += long * ((loss - slow) * (loss - old) - variance)
        if t < 20 or slow <= best:
            best, best_variance = slow, variance
        else:
            best += 0.001 * pace * (slow - best)
            best_variance += 0.001 * pace * (variance - best_variance)
        alarm = t >= 20 and fast > best + 0.7 * math.sqrt(best_variance)
        moved = min(max(s + pace * (-0.2 if alarm else 0.0025), -2.5), 0.0)
        eta *= math.exp(moved - s)
        s = moved
        if measured[t]:
            n, d = -slope, abs(curvature)
            if eta == 0:
                eta = 0.01 * max(n, 0) / d
            else:
                wanted, present = sigma * math.exp(s) * n, eta * d
                error = (wanted - present) / (abs(wanted) + present)
                eta *= math.exp((0.25 if t < 16 else 0.2) * error)
        if eta > 0:
            if t < 32:
                log_usual = math.log(eta)
            else:
                log_usual += (math.log(eta) - log_usual) * min(1, 3 / (t + 1))
                eta = min(eta, math.exp(1 + log_usual))
        rates.append(eta)
    return rates


def run(tuner, scalar, losses, slopes, curvatures, measured):
    """Return the rates, and the last state."""
    state, rates = tuner.init(scalar(0.0)), []
    for value, slope, curvature, now in zip(losses, slopes, curvatures, measured, strict=True):
        if now:
            model = Measurement(scalar(value), scalar(slope), scalar(curvature))
            rate, state = tuner.update(model, state)
        else:
            rate, state = tuner.observe(scalar(value), state)
        rates.append(float(rate))
    return rates, state


def noisy_run(seed, steps):
    """Return losses with a cliff and outliers, slopes of both signs, and curvatures."""
    rng = np.random.default_rng(seed)
    losses = 1 + np.exp(-np.arange(steps) / 50) + 0.2 * rng.standard_normal(steps)
    losses[steps // 2 : steps // 2 + 9] += 3.0
    losses[rng.integers(30, steps, 2)] *= 1e3
    slopes = -np.exp(rng.standard_normal(steps)) * np.where(rng.random(steps) < 0.9, 1, -1)
    slopes[0] = -1.0
    return losses, slopes, np.exp(3 * rng.standard_normal(steps))


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_rates_follow_the_formula(beta, seed):
    steps = 1500
    data = noisy_run(seed, steps)
    tuner = tuners.self_tuning(momentum=beta)
    measured = [bool(tuner.measures(t)) for t in range(steps)]
    rates, state = run(tuner, np.asarray, *data, measured)
    expected = reference(*data, measured, beta)
    assert rates == pytest.approx(expected, rel=1e-9)
    assert (int(state.step), int(state.skipped)) == (steps, 0)
    assert float(state.retreat) > 0  # the cliff raised the alarm


def test_schedule_of_measurements():
    """All of 16 steps, then one in 8, and ever fewer; the same on integers and on arrays."""
    tuner = tuners.self_tuning()
    steps = np.arange(30_000)
    on_arrays = np.asarray(tuner.measures(steps))
    assert all(on_arrays[t] == tuner.measures(t) for t in range(5000))
    found = steps[on_arrays]
    assert list(found[:18]) == [*range(17), 24]
    gaps = np.diff(found)
    assert np.all(gaps[found[1:] > 16] <= np.maximum(8, found[1:][found[1:] > 16] / 50))
    for total, most in [(1000, 102), (4000, 240), (20_000, 350)]:
        tuner = tuners.self_tuning(total_steps=total)
        assert np.asarray(tuner.measures(steps)).sum() <= most


@few
@given(
    seed=st.integers(0, 2**31),
    scale=st.floats(1e-3, 1e3),
    offset=st.floats(-100, 100),
    stretch=st.floats(1e-3, 1e3),
)
def test_invariant_to_loss_and_to_scale_of_the_update(seed, scale, offset, stretch):
    """Loss -> a loss + b leaves the rate; u -> c u divides it by c."""
    losses, slopes, curvatures = noisy_run(seed, 200)
    tuner = tuners.self_tuning()
    measured = [bool(tuner.measures(t)) for t in range(200)]
    plain, _ = run(tuner, np.asarray, losses, slopes, curvatures, measured)
    a, c = scale, stretch
    moved = (a * losses + offset, a * c * slopes, a * c**2 * curvatures)
    found, _ = run(tuner, np.asarray, *moved, measured)
    assert found == pytest.approx([rate / c for rate in plain], rel=1e-6)


@few
@given(seed=st.integers(0, 2**31))
def test_change_per_step_is_bounded(seed):
    """Whatever one batch reports: up by e**.25 and the recovery, down by the guard as well."""
    rng = np.random.default_rng(seed)
    steps = 120
    numbers = np.exp(20 * rng.standard_normal((3, steps))) * rng.choice([-1, 1], (3, steps))
    numbers[1, 0] = -1.0
    tuner = tuners.self_tuning(0.0)
    rates, _ = run(tuner, np.asarray, *numbers, [True] * steps)
    changes = np.diff(np.log(rates))
    assert changes.max() <= 0.25 + 0.0025 + 1e-9
    assert changes[:GROWTH_START].min() >= -0.45 - 1e-9


GROWTH_START = 31


def test_growth_without_curvature_is_bounded():
    """A loss that stays linear: the rate grows like a power of the number of steps, no faster."""
    tuner = tuners.self_tuning()
    steps = 3000
    data = (np.zeros(steps), -np.ones(steps), np.full(steps, 1e-30))
    rates, _ = run(tuner, np.asarray, *data, [True] * steps)
    assert rates[2999] / rates[299] < 1.2 * 10**3


def test_alarm_lowers_the_rate_and_quiet_raises_it_again():
    tuner = tuners.self_tuning(0.0)
    steps = 2000
    losses = 1 + 0.1 * (-1.0) ** np.arange(steps)
    losses[100:140] += 2.0
    measured = [t == 0 for t in range(steps)]
    data = (losses, -np.ones(steps), np.ones(steps))
    rates, _ = run(tuner, np.asarray, *data, measured)
    assert rates[99] == rates[0] == 0.01
    assert min(rates) == pytest.approx(0.01 * math.exp(-2.5))
    assert rates[-1] == pytest.approx(0.01)


def test_outlier_does_not_blind_the_guard():
    """One loss of a million, then a real climb: the climb is still noticed."""
    tuner = tuners.self_tuning(0.0)
    rng = np.random.default_rng(1)
    losses = 1 + 0.1 * rng.standard_normal(200)
    losses[60] = 1e6
    losses[120:] += 3.0
    data = (losses, -np.ones(200), np.ones(200))
    rates, state = run(tuner, np.asarray, *data, [t == 0 for t in range(200)])
    assert rates[-1] < 0.2 * rates[110]
    assert float(state.spread) < 10


def test_ascent_lowers_the_rate_by_a_bounded_factor():
    tuner = tuners.self_tuning(0.0)
    _, state = run(tuner, np.asarray, [1.0], [-1.0], [2.0], [True])
    for _ in range(10):
        before = float(state.rate)
        rate, state = tuner.update(
            Measurement(np.asarray(1.0), np.asarray(1.0), np.asarray(2.0)), state
        )
        assert float(rate) == pytest.approx(before * math.exp(-0.25))


@pytest.mark.parametrize(
    ("value", "slope", "curvature", "first"),
    [
        (4.0, -2.0, 5.0, 0.01 * 2 / 5),
        (4.0, -2.0, -5.0, 0.01 * 2 / 5),
        (4.0, -2.0, 0.0, 0.01 * 4 / 2),
        (0.0, -2.0, 0.0, 0.0),
        (4.0, 0.0, 5.0, 0.0),
        (4.0, 2.0, 5.0, 0.0),
        (4.0, 0.0, 0.0, 0.0),
    ],
)
def test_first_rate(scalar, eps, value, slope, curvature, first):
    """Without a descent there is no rate yet; the first descent gives it."""
    tuner = tuners.self_tuning()
    model = Measurement(scalar(value), scalar(slope), scalar(curvature))
    rate, state = tuner.update(model, tuner.init(scalar(0.0)))
    assert float(rate) == pytest.approx(first, rel=8 * eps)
    if first == 0:
        held, state = tuner.observe(scalar(value), state)
        assert float(held) == 0
        model = Measurement(scalar(1.0), scalar(-1.0), scalar(1.0))
        rate, _ = tuner.update(model, state)
        assert float(rate) == pytest.approx(0.01, rel=8 * eps)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_observed_loss_that_is_not_finite_is_skipped(scalar, bad):
    tuner = tuners.self_tuning()
    model = Measurement(scalar(4.0), scalar(-2.0), scalar(5.0))
    _, state = tuner.update(model, tuner.init(scalar(0.0)))
    rate, after = tuner.observe(scalar(bad), state)
    assert float(rate) == 0
    assert after._replace(skipped=state.skipped) == state
    assert int(after.skipped) == 1
    rate, _ = tuner.observe(scalar(4.0), after)
    assert float(rate) == float(state.rate)


def test_rule_needs_the_loss():
    tuner = tuners.self_tuning()
    state = tuner.init(np.asarray(0.0))
    with pytest.raises(ValueError, match="Measurement.value, got None"):
        tuner.observe(None, state)
    with pytest.raises(ValueError, match="Measurement.value, got None"):
        tuner.update(Measurement(None, np.asarray(-1.0), np.asarray(1.0)), state)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, math.nan])
def test_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(ValueError, match="momentum must be in"):
        tuners.self_tuning(momentum)


@pytest.mark.parametrize("total", [0, -3])
def test_total_steps_out_of_range_is_refused(total):
    with pytest.raises(ValueError, match="total_steps must be an integer >= 1"):
        tuners.self_tuning(total_steps=total)


@pytest.mark.parametrize("total", [1.5, True, "10"])
def test_total_steps_of_another_type_is_refused(total):
    with pytest.raises(TypeError, match="total_steps must be an integer >= 1"):
        tuners.self_tuning(total_steps=total)


# The cooldown, around this tuner and others.


def test_cooldown_multiplies_the_rate_and_stops_measuring(scalar, eps):
    """Linear over the last 30 of 100 steps, then 0; step 70 is the first without a measurement."""
    tuner = tuners.self_tuning(total_steps=100)
    plain = tuners.self_tuning()
    assert [t for t in range(120) if tuner.measures(t)] == [
        t for t in range(70) if plain.measures(t)
    ]
    data = (np.ones(110), -np.ones(110), np.ones(110))
    measured = [bool(tuner.measures(t)) for t in range(110)]
    rates, state = run(tuner, scalar, *data, measured)
    free, _ = run(plain, scalar, *data, measured)
    expected = [rate * min(1, max(0, 100 - t) / 30) for t, rate in enumerate(free)]
    assert rates == pytest.approx(expected, rel=50 * eps)
    assert rates[100:] == [0.0] * 10
    assert (int(state.step), int(state.skipped)) == (110, 0)


def test_rate_only_falls_in_the_cooldown():
    """Before the factor: the alarm lowers it, but its recovery does not raise it."""
    tuner = tuners.with_cooldown(tuners.scheduled(lambda t: 1 + (t - 6) ** 2), 20, fraction=0.5)
    state, rates = tuner.init(np.asarray(0.0)), []
    for _ in range(20):
        rate, state = tuner.update(Measurement(None, None, None), state)
        rates.append(float(rate))
    assert rates[:10] == [1.0 + (t - 6) ** 2 for t in range(10)]
    assert rates[10:] == pytest.approx([10.0 * (20 - t) / 10 for t in range(10, 20)])


def test_cooldown_of_the_published_rule_holds_its_rate(scalar):
    """Between measurements and in the cooldown; skips count as steps."""
    tuner = tuners.with_cooldown(tuners.every(tuners.cdat(1.0, 0.0), 4), 10, fraction=0.5)
    assert [t for t in range(10) if tuner.measures(t)] == [0, 4]
    state, rates = tuner.init(scalar(0.0)), []
    for step in range(10):
        value = math.nan if step == 6 else 1.0
        if tuner.measures(step):
            model = Measurement(scalar(value), scalar(-1.0), scalar(step + 1.0))
            rate, state = tuner.update(model, state)
        else:
            rate, state = tuner.observe(scalar(value), state)
        rates.append(float(rate))
    held = [1.0] * 4 + [0.2] * 6
    factors = [1.0] * 6 + [0.0, 0.6, 0.4, 0.2]
    assert rates == pytest.approx([r * f for r, f in zip(held, factors, strict=True)], rel=1e-6)
    assert (int(state.step), int(state.skipped)) == (10, 1)
    rate, _ = tuner.observe(None, state)
    assert float(rate) == 0


def test_longer_run_moves_the_cooldown():
    """A state continues under another number of steps, as after a resume."""
    short, long = (tuners.self_tuning(0.0, n) for n in (40, 80))
    data = (np.ones(40), -np.ones(40), np.ones(40))
    measured = [bool(short.measures(t)) for t in range(40)]
    rates, state = run(short, np.asarray, *data, measured)
    assert rates[-1] < 0.1 * rates[20]
    rate, _ = long.observe(np.asarray(1.0), state)
    assert float(rate) == pytest.approx(float(state.rate))
    assert long.measures(48)
    assert not short.measures(32)


def test_cooldown_of_the_whole_dtype_and_a_batch(scalar, dtype):
    """The state keeps its dtypes; total_steps may be an array of another length per run."""
    tuner = tuners.with_cooldown(tuners.constant(1.0), np.asarray([2, 4]), fraction=0.5)
    state = tuner.init(np.zeros(2))
    rates = []
    for _ in range(4):
        rate, state = tuner.update(Measurement(None, None, None), state)
        rates.append(rate.tolist())
    assert rates == [[1.0, 1.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.5]]
    one = tuners.self_tuning(total_steps=5)
    rate, state = one.update(
        Measurement(scalar(1.0), scalar(-1.0), scalar(1.0)), one.init(scalar(0.0))
    )
    assert rate.dtype == state.rate.dtype == state.tuner_state.rate.dtype == dtype


def test_average_weight_is_that_of_the_closed_form():
    """The weight of iterate k in the average of T is that of Shamir and Zhang's scheme."""
    steps = 50
    weights = np.zeros(steps)
    for t in range(steps):
        weights *= 1 - tuners.average_weight(t)
        weights[t] = tuners.average_weight(t)
    assert weights.sum() == pytest.approx(1.0)
    expected = [math.comb(t + 8, 8) for t in range(steps)]
    assert weights == pytest.approx(np.array(expected) / sum(expected))


def test_every_is_a_schedule():
    tuner = tuners.every(tuners.self_tuning(), 5)
    assert [t for t in range(12) if tuner.measures(t)] == [0, 5, 10]
    third = tuners.every(tuners.cdat(), np.asarray(3)).measures(np.arange(4))
    assert third.tolist() == [True, False, False, True]
    with pytest.raises(ValueError, match="k must be an integer >= 1"):
        tuners.every(tuners.cdat(), 0)
