"""The Gauss-Newton curvature against a dense Jacobian and the dense Hessian of the loss."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from cdat_core import tuners
from cdat_jax import CompositeLoss, cdat, measure, scale_by_cdat, scale_by_tuner
from tests.jax.problems import dense, flat, random_like, stepper

pytestmark = pytest.mark.usefixtures("quick_compilation")

gauss_newton = functools.partial(measure, curvature="gauss_newton")


def dense_gauss_newton(model_fn, loss_fn, params):
    """Return value, gradient and J' H_loss J, with one reverse pass per output for J."""
    vector, unravel = ravel_pytree(params)
    _, unravel_outputs = ravel_pytree(model_fn(params))

    def outputs(vector):
        return ravel_pytree(model_fn(unravel(vector)))[0]

    def loss(z):
        return loss_fn(unravel_outputs(z))

    @jax.jit
    def derivatives(vector):
        z, jacobian = outputs(vector), jax.jacrev(outputs)(vector)
        value, grad = jax.value_and_grad(loss)(z)
        return value, jacobian.T @ grad, jacobian.T @ jax.hessian(loss)(z) @ jacobian

    value, gradient, matrix = derivatives(vector)
    return float(value), np.asarray(gradient), np.asarray(matrix)


def with_custom_vjp(function, backward):
    """Return `function` with a derivative that has no forward-mode rule."""
    wrapped = jax.custom_vjp(function)
    wrapped.defvjp(lambda x: (function(x), x), lambda x, g: (backward(x) * g,))
    return wrapped


custom_tanh = with_custom_vjp(jnp.tanh, lambda x: 1 - jnp.tanh(x) ** 2)
custom_square = with_custom_vjp(jnp.square, lambda x: 2 * x)
custom_double = with_custom_vjp(lambda x: 2 * x, lambda _: 2.0)


def network(params, x, activation=jnp.tanh):
    """A fully connected network with the layers of `params`."""
    for matrix, bias in params[:-1]:
        x = activation(x @ matrix + bias[None])
    return x @ params[-1][0] + params[-1][1][None]


def cross_entropy(z, y):
    return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(z), axis=1))


def squared(z, y):
    return jnp.mean((z - y) ** 2)


def recurrent(params, x):
    """A scan over one layer, each step rematerialised."""
    step = jax.checkpoint(lambda h, _: (jnp.tanh(h @ params["w"] + params["b"][None]), None))
    return jax.lax.scan(step, x @ params["in"], None, length=3)[0] @ params["out"]


def many_outputs(params, x):
    """A pytree of outputs, with the weights for a loss that includes weight decay."""
    return {"logits": network(params, x), "weights": params, "unused": None, "data": (x,)}


def decayed(outputs, y):
    decay = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(outputs["weights"]))
    data = 0.1 * jnp.sum(outputs["data"][0]) * jnp.mean(outputs["logits"] ** 2)
    return cross_entropy(outputs["logits"], y) + 0.3 * decay + data


def layers(dtype=float):
    sizes = ((8, 6), (6, 6), (6, 4))
    return random_like([(jnp.zeros(s, dtype), jnp.zeros(s[1], dtype)) for s in sizes], 0, scale=0.6)


def batch():
    generator = np.random.default_rng(5)
    return generator.normal(size=(10, 8)), np.eye(4)[generator.integers(4, size=10)]


CELL = {"in": (8, 5), "w": (5, 5), "b": (5,), "out": (5, 4)}
CASES = {
    "cross-entropy": (network, cross_entropy, layers),
    "squared": (network, squared, layers),
    "not convex": (network, lambda z, y: jnp.mean(jnp.cos(z * y) + z[:, ::-1] * z), layers),
    "scan and remat": (
        recurrent,
        cross_entropy,
        lambda: random_like({k: jnp.zeros(s) for k, s in CELL.items()}, 1, scale=0.6),
    ),
    "pytree of outputs": (many_outputs, decayed, layers),
    "custom_vjp in the model": (
        functools.partial(network, activation=custom_tanh),
        cross_entropy,
        layers,
    ),
    "linear custom_vjp in the model": (
        functools.partial(network, activation=lambda x: jnp.tanh(custom_double(x))),
        squared,
        layers,
    ),
    "custom_vjp in the loss": (network, lambda z, y: jnp.mean(custom_square(z - y)), layers),
    "custom_vjp in both": (
        lambda params, x: custom_tanh(network(params, x)),
        lambda z, y: jnp.mean(custom_square(z - y)),
        layers,
    ),
}


@pytest.mark.parametrize(
    ("case", "compiled"),
    [
        *((case, True) for case in CASES),
        ("squared", False),
        ("linear custom_vjp in the model", False),
    ],
)
def test_matches_the_dense_gauss_newton_matrix(case, compiled):
    model_fn, loss_fn, build = CASES[case]
    params, (x, y) = build(), batch()
    u = random_like(params, seed=2)
    value, gradient, matrix = dense_gauss_newton(
        lambda p: model_fn(p, x), lambda z: loss_fn(z, y), params
    )
    on_batch = functools.partial(CompositeLoss(model_fn, loss_fn), x=x, y=y)
    measuring = functools.partial(gauss_newton, on_batch)
    got = (jax.jit(measuring) if compiled else measuring)(params, u)
    expected = [value, gradient @ flat(u), flat(u) @ matrix @ flat(u)]
    assert [float(field) for field in got[:3]] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("loss_fn", [cross_entropy, lambda z, y: jnp.mean(jnp.cos(z * y))])
def test_a_linear_model_has_the_hessian(loss_fn):
    params, (x, y) = layers()[:1], batch()
    y = y @ np.ones((4, 6))
    u = random_like(params, seed=2)
    on_batch = functools.partial(CompositeLoss(network, loss_fn), x=x, y=y)
    _, _, hessian = dense(on_batch, params)
    expected = flat(u) @ hessian @ flat(u)
    assert float(gauss_newton(on_batch, params, u).curvature) == pytest.approx(expected, rel=1e-10)


def test_a_partial_with_attributes_may_be_fixed_further():
    """Python does not merge the two; the last value of a keyword counts."""
    params, (x, y) = layers(), batch()
    u = random_like(params, seed=2)
    loss = CompositeLoss(network, cross_entropy)
    inner = functools.partial(loss, x=x, y=jnp.roll(y, 1))
    inner.name = "training"
    outer = functools.partial(inner, y=y)
    assert outer.func is inner
    expected = gauss_newton(functools.partial(loss, x=x, y=y), params, u)
    assert jax.tree.leaves(gauss_newton(outer, params, u)) == jax.tree.leaves(expected)


def test_a_convex_loss_is_nonnegative_where_the_hessian_is_negative():
    params, (x, y) = layers(), batch()
    on_batch = functools.partial(CompositeLoss(network, cross_entropy), x=x, y=y)
    _, _, hessian = dense(on_batch, params)
    values, vectors = np.linalg.eigh(hessian)
    vectors = vectors[:, values < -1e-4 * values.max()]
    assert vectors.shape[1] >= 3
    _, unravel = ravel_pytree(params)

    @jax.jit
    @jax.vmap
    def both(vector):
        u = unravel(vector)
        return gauss_newton(on_batch, params, u).curvature, measure(on_batch, params, u).curvature

    curvatures, negative = both(vectors.T)
    assert np.all(np.asarray(negative) < 0)
    _, _, matrix = dense_gauss_newton(
        lambda p: network(p, x), lambda z: cross_entropy(z, y), params
    )
    expected = np.diag(vectors.T @ matrix @ vectors)
    np.testing.assert_allclose(curvatures, expected, rtol=1e-10, atol=1e-14)
    assert np.all(np.asarray(curvatures) >= 0)


@pytest.mark.parametrize("square", [jnp.square, custom_square], ids=["plain", "custom_vjp"])
def test_outputs_that_are_no_function_of_the_parameters_are_constants(square):
    """For z = 2 w**2 and the loss sum z**2 the curvature along u is 2 (4 w u)**2."""
    key = jax.random.key(0)

    def model_fn(w):
        halves = {"index": jnp.argmax(w), "mask": w > 0, "key": key, "count": 2, "none": None}
        return halves | {"z": w**2, "floats": jnp.ones(2), "number": 1.0}

    def loss_fn(outputs):
        assert outputs["none"] is None
        noise = jax.random.normal(outputs["key"]) + outputs["index"] + jnp.sum(outputs["mask"])
        z = outputs["z"] * outputs["floats"] * outputs["number"] * outputs["count"]
        return jnp.sum(square(z)) + noise

    got = gauss_newton(CompositeLoss(model_fn, loss_fn), jnp.array([1.0, 2.0]), jnp.ones(2))
    assert float(got.curvature) == pytest.approx(2 * 16 * (1 + 4), rel=1e-12)


@pytest.mark.parametrize("square", [jnp.square, custom_square], ids=["plain", "custom_vjp"])
def test_complex_parameters_and_outputs_count_as_their_real_and_imaginary_parts(square):
    params, u = (random_like(jnp.zeros(3, dtype=complex), seed) for seed in (0, 1))

    def model_fn(w):
        return jnp.exp(1j * w) * jnp.conj(w[::-1])

    def loss_fn(z):
        return jnp.sum(square(z.real - 2 * z.imag[::-1]) * jnp.abs(z) ** 2)

    def parts(z):
        return jnp.stack([z.real, z.imag])

    value, gradient, matrix = dense_gauss_newton(
        lambda p: parts(model_fn(p[0] + 1j * p[1])), lambda z: loss_fn(z[0] + 1j * z[1]),
        parts(params),
    )  # fmt: skip
    v = flat(parts(u))
    got = jax.jit(functools.partial(gauss_newton, CompositeLoss(model_fn, loss_fn)))(params, u)
    expected = [value, gradient @ v, v @ matrix @ v]
    assert [float(field) for field in got[:3]] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("activation", [jnp.tanh, custom_tanh], ids=["plain", "custom_vjp"])
def test_bfloat16_parameters_have_float32_scalars(activation):
    """At the same rounded point; 5e-2 is 12 roundings of bfloat16."""
    low, (x, y) = layers(jnp.bfloat16), batch()
    params, u = (jax.tree.map(lambda p: p.astype(float), low), random_like(low, seed=2))

    def model_fn(p, x):
        return network(p, x.astype(p[0][0].dtype), activation)

    def loss_fn(z, y):
        return cross_entropy(z.astype(jnp.float32), y.astype(jnp.float32))

    on_batch = functools.partial(CompositeLoss(model_fn, loss_fn), x=x, y=y)
    got = jax.jit(functools.partial(gauss_newton, on_batch))(low, u)
    assert {field.dtype for field in got[:3]} == {jnp.dtype("float32")}
    _, _, matrix = dense_gauss_newton(
        lambda p: network(p, x), lambda z: cross_entropy(z, y), params
    )
    v = flat(u).astype(float)
    assert float(got.curvature) == pytest.approx(v @ matrix @ v, rel=5e-2)


def test_the_products_cost_a_forward_pass_more():
    """For 3 layers, a gradient without that of the data has 8 products, and J u has 5 more."""

    def gradient(params, x, y):
        return jax.value_and_grad(composite)(params, x, y)

    def both(params, x, y):
        value, grad = gradient(params, x, y)
        return value, grad, gauss_newton(functools.partial(composite, x=x, y=y), params, grad)[:3]

    composite = CompositeLoss(network, squared)
    x, y = jnp.ones((256, 128)), jnp.ones((256, 128))
    params = [(jnp.full((128, 128), 0.01), jnp.zeros(128)) for _ in range(3)]
    flops = [
        jax.jit(function).lower(params, x, y).compile().cost_analysis()["flops"]
        for function in (gradient, both)
    ]
    assert flops[1] < (1 + 5 / 8 + 0.05) * flops[0]


SOLVERS = {
    "scale_by_tuner": lambda **how: scale_by_tuner(tuners.cdat(1.0, 0.0), **how),
    "scale_by_cdat": lambda **how: scale_by_cdat(sigma=1.0, decay=0.0, **how),
    "cdat": lambda **how: cdat(optax.identity(), sigma=1.0, decay=0.0, **how),
}


def descent(scale):
    """Gradient descent, with the tuner last or around it."""
    return optax.chain(optax.sgd(1.0), scale)


@pytest.mark.parametrize("build", SOLVERS.values(), ids=list(SOLVERS))
def test_a_training_step_uses_it_and_compiles_once(build):
    traces, params, (x, y) = [], layers(), batch()

    def model_fn(p, x):
        traces.append(None)
        return network(p, x)

    solver = descent(build(curvature="gauss_newton"))
    step, state = stepper(solver, CompositeLoss(model_fn, cross_entropy)), solver.init(params)
    for _ in range(2):
        _, gradient, matrix = dense_gauss_newton(
            lambda p: network(p, x), lambda z: cross_entropy(z, y), params
        )
        before = flat(params)
        params, state = step(params, state, x=x, y=y)
        counted = len(traces)
        rate = gradient @ gradient / (gradient @ matrix @ gradient)
        np.testing.assert_allclose(flat(params), before - rate * gradient, rtol=1e-9, atol=1e-12)
    assert step._cache_size() == 1
    step(params, state, x=x, y=y)
    assert len(traces) == counted


def test_every_works_with_it():
    params, (x, y) = layers(), batch()
    solver = descent(scale_by_cdat(sigma=1.0, curvature="gauss_newton", every=2))
    step, state = stepper(solver, CompositeLoss(network, cross_entropy)), solver.init(params)
    rates = []
    for _ in range(4):
        params, state = step(params, state, x=x, y=y)
        rates.append(float(state[-1].learning_rate))
    assert rates[0] == rates[1] != rates[2] == rates[3]


def test_it_works_with_the_line_searches_of_optax():
    params, (x, y) = layers(), batch()
    loss = CompositeLoss(network, cross_entropy)
    solver = descent(optax.scale_by_backtracking_linesearch(20))
    after, _ = stepper(solver, loss)(params, solver.init(params), x=x, y=y)
    assert float(loss(after, x, y)) < float(loss(params, x, y))


def test_under_shard_map_and_with_sharded_arrays_it_is_that_of_the_whole_batch():
    code = """
        import functools, jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from cdat_jax import CompositeLoss, measure
        from tests.jax.test_gauss_newton import (
            batch, custom_square, custom_tanh, dense_gauss_newton, flat, layers, network,
            random_like,
        )
        jax.config.update("jax_enable_x64", True)
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        params, (x, y) = layers(), batch()
        u = random_like(params, seed=2)
        _, gradient, matrix = dense_gauss_newton(
            lambda p: network(p, x), lambda z: jnp.mean((z - y) ** 2), params
        )
        expected = [gradient @ flat(u), flat(u) @ matrix @ flat(u)]
        for activation, square in [(jnp.tanh, jnp.square), (jnp.tanh, custom_square),
                                   (custom_tanh, jnp.square), (custom_tanh, custom_square)]:
            model_fn = functools.partial(network, activation=activation)
            def measured(reduce, params, u, x, y):
                loss = CompositeLoss(model_fn, lambda z, y: reduce(jnp.mean(square(z - y))))
                on_batch = functools.partial(loss, x=x, y=y)
                return measure(on_batch, params, u, curvature="gauss_newton")[1:3]
            mean = lambda value: jax.lax.pmean(value, "data")
            mapped = jax.jit(jax.shard_map(
                functools.partial(measured, mean), mesh=mesh,
                in_specs=(P(), P(), P("data"), P("data")), out_specs=P(),
            ))
            np.testing.assert_allclose(mapped(params, u, x, y), expected, rtol=1e-10)
            split = jax.device_put((x, y), NamedSharding(mesh, P("data")))
            got = jax.jit(functools.partial(measured, lambda value: value))(params, u, *split)
            np.testing.assert_allclose(got, expected, rtol=1e-10)
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2])


def flax_apply(variables, *args, train=False, **kwargs):
    return variables, args, train, kwargs


ROUTES = {
    "the model's first, then those of the loss alone": (
        CompositeLoss(lambda p, x, mask: (p, x, mask), lambda z, mask, y: (*z, mask, y)),
        lambda f: f("p", "x", "m", "y"),
        ("p", "x", "m", "m", "y"),
    ),
    "by name": (
        CompositeLoss(lambda p, x, mask: (p, x, mask), lambda z, mask, y: (*z, mask, y)),
        lambda f: f("p", y="y", mask="m", x="x"),
        ("p", "x", "m", "m", "y"),
    ),
    "positional only": (
        CompositeLoss(lambda p, x, /: (p, x), lambda z, y, /: (*z, y)),
        lambda f: f("p", "x", y="y"),
        ("p", "x", "y"),
    ),
    "defaults stay": (
        CompositeLoss(lambda p, x, train=True: (p, x, train), lambda z, y, scale=1: (*z, y, scale)),
        lambda f: f("p", "x", "y"),
        ("p", "x", True, "y", 1),
    ),
    "defaults by name": (
        CompositeLoss(lambda p, x, train=True: (p, x, train), lambda z, y, scale=1: (*z, y, scale)),
        lambda f: f("p", "x", "y", scale=2, train=False),
        ("p", "x", False, "y", 2),
    ),
    "*args and **kwargs": (
        CompositeLoss(flax_apply, lambda z, y: (*z, y)),
        lambda f: f("p", "x", "mask", y="y", rngs="r"),
        ("p", ("x", "mask"), False, {"rngs": "r"}, "y"),
    ),
    "fixed by partial": (
        CompositeLoss(functools.partial(flax_apply, train=True), lambda z, *, y: (*z, y)),
        lambda f: f("p", "x", y="y"),
        ("p", ("x",), True, {}, "y"),
    ),
    "a wrapper without names": (
        CompositeLoss(lambda *args: args, lambda *args: args[0]),
        lambda f: f("p", "x"),
        ("p", "x"),
    ),
}


@pytest.mark.parametrize(("loss", "call", "expected"), ROUTES.values(), ids=list(ROUTES))
def test_each_argument_reaches_the_function_that_names_it(loss, call, expected):
    assert call(loss) == expected


def test_extra_arguments_that_nobody_names_are_left_out_of_a_step():
    """As for any value_fn: optax.chain passes every extra argument to every member."""
    loss = CompositeLoss(lambda w, x: w * x, lambda z, y: jnp.sum((z - y) ** 2))
    solver = descent(scale_by_cdat(sigma=1.0, curvature="gauss_newton"))
    w, x, y = jnp.ones(2), jnp.array([1.0, 2.0]), jnp.zeros(2)
    value, grad = jax.value_and_grad(loss)(w, x, y)
    _, state = solver.update(
        grad, solver.init(w), w, value=value, grad=grad, value_fn=loss, x=x, y=y, other=3
    )
    assert float(state[-1].info.curvature) == 2 * (2**2 + 2**2 * 8**2)


def test_missing_and_unknown_arguments_are_named():
    loss = CompositeLoss(network, cross_entropy)
    x, y = batch()
    with pytest.raises(TypeError, match="missing a required argument: 'y'"):
        loss(layers(), x)
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        gauss_newton(functools.partial(loss, y=y), layers(), layers())
    with pytest.raises(TypeError, match="unexpected keyword argument 'labels'"):
        loss(layers(), x, y, labels=y)


@pytest.mark.parametrize(
    "value_fn",
    [
        lambda w: jnp.sum(w**2),
        jax.jit(CompositeLoss(lambda w: w, jnp.sum)),
        functools.partial(CompositeLoss(lambda w, x: w * x, lambda z: jnp.sum(z)), jnp.ones(2)),
    ],
    ids=["function", "jit", "params in a partial"],
)
def test_other_objectives_are_refused(value_fn):
    w = jnp.ones(2)
    with pytest.raises(
        TypeError, match=r"value_fn must be a CompositeLoss .* got .*write the loss"
    ):
        gauss_newton(value_fn, w, w)
    solver = descent(scale_by_cdat(sigma=2.0, curvature="gauss_newton", every=2))
    with pytest.raises(TypeError, match="value_fn must be a CompositeLoss"):
        solver.update(w, solver.init(w), w, value=1.0, grad=w, value_fn=value_fn)


def test_bad_parts_are_named():
    good = lambda z: jnp.sum(z)
    for name, parts in (("model_fn", (jnp.ones(2), good)), ("loss_fn", (good, 3.0))):
        with pytest.raises(TypeError, match=f"{name} must be callable, got .* not its result"):
            CompositeLoss(*parts)
    with pytest.raises(TypeError, match="model_fn must take a positional argument first"):
        CompositeLoss(lambda *, w: w, good)
    with pytest.raises(TypeError, match="loss_fn must have a signature"):
        CompositeLoss(good, type)
    with pytest.raises(TypeError, match=r"through the outputs only, but it takes 'w'.*return them"):
        CompositeLoss(lambda w, x: w * x, lambda z, w: jnp.sum(z) + jnp.sum(w**2))
    w = jnp.ones(2)
    with pytest.raises(ValueError, match=r"loss_fn must return a scalar, got shape \(2,\)"):
        gauss_newton(CompositeLoss(lambda w: w, lambda z: z), w, w)
    with pytest.raises(ValueError, match=r"model_fn must return at least one float.*got .*int"):
        gauss_newton(CompositeLoss(jnp.argmax, lambda z: 1.0 * z), w, w)
