"""Slope and curvature along a direction against the dense Hessian."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import cdat_core
from cdat_jax import TreeSpace, cdat, hvp, measure, scale_by_tuner
from tests.jax.problems import dense, flat, network, random_like

EXACT = ("auto", "forward", "hvp")
ALL = (*EXACT, "finite_difference")
exact_methods = pytest.mark.parametrize("method", EXACT)
all_methods = pytest.mark.parametrize("method", ALL)


def weights(generator, *sizes):
    """Return weights and biases of a fully connected network."""
    return [
        (jnp.asarray(generator.normal(size=(m, n)) / m**0.5), jnp.asarray(generator.normal(size=n)))
        for m, n in itertools.pairwise(sizes)
    ]


def affine(layer, inputs):
    matrix, bias = layer
    return inputs.astype(matrix.dtype) @ matrix + bias[None]


def cross_entropy(logits, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))


def labelled(generator, samples, features, classes):
    return generator.normal(size=(samples, features)), generator.integers(classes, size=samples)


def tanh_network(generator):
    """64 samples of 64 features, a 64-48-48-10 network, cross-entropy."""
    inputs, labels = labelled(generator, 64, 64, 10)

    def value_fn(params):
        hidden = jnp.tanh(affine(params[0], inputs))
        hidden = jnp.tanh(affine(params[1], hidden))
        return cross_entropy(affine(params[2], hidden), labels)

    return value_fn, weights(generator, 64, 48, 48, 10)


def layer_norm(generator):
    inputs, labels = labelled(generator, 12, 6, 3)

    def value_fn(params):
        hidden = affine(params["layers"][0], inputs)
        centred = hidden - jnp.mean(hidden, axis=1, keepdims=True)
        spread = jnp.sqrt(jnp.mean(centred**2, axis=1, keepdims=True) + 1e-5)
        hidden = jnp.tanh(params["gain"][None] * centred / spread)
        return cross_entropy(affine(params["layers"][1], hidden), labels)

    return value_fn, {"layers": weights(generator, 6, 8, 3), "gain": jnp.linspace(0.5, 1.5, 8)}


def dropout(generator):
    inputs, labels = labelled(generator, 12, 6, 3)
    key = jax.random.key(0)

    def value_fn(params):
        hidden = jnp.tanh(affine(params[0], inputs))
        kept = jax.random.bernoulli(key, 0.7, hidden.shape)
        return cross_entropy(affine(params[1], jnp.where(kept, hidden / 0.7, 0)), labels)

    return value_fn, weights(generator, 6, 8, 3)


def attention(generator):
    """Two heads of causal attention with a residual connection."""
    inputs = generator.normal(size=(2, 5, 8))
    targets = generator.normal(size=(2, 5, 8))

    def value_fn(params):
        query, key, value = (
            jnp.reshape(jnp.einsum("bti,ij->btj", inputs, params[name]), (2, 5, 2, 4))
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / 2
        causal = jnp.tril(jnp.ones((5, 5), dtype=bool))[None, None]
        shares = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
        mixed = jnp.reshape(jnp.einsum("bhqk,bkhd->bqhd", shares, value), (2, 5, 8))
        outputs = inputs + jnp.einsum("bti,ij->btj", mixed, params["out"])
        return jnp.mean((outputs - targets) ** 2)

    names = ("query", "key", "value", "out")
    return value_fn, {name: jnp.asarray(generator.normal(size=(8, 8)) / 2) for name in names}


def scan(generator):
    inputs, labels = labelled(generator, 12, 4, 3)

    def value_fn(params):
        def layer(hidden, _):
            return jnp.tanh(affine(params[1], hidden)), None

        hidden, _ = jax.lax.scan(layer, affine(params[0], inputs), None, length=3)
        return cross_entropy(affine(params[2], hidden), labels)

    return value_fn, weights(generator, 4, 5, 5, 3)


def remat(generator):
    inputs, labels = labelled(generator, 12, 4, 3)

    def value_fn(params):
        block = jax.checkpoint(lambda layer, hidden: jnp.tanh(affine(layer, hidden)))
        return cross_entropy(affine(params[1], block(params[0], inputs)), labels)

    return value_fn, weights(generator, 4, 5, 3)


def cond(generator):
    inputs, labels = labelled(generator, 12, 4, 3)

    def value_fn(params):
        hidden = affine(params[0], inputs)
        positive = jnp.sum(params[0][1]) ** 2 > -1
        hidden = jax.lax.cond(positive, jnp.tanh, jnp.sin, hidden)
        return cross_entropy(affine(params[1], hidden), labels)

    return value_fn, weights(generator, 4, 5, 3)


class Case(NamedTuple):
    """An objective with its dense derivatives."""

    value_fn: Callable
    params: Any
    direction: Any
    gradient: np.ndarray
    hessian: np.ndarray
    expected: list[float]


OBJECTIVES = (tanh_network, layer_norm, dropout, attention, scan, remat, cond)


@pytest.fixture(scope="module", params=OBJECTIVES, ids=lambda build: build.__name__)
def case(request, strict_jax):
    """One objective, with a random direction."""
    value_fn, params = request.param(np.random.default_rng(0))
    direction = random_like(params, seed=1)
    value, gradient, hessian = dense(value_fn, params)
    u = flat(direction)
    expected = [value, gradient @ u, u @ hessian @ u]
    return Case(value_fn, params, direction, gradient, hessian, expected)


def measured(value_fn, params, direction, method):
    """Measure under jit; return the first three fields."""
    compiled = jax.jit(functools.partial(measure, value_fn, curvature=method))
    return [float(field) for field in compiled(params, direction)[:3]]


@exact_methods
def test_exact_methods_match_the_dense_hessian(case, method):
    got = measured(case.value_fn, case.params, case.direction, method)
    assert got == pytest.approx(case.expected, rel=1e-10)


def test_finite_difference_matches_within_its_error(case):
    """The displacement h ~ eps**(1/3) |w| leaves errors of order h**2 and eps/h, both ~ 1e-10."""
    got = measured(case.value_fn, case.params, case.direction, "finite_difference")
    assert got == pytest.approx(case.expected, rel=1e-7)


def test_hvp_gives_the_columns_of_the_dense_hessian(case):
    columns = np.arange(0, len(case.gradient), max(1, len(case.gradient) // 40))
    _, unravel = ravel_pytree(case.params)

    @jax.jit
    @jax.vmap
    def product(unit):
        return ravel_pytree(hvp(case.value_fn, case.params)(unravel(unit)))[0]

    unit = jnp.asarray(np.eye(len(case.gradient))[columns])
    np.testing.assert_allclose(
        product(unit), case.hessian[columns], rtol=0, atol=1e-12 * np.abs(case.hessian).max()
    )


def test_finite_difference_errs_with_the_square_of_its_step():
    """For f = sum(w**4) / 12 the central difference of the gradient errs by h**2 v**3 / 3."""
    params, direction, space = jnp.linspace(-1, 1, 5), jnp.linspace(0.5, 1, 5), TreeSpace()
    exact = float(jnp.sum(params**2 * direction**2))
    for step in (1e-2, 1e-3):
        product = cdat_core.finite_difference_hvp(
            jax.grad(lambda w: jnp.sum(w**4) / 12), params, step=step, space=space
        )
        h = step * np.linalg.norm(params) / np.linalg.norm(direction)
        error = float(space.vdot(direction, product(direction))) - exact
        assert error == pytest.approx(h**2 * float(jnp.sum(direction**4)) / 3, rel=1e-4)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def rounded(request, strict_jax):
    """A rounded point with the negative gradient as direction, and the values in float64."""
    value_fn, params = tanh_network(np.random.default_rng(0))
    low = jax.tree.map(lambda x: x.astype(request.param), params)
    high = jax.tree.map(lambda x: x.astype(jnp.float64), low)
    direction = jax.tree.map(
        lambda g: (-g).astype(request.param), jax.jit(jax.grad(value_fn))(high)
    )
    exact = jax.tree.map(lambda u: u.astype(jnp.float64), direction)
    return request.param, value_fn, low, direction, measured(value_fn, high, exact, "hvp")


@exact_methods
def test_low_precision_parameters_give_float32_scalars(rounded, method):
    """At the same rounded point: 1e-5 is 100 roundings of float32, 5e-2 is 12 of bfloat16."""
    dtype, value_fn, params, direction, expected = rounded
    got = jax.jit(functools.partial(measure, value_fn, curvature=method))(params, direction)
    assert {field.dtype for field in got[:3]} == {jnp.dtype("float32")}
    tolerance = {"float32": 1e-5, "bfloat16": 5e-2}[dtype]
    assert [float(field) for field in got[:3]] == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("rounded", ["float32"], indirect=True)
def test_finite_difference_in_float32(rounded):
    """Along a displacement of 5e-3 |w|; rounding and truncation are both of order 1e-3."""
    _, value_fn, params, direction, expected = rounded
    got = measured(value_fn, params, direction, "finite_difference")
    assert got == pytest.approx(expected, rel=1e-2)


def test_without_float64_the_scalars_are_float32(single_precision):
    value_fn, params = layer_norm(np.random.default_rng(0))
    got = measure(value_fn, params, random_like(params, seed=1))
    assert {field.dtype for field in got[:3]} == {jnp.dtype("float32")}


def test_direction_is_cast_to_the_dtypes_of_the_parameters():
    params = jnp.ones(3, dtype=jnp.bfloat16)
    direction = jnp.asarray([1.001, 2.0, 3.0], dtype=jnp.float64)
    got = measure(lambda w: jnp.sum(w.astype(jnp.float32) ** 2), params, direction)
    assert float(got.curvature) == 2 * (1.0 + 4.0 + 9.0)


def test_python_numbers_are_parameters():
    for method in ALL:
        got = measure(lambda w: w**3, 2.0, 0.5, curvature=method)
        assert [float(field) for field in got[:3]] == pytest.approx([8.0, 6.0, 3.0])


def test_directions_can_be_batched():
    value_fn, params = layer_norm(np.random.default_rng(0))
    directions = [random_like(params, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *directions)
    batched = jax.jit(jax.vmap(functools.partial(measure, value_fn, params)))(stacked)
    single = [measure(value_fn, params, direction).curvature for direction in directions]
    np.testing.assert_allclose(batched.curvature, np.asarray(single), rtol=1e-12)


def with_custom_vjp(function, forward, backward):
    wrapped = jax.custom_vjp(function)
    wrapped.defvjp(forward, backward)
    return wrapped


def slope_of_tanh(y, cotangent):
    return (cotangent * (1 - y**2),)


CUSTOM = {
    "tanh": (
        with_custom_vjp(jnp.tanh, lambda x: (jnp.tanh(x), jnp.tanh(x)), slope_of_tanh),
        jnp.tanh,
    ),
    "tanh-in-jit": (
        jax.jit(with_custom_vjp(jnp.tanh, lambda x: (jnp.tanh(x), jnp.tanh(x)), slope_of_tanh)),
        jnp.tanh,
    ),
    "linear": (
        with_custom_vjp(lambda x: 2 * x, lambda x: (2 * x, None), lambda _, g: (2 * g,)),
        lambda x: 2 * x,
    ),
}
custom = pytest.mark.parametrize(("function", "plain"), list(CUSTOM.values()), ids=list(CUSTOM))


def applied(function):
    """An objective that applies `function` to the parameters themselves and to what they make."""
    inputs = np.random.default_rng(0).normal(size=(6, 3))
    return lambda w: jnp.sum(jnp.cos(function(inputs @ function(w))))


@custom
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("method", ["auto", "hvp", "finite_difference"])
def test_custom_vjp_is_measured_by_reverse_mode(function, plain, method, compiled):
    """The linear one keeps no residuals, so that a jvp of a jvp fails only when compiled."""
    params, direction = jnp.linspace(0.1, 1, 3), jnp.linspace(-1, 1, 3)
    for first in (applied, lambda f: lambda w: jnp.sum(f(w) ** 3)):
        expected = measured(first(plain), params, direction, "forward")
        measuring = functools.partial(measure, first(function), curvature=method)
        got = (jax.jit(measuring) if compiled else measuring)(params, direction)
        tolerance = 1e-7 if method == "finite_difference" else 1e-12
        assert [float(field) for field in got[:3]] == pytest.approx(expected, rel=tolerance)


@custom
def test_custom_vjp_has_no_forward_over_forward(function, plain):
    params, direction = jnp.linspace(0.1, 1, 3), jnp.linspace(-1, 1, 3)
    forward = functools.partial(measure, applied(function), curvature="forward")
    for measuring in (forward, jax.jit(forward)):
        with pytest.raises((TypeError, NotImplementedError), match=r"custom_vjp|custom_lin"):
            measuring(params, direction)


def test_custom_vjp_of_the_data_leaves_forward_mode_alone():
    """Reverse mode cannot pass the while_loop, so this also shows which mode was chosen."""
    double, _ = CUSTOM["linear"]

    def value_fn(w):
        looped = jax.lax.while_loop(lambda x: jnp.sum(x) < 0, lambda x: x + 1, w)
        return jnp.sum(double(jnp.ones(3)) * looped**2)

    assert float(measure(value_fn, jnp.ones(3), jnp.ones(3)).curvature) == 12


@pytest.mark.parametrize("message", ["of the user", "about a custom_vjp"])
@all_methods
def test_type_error_of_the_objective_surfaces_unchanged(method, message):
    error = TypeError(message)

    def value_fn(params):
        raise error

    with pytest.raises(TypeError) as caught:
        measure(value_fn, jnp.ones(2), jnp.ones(2), curvature=method)
    assert caught.value is error


def test_while_loop_is_measured_by_forward_mode():
    """Reverse mode cannot pass a while_loop of unknown length; nor can the gradient."""

    def value_fn(params, loop):
        return jnp.sum(loop(lambda x: jnp.sin(x) + x**2 / 4, params))

    def dynamic(body, x):
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, body(c[1])), (0, x))[1]

    params, direction = jnp.linspace(0.1, 1, 4), jnp.linspace(-1, 1, 4)
    unrolled = functools.partial(value_fn, loop=lambda body, x: body(body(body(x))))
    _, _, hessian = dense(unrolled, params)
    expected = float(direction @ hessian @ direction)
    for method in ("auto", "forward"):
        looped = functools.partial(value_fn, loop=dynamic)
        assert measured(looped, params, direction, method)[2] == pytest.approx(expected, rel=1e-12)


def complex_objective(params):
    """Real, not holomorphic, with an indefinite Hessian; a complex and a real leaf."""
    z, x = params["z"], params["x"]
    coupling = jnp.sum(jnp.abs(z) ** 2) * jnp.sum(jnp.sin(x))
    return jnp.sum(jnp.real((1 + 2j) * z**3) + jnp.abs(z) ** 4) + coupling


def split(params):
    return {"re": params["z"].real, "im": params["z"].imag, "x": params["x"]}


def joined(parts):
    return {"z": parts["re"] + 1j * parts["im"], "x": parts["x"]}


@pytest.fixture(scope="module")
def complex_case(strict_jax):
    """Parameters, direction, and the dense derivatives over real and imaginary parts."""
    params = random_like({"z": jnp.zeros(3, dtype=complex), "x": jnp.zeros(2)}, seed=0)
    direction = random_like(params, seed=1)
    parts = split(params)
    return params, direction, *dense(lambda p: complex_objective(joined(p)), parts)


@all_methods
def test_complex_parameters_count_as_real_and_imaginary_parts(complex_case, method):
    params, direction, value, gradient, hessian = complex_case
    u = flat(split(direction))
    expected = [value, gradient @ u, u @ hessian @ u]
    got = measured(complex_objective, params, direction, method)
    assert got == pytest.approx(expected, rel=1e-7 if method == "finite_difference" else 1e-12)


def test_complex_hvp_is_the_symmetric_operator_of_the_space(complex_case):
    params, direction, _, _, hessian = complex_case
    product = hvp(complex_objective, params)(direction)
    np.testing.assert_allclose(flat(split(product)), hessian @ flat(split(direction)), rtol=1e-12)
    curvature = cdat_core.directional_curvature(
        hvp(complex_objective, params), direction, space=TreeSpace()
    )
    expected = measure(complex_objective, params, direction).curvature
    assert float(curvature) == pytest.approx(float(expected), rel=1e-12)


@all_methods
def test_zero_direction_gives_zeros(method):
    loss, params, batch = network()
    zeros = jax.tree.map(jnp.zeros_like, params)
    value, slope, curvature = measured(lambda p: loss(p, batch), params, zeros, method)
    assert (slope, curvature) == (0.0, 0.0)
    assert value == pytest.approx(float(loss(params, batch)))


@all_methods
@pytest.mark.parametrize("shape", [(1,), (3,)])
def test_objective_must_return_a_scalar(method, shape):
    with pytest.raises(ValueError, match=r"value_fn must return a scalar, got shape \("):
        measure(
            lambda w: jnp.broadcast_to(jnp.sum(w), shape),
            jnp.ones(2),
            jnp.ones(2),
            curvature=method,
        )


def test_hvp_of_an_objective_that_is_no_scalar():
    with pytest.raises(ValueError, match="value_fn must return a scalar"):
        hvp(lambda w: w**2, jnp.ones(2))


@all_methods
def test_shapes_of_the_direction_must_match(method):
    params = {"a": jnp.ones(2), "b": jnp.ones((2, 1))}
    value_fn = lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2)
    with pytest.raises(ValueError, match=r"direction must have the shapes of params, got \(1,\)"):
        measure(value_fn, params, {"a": jnp.ones(1), "b": jnp.ones((2, 1))}, curvature=method)
    with pytest.raises(ValueError, match="structure"):
        measure(value_fn, params, {"a": jnp.ones(2), "c": jnp.ones((2, 1))}, curvature=method)
    with pytest.raises(ValueError, match="direction must have the shapes of params"):
        hvp(value_fn, params)({"a": jnp.ones((2, 1)), "b": jnp.ones((2, 1))})


@pytest.mark.parametrize(
    "call",
    [
        lambda name: measure(jnp.sum, jnp.ones(2), jnp.ones(2), curvature=name),
        lambda name: scale_by_tuner(cdat_core.tuners.cdat(), curvature=name),
        lambda name: cdat(optax.sgd(1.0), curvature=name),
    ],
    ids=["measure", "scale_by_tuner", "cdat"],
)
def test_unknown_curvature_is_named(call):
    with pytest.raises(ValueError, match="curvature must be one of .*'auto'.* got 'newton'"):
        call("newton")
