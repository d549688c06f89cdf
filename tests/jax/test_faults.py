"""Non-finite steps move nothing; missing and wrong arguments are named in the error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cdat_core import linesearch, tuners
from cdat_jax import cdat, measure, scale_by_cdat, scale_by_tuner
from tests.jax.problems import factors, same, stepper

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOOD, *FAULTS = ("nothing", "value-nan", "value-inf", "grad-nan", "grad-inf", "curvature")


def faulty(loss):
    """Return `loss` with another argument that selects what is not finite, like a bad batch.

    Except for the faults themselves, the added terms are zero: at zero the square root has an
    infinite gradient, and the power 1.5 has a zero gradient and an infinite curvature.
    """

    def value_fn(params, batch, fault):
        leaf = params["outer"]
        offset = leaf - jax.lax.stop_gradient(leaf)
        terms = (
            lambda x: jnp.sum(0 * x),
            lambda x: jnp.nan + jnp.sum(0 * x),
            lambda x: jnp.inf + jnp.sum(0 * x),
            lambda x: jnp.sqrt(jnp.sum(x**2)),
            lambda x: jnp.sum(jnp.sqrt(x)),
            lambda x: jnp.sum(x**1.5),
        )
        return loss(params, batch) + jax.lax.switch(fault, terms, offset)

    return value_fn


SOLVERS = {
    "cdat": lambda: optax.chain(optax.sgd(1.0), scale_by_cdat(sigma=1.0)),
    "cdat-every": lambda: optax.chain(optax.sgd(1.0), scale_by_cdat(sigma=1.0, every=3)),
    "constant": lambda: optax.chain(optax.sgd(1.0), scale_by_tuner(tuners.constant(0.02))),
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), scale_by_tuner(linesearch.backtracking(initial_step_size=0.1))
    ),
    "wrapper": lambda: cdat(optax.adam(1.0), sigma=1.0, learning_rate=lambda step: 1 / (1 + step)),
}
MEASURING = {"cdat", "cdat-every", "wrapper"}


class Runner:
    """A solver with its compiled step."""

    def __init__(self, name):
        loss, self.params, self.batch = factors()
        self.name, self.solver = name, SOLVERS[name]()
        self.step = stepper(self.solver, faulty(loss))

    def run(self, faults):
        """Take one step for each fault; return parameters and state at the start and after each."""
        params, state = self.params, self.solver.init(self.params)
        trajectory = [(params, state)]
        for fault in faults:
            index = (GOOD, *FAULTS).index(fault)
            params, state = self.step(params, state, batch=self.batch, fault=index)
            trajectory.append((params, state))
        return trajectory

    def tuning(self, state):
        """Return the ScaleByTunerState."""
        return state.tuner if self.name == "wrapper" else state[1]


runner = functools.cache(Runner)  # one compilation for all faults
SEEN = [(name, fault) for name in SOLVERS for fault in FAULTS
        if fault != "curvature" or name in MEASURING]  # fmt: skip
TUNED = [(name, fault) for name, fault in SEEN if name != "backtracking"]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_faults_are_what_they_say(fault):
    loss, params, batch = factors()
    value_fn, index = faulty(loss), (GOOD, *FAULTS).index(fault)
    objective = lambda p: value_fn(p, batch, index)
    value, grad = jax.jit(jax.value_and_grad(objective))(params)
    direction = jax.tree.map(jnp.ones_like, params)
    curvature = jax.jit(lambda p, u: measure(objective, p, u).curvature)(params, direction)
    finite = [np.isfinite(value), np.isfinite(grad["outer"]).all(), np.isfinite(curvature)]
    position = ("value", "grad", "curvature").index(fault.split("-")[0])
    assert not finite[position]
    assert finite[:position] == [True] * position


@pytest.mark.parametrize(("name", "fault"), SEEN)
def test_a_bad_step_moves_nothing_and_is_counted(name, fault):
    """With ``every=3`` the fourth step measures the curvature again."""
    case = runner(name)
    *_, (params, state), (after, bad) = case.run([GOOD, GOOD, GOOD, fault])
    before, tuning = case.tuning(state), case.tuning(bad)
    assert same(after, params)
    assert (int(before.info.skipped), int(tuning.info.skipped)) == (0, 1)
    assert float(before.learning_rate) > 0
    assert float(tuning.learning_rate) == 0


@pytest.mark.parametrize(("name", "fault"), TUNED)
def test_a_bad_step_leaves_the_averages(name, fault):
    case = runner(name)
    *_, (_, state), (_, bad) = case.run([GOOD, GOOD, GOOD, fault])
    before, after = (case.tuning(s).tuner_state for s in (state, bad))
    assert same(after._replace(skipped=before.skipped), before)
    assert int(after.skipped) == 1


@pytest.mark.parametrize("fault", FAULTS)
def test_the_wrapper_keeps_its_base_from_a_bad_step(fault):
    *_, (_, state), (_, bad) = runner("wrapper").run([GOOD, GOOD, fault])
    assert same((bad.base, bad.step), (state.base, state.step))


@pytest.mark.parametrize(("name", "fault"), TUNED)
def test_the_next_good_step_is_as_if_the_bad_ones_had_not_been(name, fault):
    case = runner(name)
    broken, state = case.run([GOOD, GOOD, GOOD, fault, fault, GOOD])[-1]
    whole, expected = case.run([GOOD, GOOD, GOOD, GOOD])[-1]
    assert same(broken, whole)
    assert int(case.tuning(state).info.skipped) == 2
    assert same(case.tuning(state).learning_rate, case.tuning(expected).learning_rate)
    if name == "wrapper":
        assert same((state.base, state.step), (expected.base, expected.step))


@pytest.mark.parametrize(("name", "fault"), SEEN)
def test_a_run_that_begins_badly_recovers(name, fault):
    case = runner(name)
    params, state = case.run([fault, GOOD])[-1]
    assert same(params, case.run([GOOD])[-1][0])
    assert int(case.tuning(state).info.skipped) == 1


@pytest.mark.parametrize("name", sorted(SOLVERS.keys() - MEASURING))
def test_a_curvature_that_is_not_needed_may_be_infinite(name):
    case = runner(name)
    params, state = case.run([GOOD, "curvature"])[-1]
    assert same(params, case.run([GOOD, GOOD])[-1][0])
    assert int(case.tuning(state).info.skipped) == 0


@pytest.mark.parametrize("fault", FAULTS[:-1])
def test_a_search_starts_from_its_first_guess_after_a_bad_step(fault):
    """Without the bad step the guess would have grown from 0.1 by the factor 1.5."""
    case = runner("backtracking")
    states = [case.tuning(state) for _, state in case.run([GOOD, fault, GOOD])]
    rates = [float(state.learning_rate) for state in states]
    assert rates == pytest.approx([0.0, 0.1, 0.0, 0.1])
    unbroken = case.tuning(case.run([GOOD, GOOD])[-1][1])
    assert float(unbroken.learning_rate) == pytest.approx(0.15)


@pytest.mark.parametrize(
    "build",
    [
        lambda: scale_by_cdat(sigma=2.0),
        lambda: scale_by_cdat(sigma=2.0, every=2),
        lambda: scale_by_tuner(tuners.constant(0.1)),
        lambda: scale_by_tuner(linesearch.backtracking()),
    ],
    ids=["cdat", "cdat-every", "constant", "backtracking"],
)
def test_a_direction_that_is_not_finite_never_reaches_the_parameters(build):
    """Also if the gradient is zero, because 0 * inf is NaN."""
    loss = lambda w: jnp.sum((w - 1) ** 2)
    solver = build()

    @jax.jit
    def update(params, direction, state):
        value, grad = jax.value_and_grad(loss)(params)
        return solver.update(direction, state, params, value=value, grad=grad, value_fn=loss)

    for params in ([0.0, 1.0], [0.0, 1.5]):
        params, good = jnp.asarray(params), jnp.asarray([1.0, -1.0])
        _, state = update(params, good, solver.init(params))
        for bad in (np.nan, np.inf, -np.inf):
            updates, after = update(params, jnp.asarray([1.0, bad]), state)
            assert np.array_equal(updates, [0.0, 0.0])
            assert (int(state.info.skipped), int(after.info.skipped)) == (0, 1)
            updates, _ = update(params, good, after)
            assert np.isfinite(updates).all()
            assert updates[0] > 0


def arguments(**changes):
    """Return the keyword arguments of an update, some changed, or left out by ``...``."""
    ones = jnp.ones(2)
    keywords = {"value": 1.0, "grad": ones, "value_fn": lambda w: jnp.sum(w**2)} | changes
    return {name: value for name, value in keywords.items() if value is not ...}


TRANSFORMATIONS = {
    "scale_by_cdat": lambda: scale_by_cdat(sigma=2.0),
    "scale_by_tuner": lambda: scale_by_tuner(linesearch.backtracking()),
    "chain": lambda: optax.chain(optax.sgd(1.0), scale_by_cdat(sigma=2.0)),
    "cdat": lambda: cdat(optax.sgd(1.0), sigma=2.0),
}
transformations = pytest.mark.parametrize(
    "build", list(TRANSFORMATIONS.values()), ids=list(TRANSFORMATIONS)
)


@transformations
@pytest.mark.parametrize("name", ["value", "grad", "value_fn"])
def test_a_missing_argument_is_named(build, name):
    solver, params = build(), jnp.ones(2)
    with pytest.raises(TypeError, match=rf"missing 1 required .*'{name}'"):
        solver.update(params, solver.init(params), params, **arguments(**{name: ...}))


@transformations
def test_missing_parameters_are_reported_in_the_words_of_optax(build):
    solver, params = build(), jnp.ones(2)
    with pytest.raises(ValueError, match="not passing `params`") as caught:
        solver.update(params, solver.init(params), **arguments())
    with pytest.raises(ValueError, match="params") as theirs:
        optax.scale_by_trust_ratio().update(params, optax.EmptyState(), None)
    assert str(caught.value) == str(theirs.value)


@transformations
def test_a_value_must_be_a_scalar(build):
    solver, params = build(), jnp.ones(2)
    with pytest.raises(ValueError, match=r"value must be a scalar, got shape \(2,\)"):
        solver.update(params, solver.init(params), params, **arguments(value=jnp.ones(2)))


def test_an_objective_must_return_a_scalar():
    solver, params = scale_by_cdat(sigma=2.0), jnp.ones(2)
    with pytest.raises(ValueError, match="value_fn must return a scalar"):
        solver.update(params, solver.init(params), params, **arguments(value_fn=lambda w: w))


@transformations
def test_a_gradient_of_other_shapes_is_refused(build):
    solver, params = build(), jnp.ones(2)
    with pytest.raises(ValueError, match=r"grad must have the shapes of params, got \(1,\)"):
        solver.update(params, solver.init(params), params, **arguments(grad=jnp.ones(1)))


@pytest.mark.parametrize("rule", [42, "cdat", None, tuners.cdat])
def test_anything_but_a_tuner_or_search_is_refused(rule):
    with pytest.raises(TypeError, match="tuner_or_search must be a cdat_core Tuner or LineSearch"):
        scale_by_tuner(rule)


@pytest.mark.parametrize("build", [scale_by_cdat, lambda **kw: cdat(optax.sgd(1.0), **kw)])
@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be an integer >= 1, got 0"),
        ({"every": -2}, ValueError, "every must be an integer >= 1, got -2"),
        ({"every": 2.0}, TypeError, "every must be an integer >= 1, got 2.0"),
        ({"every": True}, TypeError, "every must be an integer >= 1, got True"),
        ({"sigma": -1.5}, ValueError, "sigma must be a finite number > 0, got -1.5"),
        ({"sigma": np.nan}, ValueError, "sigma must be a finite number > 0, got nan"),
        ({"decay": 1.0}, ValueError, r"decay must be in \[0, 1\), got 1.0"),
        ({"eps": -1e-8}, ValueError, "eps must be a finite number >= 0, got -1e-08"),
        ({"max_growth": 0.5}, ValueError, "max_growth must be a finite number >= 1, got 0.5"),
        ({"sigma": "2"}, TypeError, "sigma must be a real number or a 0-d array, got '2'"),
    ],
)
def test_bad_hyperparameters_are_named_with_their_value(build, keywords, error, message):
    with pytest.raises(error, match=message):
        build(**keywords)


@pytest.mark.parametrize("rate", [-0.5, np.inf])
def test_a_bad_multiplier_is_named(rate):
    with pytest.raises(ValueError, match="learning_rate must be a finite number >= 0"):
        cdat(optax.sgd(1.0), learning_rate=rate)


def switching(params, straight):
    """Return a bowl, or if `straight` a plane without curvature."""
    return jnp.where(straight, jnp.sum(params), jnp.sum(params**2))


@pytest.mark.parametrize("initial", [None, 0.01])
def test_zero_curvature_holds_the_rate(initial):
    """Before any curvature is known the rate is the initial one, or 0."""
    solver = optax.chain(optax.sgd(1.0), scale_by_cdat(initial_learning_rate=initial, sigma=1.0))
    step, params = stepper(solver, switching), jnp.ones(3)
    state, rates = solver.init(params), []
    for straight in (True, False, True, True, False):
        params, state = step(params, state, straight=straight)
        rates.append(float(state[1].learning_rate))
    bowl = 0.5 if initial is None else 0.01
    assert rates[:4] == pytest.approx([initial or 0.0, bowl, bowl, bowl])
    assert int(state[1].info.skipped) == 0
    assert np.isfinite(params).all()
