"""Tuned gradient descent through `scipy.optimize.minimize`."""

import re

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse.linalg
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import OptimizeResult, rosen, rosen_der, rosen_hess, rosen_hess_prod

from cdat_core import Measurement, linesearch, tuners
from cdat_core.scipy import as_linear_operator, from_linear_operator, minimize, tuned
from tests.examples import examples

GREEDY = tuners.quadratically_greedy()
SEARCH = linesearch.backtracking()
LONG = {"maxiter": 20_000}


class Counted:
    """A function that counts its calls and overwrites its argument."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, x, *args):
        self.calls += 1
        result = self.function(x, *args)
        x[...] = np.nan  # a method that relied on its own copy would notice
        return result


def bowl(x):
    return float(x @ x)


def bowl_der(x):
    return 2 * x


DERIVATIVES = {
    "hessp": {"jac": rosen_der, "hessp": rosen_hess_prod},
    "hess": {"jac": rosen_der, "hess": rosen_hess},
    "differences": {"jac": rosen_der},
}


@pytest.mark.parametrize("derivatives", DERIVATIVES.values(), ids=DERIVATIVES)
def test_rosenbrock_is_minimised(derivatives):
    result = minimize(rosen, [0.5, 0.5], tuner=GREEDY, options=LONG, **derivatives)
    assert (result.success, result.status) == (True, 0)
    assert np.max(np.abs(rosen_der(result.x))) <= 1e-5
    np.testing.assert_allclose(result.x, [1.0, 1.0], atol=1e-4)
    assert result.fun == rosen(result.x)
    np.testing.assert_array_equal(result.jac, rosen_der(result.x))


@pytest.mark.parametrize("tuner", [tuners.constant(1e-3), SEARCH], ids=["constant", "backtracking"])
def test_rosenbrock_is_minimised_without_curvature(tuner):
    result = minimize(rosen, [0.5, 0.5], tuner=tuner, jac=rosen_der, tol=1e-2, options=LONG)
    assert result.success
    assert np.max(np.abs(rosen_der(result.x))) <= 1e-2
    assert result.nhev == 0


@pytest.mark.parametrize("tuner", [GREEDY, SEARCH], ids=["greedy", "backtracking"])
@examples(20)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 8))
def test_convex_quadratic_equals_its_linear_solve(tuner, seed, n):
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((n, n))
    a, b = factor @ factor.T / n + np.eye(n), rng.standard_normal(n)
    result = minimize(
        lambda x: 0.5 * x @ a @ x + b @ x,
        rng.standard_normal(n),
        tuner=tuner,
        jac=lambda x: a @ x + b,
        hessp=lambda x, v: a @ v,
        tol=1e-6,
    )
    assert result.success
    # |x - x*| <= |gradient| / (smallest eigenvalue), and that is at least 1.
    np.testing.assert_allclose(result.x, np.linalg.solve(a, -b), atol=1e-6 * np.sqrt(n))


@pytest.mark.parametrize("kind", DERIVATIVES)
@pytest.mark.parametrize("tuner", [GREEDY, SEARCH], ids=["greedy", "backtracking"])
def test_calls_are_counted(kind, tuner):
    fun = Counted(rosen)
    derivatives = {name: Counted(f) for name, f in DERIVATIVES[kind].items()}
    result = minimize(fun, [0.5, 0.5], tuner=tuner, options={"maxiter": 20}, **derivatives)
    assert result.nit == 20
    assert result.nfev == fun.calls
    assert result.njev == derivatives["jac"].calls
    second = [counted.calls for name, counted in derivatives.items() if name != "jac"]
    assert [result.nhev] == (second or [0])
    if tuner is GREEDY:  # one value and gradient per point, one product per step
        assert result.nfev == 21
        assert (result.njev, result.nhev) == ((61, 0) if kind == "differences" else (21, 20))
    else:
        assert result.nfev > 21
        assert (result.njev, result.nhev) == (21, 0)


def test_jac_true_takes_both_from_one_function():
    calls = Counted(lambda x: (bowl(x), bowl_der(x)))
    result = minimize(calls, [3.0, 4.0], tuner=tuners.cdat(1.0), jac=True, hessp=lambda x, v: 2 * v)
    assert (result.success, result.nit, result.nfev, result.njev) == (True, 1, 2, 2)
    assert calls.calls == 2
    assert result.fun == 0


def test_further_arguments_reach_every_function():
    result = minimize(
        lambda x, a, b: float(a * x @ x + b),
        [1.0],
        (2.0, 5.0),
        tuner=GREEDY,
        jac=lambda x, a, b: 2 * a * x,
        hessp=lambda x, v, a, b: 2 * a * v,
    )
    assert (result.fun, result.nit) == (5.0, 1)


def test_callback_gets_the_iterates():
    seen = []
    result = minimize(rosen, [0.5, 0.5], tuner=GREEDY, jac=rosen_der, callback=seen.append, tol=5.0)
    assert len(seen) == result.nit > 1
    np.testing.assert_array_equal(seen[-1], result.x)
    assert len({tuple(x) for x in seen}) == len(seen)


def test_callback_gets_intermediate_results():
    seen = []

    def callback(intermediate_result):
        seen.append(intermediate_result)

    result = minimize(rosen, [0.5, 0.5], tuner=GREEDY, jac=rosen_der, callback=callback, tol=5.0)
    assert len(seen) == result.nit > 1
    assert all(isinstance(state, OptimizeResult) for state in seen)
    assert seen[-1].fun == result.fun
    np.testing.assert_array_equal(seen[-1].x, result.x)


@pytest.mark.parametrize("modern", [False, True])
def test_stop_iteration_ends_the_run(modern):
    calls = []

    def stop(x):
        calls.append(x)
        if len(calls) == 3:
            raise StopIteration

    def stop_modern(intermediate_result):
        stop(intermediate_result.x)

    callback = stop_modern if modern else stop
    result = minimize(rosen, [0.5, 0.5], tuner=GREEDY, jac=rosen_der, callback=callback)
    assert (result.success, result.status, result.nit) == (False, 99, 3)
    assert "StopIteration" in result.message
    np.testing.assert_array_equal(calls[-1], result.x)


def test_callback_cannot_change_the_iterate():
    def callback(x):
        x[...] = np.nan

    def spoil(intermediate_result):
        intermediate_result.x[...] = np.nan

    for spoiler in (callback, spoil):
        result = minimize(bowl, [3.0], tuner=GREEDY, jac=bowl_der, callback=spoiler)
        assert result.success


@pytest.mark.parametrize("maxiter", [0, 1, 7])
def test_iteration_limit(maxiter):
    result = minimize(rosen, [0.5, 0.5], tuner=GREEDY, jac=rosen_der, options={"maxiter": maxiter})
    assert (result.success, result.status, result.nit) == (False, 1, maxiter)
    assert result.message == "Maximum number of iterations has been exceeded."


def test_start_at_the_minimum_takes_no_step():
    result = minimize(rosen, [1.0, 1.0], tuner=GREEDY, jac=rosen_der)
    assert (result.success, result.nit, result.nfev, result.njev) == (True, 0, 1, 1)


def test_last_iterate_may_be_the_minimum():
    """Convergence at the iteration limit is convergence."""
    result = minimize(
        bowl, [3.0], tuner=GREEDY, jac=bowl_der, hessp=lambda x, v: 2 * v, options={"maxiter": 1}
    )
    assert (result.success, result.nit) == (True, 1)


@pytest.mark.parametrize("maxiter", [0, 1000])
@pytest.mark.parametrize("tuner", [GREEDY, SEARCH], ids=["greedy", "backtracking"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_objective_that_is_not_finite_at_the_start(tuner, value, maxiter):
    """Even where the gradient is zero, because that is no minimum."""
    for jac in (bowl_der, np.zeros_like):
        result = minimize(
            lambda x: value, [3.0], tuner=tuner, jac=jac, options={"maxiter": maxiter}
        )
        assert (result.success, result.status, result.nit) == (False, 3, 0)
        np.testing.assert_array_equal(result.x, [3.0])


@pytest.mark.parametrize("broken", ["jac", "hessp"])
def test_derivative_that_is_not_finite(broken):
    functions = {"jac": bowl_der, "hessp": lambda x, v: 2 * v}
    functions[broken] = lambda x, *v: x * np.nan
    result = minimize(bowl, [3.0], tuner=GREEDY, **functions)
    assert (result.success, result.status, result.nit) == (False, 3, 0)
    assert result.message == "The loss, its gradient or its curvature is not finite."
    np.testing.assert_array_equal(result.x, [3.0])


def test_objective_that_stops_being_finite_on_the_way():
    """A step that is too long leaves the domain of a logarithm; the search shrinks it."""

    def log_barrier(x):
        with np.errstate(invalid="ignore"):
            return float(np.sum(x - np.log(x)))

    def der(x):
        return 1 - 1 / x

    tuner = tuners.constant(1.0)
    result = minimize(log_barrier, [4.0], tuner=tuner, jac=der, options={"maxiter": 1})
    assert result.status == 1
    result = minimize(log_barrier, [4.0], tuner=tuners.constant(8.0), jac=der)
    assert (result.success, result.status, result.nit) == (False, 3, 1)
    assert np.all(np.isfinite(result.x))
    search = linesearch.backtracking(initial_step_size=8.0)
    assert minimize(log_barrier, [4.0], tuner=search, jac=der).x == pytest.approx(1.0, abs=1e-4)


def test_search_that_finds_no_lower_value():
    """With a gradient of the wrong sign."""
    result = minimize(bowl, [3.0], tuner=SEARCH, jac=lambda x: -2 * x)
    assert (result.success, result.status, result.nit) == (False, 2, 0)
    assert result.message == "The line search found no lower value."
    np.testing.assert_array_equal(result.x, [3.0])


@pytest.mark.parametrize("jac", [None, False, "2-point"])
def test_gradient_is_required(jac):
    with pytest.raises(ValueError, match=r"^jac must be the gradient function"):
        minimize(bowl, [3.0], tuner=GREEDY, jac=jac)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bounds", [(0, 1)]),
        ("bounds", scipy.optimize.Bounds(0, 1)),
        ("constraints", {"type": "eq", "fun": bowl}),
        ("constraints", [{"type": "eq", "fun": bowl}]),
        ("constraints", scipy.optimize.LinearConstraint([[1.0]], 0, 1)),
    ],
)
def test_bounds_and_constraints_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} are not supported.*, got "):
        scipy.optimize.minimize(bowl, [3.0], method=tuned(GREEDY), jac=bowl_der, **{name: value})


def test_shapes_of_the_functions_are_checked():
    with pytest.raises(ValueError, match=r"^fun must return a scalar, got .*\(2,\)"):
        minimize(lambda x: x, [3.0, 4.0], tuner=GREEDY, jac=bowl_der)
    with pytest.raises(ValueError, match=r"^jac must return .*\(2,\), got \(2, 1\)"):
        minimize(bowl, [3.0, 4.0], tuner=GREEDY, jac=lambda x: x[:, None])
    with pytest.raises(ValueError, match=r"same shape, got \(2,\) and \(1,\)"):
        minimize(bowl, [3.0, 4.0], tuner=GREEDY, jac=bowl_der, hessp=lambda x, v: v[:1])
    with pytest.raises(ValueError, match=r"^hess must be callable or None, got '2-point'"):
        minimize(bowl, [3.0], tuner=GREEDY, jac=bowl_der, hess="2-point")


@pytest.mark.parametrize("x0", [[1j], ["a"], [None], "12"])
def test_start_must_be_real(x0):
    with pytest.raises(TypeError, match="^x0 must hold real numbers, got "):
        minimize(bowl, x0, tuner=GREEDY, jac=bowl_der)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"maxiter": -1}, ValueError, "maxiter must be an integer >= 0, got -1"),
        ({"maxiter": 2.5}, TypeError, "maxiter must be an integer >= 0, got 2.5"),
        ({"gtol": -1e-3}, ValueError, "gtol must be a finite number >= 0, got -0.001"),
        ({"gtol": np.nan}, ValueError, "gtol must be a finite number >= 0, got nan"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        minimize(bowl, [3.0], tuner=GREEDY, jac=bowl_der, options=options)


@pytest.mark.parametrize("tuner", [GREEDY, tuners.polyak(f_min=100.0), tuners.constant(0.0)])
def test_a_rate_that_stays_zero_ends_the_run(tuner):
    """A straight line has no curvature; the loss is below f_min."""
    options = {"maxiter": 50}
    line = {"jac": np.ones_like, "hessp": lambda x, v: 0 * v}
    result = minimize(lambda x: float(np.sum(x)), [3.0], tuner=tuner, options=options, **line)
    assert not result.success
    assert (result.status, result.nit) == ((1, 50) if tuner.needs == frozenset() else (4, 0))
    if result.status == 4:
        assert "initial_learning_rate" in result.message


@pytest.mark.parametrize("x0", [[], [[1.0, 2.0]]])
def test_start_must_be_a_vector(x0):
    with pytest.raises(ValueError, match="x0"):
        minimize(bowl, x0, tuner=GREEDY, jac=bowl_der)


@pytest.mark.parametrize("rule", ["cdat", None, tuners.cdat])
def test_method_needs_a_tuner_or_a_line_search(rule):
    message = "^tuner_or_search must be a Tuner or a LineSearch, got " + re.escape(repr(rule))
    with pytest.raises(TypeError, match=message):
        tuned(rule)


@pytest.mark.parametrize("tuner", [GREEDY, SEARCH], ids=["greedy", "backtracking"])
@pytest.mark.parametrize(
    ("x0", "dtype"),
    [
        ([3, -4], np.float64),
        (np.array([3, -4]), np.float64),
        (3, np.float64),
        (3.0, np.float64),
        (np.float64(3.0), np.float64),
        (np.array([3, -4], np.float16), np.float32),
        (np.array([3, -4], np.float32), np.float32),
        (np.array([3, -4], np.float64), np.float64),
    ],
)
def test_dtype_of_the_start_is_that_of_the_result(tuner, x0, dtype):
    """Integers become float64; every function sees that dtype, and may return another."""
    seen = set()

    def fun(x):
        seen.add(x.dtype)
        return bowl(x)

    def jac(x):
        seen.add(x.dtype)
        return (2 * x).astype(np.float64)

    def hessp(x, v):
        seen.update([x.dtype, v.dtype])
        return (2 * v).astype(np.float64)

    result = minimize(fun, x0, tuner=tuner, jac=jac, hessp=hessp)
    assert result.success
    assert result.x.shape == (np.size(x0),)
    assert {result.x.dtype, result.jac.dtype, *seen} == {np.dtype(dtype)}
    assert isinstance(result.fun, float)
    assert isinstance(result.learning_rate, float)


@pytest.mark.parametrize("tuner", [GREEDY, tuners.cdat(), SEARCH], ids=["greedy", "cdat", "search"])
def test_both_doors_lead_to_the_same_run(tuner):
    arguments = {"jac": rosen_der, "hessp": rosen_hess_prod, "tol": 1e-3}
    options = {"maxiter": 50}
    direct = minimize(rosen, [0.5, 0.5], tuner=tuner, options=options, **arguments)
    method = scipy.optimize.minimize(
        rosen, [0.5, 0.5], method=tuned(tuner), options=options, **arguments
    )
    assert direct.keys() == method.keys()
    for name in direct:
        np.testing.assert_array_equal(direct[name], method[name])


def test_tolerance_stops_earlier():
    results = [
        minimize(rosen, [0.5, 0.5], tuner=GREEDY, jac=rosen_der, **tolerance)
        for tolerance in ({"tol": 1e-1}, {"options": {"gtol": 1e-1}}, {"options": LONG})
    ]
    assert results[0].nit == results[1].nit < results[2].nit
    assert np.max(np.abs(results[0].jac)) <= 1e-1


def test_start_is_not_modified():
    x0 = np.array([0.5, 0.5])
    result = minimize(rosen, x0, tuner=GREEDY, jac=rosen_der, options={"maxiter": 3})
    np.testing.assert_array_equal(x0, [0.5, 0.5])
    assert not np.shares_memory(result.x, x0)
    unmoved = minimize(bowl, np.zeros(1), tuner=GREEDY, jac=bowl_der)
    assert unmoved.nit == 0


def test_search_grows_its_first_guess_from_step_to_step():
    """On an endless slope every first trial is accepted."""
    search = linesearch.backtracking(initial_step_size=0.5, increase_factor=2.0)
    result = minimize(
        lambda x: float(np.sum(x)), [0.0], tuner=search, jac=np.ones_like, options={"maxiter": 4}
    )
    assert result.x == -(0.5 + 1 + 2 + 4)
    assert (result.learning_rate, result.nit) == (4.0, 4)


def test_accepted_trial_is_not_evaluated_again():
    """One loss at the start, one for each trial; of zoom also one gradient for each."""
    values, gradients = Counted(rosen), Counted(rosen_der)
    for search in (linesearch.backtracking(), linesearch.zoom()):
        values.calls = gradients.calls = 0
        result = minimize(values, [0.5, 0.5], tuner=search, jac=gradients, options={"maxiter": 1})
        start, down = np.array([0.5, 0.5]), -rosen_der([0.5, 0.5])
        measurement = Measurement(np.asarray(rosen(start)), np.asarray(-down @ down), None)
        trial = search.init(measurement, np.asarray(0.0))
        while not trial.done:
            there = start + trial.step_size * down
            slope = rosen_der(there) @ down
            trial = search.tell(trial, np.asarray(rosen(there)), np.asarray(slope))
        assert result.nit == 1
        assert values.calls == result.nfev == 1 + int(trial.trials)
        gradients_of_trials = int(trial.trials) if "slope" in search.trial_needs else 1
        assert gradients.calls == result.njev == 1 + gradients_of_trials


def test_zoom_minimises_rosenbrock():
    result = minimize(rosen, [0.5, 0.5], tuner=linesearch.zoom(), jac=rosen_der, options=LONG)
    assert result.success
    np.testing.assert_allclose(result.x, [1.0, 1.0], atol=1e-4)


def test_sharpness_rule_follows_the_largest_eigenvalue():
    """With sigma = 1 on a quadratic: gradient descent at 1 / lambda_max."""
    eigenvalues = np.array([0.5, 1.0, 2.0, 4.0])
    seen = []
    result = minimize(
        lambda x: 0.5 * float(x @ (eigenvalues * x)),
        np.ones(4),
        tuner=tuners.sharpness_edge(1.0),
        jac=lambda x: eigenvalues * x,
        hessp=lambda x, v: eigenvalues * v,
        callback=seen.append,
    )
    assert result.success
    np.testing.assert_allclose(seen[0], 1 - eigenvalues / 4.0, rtol=1e-12, atol=1e-12)
    assert result.learning_rate == pytest.approx(0.25, rel=1e-6)
    assert result.nhev <= 8 * result.nit


@examples(30)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 6))
def test_linear_operators_go_both_ways(seed, n):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((n, n))
    a = a + a.T
    operator = as_linear_operator(lambda v: a @ v, np.zeros(n))
    x = rng.standard_normal((n, 2))
    np.testing.assert_allclose(operator @ x, a @ x, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(operator.T @ x, a @ x, rtol=1e-13, atol=1e-13)
    for source in (operator, a, scipy.sparse.csr_array(a)):
        np.testing.assert_allclose(from_linear_operator(source)(x[:, 0]), a @ x[:, 0], atol=1e-13)


def test_linear_operator_of_arrays_of_any_shape():
    factor = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    operator = as_linear_operator(lambda v: factor * v, np.zeros((2, 3), np.float32))
    assert (operator.shape, operator.dtype) == ((6, 6), np.float32)
    np.testing.assert_array_equal(operator @ np.ones(6), factor.reshape(-1))
    back = from_linear_operator(operator)
    np.testing.assert_array_equal(back(np.ones((2, 3))), factor)
    largest = scipy.sparse.linalg.eigsh(operator, 1, return_eigenvectors=False)
    assert largest[0] == pytest.approx(6.0, rel=1e-6)


def test_linear_operators_of_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"operator must be square, got shape \(2, 3\)"):
        from_linear_operator(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"hvp must return an array of shape \(2,\), got \(1,\)"):
        as_linear_operator(lambda v: v[:1], np.zeros(2)) @ np.ones(2)
    with pytest.raises(TypeError, match="like must have a real floating dtype, got int64"):
        as_linear_operator(lambda v: v, np.zeros(2, np.int64))


def test_display(capsys):
    minimize(bowl, [3.0], tuner=GREEDY, jac=bowl_der, hessp=lambda x, v: 2 * v)
    assert capsys.readouterr().out == ""
    minimize(
        bowl, [3.0], tuner=GREEDY, jac=bowl_der, hessp=lambda x, v: 2 * v, options={"disp": True}
    )
    assert capsys.readouterr().out == ("Optimization terminated successfully. fun=0 nit=1 nfev=2\n")
