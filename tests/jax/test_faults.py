"""What is not finite, missing or wrong: no such step moves the parameters, and errors have names."""

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
    """Return `loss` with a further argument that picks what is not finite, as a bad batch would.

    Each term is zero, or has a zero gradient, at the point where it is evaluated: the square root
    has an infinite gradient there, the power 1.5 a finite gradient and an infinite curvature.
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

    def sees(self, fault):
        return fault != "curvature" or self.name in MEASURING


@pytest.fixture(scope="module", params=list(SOLVERS))
def runner(request, strict_jax, quick_compilation):
    return Runner(request.param)


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


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_step_moves_nothing_and_is_counted(runner, fault):
    # Where the curvature is refreshed every third step, the fourth step measures it again.
    *_, (params, state), (after, bad) = runner.run([GOOD, GOOD, GOOD, fault])
    if not runner.sees(fault):
        assert int(runner.tuning(bad).info.skipped) == 0
        return
    assert same(after, params)
    before, tuning = runner.tuning(state), runner.tuning(bad)
    assert (int(before.info.skipped), int(tuning.info.skipped)) == (0, 1)
    assert float(before.learning_rate) > 0
    assert float(tuning.learning_rate) == 0
    if runner.name == "wrapper":
        assert same((bad.base, bad.step), (state.base, state.step))
    if runner.name != "backtracking":
        assert int(tuning.tuner_state.skipped) == 1
        zero = jnp.zeros_like(before.tuner_state.skipped)
        assert same(
            tuning.tuner_state._replace(skipped=zero), before.tuner_state._replace(skipped=zero)
        )


@pytest.mark.parametrize("fault", FAULTS)
def test_the_next_good_step_is_the_one_that_would_have_been(runner, fault):
    if not runner.sees(fault) or runner.name == "backtracking":
        return
    broken = runner.run([GOOD, GOOD, GOOD, fault, fault, GOOD])[-1]
    whole = runner.run([GOOD, GOOD, GOOD, GOOD])[-1]
    assert same(broken[0], whole[0])
    assert float(runner.tuning(broken[1]).learning_rate) > 0
    assert int(runner.tuning(broken[1]).info.skipped) == 2
    assert same(runner.tuning(broken[1]).learning_rate, runner.tuning(whole[1]).learning_rate)
    if runner.name == "wrapper":
        assert same((broken[1].base, broken[1].step), (whole[1].base, whole[1].step))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_search_starts_over_after_a_bad_step(fault):
    runner = Runner("backtracking")
    trajectory = runner.run([GOOD, GOOD, GOOD, fault, GOOD])
    (params, _), (after, state) = trajectory[-2:]
    tuning = runner.tuning(state)
    assert not same(after, params)
    assert int(tuning.info.skipped) == int(runner.sees(fault) and fault != "curvature")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_that_begins_badly_recovers(runner, fault):
    if runner.name == "cdat-every" or not runner.sees(fault):
        return
    params, state = runner.run([fault, GOOD])[-1]
    expected, _ = runner.run([GOOD])[-1]
    assert same(params, expected)
    assert int(runner.tuning(state).info.skipped) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("build", [lambda: scale_by_cdat(), lambda: scale_by_cdat(every=2),
    lambda: scale_by_tuner(tuners.constant(0.1)), lambda: scale_by_tuner(linesearch.backtracking())],
    ids=["cdat", "cdat-every", "constant", "backtracking"])  # fmt: skip
@pytest.mark.parametrize("slope", [0.0, 1.0], ids=["zero-gradient", "gradient"])
def test_a_direction_that_is_not_finite_never_reaches_the_parameters(build, bad, slope):
    """Not even where the gradient is zero: 0 * inf is NaN."""
    loss = lambda w: jnp.sum((w - 1) ** 2)
    params = jnp.asarray([0.0, 1.0 + slope / 2])
    solver = build()

    @jax.jit
    def update(direction, state):
        value, grad = jax.value_and_grad(loss)(params)
        return solver.update(direction, state, params, value=value, grad=grad, value_fn=loss)

    _, state = update(jnp.asarray([1.0, -1.0]), solver.init(params))
    updates, after = update(jnp.asarray([1.0, bad]), state)
    assert np.array_equal(updates, [0.0, 0.0])
    assert (int(state.info.skipped), int(after.info.skipped)) == (0, 1)
    updates, _ = update(jnp.asarray([1.0, -1.0]), after)
    assert np.isfinite(updates).all()
    assert updates[0] > 0


def arguments(**changes):
    """Return positional and keyword arguments of an update, with some changed or left out (...)."""
    ones = jnp.ones(2)
    keywords = {"value": 1.0, "grad": ones, "value_fn": lambda w: jnp.sum(w**2)} | changes
    return {name: value for name, value in keywords.items() if value is not ...}


TRANSFORMATIONS = {
    "scale_by_cdat": lambda: scale_by_cdat(),
    "scale_by_tuner": lambda: scale_by_tuner(linesearch.backtracking()),
    "chain": lambda: optax.chain(optax.sgd(1.0), scale_by_cdat()),
    "cdat": lambda: cdat(optax.sgd(1.0)),
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
        optax.add_decayed_weights(0.1).update(params, optax.EmptyState())
    assert str(caught.value) == str(theirs.value)


@transformations
def test_a_value_must_be_a_scalar(build):
    solver, params = build(), jnp.ones(2)
    with pytest.raises(ValueError, match=r"value must be a scalar, got shape \(2,\)"):
        solver.update(params, solver.init(params), params, **arguments(value=jnp.ones(2)))


def test_an_objective_must_return_a_scalar():
    solver, params = scale_by_cdat(), jnp.ones(2)
    with pytest.raises(ValueError, match="value_fn must return a scalar"):
        solver.update(params, solver.init(params), params, **arguments(value_fn=lambda w: w))


@transformations
def test_a_gradient_of_other_shapes_is_refused(build):
    solver, params = build(), jnp.ones(2)
    with pytest.raises(ValueError, match="leaves of the same shape"):
        solver.update(params, solver.init(params), params, **arguments(grad=jnp.ones(1)))


@pytest.mark.parametrize("rule", [42, "cdat", None, tuners.cdat])
def test_what_is_no_tuner_is_refused(rule):
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


@pytest.mark.parametrize("checks", ["jax_debug_nans", "jax_debug_infs"])
@pytest.mark.parametrize("name", list(SOLVERS))
def test_finite_data_make_no_nan_on_the_way(checks, name):
    """Neither do safe divisions leave a NaN in the branch that is not taken."""
    loss, params, batch = factors()
    solver = SOLVERS[name]()
    before = jax.config.values[checks]
    jax.config.update(checks, True)
    try:
        step, state = stepper(solver, loss), solver.init(params)
        for _ in range(20):
            params, state = step(params, state, batch=batch)
    finally:
        jax.config.update(checks, before)
    assert loss(params, batch) < 0.5 * loss(factors()[1], batch)


def switching(params, straight):
    """A bowl, or (straight) a plane of no curvature."""
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


@pytest.mark.parametrize("name", list(SOLVERS))
def test_no_tracer_leaks(name):
    loss, params, batch = factors()
    solver = SOLVERS[name]()
    with jax.checking_leaks():
        moved, _ = stepper(solver, loss)(params, solver.init(params), batch=batch)
    assert not same(moved, params)
