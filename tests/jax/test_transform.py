"""The transformation in a training loop: swapped for Optax's searches, jitted, scanned, mapped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cdat_core
from cdat_core import linesearch, tuners
from cdat_jax import ScaleByTunerState, scale_by_cdat, scale_by_tuner
from tests.jax.problems import factors, quadratic, stepper, train

pytestmark = pytest.mark.usefixtures("quick_compilation")

OURS = {
    "cdat": lambda: scale_by_cdat(sigma=1.0),
    "cdat-every": lambda: scale_by_cdat(sigma=1.0, every=3),
    "constant": lambda: scale_by_tuner(tuners.constant(0.02)),
    "backtracking": lambda: scale_by_tuner(linesearch.backtracking()),
}
ours = pytest.mark.parametrize("build", list(OURS.values()), ids=list(OURS))


@pytest.mark.parametrize(
    "search",
    [lambda: optax.scale_by_backtracking_linesearch(50), *OURS.values()],
    ids=["optax", *OURS],
)
def test_the_same_loop_runs_with_optax_and_with_ours(search):
    """The one-line swap: only the second member of the chain differs."""
    loss, params, batch = factors()
    trajectory = train(optax.chain(optax.sgd(1.0), search()), loss, params, 30, batch=batch)
    assert loss(trajectory[-1][0], batch) < 0.6 * loss(params, batch)
    assert all(0 < state[1].learning_rate < np.inf for _, state in trajectory)


def test_backtracking_takes_the_steps_of_optax():
    """The rules agree if the constants do and no rounding is allowed for."""
    loss, params, batch = factors()
    search = linesearch.backtracking(max_step_size=1.0, value_rtol=0.0)
    theirs = optax.scale_by_backtracking_linesearch(50)
    both = [
        train(optax.chain(optax.sgd(4.0), second), loss, params, 15, batch=batch)
        for second in (scale_by_tuner(search), theirs)
    ]
    rates = [[float(state[1].learning_rate) for _, state in run] for run in both]
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)
    assert len(set(rates[0])) > 3


@pytest.mark.parametrize("base", [optax.sgd(1.0), optax.adam(1.0)], ids=["sgd", "adam"])
def test_sigma_one_steps_to_the_minimum_along_the_update(base):
    loss, params, hessian, minimiser = quadratic()
    ((after, state),) = train(optax.chain(base, scale_by_cdat(sigma=1.0)), loss, params, 1)
    gradient, moved = hessian @ (after - minimiser), after - params
    length = np.linalg.norm(gradient) * np.linalg.norm(moved)
    assert abs(gradient @ moved) < 1e-13 * length
    assert float(loss(after)) < float(loss(params))
    assert float(state[1].info.value) == pytest.approx(float(loss(params)), rel=1e-14)


def test_sigma_two_returns_to_the_same_loss():
    loss, params, _, _ = quadratic()
    ((after, _),) = train(optax.chain(optax.sgd(1.0), scale_by_cdat(sigma=2.0)), loss, params, 1)
    assert float(loss(after)) == pytest.approx(float(loss(params)), rel=1e-12)
    assert not np.allclose(after, params)


def test_complex_parameters_train_as_their_real_and_imaginary_parts():
    """JAX's gradient of a complex parameter is the conjugate of the descent direction."""
    weights, target = np.linspace(1, 4, 3), np.asarray([1 + 1j, -2j, 0.5])
    loss = lambda z: jnp.sum(weights * jnp.abs(z - target) ** 2)
    parts = lambda p: loss(p[0] + 1j * p[1])
    conjugate = optax.stateless(lambda updates, _: jax.tree.map(jnp.conj, updates))
    z = jnp.asarray([0.1 + 0j, 1.0 - 1j, 2j])
    for second in (scale_by_cdat(sigma=1.0), scale_by_tuner(linesearch.backtracking())):
        solver = optax.chain(conjugate, optax.sgd(1.0), second)
        as_complex = train(solver, loss, z, 5)
        as_real = train(solver, parts, jnp.stack([z.real, z.imag]), 5)
        for (left, state), (right, expected) in zip(as_complex, as_real, strict=True):
            np.testing.assert_allclose(left, right[0] + 1j * right[1], rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose(state[2].learning_rate, expected[2].learning_rate)
            assert state[2].learning_rate.dtype == jnp.float64


def test_bfloat16_parameters_are_tuned_in_float32():
    loss, params, batch = factors(jnp.bfloat16)
    ((_, state),) = train(
        optax.chain(optax.sgd(1.0), scale_by_cdat(sigma=1.0)), loss, params, 1, batch=batch
    )
    exact = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    ((_, expected),) = train(
        optax.chain(optax.sgd(1.0), scale_by_cdat(sigma=1.0)), loss, exact, 1, batch=batch
    )
    rate, wanted = state[1].learning_rate, float(expected[1].learning_rate)
    assert rate.dtype == jnp.float32
    assert float(rate) == pytest.approx(wanted, rel=0.05)
    assert float(rate) != float(rate.astype(jnp.bfloat16))


def test_mapping_over_sigma_equals_separate_runs():
    loss, params, batch = factors()
    sigmas = jnp.asarray([0.5, 1.0, 1.9])

    @jax.jit
    def run(sigma):
        solver = optax.chain(optax.sgd(1.0), scale_by_cdat(sigma=sigma))
        step = stepper(solver, loss)
        body = lambda carry, _: (step(*carry, batch=batch), None)
        return jax.lax.scan(body, (params, solver.init(params)), length=5)[0]

    mapped = jax.vmap(run)(sigmas)
    for index, sigma in enumerate(sigmas):
        single = run(sigma)
        for x, y in zip(jax.tree.leaves(mapped), jax.tree.leaves(single), strict=True):
            np.testing.assert_allclose(x[index], y, rtol=1e-10, atol=1e-12)


def observed(loss):
    """Return `loss` as an objective that records the ``step`` in which it is evaluated."""
    seen = set()

    def value_fn(params, batch, step):
        jax.debug.callback(lambda step: seen.add(int(step)), step)
        return loss(params, batch)

    return value_fn, seen


def measured_steps(solver, scales):
    """Train with the values multiplied by `scales`; return the steps measured and the rates."""
    loss, params, batch = factors()
    value_fn, seen = observed(loss)

    @jax.jit
    def step(params, state, index, scale):
        value, grad = jax.value_and_grad(loss)(params, batch)
        updates, state = solver.update(
            grad, state, params,
            value=scale * value, grad=grad, value_fn=value_fn, batch=batch, step=index,
        )  # fmt: skip
        return optax.apply_updates(params, updates), state

    state, rates = solver.init(params), []
    for index, scale in enumerate(scales):
        params, state = step(params, state, index, scale)
        rates.append(float(state[1].learning_rate))
    jax.effects_barrier()
    return seen, rates


@pytest.mark.parametrize("every", [1, 3, 4])
def test_curvature_is_measured_every_so_many_steps_and_held_between(every):
    solver = optax.chain(optax.sgd(1.0), scale_by_cdat(sigma=1.0, every=every))
    seen, rates = measured_steps(solver, np.ones(10))
    assert seen == set(range(0, 10, every))
    assert all(rates[index] == rates[index - index % every] > 0 for index in range(10))
    assert len(set(rates)) == len(seen)


def products(traced):
    """Return the number of matrix products outside of conditions, and in each of their branches."""
    outside, branches = 0, []
    for equation in getattr(getattr(traced, "jaxpr", traced), "eqns", ()):
        if equation.primitive.name == "cond":
            inside = [products(branch) for branch in equation.params["branches"]]
            branches += [number + sum(further) for number, further in inside]
            continue
        outside += equation.primitive.name == "dot_general"
        for inner in jax.tree.leaves(list(equation.params.values())):
            number, further = products(inner)
            outside, branches = outside + number, branches + further
    return outside, branches


@pytest.mark.parametrize("method", ["forward", "hvp", "finite_difference"])
def test_a_step_without_a_measurement_does_not_compute_one(method):
    """The measurement is in one branch of a condition, in the compiled program too.

    Under jax.vmap the condition differs between the runs, so both branches are computed.
    """
    loss, params, _, _ = quadratic()
    solver = scale_by_cdat(sigma=2.0, every=3, curvature=method)
    state, value = solver.init(params), jnp.asarray(1.0)

    def update(params, state):
        return solver.update(-params, state, params, value=value, grad=params, value_fn=loss)

    outside, branches = products(jax.make_jaxpr(update)(params, state))
    assert (outside, min(branches)) == (0, 0)
    assert len(branches) == 2
    assert max(branches) >= 4  # the loss alone has two
    assert "conditional" in jax.jit(update).lower(params, state).compile().as_text()

    together = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (params, state))
    outside, branches = products(jax.make_jaxpr(jax.vmap(update))(*together))
    assert branches == []
    assert outside >= 4


def test_a_skipped_measurement_is_repeated_in_the_next_step():
    solver = optax.chain(optax.sgd(1.0), scale_by_cdat(sigma=1.0, every=4))
    scales = np.ones(12)
    scales[[2, 4, 5]] = np.nan
    seen, rates = measured_steps(solver, scales)
    # 0 and its hold with a skip at 2, the measurement of 4 skipped twice and made in 6, 8
    assert seen == {0, 4, 5, 6, 8}
    assert [index for index, rate in enumerate(rates) if rate == 0] == [2, 4, 5]
    assert rates[0] == rates[1] == rates[3]
    assert rates[6] == rates[7] != rates[3]
    assert rates[8] == rates[9] == rates[10] == rates[11] != rates[7]


def test_a_tuner_that_needs_no_curvature_does_not_pay_for_it():
    solver = optax.chain(optax.sgd(1.0), scale_by_tuner(tuners.constant(0.1)))
    seen, rates = measured_steps(solver, np.ones(3))
    assert seen == set()
    assert rates == [0.1] * 3


@pytest.mark.parametrize("base", [optax.sgd, optax.adam, optax.rmsprop])
def test_constant_tuner_is_plain_optax(base):
    loss, params, batch = factors()
    tuned = optax.chain(base(1.0), scale_by_tuner(tuners.constant(0.03)))
    plain = optax.with_extra_args_support(base(0.03))
    left = train(tuned, loss, params, 5, batch=batch)[-1][0]
    right = train(plain, loss, params, 5, batch=batch)[-1][0]
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_max_ulp(x, y, maxulp=4)


def test_scheduled_tuner_is_plain_optax():
    """In float32, the precision in which Optax evaluates a schedule."""
    loss, params, batch = factors(jnp.float32)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 10)
    tuned = optax.chain(optax.sgd(1.0), scale_by_tuner(tuners.scheduled(schedule)))
    plain = optax.with_extra_args_support(optax.sgd(schedule))
    left = train(tuned, loss, params, 10, batch=batch)
    right = train(plain, loss, params, 10, batch=batch)
    rates = [float(state[1].learning_rate) for _, state in left]
    assert rates == pytest.approx([float(schedule(step)) for step in range(10)], rel=1e-6)
    for x, y in zip(jax.tree.leaves(left[-1][0]), jax.tree.leaves(right[-1][0]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def test_backtracking_equals_the_core_search_driven_by_hand():
    """The accepted step also meets the Armijo condition."""
    loss, params, hessian, minimiser = quadratic()
    search = linesearch.backtracking(initial_step_size=8.0, decrease_factor=0.7)
    solver = optax.chain(optax.sgd(1.0), scale_by_tuner(search))
    w, previous = np.asarray(params), None

    def value_at(point):
        return 0.5 * (point - minimiser) @ (hessian @ (point - minimiser))

    for after, state in train(solver, loss, params, 8):
        gradient = hessian @ (w - minimiser)
        slope = np.asarray(-gradient @ gradient)
        measurement = cdat_core.Measurement(np.asarray(value_at(w)), slope, None)
        trial = search.init(measurement, np.zeros(()), previous)
        while not trial.done:
            trial = search.tell(trial, np.asarray(value_at(w - trial.step_size * gradient)))
        rate = float(state[1].learning_rate)
        assert rate == pytest.approx(float(trial.step_size), rel=1e-12)
        assert int(state[1].tuner_state.trials) == int(trial.trials)
        assert not state[1].tuner_state.failed
        bound = value_at(w) + 1e-4 * rate * slope
        assert value_at(np.asarray(after)) <= bound + 4e-16 * abs(value_at(w))
        w, previous = np.asarray(after), trial.step_size


def test_first_guess_of_a_search_grows_from_the_last_step():
    loss, params, _, _ = quadratic()
    search = linesearch.backtracking(initial_step_size=1e-4, increase_factor=1.5)
    trajectory = train(optax.chain(optax.sgd(1.0), scale_by_tuner(search)), loss, params, 6)
    rates = [float(state[1].learning_rate) for _, state in trajectory]
    assert rates == pytest.approx([1e-4 * 1.5**step for step in range(6)], rel=1e-12)
    assert all(int(state[1].tuner_state.trials) == 1 for _, state in trajectory)


def test_state_shows_the_last_measurement():
    loss, params, hessian, minimiser = quadratic()
    ((_, (_, state)),) = train(
        optax.chain(optax.sgd(1.0), scale_by_cdat(sigma=2.0)), loss, params, 1
    )
    gradient = hessian @ (np.asarray(params) - minimiser)
    assert isinstance(state, ScaleByTunerState)
    assert float(state.info.value) == pytest.approx(float(loss(params)))
    assert float(state.info.slope) == pytest.approx(-gradient @ gradient)
    assert float(state.info.curvature) == pytest.approx(gradient @ hessian @ gradient)
    assert float(optax.tree.get(state, "curvature")) == float(state.info.curvature)
    assert state.info.learning_rate is state.learning_rate
    assert (state.info.sharpness, state.info.method) == (None, None)
    numbers = {"value", "slope", "curvature", "learning_rate", "skipped"}
    assert state.info.as_dict().keys() == numbers
