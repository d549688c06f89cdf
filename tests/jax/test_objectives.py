"""The arguments and results that an objective may have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cdat_core import linesearch, tuners
from cdat_jax import CompositeLoss, cdat, hvp, measure, scale_by_cdat, scale_by_tuner, sharpness
from tests.jax.problems import factors, same, train

pytestmark = pytest.mark.usefixtures("quick_compilation")


def extras_seen(value_fn, **extra):
    """Update once; `value_fn` records its arguments."""
    params = jnp.ones(2)
    solver = optax.chain(optax.sgd(1.0), scale_by_cdat(sigma=2.0))
    solver.update(
        params, solver.init(params), params, value=1.0, grad=params, value_fn=value_fn, **extra
    )


def test_an_objective_gets_the_extra_arguments_that_it_names():
    seen = []

    def positional(params, batch, weight=2.0):
        seen.append((batch, weight))
        return jnp.sum(params**2)

    def keyword(params, *, batch):
        seen.append(batch)
        return jnp.sum(params**2)

    def everything(params, **extra):
        seen.append(extra)
        return jnp.sum(params**2)

    def nothing(params):
        seen.append(())
        return jnp.sum(params**2)

    def first(value_fn):
        seen.clear()
        extras_seen(value_fn, batch=7, unrelated="x")
        return seen[0]

    assert first(positional) == (7, 2.0)
    assert first(keyword) == 7
    assert first(everything) == {"batch": 7, "unrelated": "x"}
    assert first(nothing) == ()
    assert first(functools.partial(positional, weight=3.0)) == (7, 3.0)
    assert first(functools.partial(keyword, batch=8)) == 7


def test_a_jitted_objective_gets_the_extra_arguments_that_it_names():
    compiled = jax.jit(lambda params, batch: jnp.sum(batch * params**2))
    params = jnp.ones(2)
    solver = scale_by_cdat(sigma=1.0)
    _, state = solver.update(
        -params, solver.init(params), params,
        value=1.0, grad=params, value_fn=compiled, batch=4.0, unrelated=1.0,
    )  # fmt: skip
    assert float(state.learning_rate) == 2 / 16


def test_an_objective_that_misses_an_argument_says_so():
    with pytest.raises(TypeError, match="batch"):
        extras_seen(lambda params, batch: jnp.sum(params**2) * batch, bacth=1.0)


def network(params, batch):
    weights, bias = params["inner"]
    return (batch[0] * weights + bias) * params["outer"]


def squared_error(outputs, batch):
    return jnp.mean((outputs - batch[1]) ** 2)


def error_and_metrics(outputs, batch):
    metrics = {"largest": jnp.max(jnp.abs(outputs)), "samples": outputs.size, "outputs": outputs}
    return squared_error(outputs, batch), metrics


PLAIN = CompositeLoss(network, squared_error)
WITH_AUX = CompositeLoss(network, error_and_metrics)
METHODS = ("auto", "forward", "hvp", "finite_difference", "gauss_newton")


@pytest.mark.parametrize("method", METHODS)
def test_auxiliary_outputs_change_no_measurement(method):
    _, params, batch = factors()
    direction = jax.tree.map(jnp.ones_like, params)
    plain, pair = (
        jax.jit(lambda p, f=f: measure(functools.partial(f, batch=batch), p, direction,
                                       curvature=method))(params)
        for f in (PLAIN, WITH_AUX)
    )  # fmt: skip
    assert same(pair, plain)
    assert float(pair.value) == pytest.approx(float(PLAIN(params, batch)), rel=1e-14)


def test_auxiliary_outputs_change_no_product_and_no_sharpness():
    _, params, batch = factors()
    v = jax.tree.map(jnp.ones_like, params)
    products = [hvp(lambda p, f=f: f(p, batch), params)(v) for f in (PLAIN, WITH_AUX)]
    assert same(*products)
    assert same(*(sharpness(f, params, batch, num_matvecs=3) for f in (PLAIN, WITH_AUX)))


@pytest.mark.parametrize(
    "build",
    [
        lambda: scale_by_cdat(sigma=1.0),
        lambda: scale_by_cdat(sigma=1.0, every=2),
        lambda: scale_by_cdat(sigma=1.0, curvature="gauss_newton"),
        lambda: scale_by_tuner(tuners.constant(0.01)),
        lambda: scale_by_tuner(linesearch.backtracking()),
        lambda: scale_by_tuner(linesearch.zoom()),
    ],
    ids=["cdat", "every", "gauss_newton", "constant", "backtracking", "zoom"],
)
def test_a_training_step_with_auxiliary_outputs(build):
    """With ``jax.value_and_grad(..., has_aux=True)``; the steps are those of the loss alone."""
    _, params, batch = factors()
    solver = optax.chain(optax.sgd(1.0), build())
    expected = train(solver, PLAIN, params, 3, batch=batch)

    @jax.jit
    def step(params, state, batch):
        (value, aux), grad = jax.value_and_grad(WITH_AUX, has_aux=True)(params, batch)
        updates, state = solver.update(
            grad, state, params, value=value, grad=grad, value_fn=WITH_AUX, batch=batch
        )
        return optax.apply_updates(params, updates), state, aux

    state = solver.init(params)
    for reference in expected:
        outputs = network(params, batch)
        params, state, aux = step(params, state, batch)
        np.testing.assert_allclose(aux["outputs"], outputs, rtol=1e-12)
        for x, y in zip(jax.tree.leaves((params, state)), jax.tree.leaves(reference), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-15)


def test_the_value_of_an_update_is_the_loss_alone():
    params, solver = jnp.ones(2), scale_by_cdat(sigma=2.0)
    with pytest.raises(ValueError, match="value must be a scalar, got a tuple; .* the loss alone"):
        solver.update(
            -params, solver.init(params), params,
            value=(jnp.ones(()), {"metric": 1}), grad=params, value_fn=jnp.sum,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("returned", "got"),
    [((1, 2, 3), "tuple"), ([1.0, 2.0], "list"), ({"loss": 1.0}, "dict")],
    ids=["three", "list", "dict"],
)
@pytest.mark.parametrize("method", METHODS[:-1])
def test_results_other_than_a_scalar_or_a_pair_are_refused(returned, got, method):
    with pytest.raises(ValueError, match=rf"must return a scalar or \(scalar, aux\), got {got}"):
        measure(lambda w: returned, jnp.ones(2), jnp.ones(2), curvature=method)
    with pytest.raises(ValueError, match=r"value_fn must return a scalar, got shape \(2,\)"):
        measure(lambda w: (w, None), jnp.ones(2), jnp.ones(2), curvature=method)


@pytest.mark.parametrize(
    ("leaf", "dtype"),
    [(3, "int"), (np.int32(3), "int32"), (np.True_, "bool"), (jax.random.key(0), "key<fry>")],
    ids=["python", "int32", "bool", "key"],
)
def test_parameters_that_are_not_inexact_are_named(leaf, dtype):
    """Optax cannot update them either; they should be arguments of the loss."""
    params = {"w": jnp.ones(2), "rest": [leaf]}
    message = rf"floating arrays, got {dtype}.* at params\['rest'\]\[0\]; pass it to value_fn"
    value_fn = lambda p: jnp.sum(p["w"] ** 2)
    for call in (
        lambda: measure(value_fn, params, params),
        lambda: hvp(value_fn, params),
        lambda: scale_by_cdat(sigma=2.0).init(params),
        lambda: scale_by_tuner(tuners.constant(0.1)).init(params),
        lambda: cdat(optax.identity(), sigma=2.0).init(params),
    ):
        with pytest.raises(TypeError, match=message):
            call()
