"""The transformation in a training step: called like Optax's line searches, compiled once."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cdat_jax
from cdat_core import linesearch, tuners

X = np.random.default_rng(0).normal(size=(32, 5)).astype(np.float32)
Y = np.tanh(X[:, :1] - X[:, 1:2]).astype(np.float32)


def loss_fn(params, x, y, scale=1.0):
    return scale * jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["out"] - y) ** 2)


def start():
    rng = np.random.default_rng(1)
    shapes = {"hidden": (5, 8), "out": (8, 1)}
    return {k: jnp.asarray(rng.normal(size=s) / 3, dtype=jnp.float32) for k, s in shapes.items()}


def make_step(solver, traces=None):
    @jax.jit
    def step(params, state, scale=1.0):
        if traces is not None:
            traces.append(1)
        value, grad = jax.value_and_grad(loss_fn)(params, X, Y, scale)
        updates, state = solver.update(
            grad, state, params, value=value, grad=grad, value_fn=loss_fn, x=X, y=Y, scale=scale
        )
        return optax.apply_updates(params, updates), state, value

    return step


def train(solver, steps):
    params, step, values = start(), make_step(solver), []
    state = solver.init(params)
    for _ in range(steps):
        params, state, value = step(params, state)
        values.append(float(value))
    return params, state, values


SOLVERS = {
    "cdat": lambda: cdat_jax.scale_by_cdat(sigma=1.0),
    "every": lambda: cdat_jax.scale_by_cdat(sigma=1.0, every=3),
    "backtracking": lambda: cdat_jax.scale_by_tuner(linesearch.backtracking()),
    "optax": lambda: optax.scale_by_backtracking_linesearch(30),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_the_same_loop_runs_with_every_search_and_lowers_the_loss(name):
    _, _, values = train(optax.chain(optax.sgd(1.0), SOLVERS[name]()), 30)
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize("name", ["cdat", "every", "backtracking"])
def test_a_hundred_steps_compile_once(name):
    traces = []
    solver = optax.chain(optax.adam(1.0), SOLVERS[name]())
    step, params = make_step(solver, traces), start()
    state = solver.init(params)
    for _ in range(100):
        params, state, _ = step(params, state)
    assert len(traces) == 1
    assert step._cache_size() == 1


def test_one_greedy_step_minimises_a_quadratic_along_the_update():
    scale = jnp.array([1.0, 10.0])
    value_fn = lambda w: 0.5 * (scale * w**2).sum()
    solver = optax.chain(optax.sgd(1.0), cdat_jax.scale_by_cdat(sigma=1.0, decay=0.0))
    w = jnp.array([3.0, -1.0])
    value, grad = jax.value_and_grad(value_fn)(w)
    updates, state = solver.update(
        grad, solver.init(w), w, value=value, grad=grad, value_fn=value_fn
    )
    expected = (grad @ grad) / (grad @ (scale * grad))
    np.testing.assert_allclose(state[-1].learning_rate, expected, rtol=1e-6)
    np.testing.assert_allclose(updates, -expected * grad, rtol=1e-6)


def test_a_constant_rate_is_plain_optax():
    _, _, ours = train(
        optax.chain(optax.adam(1.0), cdat_jax.scale_by_tuner(tuners.constant(0.02))), 20
    )
    _, _, theirs = train(optax.with_extra_args_support(optax.adam(0.02)), 20)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_every_holds_the_rate_between_measurements():
    solver = optax.chain(optax.sgd(1.0), SOLVERS["every"]())
    step, params = make_step(solver), start()
    state, rates = solver.init(params), []
    for _ in range(9):
        params, state, _ = step(params, state)
        rates.append(float(state[-1].learning_rate))
    assert all(rates[i] == rates[i - i % 3] for i in range(9))
    assert len(set(rates)) == 3


@pytest.mark.parametrize("name", ["cdat", "every", "backtracking"])
def test_scan_equals_the_loop_and_vmap_equals_single_runs(name):
    solver = optax.chain(optax.sgd(1.0), SOLVERS[name]())
    step, params = make_step(solver), start()

    def body(carry, _):
        params, state, value = step(*carry)
        return (params, state), value

    _, scanned = jax.lax.scan(body, (params, solver.init(params)), length=10)
    _, _, looped = train(solver, 10)
    np.testing.assert_allclose(scanned, looped, rtol=1e-5)


def test_sigma_can_be_mapped_over():
    def final(sigma):
        solver = optax.chain(optax.sgd(1.0), cdat_jax.scale_by_cdat(sigma=sigma))
        params, state = start(), solver.init(start())
        for _ in range(5):
            params, state, value = make_step(solver)(params, state)
        return value

    mapped = jax.vmap(final)(jnp.array([0.5, 1.0]))
    single = [final(0.5), final(1.0)]
    np.testing.assert_allclose(mapped, single, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["cdat", "every", "backtracking"])
def test_a_bad_step_gives_zero_updates_and_is_counted(name, bad):
    solver = optax.chain(optax.sgd(1.0), SOLVERS[name]())
    step, params = make_step(solver), start()
    params, state, _ = step(params, solver.init(params))
    after, bad_state, _ = step(params, state, bad)
    jax.tree.map(np.testing.assert_array_equal, after, params)
    assert int(bad_state[-1].info.skipped) == 1
    assert float(bad_state[-1].learning_rate) == 0
    if name == "cdat":
        before, now = state[-1].tuner_state, bad_state[-1].tuner_state
        assert before._replace(skipped=0) == now._replace(skipped=0)
    params, state, _ = step(after, bad_state)
    assert float(state[-1].learning_rate) > 0
    assert all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves(params))


def test_the_wrapper_protects_the_state_of_its_base_too():
    solver = cdat_jax.cdat(optax.adam(1.0), sigma=1.0)
    step, params = make_step(solver), start()
    params, state, _ = step(params, solver.init(params))
    after, bad_state, _ = step(params, state, np.nan)
    jax.tree.map(np.testing.assert_array_equal, (after, bad_state.base), (params, state.base))
    assert (int(bad_state.step), int(bad_state.tuner.info.skipped)) == (1, 1)
    resumed, unbroken = step(after, bad_state), step(params, state)
    jax.tree.map(np.testing.assert_array_equal, resumed[0], unbroken[0])


def test_the_wrapper_is_the_chain_with_a_multiplier():
    _, _, chain_values = train(optax.chain(optax.adam(1.0), cdat_jax.scale_by_cdat(sigma=1.0)), 10)
    _, wrapped, values = train(cdat_jax.cdat(optax.adam(1.0), sigma=1.0), 10)
    np.testing.assert_allclose(values, chain_values, rtol=1e-5)
    assert int(wrapped.step) == 10
    params = start()
    half = cdat_jax.cdat(optax.adam(1.0), sigma=1.0, learning_rate=lambda step: 0.5 + 0.0 * step)
    full = cdat_jax.cdat(optax.adam(1.0), sigma=1.0)
    moves = [make_step(s)(params, s.init(params))[0] for s in (half, full)]
    jax.tree.map(
        lambda p, h, f: np.testing.assert_allclose(2 * (h - p), f - p, rtol=1e-3, atol=1e-6),
        params, *moves,
    )  # fmt: skip


def test_what_is_missing_is_named():
    solver = optax.chain(optax.sgd(1.0), cdat_jax.scale_by_cdat())
    params = start()
    state, grad = solver.init(params), start()
    with pytest.raises(TypeError, match="value_fn"):
        solver.update(grad, state, params, value=1.0, grad=grad)
    with pytest.raises(TypeError, match=r"'value'.*'grad'.*'value_fn'"):
        solver.update(grad, state, params)
    with pytest.raises(ValueError, match="not passing `params`"):
        solver.update(grad, state, value=1.0, grad=grad, value_fn=loss_fn)
    with pytest.raises(ValueError, match=r"value must be a scalar, got shape \(2,\)"):
        solver.update(grad, state, params, value=jnp.ones(2), grad=grad, value_fn=loss_fn)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="tuner_or_search must be"):
        cdat_jax.scale_by_tuner(42)
    with pytest.raises(ValueError, match="every must be an integer >= 1, got 0"):
        cdat_jax.scale_by_cdat(every=0)
    with pytest.raises(ValueError, match="curvature must be one of .* got 'exact'"):
        cdat_jax.scale_by_cdat(curvature="exact")
    with pytest.raises(ValueError, match=r"sigma must be .* got -1.0"):
        cdat_jax.cdat(optax.adam(1.0), sigma=-1.0)


def test_an_objective_that_takes_everything_gets_everything():
    seen = {}

    def greedy(params, **kwargs):
        seen.update(kwargs)
        return (params**2).sum()

    solver = optax.chain(optax.sgd(1.0), cdat_jax.scale_by_cdat())
    w = jnp.ones(2)
    solver.update(w, solver.init(w), w, value=2.0, grad=2 * w, value_fn=greedy, batch=3)
    assert seen == {"batch": 3}


def test_the_missing_extra_is_named():
    code = """
        import sys
        sys.modules["jax"] = None
        try:
            import cdat_jax
        except ImportError as error:
            assert 'pip install "cdat[jax]"' in str(error), error
        else:
            raise AssertionError("imported without jax")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
