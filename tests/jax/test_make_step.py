"""A whole step is the step written by hand, and both branches of its condition are whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cdat_core import linesearch, tuners
from cdat_jax import (
    CompositeLoss,
    accumulate,
    average_params,
    cdat,
    make_step,
    scale_by_cdat,
    scale_by_tuner,
)
from tests.jax.problems import factors, same, stepper

pytestmark = pytest.mark.usefixtures("quick_compilation")

SOLVERS = {
    "wrapper": lambda: cdat(optax.adam(1.0), every=3),
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(1.0), scale_by_cdat(total_steps=9, every=2),
        average_params(),
    ),
    "always": lambda: cdat(optax.sgd(1.0), sigma=1.0),
    "nested": lambda: optax.apply_if_finite(cdat(optax.sgd(1.0), sigma=1.0, every=2), 3),
    "MultiSteps": lambda: optax.MultiSteps(cdat(optax.sgd(1.0), sigma=1.0, every=2), 2),
    "two-tuners": lambda: optax.chain(
        optax.sgd(1.0), scale_by_cdat(sigma=1.0, every=2), scale_by_cdat(sigma=0.5, every=3)
    ),
    "search": lambda: optax.chain(optax.sgd(1.0), scale_by_tuner(linesearch.backtracking())),
    "optax-search": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=4)
    ),
    "plain": lambda: optax.adam(0.1),
}  # fmt: skip


def noisy(params, batch, scale):
    loss, _, _ = factors()
    return scale * loss(params, batch)


@pytest.mark.parametrize("name", SOLVERS)
def test_it_is_the_step_written_by_hand(name):
    """In steps with and without a measurement, and in those that are skipped."""
    solver = SOLVERS[name]()
    if name in ("plain", "optax-search"):
        solver = optax.with_extra_args_support(solver)
    _, params, batch = factors()
    by_hand, step = stepper(solver, noisy), jax.jit(make_step(noisy, solver))
    left = right = (params, solver.init(params))
    scales = np.ones(9)
    if name not in ("plain", "optax-search"):
        scales[[4, 5]] = np.nan
    for scale in scales:
        expected = noisy(left[0], batch, scale)
        left = by_hand(*left, batch=batch, scale=scale)
        *right, loss = step(*right, batch, scale=scale)
        np.testing.assert_allclose(loss, expected, rtol=1e-12)
        for x, y in zip(*map(jax.tree.leaves, (tuple(right), left)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-13)


def dots(traced):
    """Return how many matrix products are outside of conditions, and in each branch of one."""
    outside, branches = 0, []
    for equation in getattr(getattr(traced, "jaxpr", traced), "eqns", ()):
        outside += equation.primitive.name == "dot_general"
        if equation.primitive.name == "cond":
            found = [sum(dots(branch)[:1]) for branch in equation.params["branches"]]
            branches += [found] if any(found) else []
        else:
            for inner in jax.tree.leaves(list(equation.params.values())):
                more, deeper = dots(inner)
                outside, branches = outside + more, branches + deeper
    return outside, branches


def test_the_gradient_is_in_both_branches_and_nowhere_else():
    loss = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
    params, x = jnp.ones((3, 2)), jnp.ones((4, 3))
    for solver in (cdat(optax.adam(1.0)), optax.chain(optax.adam(1.0), scale_by_cdat())):
        traced = jax.make_jaxpr(make_step(loss, solver))(params, solver.init(params), x)
        outside, (branches,) = dots(traced)
        assert outside == 0
        assert min(branches) == 2  # the model and its gradient
        assert max(branches) >= 4


def test_a_step_that_never_measures_has_no_condition():
    params = jnp.ones(3)
    for solver in (
        optax.adam(0.1),
        optax.chain(optax.sgd(1.0), scale_by_tuner(linesearch.backtracking())),
    ):
        step = make_step(lambda w: jnp.sum(w**2), solver)
        assert " cond[" not in str(jax.make_jaxpr(step)(params, solver.init(params)))


@functools.cache
def compiled():
    loss, params, batch = factors()
    solver = cdat(optax.adam(1.0), total_steps=20)
    return make_step(loss, solver), solver, params, batch


@pytest.mark.bitwise
def test_scan_is_the_loop_and_buffers_can_be_donated():
    step, solver, params, batch = compiled()
    start = params, solver.init(params)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    looped = jax.tree.map(jnp.copy, start)
    for _ in range(20):
        *looped, _ = jitted(*looped, batch)

    @jax.jit
    def scanned(carry):
        def body(carry, _):
            params, state, loss = step(*carry, batch)
            return (params, state), loss

        return jax.lax.scan(body, carry, length=20)

    end, losses = scanned(start)
    assert same(end, tuple(looped))
    assert float(losses[-1]) < float(losses[0])


def test_vmap_runs_independent_steps():
    step, solver, params, batch = compiled()
    start = params, solver.init(params)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), start)
    batches = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x), 2 * jnp.asarray(x)]), batch)
    together, single = jax.jit(jax.vmap(step)), jax.jit(step)
    alone = [start, start]
    for _ in range(3):
        *stacked, _ = together(*stacked, batches)
        for index in range(2):
            one = jax.tree.map(lambda x, index=index: x[index], batches)
            *alone[index], _ = single(*alone[index], one)
    for index in range(2):
        found = jax.tree.map(lambda x, index=index: x[index], tuple(stacked))
        for x, y in zip(*map(jax.tree.leaves, (found, tuple(alone[index]))), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)


def test_auxiliary_outputs_come_back_with_the_loss():
    def loss_fn(w, x, *, offset):
        residual = w * x - offset
        return jnp.mean(residual**2), {"residual": residual}

    for solver in (cdat(optax.sgd(1.0)), optax.sgd(0.1)):
        step = jax.jit(make_step(loss_fn, solver, has_aux=True))
        params, state = jnp.asarray(2.0), solver.init(jnp.asarray(2.0))
        for _ in range(18):  # with and without a measurement
            before = params
            params, state, (loss, aux) = step(params, state, jnp.ones(3), offset=1.0)
            np.testing.assert_allclose(aux["residual"], np.full(3, before - 1.0), rtol=1e-12)
            assert float(loss) == pytest.approx(float((before - 1.0) ** 2))


def test_composite_and_accumulated_losses_keep_their_parts():
    """Arguments by position too."""
    model = lambda w, x: jnp.tanh(x * w)
    composite = CompositeLoss(model, lambda z, y: jnp.mean((z - y) ** 2))
    x, y, w = jnp.linspace(-1.0, 1.0, 6), jnp.linspace(0.0, 1.0, 6), jnp.asarray(0.5)
    solver = cdat(optax.sgd(1.0), sigma=1.0, decay=0.0, curvature="gauss_newton", every=2)
    whole = jax.jit(make_step(composite, solver))(w, solver.init(w), x, y)
    parts = x.reshape(3, 2), y.reshape(3, 2)
    mean = jax.jit(make_step(accumulate(composite), solver))(w, solver.init(w), *parts)
    for found, expected in zip(jax.tree.leaves(mean), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert float(whole[1].tuner.info.curvature) > 0


def test_a_loss_with_any_signature():
    params = jnp.asarray(1.0)
    solver = optax.sgd(0.25)

    def star(*args):
        return args[0] ** 2 * args[1]

    def only(params, x, /):
        return params**2 * x

    for loss_fn in (star, only, jax.jit(only), functools.partial(only), lambda w, x: w**2 * x):
        moved, _, loss = make_step(loss_fn, solver)(params, solver.init(params), jnp.asarray(1.0))
        assert (float(moved), float(loss)) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1.0, optax.sgd(0.1)), "loss_fn must be callable, got 1.0"),
     ((abs, tuners.cdat()), "solver must be an optax.GradientTransformation, got Tuner")],
)  # fmt: skip
def test_bad_input(arguments, message):
    with pytest.raises(TypeError, match=message):
        make_step(*arguments)
