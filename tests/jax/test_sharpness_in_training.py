"""Tuners that need the sharpness, against dense float64 Hessians of small problems."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from cdat_core import tuners
from cdat_jax import adam_inverse_sqrt, measure, scale_by_tuner, tuned
from tests.jax.problems import flat, quadratic, same, stepper, train

pytestmark = pytest.mark.usefixtures("quick_compilation")

ALL = 26
"""Products for the whole Krylov space of the network below; the Lanczos method is then exact."""


def network(fault=0.0):
    """Return the loss of a network with 26 parameters, its parameters and a batch."""
    generator = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(generator.normal(size=shape))
    params = {"inner": (draw(3, 5) / 2, draw(5) / 2), "outer": (draw(5) / 2, draw())}

    def loss(params, x, y, fault):
        hidden = jnp.tanh(x @ params["inner"][0] + params["inner"][1][None])
        # Value and gradient are zero; the second derivative is infinite unless fault is 0.
        offset = params["outer"][1] - jax.lax.stop_gradient(params["outer"][1])
        bad = jax.lax.cond(fault != 0, lambda x: x**1.5, lambda x: 0.0 * x, offset)
        return jnp.mean((hidden @ params["outer"][0] + params["outer"][1] - y) ** 2) + bad

    return loss, params, {"x": draw(12, 3), "y": draw(12), "fault": fault}


@functools.cache
def compiled_derivatives():
    loss, params, batch = network()
    unravel = ravel_pytree(params)[1]
    on_vector = lambda vector: loss(unravel(vector), **batch)
    return jax.jit(lambda v: (*jax.value_and_grad(on_vector)(v), jax.hessian(on_vector)(v)))


def derivatives(params):
    """Return value, gradient and Hessian of the network's loss, dense."""
    return map(np.asarray, compiled_derivatives()(ravel_pytree(params)[0]))


def hessian_at(params):
    return list(derivatives(params))[2]


def largest(matrix):
    return np.linalg.eigvalsh(matrix)[-1]


def chain(base=None, **options):
    """Return gradient descent at 1 / sharpness, or another base followed by the rule."""
    rule = scale_by_tuner(tuners.sharpness_edge(1.0), **options)
    return optax.chain(optax.sgd(1.0) if base is None else base, rule)


def starts(params, trajectory):
    """Return the parameters at which each step was taken."""
    return [params, *(after for after, _ in trajectory[:-1])]


@functools.cache
def exact_run(curvature):
    """Return the parameters and states of five steps with a whole Krylov space each."""
    loss, params, batch = network()
    return train(chain(sharpness_matvecs=ALL, curvature=curvature), loss, params, 5, **batch)


@pytest.mark.parametrize("curvature", ["auto", "finite_difference"])
def test_the_rate_is_sigma_over_the_sharpness(curvature):
    """Exact with a whole Krylov space; finite differences have an error of about 1e-10."""
    _, params, _ = network()
    trajectory = exact_run(curvature)
    rtol = 1e-9 if curvature == "auto" else 1e-6
    for before, (_, state) in zip(starts(params, trajectory), trajectory, strict=True):
        exact = largest(hessian_at(before))
        info = state[1].info
        np.testing.assert_allclose(info.sharpness, exact, rtol=rtol)
        np.testing.assert_allclose(state[1].learning_rate, 1 / info.sharpness, rtol=1e-14)
        assert info.curvature is None


def test_the_vector_is_the_eigenvector():
    _, params, _ = network()
    _, state = exact_run("auto")[0]
    assert jax.tree.structure(state[1].sharpness_vector) == jax.tree.structure(params)
    vector = flat(state[1].sharpness_vector)
    expected = np.linalg.eigh(hessian_at(params))[1][:, -1]
    np.testing.assert_allclose(abs(vector @ expected), 1.0, rtol=1e-9)


@pytest.mark.parametrize("matvecs", [2, 8])
def test_on_a_quadratic_it_converges_to_the_largest_eigenvalue(matvecs):
    """With two products per step, the first measurement is too small by up to a thirtieth."""
    loss, params, hessian, _ = quadratic(size=30)
    exact = largest(hessian)
    trajectory = train(chain(sharpness_matvecs=matvecs), loss, params, 40)
    found = np.asarray([float(state[1].info.sharpness) for _, state in trajectory])
    # Each start contains noise; the error is quadratic in it.
    errors = 1 - found / exact
    assert errors[0] < 1 / 30
    assert errors.min() > -1e-12
    assert errors[-1] < (3e-3 if matvecs == 2 else 1e-6)


def test_on_a_network_it_follows_the_largest_eigenvalue():
    """Within one percent after a few steps, although the Hessian changes by more than that."""
    loss, params, batch = network()
    trajectory = train(chain(sharpness_matvecs=4), loss, params, 30, **batch)
    exact = [largest(hessian_at(p)) for p in starts(params, trajectory)]
    found = [float(state[1].info.sharpness) for _, state in trajectory]
    errors = np.abs(np.asarray(found) / exact - 1)[3:]
    assert errors.max() < 0.01
    assert errors.max() > 1e-12  # so few products are not exact
    assert max(exact[3:]) > 1.1 * min(exact[3:])


def adam_by_hand(gradients, b2, eps):
    """Return the divisor of the last update."""
    second = np.zeros_like(gradients[0])
    for gradient in gradients:
        second = b2 * second + (1 - b2) * gradient**2
    return np.sqrt(second / (1 - b2 ** len(gradients))) + eps


def rms_inverse_sqrt(state):
    """P^-1/2 of ``optax.rmsprop(1.0, decay=0.9, eps=1e-2)``, as a user would write it."""
    factors = jax.tree.map(lambda nu: (nu + 1e-2) ** -0.25, state[0].nu)
    return lambda v: jax.tree.map(jnp.multiply, factors, v)


PRECONDITIONED = {
    "adam": (
        lambda: optax.adam(1.0, b1=0.5, b2=0.9, eps=1e-3),
        functools.partial(adam_inverse_sqrt, b2=0.9, eps=1e-3),
        lambda gradients: adam_by_hand(gradients, 0.9, 1e-3),
    ),
    "rmsprop": (
        lambda: optax.rmsprop(1.0, decay=0.9, eps=1e-2),
        rms_inverse_sqrt,
        lambda gradients: np.sqrt(
            sum(0.1 * 0.9**age * g**2 for age, g in enumerate(reversed(gradients))) + 1e-2
        ),
    ),
}


@pytest.mark.parametrize("matvecs", [8, ALL])
@pytest.mark.parametrize("name", PRECONDITIONED)
def test_under_a_preconditioner_against_the_dense_matrix(name, matvecs):
    """P belongs to the same step and includes its gradient."""
    loss, params, batch = network()
    build, inverse_sqrt, divisor = PRECONDITIONED[name]
    solver = tuned(
        build(),
        tuners.sharpness_edge(0.5),
        inverse_sqrt=inverse_sqrt,
        sharpness_matvecs=matvecs,
    )
    trajectory, gradients = train(solver, loss, params, 8, **batch), []
    for step, before in enumerate(starts(params, trajectory)):
        _, gradient, hessian = derivatives(before)
        gradients.append(gradient)
        p = divisor(gradients)
        exact = largest(hessian / np.sqrt(p[:, None] * p))
        found = trajectory[step][1].tuner.info.sharpness
        rtol = 1e-9 if matvecs == ALL else 0.01
        if matvecs == ALL or step >= 3:
            np.testing.assert_allclose(found, exact, rtol=rtol)
        assert abs(exact / largest(hessian) - 1) > 0.3  # P makes a difference


def test_without_a_preconditioner_the_wrapper_is_the_chain():
    loss, params, batch = network()
    wrapped = train(tuned(optax.adam(1.0), tuners.sharpness_edge(0.01)), loss, params, 4, **batch)
    rule = scale_by_tuner(tuners.sharpness_edge(0.01))
    chained = train(optax.chain(optax.adam(1.0), rule), loss, params, 4, **batch)
    for (left, state), (right, expected) in zip(wrapped, chained, strict=True):
        for x, y in zip(
            jax.tree.leaves((left, state.tuner)), jax.tree.leaves((right, expected[1])), strict=True
        ):
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


def test_a_rule_may_need_all_measurements():
    loss, params, batch = network()

    def rule(measurement, state):
        greedy = -measurement.slope / measurement.curvature
        return jnp.minimum(greedy, 1 / measurement.sharpness), state

    everything = tuners.from_rule(
        tuners.constant(0.0).init, rule, needs=("value", "slope", "curvature", "sharpness")
    )
    second = scale_by_tuner(everything, sharpness_matvecs=ALL)
    trajectory = train(optax.chain(optax.sgd(1.0), second), loss, params, 3, **batch)
    for before, (_, (_, state)) in zip(starts(params, trajectory), trajectory, strict=True):
        value, gradient, hessian = derivatives(before)
        expected = (value, -gradient @ gradient, gradient @ hessian @ gradient, largest(hessian))
        info = state.info
        found = (info.value, info.slope, info.curvature, info.sharpness)
        np.testing.assert_allclose(found, expected, rtol=1e-9)
        rate = min(-expected[1] / expected[2], 1 / expected[3])
        np.testing.assert_allclose(state.learning_rate, rate, rtol=1e-9)


SOLVERS = {
    "chain": chain,
    "every": lambda: chain(every=3),
    "adam": lambda: tuned(
        optax.adam(1.0), tuners.sharpness_edge(0.5), inverse_sqrt=adam_inverse_sqrt
    ),
}
every_solver = pytest.mark.parametrize("build", SOLVERS.values(), ids=SOLVERS)


@functools.cache
def compiled(name):
    """Return a solver, its step with another argument that scales the loss, and the arguments."""
    loss, params, batch = network()
    solver = SOLVERS[name]()
    value_fn = lambda p, x, y, fault, scale: scale * loss(p, x, y, fault)
    return solver, stepper(solver, value_fn), params, batch | {"scale": 1.0}


@functools.cache
def looped(name):
    """Return a solver, its step, and the parameters and state after six steps."""
    loss, params, batch = network()
    solver = SOLVERS[name]()
    step, state = stepper(solver, loss), solver.init(params)
    for _ in range(6):
        params, state = step(params, state, **batch)
    return solver, step, (params, state)


def tuning(state):
    return state.tuner if hasattr(state, "tuner") else state[1]


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("good_steps", [0, 3])
@pytest.mark.parametrize("fault", ["value", "sharpness"])
def test_a_step_that_is_not_finite_leaves_the_vector(name, good_steps, fault):
    """Training then continues as if the bad step had not happened."""
    solver, step, params, good = compiled(name)
    state = solver.init(params)
    for _ in range(good_steps):
        params, state = step(params, state, **good)
    bad = good | ({"scale": np.nan} if fault == "value" else {"fault": 1.0})
    after, bad_state = step(params, state, **bad)
    assert same(after, params)
    before, now = tuning(state), tuning(bad_state)
    assert same(now.sharpness_vector, before.sharpness_vector)
    assert np.any(flat(now.sharpness_vector)) == (good_steps > 0)
    assert (int(now.info.skipped), float(now.learning_rate)) == (1, 0.0)
    if name == "adam":
        assert same(bad_state.base, state.base)
        assert same(step(after, bad_state, **good)[0], step(params, state, **good)[0])


def test_the_fault_is_what_it_says():
    loss, params, batch = network(fault=1.0)
    value, gradient = jax.value_and_grad(loss)(params, **batch)
    assert np.isfinite(value)
    assert np.isfinite(flat(gradient)).all()
    direction = jax.tree.map(jnp.ones_like, params)
    assert not np.isfinite(measure(functools.partial(loss, **batch), params, direction).curvature)


def test_between_measurements_rate_and_vector_hold():
    loss, params, batch = network()
    trajectory = train(chain(every=3, sharpness_matvecs=ALL), loss, params, 7, **batch)
    exact = [largest(hessian_at(p)) for p in starts(params, trajectory)]
    for step, (_, (_, state)) in enumerate(trajectory):
        measured = step - step % 3
        np.testing.assert_allclose(state.learning_rate, 1 / exact[measured], rtol=1e-9)
        np.testing.assert_allclose(state.info.sharpness, exact[measured], rtol=1e-9)
        assert same(state.sharpness_vector, trajectory[measured][1][1].sharpness_vector)
    assert len({float(state[1].learning_rate) for _, state in trajectory}) == 3


@pytest.mark.bitwise
@pytest.mark.parametrize("name", SOLVERS)
def test_scan_equals_the_loop_bit_for_bit(name):
    _, params, batch = network()
    solver, step, expected = looped(name)

    @jax.jit
    def scanned(params, state, batch):
        body = lambda carry, _: (step(*carry, **batch), None)
        return jax.lax.scan(body, (params, state), length=6)[0]

    assert same(scanned(params, solver.init(params), batch), expected)


def test_mapping_over_seeds_equals_separate_runs():
    """Also if some start from random signs and others from an eigenvector."""
    solver, step, params, batch = compiled("chain")
    seeds = [jax.tree.map(lambda p, s=scale: s * p, params) for scale in (1.0, 0.7, 1.3)]
    states = [solver.init(p) for p in seeds]
    seeds[1], states[1] = step(seeds[1], states[1], **batch)
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    mapped = jax.jit(jax.vmap(lambda p, s: step(*step(p, s, **batch), **batch)))
    found = mapped(stack(seeds), stack(states))
    for index, (p, s) in enumerate(zip(seeds, states, strict=True)):
        single = step(*step(p, s, **batch), **batch)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(single), strict=True):
            np.testing.assert_allclose(x[index], y, rtol=1e-8, atol=1e-10)


@every_solver
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
def test_structure_and_dtypes_of_the_state_are_fixed(build, dtype):
    params = {"a": jnp.ones((2, 3), dtype=dtype), "b": (jnp.ones(4, dtype=dtype),)}
    loss = lambda p: sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in jax.tree.leaves(p))
    solver = build()
    state = jax.eval_shape(solver.init, params)
    _, after = jax.eval_shape(
        lambda s: solver.update(params, s, params, value=loss(params), grad=params, value_fn=loss),
        state,
    )
    assert after == state
    vector = tuning(state).sharpness_vector
    assert jax.tree.map(lambda v: (v.shape, v.dtype), vector) == jax.tree.map(
        lambda p: (p.shape, p.dtype), params
    )
    assert tuning(state).info.sharpness.dtype == jnp.float32


@pytest.mark.bitwise
def test_many_steps_compile_once_and_donate():
    loss, params, batch = network()
    solver, _, expected = looped("adam")
    step = stepper(solver, loss, donate_argnums=(0, 1))
    donated, state = jax.tree.map(jnp.copy, params), solver.init(params)
    for _ in range(6):
        donated, state = step(donated, state, **batch)
    assert step._cache_size() == 1
    assert same((donated, state), expected)


def test_the_hessian_is_compiled_once_however_many_products():
    """The program does not grow with the number of products."""
    loss, params, batch = network()

    def dots(matvecs):
        solver = chain(sharpness_matvecs=matvecs)
        step = stepper(solver, loss)
        return step.lower(params, solver.init(params), **batch).as_text().count("dot_general")

    assert dots(2) == dots(20)


def test_a_concave_loss_or_a_straight_line_holds_the_rate():
    solver = optax.chain(
        optax.sgd(1.0), scale_by_tuner(tuners.sharpness_edge(1.0, initial_learning_rate=0.1))
    )
    for loss, expected in ((lambda w: -jnp.sum(w**2), -2.0), (jnp.sum, 0.0)):
        ((_, state),) = train(solver, loss, jnp.ones(2), 1)
        np.testing.assert_allclose(state[1].info.sharpness, expected, rtol=1e-12)
        np.testing.assert_allclose(state[1].learning_rate, 0.1)


def test_what_cannot_be_measured_is_refused():
    rule = tuners.sharpness_edge()
    with pytest.raises(
        ValueError, match='"gauss_newton" has no Hessian-vector products.*curvature="auto"'
    ):
        scale_by_tuner(rule, curvature="gauss_newton")
    with pytest.raises(ValueError, match="sharpness_matvecs must be an integer >= 1, got 0"):
        scale_by_tuner(rule, sharpness_matvecs=0)
    with pytest.raises(
        TypeError, match="inverse_sqrt must be a callable from the state .* got 0.5"
    ):
        tuned(optax.adam(1.0), rule, inverse_sqrt=0.5)
    # The map itself instead of a function from the state to it.
    solver, w = tuned(optax.sgd(1.0), rule, inverse_sqrt=lambda v: v), jnp.ones(2)
    with pytest.raises(TypeError, match="inverse_sqrt must be a callable or a number, got tuple"):
        solver.update(w, solver.init(w), w, value=1.0, grad=w, value_fn=lambda w: jnp.sum(w**2))
