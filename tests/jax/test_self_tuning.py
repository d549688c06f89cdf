"""The self-tuning rule, its schedule of measurements, and averaged parameters."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cdat_core import Measurement, tuners
from cdat_jax import (
    accumulate,
    average_params,
    averaged_params,
    cdat,
    make_step,
    scale_by_cdat,
    tuned,
)
from tests.jax.problems import same, stepper

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 200
GENERATOR = np.random.default_rng(0)
TEACHER = GENERATOR.normal(size=8)
INPUTS = GENERATOR.normal(size=(STEPS, 16, 8))
TARGETS = np.tanh(INPUTS @ TEACHER) + 0.3 * GENERATOR.normal(size=(STEPS, 16))
START = 0.1 * np.ones(8)


def loss_fn(w, x, y, scale=1.0):
    """Return the loss of a neuron, with noise in its data."""
    return scale * jnp.mean((jnp.tanh(x @ w) - y) ** 2)


def batches(scales=None):
    scales = np.ones(STEPS) if scales is None else scales
    return jnp.asarray(INPUTS), jnp.asarray(TARGETS), jnp.asarray(scales)


def scanned(solver):
    """Return a compiled run, which returns the last carry, and each state and parameters."""
    step = make_step(loss_fn, solver)

    def body(carry, batch):
        *carry, _ = step(*carry, *batch)
        return tuple(carry), (carry[0], carry[1].tuner, carry[1].average)

    return jax.jit(lambda carry, batches: jax.lax.scan(body, carry, batches))


@functools.cache
def averaging():
    """Return the solver with an average, and its compiled run."""
    solver = cdat(optax.sgd(1.0, momentum=0.9))
    return solver, scanned(solver)


def begin(solver):
    params = jnp.asarray(START)
    return params, solver.init(params)


def by_hand(tuner, history):
    """Return the rates of the tuner of the core, fed with what the adapter measured."""
    state, rates, due, before = tuner.init(np.asarray(0.0)), [], False, 0
    value, slope, curvature = (np.asarray(x) for x in history.info[:3])
    measured = []
    for step in range(len(value)):
        measured.append(due or bool(tuner.measures(step)))
        if measured[-1]:
            found = Measurement(value[step], slope[step], curvature[step])
            rate, state = tuner.update(found, state)
        else:
            rate, state = tuner.observe(value[step], state)
        due = measured[-1] and int(state.skipped) > before
        before = int(state.skipped)
        rates.append(float(rate))
    return np.asarray(rates), measured


@pytest.mark.parametrize("total_steps", [None, STEPS])
def test_rates_are_those_of_the_core(total_steps):
    if total_steps is None:
        solver, run = averaging()
    else:
        solver = cdat(optax.sgd(1.0, momentum=0.9), total_steps=total_steps)
        run = scanned(solver)
    _, (_, history, average) = run(begin(solver), batches())
    rates, measured = by_hand(tuners.self_tuning(0.9, total_steps), history)
    np.testing.assert_allclose(history.learning_rate, rates, rtol=1e-10)
    assert np.array_equal(history.due[:-1], measured[1:])
    assert sum(measured) == (16 + 23 if total_steps is None else 16 + 16)
    assert (average is None) == (total_steps is not None)
    if total_steps is not None:
        assert np.all(np.diff(rates[140:]) <= 0)
        assert rates[-1] < 0.02 * rates[140]


def test_a_skipped_measurement_is_repeated_and_other_skips_are_not():
    solver, run = averaging()
    scales = np.ones(STEPS)
    scales[[0, 40, 41, 51]] = np.nan, np.inf, np.nan, np.nan  # 0 and 40 measure
    end, (params, history, average) = run(begin(solver), batches(scales))
    rates, measured = by_hand(tuners.self_tuning(0.9), history)
    assert np.array_equal(history.due[:-1], measured[1:])
    np.testing.assert_allclose(history.learning_rate, rates, rtol=1e-10)
    assert [t for t in range(16, 60) if measured[t]] == [16, 24, 32, 40, 41, 42, 48, 56]
    assert np.flatnonzero(rates == 0).tolist() == [0, 40, 41, 51]
    assert np.array_equal(params[40], params[39])
    assert int(end[1].tuner.info.skipped) == 4
    assert int(end[1].tuner.step) == STEPS
    assert int(average.step[-1]) == int(end[1].step) == STEPS - 4
    assert np.array_equal(average.average[51], average.average[50])


def test_the_average_is_that_of_the_parameters_after_each_step():
    solver, run = averaging()
    end, (params, _, average) = run(begin(solver), batches())
    expected = START
    for step, w in enumerate(np.asarray(params)):
        expected = expected + 9 / (step + 9) * (w - expected)
        np.testing.assert_allclose(average.average[step], expected, rtol=1e-12)
    assert averaged_params(end[1]) is end[1].average.average
    distance = lambda w: np.linalg.norm(w - TEACHER)
    assert distance(averaged_params(end[1])) < distance(START)


@pytest.mark.bitwise
def test_a_loop_and_a_resumed_run_are_the_scan_bit_for_bit():
    solver, run = averaging()
    step, carry = jax.jit(make_step(loss_fn, solver), donate_argnums=(0, 1)), begin(solver)
    for batch in zip(*batches(), strict=True):
        *carry, _ = step(*carry, *batch)
    whole, _ = run(begin(solver), batches())
    assert same(tuple(carry), whole)

    halves = [jax.tree.map(lambda x, s=s: x[s], batches()) for s in (np.s_[:100], np.s_[100:])]
    half, _ = run(begin(solver), halves[0])
    stored = pickle.dumps(jax.tree.map(np.asarray, half))
    restored = jax.tree.map(jnp.asarray, pickle.loads(stored))
    resumed, _ = run(restored, halves[1])
    assert same(resumed, whole)


def test_total_steps_and_momentum_may_be_traced_and_mapped():
    @jax.jit
    @jax.vmap
    def rates(total_steps, momentum, start):
        solver = cdat(optax.sgd(1.0), total_steps=total_steps, momentum=momentum)
        step = make_step(loss_fn, solver)

        def body(carry, batch):
            *carry, _ = step(*carry, *batch)
            return tuple(carry), carry[1].tuner.learning_rate

        few = jax.tree.map(lambda x: x[:40], batches())
        return jax.lax.scan(body, (start, solver.init(start)), few)[1]

    totals, momenta = np.asarray([20, 40, 50]), np.asarray([0.0, 0.9, 0.5])
    together = rates(jnp.asarray(totals), jnp.asarray(momenta), jnp.stack([jnp.asarray(START)] * 3))
    for index, (total, momentum) in enumerate(zip(totals, momenta, strict=True)):
        alone = rates(*(jnp.asarray([x]) for x in (total, momentum)), jnp.asarray(START)[None])
        np.testing.assert_allclose(together[index], alone[0], rtol=1e-11)
    assert np.all(np.asarray(together[0][20:]) == 0)
    assert together[0][19] > 0
    first = np.asarray(together[:, 0])
    assert np.all(first == first[0])  # the first rate does not depend on sigma


def test_a_resumed_run_may_have_another_length():
    """The cooldown moves; what was measured stays."""
    short, long = (cdat(optax.sgd(1.0), total_steps=total) for total in (30, 100))
    carry, few = begin(short), jax.tree.map(lambda x: x[:60], batches())
    run = {id(s): scanned(s) for s in (short, long)}
    carry, (_, history, _) = run[id(short)](carry, jax.tree.map(lambda x: x[:30], few))
    assert history.learning_rate[-1] < 0.2 * history.learning_rate[20]
    _, (_, history, _) = run[id(long)](carry, jax.tree.map(lambda x: x[30:], few))
    assert history.learning_rate[0] > 0.9 * carry[1].tuner.tuner_state.rate
    assert np.all(np.asarray(history.learning_rate) > 0)


BASES = {
    "sgd": (lambda: optax.sgd(1.0), 0.0),
    "momentum": (lambda: optax.sgd(1.0, momentum=0.9), 0.9),
    "adam": (lambda: optax.adam(1.0), 0.9),
}


def network(params, x, y):
    hidden = jnp.tanh(x @ params["inner"])
    return jnp.mean((hidden @ params["outer"] - y) ** 2)


@pytest.mark.parametrize(
    ("base", "full_batch"),
    [("sgd", False), ("momentum", False), ("adam", False), ("momentum", True), ("adam", True)],
)
def test_a_newcomer_chooses_nothing(base, full_batch):
    """On mini-batches of 16 of 128 samples, or on all of them; eight seeds at once."""
    build, momentum = BASES[base]
    solver = cdat(build(), momentum=momentum, full_batch=full_batch)
    step = make_step(network, solver)

    @jax.jit
    @jax.vmap
    def train(key):
        keys = jax.random.split(key, 4)
        x = jax.random.normal(keys[0], (128, 6))
        y = jnp.sin(x[:, 0]) * x[:, 1]
        params = {"inner": jax.random.normal(keys[1], (6, 16)) / 6**0.5,
                  "outer": jax.random.normal(keys[2], (16,)) / 4.0}  # fmt: skip

        def body(carry, key):
            chosen = jnp.arange(128) if full_batch else jax.random.choice(key, 128, (16,))
            *carry, loss = step(*carry, x[chosen], y[chosen])
            return tuple(carry), loss

        start = params, solver.init(params)
        (end, state), _ = jax.lax.scan(body, start, jax.random.split(keys[3], 300))
        found = end if full_batch else averaged_params(state)
        return network(params, x, y), network(found, x, y)

    before, after = (np.asarray(x) for x in train(jax.random.split(jax.random.key(0), 8)))
    assert np.all(after < 0.5 * before)


def constant_updates(solver, params, steps, **extra):
    """Return parameters and states of a solver whose gradient is one, on a quadratic."""
    step = stepper(solver, lambda w, scale=1.0: scale * jnp.sum(w**2))
    state, found = solver.init(params), []
    for index in range(steps):
        params, state = step(params, state, **{k: v[index] for k, v in extra.items()})
        found.append((params, state))
    return found


def polynomial(iterates, start):
    for step, w in enumerate(iterates):
        start = start + 9 / (step + 9) * (w - start)
    return start


def test_any_chain_may_end_with_an_average():
    """It averages what the parameters really are, after every factor."""
    solver = optax.chain(
        optax.sgd(1.0), scale_by_cdat(sigma=1.0), optax.scale(0.25), average_params()
    )
    scales = [1.0, 1.0, np.nan, 1.0]
    found = constant_updates(solver, jnp.ones(2), 4, scale=scales)
    taken = [np.asarray(params) for (params, _), s in zip(found, scales, strict=True) if s == 1]
    state = found[-1][1]
    assert int(state[-1].step) == 3
    np.testing.assert_allclose(averaged_params(state), polynomial(taken, np.ones(2)), rtol=1e-12)


def test_accumulated_steps_count_once():
    plain = optax.chain(optax.sgd(0.1), average_params())
    for solver in (
        optax.MultiSteps(plain, 3).gradient_transformation(),
        optax.chain(optax.MultiSteps(optax.sgd(0.1), 3).gradient_transformation(),
                    average_params()),
    ):  # fmt: skip
        found = constant_updates(optax.with_extra_args_support(solver), jnp.ones(2), 6)
        moved = [np.asarray(params) for params, _ in found[2::3]]
        average = averaged_params(found[-1][1])
        np.testing.assert_allclose(average, polynomial(moved, np.ones(2)), rtol=1e-6)


def test_apply_if_finite_keeps_the_average():
    solver = optax.apply_if_finite(optax.chain(optax.sgd(0.1), average_params()), 3)
    (_, first), (_, second) = constant_updates(solver, jnp.ones(2), 2, scale=[1.0, np.nan])
    assert same(second.inner_state, first.inner_state)


def test_an_accumulated_loss_is_averaged_too():
    solver = cdat(optax.sgd(1.0), sigma=1.0, average=True)
    step = jax.jit(make_step(accumulate(lambda w, x: jnp.mean((w - x) ** 2)), solver))
    params, state, _ = step(jnp.asarray(0.0), solver.init(jnp.asarray(0.0)), jnp.ones((2, 3)))
    assert float(averaged_params(state)) == pytest.approx(float(params))


def test_narrow_parameters_are_averaged_in_single_precision():
    """A bfloat16 average would not see these steps: 9 / 1009 of 2e-3 is below its resolution."""
    params = {"w": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2, jnp.float32), "n": jnp.arange(2)}
    solver = average_params()
    state = solver.init(params)
    assert state.wide["b"] is None
    state = state._replace(step=jnp.asarray(1000, jnp.int32))
    updates = {
        "w": jnp.full(3, -0.0078125, jnp.bfloat16),
        "b": jnp.zeros(2),
        "n": jnp.zeros(2, int),
    }
    update = jax.jit(solver.update)
    for _ in range(60):
        _, state = update(updates, state, params)
    found = averaged_params(state)
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in params.items()}
    expected = 1 - 0.0078125 * (1 - np.prod([1 - 9 / (step + 9) for step in range(1000, 1060)]))
    np.testing.assert_allclose(state.wide["w"], expected, rtol=1e-6)
    assert float(found["w"][0]) == float(jnp.bfloat16(expected)) < 1


def test_an_average_is_kept_where_it_is_asked_for():
    params = jnp.ones(2)
    cases = {
        (): True, (("total_steps", 10),): False, (("total_steps", 10), ("average", True)): True,
        (("average", False),): False, (("sigma", 1.0),): False, (("full_batch", True),): False,
        (("sigma", 1.0), ("average", True)): True,
    }  # fmt: skip
    for options, kept in cases.items():
        state = cdat(optax.sgd(1.0), **dict(options)).init(params)
        if kept:
            assert np.array_equal(averaged_params(state), params)
        else:
            with pytest.raises(
                ValueError, match=r"found no average .* cdat_jax.average_params\(\)"
            ):
                averaged_params(state)
    with pytest.raises(ValueError, match="found 2 averages"):
        averaged_params((average_params().init(params), average_params().init(params)))


def test_hyperparameters_choose_the_published_rule():
    loss, params = lambda w: jnp.sum(w**2) + jnp.sum(w**4), jnp.asarray([0.5, 1.0])
    pairs = [
        (cdat(optax.sgd(1.0), sigma=1.0), tuned(optax.sgd(1.0), tuners.cdat(1.0))),
        (cdat(optax.sgd(1.0), max_learning_rate=0.1),
         tuned(optax.sgd(1.0), tuners.cdat(max_learning_rate=0.1))),
        (cdat(optax.sgd(1.0), full_batch=True), tuned(optax.sgd(1.0), tuners.full_batch())),
        (cdat(optax.sgd(1.0), full_batch=True, sigma=1.0),
         tuned(optax.sgd(1.0), tuners.full_batch(1.0))),
        (cdat(optax.sgd(1.0), decay=0.5, total_steps=4, every=2),
         tuned(optax.sgd(1.0), tuners.with_cooldown(tuners.every(tuners.cdat(decay=0.5), 2), 4))),
    ]  # fmt: skip
    for left, right in pairs:
        ends = []
        for solver in (left, right):
            step, carry = stepper(solver, loss), (params, solver.init(params))
            for _ in range(3):
                carry = step(*carry)
            ends.append(carry)
        assert same(*ends)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"total_steps": 0}, ValueError, "total_steps must be an integer >= 1, got 0"),
        ({"total_steps": -5}, ValueError, "total_steps must be an integer >= 1, got -5"),
        ({"total_steps": 10.0}, TypeError, "total_steps must be an integer >= 1, got 10.0"),
        ({"total_steps": True}, TypeError, "total_steps must be an integer >= 1, got True"),
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, ValueError, r"momentum must be in \[0, 1\), got -0.1"),
        ({"momentum": "0.9"}, TypeError, "momentum must be a real number"),
        ({"full_batch": 1}, TypeError, "full_batch must be True or False, got 1"),
        ({"every": 0}, ValueError, "every must be an integer >= 1, got 0"),
    ],
)
def test_bad_input(options, error, message):
    for build in (scale_by_cdat, lambda **options: cdat(optax.sgd(1.0), **options)):
        with pytest.raises(error, match=message):
            build(**options)


def test_bad_input_for_an_average():
    with pytest.raises(TypeError, match="average must be True or False, got 1"):
        cdat(optax.sgd(1.0), average=1)
    solver = average_params()
    with pytest.raises(ValueError, match="pass `params`"):
        solver.update(jnp.ones(2), solver.init(jnp.ones(2)))
