"""The joint model of learning rate and sharpness."""

import math

import numpy as np
import pytest

from cdat_core import dynamics, linesearch, tuners
from cdat_core.dynamics import JointModel, ModelState, simulate


def reference(sigma, steps, *, fixed_rate=None, lam=1.0, x=1e-3):
    """Return the sharpness along a run: the equations in Python floats."""
    tau, mu, g0, a, b = 500.0, 0.5, 0.05, 5e-3, 1.0
    found = [lam]
    for t in range(steps):
        s = 1 / (1 + t / tau)
        g = g0 * s
        n = lam**2 * x**2 + g**2
        d = lam**3 * x**2 + mu * g**2
        eta = sigma * n / d if fixed_rate is None else fixed_rate
        moved = (1 - eta * lam) * x
        lam = max(lam + eta * (a * s - b * x**2), 0.0)
        x = moved if abs(moved) >= 1e-6 else math.copysign(1e-6, moved)
        found.append(lam)
    return np.asarray(found)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.5])
def test_trajectory_follows_the_equations(sigma):
    run = simulate(tuners.cdat(sigma, decay=0.0), steps=2000)
    np.testing.assert_allclose(run.sharpness, reference(sigma, 2000), rtol=1e-6)
    run = simulate(tuners.constant(0.5), steps=2000)
    np.testing.assert_allclose(run.sharpness, reference(0, 2000, fixed_rate=0.5), rtol=1e-6)


EXPECTED = {  # sharpness after 2500 and 5000 steps, to two decimals, from an independent study
    "sigma 1": (tuners.quadratically_greedy(), 4.31, 4.96),
    "constant": (tuners.constant(0.5), 3.24, 4.00),
    "sigma 1.9": (tuners.cdat(1.9, decay=0.0), 0.80, 1.99),
    "sigma 2": (tuners.cdat(2.0, decay=0.0), 0.38, 0.41),
}


@pytest.mark.parametrize("rule", EXPECTED)
def test_sharpness_at_half_time_and_in_the_end(rule):
    tuner, half, end = EXPECTED[rule]
    run = simulate(tuner, steps=5000)
    assert (float(run.sharpness[2500]), float(run.sharpness[-1])) == pytest.approx(
        (half, end), abs=0.006
    )


def test_greedy_rules_sharpen_most_and_the_edge_least():
    rules = [tuners.quadratically_greedy(), tuners.constant(0.5), linesearch.backtracking()]
    rules += [tuners.cdat(1.9, decay=0.0), tuners.cdat(2.0, decay=0.0)]
    last = [float(simulate(rule, steps=5000).sharpness[-1]) for rule in rules]
    assert last == sorted(last, reverse=True)
    assert last[2] == pytest.approx(3.2, abs=0.05)  # Armijo; the last digit is that of its guesses


@pytest.mark.parametrize("sigma", [2.0625, 2.2, 3.0])
def test_sharpness_collapses_above_the_edge(sigma):
    run = simulate(tuners.cdat(sigma, decay=0.0), steps=5000)
    assert float(run.sharpness[-1]) == 0.0
    assert all(np.isfinite(field).all() for field in run)


@pytest.mark.parametrize("sigma", [1.0, 1.5, 1.9])
def test_tuned_rates_end_at_the_edge_of_stability(sigma):
    """Rate times sharpness settles at 2 for every sigma from 1 (greedy) to below 2."""
    run = simulate(tuners.cdat(sigma, decay=0.0), steps=5000)
    product = run.learning_rate * run.sharpness[:-1]
    assert np.median(product[-500:]) == pytest.approx(2.0, abs=0.01)


def test_oscillation_at_the_edge_has_the_size_that_balances_the_rate():
    """With eta * lam = 2 and lam fixed: lam**2 x**2 = G**2 (sigma - 2 mu / lam) / (2 - sigma)."""
    model = JointModel(progressive_sharpening=0.0, self_stabilization=0.0, decay_time=1e300)
    sigma, lam = 1.5, 3.0
    run = simulate(tuners.cdat(sigma, decay=0.0), steps=3000, sharpness=lam, model=model)
    expected = 0.05**2 * (sigma - 2 * 0.5 / lam) / (2 - sigma)
    assert (lam * float(run.displacement[-1])) ** 2 == pytest.approx(expected, rel=1e-6)
    assert float(run.learning_rate[-1]) * lam == pytest.approx(2.0, rel=1e-6)


RULES = {
    "cdat": tuners.cdat(1.5),
    "constant": tuners.constant(0.3),
    "polyak": tuners.polyak(),
    "sharpness-edge": tuners.sharpness_edge(1.9),
    "backtracking": linesearch.backtracking(),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_many_initial_conditions_at_once_equal_single_runs(rule, xp):
    sharpness = [[0.5, 1.0], [2.0, 4.0]]
    displacement = [1e-3, 0.1]
    together = simulate(
        rule,
        steps=50,
        sharpness=xp.asarray(sharpness, dtype=xp.float64),
        displacement=xp.asarray(displacement, dtype=xp.float64),
    )
    assert together.sharpness.shape == together.value.shape == (51, 2, 2)
    assert together.learning_rate.shape == (50, 2, 2)
    for i in range(2):
        for j in range(2):
            alone = simulate(
                rule, steps=50, sharpness=sharpness[i][j], displacement=displacement[j]
            )
            for many, one in zip(together, alone, strict=True):
                np.testing.assert_allclose(np.asarray(many[:, i, j]), one, rtol=1e-13)


def test_constants_of_the_model_may_be_arrays():
    sharpening = np.asarray([0.0, 5e-3])
    model = JointModel(progressive_sharpening=sharpening)
    run = simulate(tuners.constant(0.5), steps=100, model=model)
    single = simulate(tuners.constant(0.5), steps=100)
    np.testing.assert_array_equal(run.sharpness[:, 1], single.sharpness)
    assert run.sharpness[-1, 0] < 1.0 < run.sharpness[-1, 1]


def test_dtype_and_namespace_follow_like(xp, dtype):
    run = simulate(tuners.cdat(1.5), steps=5, like=xp.zeros((), dtype=dtype))
    assert all(field.dtype == dtype for field in run)
    assert all(isinstance(field, type(xp.zeros(()))) for field in run)


def test_displacement_stays_away_from_zero():
    state = ModelState(np.asarray(1e-3), np.asarray(2.0), np.asarray(0, dtype=np.int32))
    after = JointModel().advance(state, np.asarray(0.5))  # the exact minimum of the parabola
    assert abs(float(after.displacement)) == 1e-6
    assert int(after.step) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be an integer >= 1, got 0"),
        ({"steps": 1.5}, TypeError, "steps must be an integer >= 1, got 1.5"),
        ({"steps": 1, "sharpness": -1.0}, ValueError, "sharpness must be a finite number >= 0"),
        ({"steps": 1, "displacement": math.nan}, ValueError, "displacement must be a finite"),
        ({"steps": 1, "like": np.asarray(1)}, TypeError, "like must have a real floating dtype"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        simulate(tuners.cdat(), **arguments)


def test_what_is_no_rule_is_refused():
    with pytest.raises(TypeError, match="tuner must be a Tuner or a LineSearch, got 0.1"):
        simulate(0.1, steps=1)


def test_the_module_loads_no_numpy_by_itself():
    assert "numpy" not in vars(dynamics)
