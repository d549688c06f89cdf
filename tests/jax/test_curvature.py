"""Slope and curvature along a direction against the dense Hessian."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import cdat_core
from cdat_jax import TreeSpace, cdat, hvp, measure, scale_by_tuner
from tests.jax.problems import dense, flat, random_like

EXACT = ("auto", "forward", "hvp")
ALL = (*EXACT, "finite_difference")
pytestmark = pytest.mark.usefixtures("quick_compilation", "debug_nans")
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


def squared_loss(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def tanh_network(generator):
    """64 samples of 64 features, a 64-48-48-10 network, cross-entropy."""
    inputs = generator.normal(size=(64, 64))
    labels = np.eye(10)[generator.integers(10, size=64)]

    def value_fn(params):
        hidden = jnp.tanh(affine(params[0], inputs))
        hidden = jnp.tanh(affine(params[1], hidden))
        return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(affine(params[2], hidden)), axis=1))

    return value_fn, weights(generator, 64, 48, 48, 10)


def layer_norm(generator):
    inputs, targets = generator.normal(size=(2, 6, 8))

    def value_fn(params):
        hidden = affine(params["layer"], inputs)
        centred = hidden - jnp.mean(hidden, axis=1, keepdims=True)
        spread = jnp.sqrt(jnp.mean(centred**2, axis=1, keepdims=True) + 1e-5)
        return squared_loss(jnp.tanh(params["gain"][None] * centred / spread), targets)

    return value_fn, {"layer": weights(generator, 8, 8)[0], "gain": jnp.linspace(0.5, 1.5, 8)}


def dropout(generator):
    inputs, targets = generator.normal(size=(2, 6, 8))
    key = jax.random.key(0)

    def value_fn(params):
        hidden = jnp.tanh(affine(params, inputs))
        kept = jax.random.bernoulli(key, 0.7, hidden.shape)
        return squared_loss(jnp.where(kept, hidden / 0.7, 0), targets)

    return value_fn, weights(generator, 8, 8)[0]


def attention(generator):
    """Two heads of causal attention with a residual connection."""
    inputs, targets = generator.normal(size=(2, 2, 5, 8))

    def value_fn(params):
        query, key, value = (
            jnp.reshape(jnp.einsum("bti,ij->btj", inputs, params[name]), (2, 5, 2, 4))
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / 2
        causal = np.tril(np.ones((5, 5), dtype=bool))[None, None]
        shares = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
        mixed = jnp.reshape(jnp.einsum("bhqk,bkhd->bqhd", shares, value), (2, 5, 8))
        return squared_loss(inputs + jnp.einsum("bti,ij->btj", mixed, params["out"]), targets)

    names = ("query", "key", "value", "out")
    return value_fn, {name: jnp.asarray(generator.normal(size=(8, 8)) / 2) for name in names}


def scan(generator):
    inputs, targets = generator.normal(size=(2, 6, 4))

    def value_fn(params):
        layer = lambda hidden, _: (jnp.tanh(affine(params, hidden)), None)
        return squared_loss(jax.lax.scan(layer, jnp.asarray(inputs), None, length=3)[0], targets)

    return value_fn, weights(generator, 4, 4)[0]


def remat(generator):
    inputs, targets = generator.normal(size=(2, 6, 4))

    def value_fn(params):
        block = jax.checkpoint(lambda hidden: jnp.tanh(affine(params, hidden)))
        return squared_loss(block(block(inputs)), targets)

    return value_fn, weights(generator, 4, 4)[0]


def cond(generator):
    inputs, targets = generator.normal(size=(2, 6, 4))

    def value_fn(params):
        first = jnp.sum(params[1]) ** 2 > -1
        hidden = jax.lax.cond(first, jnp.tanh, lambda x: 2 * x, affine(params, inputs))
        return squared_loss(hidden, targets)

    return value_fn, weights(generator, 4, 4)[0]


class Case(NamedTuple):
    """Expected values from the dense Hessian, and measured ones."""

    columns: np.ndarray
    expected: list[float]
    measured: dict[str, tuple[float, ...]]
    products: np.ndarray


OBJECTIVES = (tanh_network, layer_norm, dropout, attention, scan, remat, cond)


@pytest.fixture(scope="module", params=OBJECTIVES, ids=lambda build: build.__name__)
def case(request, strict_jax, quick_compilation):
    """One objective, with a random direction."""
    value_fn, params = request.param(np.random.default_rng(0))
    direction = random_like(params, seed=1)
    value, gradient, hessian = dense(value_fn, params)
    u = flat(direction)
    expected = [value, gradient @ u, u @ hessian @ u]

    columns = np.arange(0, len(gradient), max(1, len(gradient) // 40))
    _, unravel = ravel_pytree(params)

    @jax.jit
    def everything(params, direction, unit):
        by_method = {m: measure(value_fn, params, direction, curvature=m)[:3] for m in ALL}
        product = hvp(value_fn, params)
        return by_method, jax.vmap(lambda v: ravel_pytree(product(unravel(v)))[0])(unit)

    unit = np.eye(len(gradient))[columns]
    by_method, products = everything(params, direction, unit)
    return Case(hessian[columns], expected, jax.tree.map(float, by_method), np.asarray(products))


def measured(value_fn, params, direction, method):
    """Measure under jit; return the first three fields."""
    compiled = jax.jit(functools.partial(measure, value_fn, curvature=method))
    return [float(field) for field in compiled(params, direction)[:3]]


@exact_methods
def test_exact_methods_match_the_dense_hessian(case, method):
    assert case.measured[method] == pytest.approx(case.expected, rel=1e-10)


def test_finite_difference_matches_within_its_error(case):
    """With h ~ eps**(1/3) |w| the errors are of order h**2 and eps/h, both ~ 1e-10."""
    assert case.measured["finite_difference"] == pytest.approx(case.expected, rel=1e-7)


def test_hvp_gives_the_columns_of_the_dense_hessian(case):
    atol = 1e-12 * np.abs(case.columns).max()
    np.testing.assert_allclose(case.products, case.columns, rtol=0, atol=atol)


def test_finite_difference_errs_with_the_square_of_its_step():
    """For f = sum(w**4) / 12 the central difference of the gradient errs by h**2 v**3 / 3."""
    params, direction, space = jnp.linspace(-1, 1, 5), jnp.linspace(0.5, 1, 5), TreeSpace()
    exact = float(jnp.sum(params**2 * direction**2))
    for step in (1e-2, 1e-3):
        gradient = jax.jit(lambda w: w**3 / 3)
        product = cdat_core.finite_difference_hvp(gradient, params, step=step, space=space)
        h = step * np.linalg.norm(params) / np.linalg.norm(direction)
        error = float(space.vdot(direction, product(direction))) - exact
        assert error == pytest.approx(h**2 * float(jnp.sum(direction**4)) / 3, rel=1e-4)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def rounded(request, strict_jax, quick_compilation):
    """A rounded point, the negative gradient as direction, and the exact values in float64."""
    value_fn, params = tanh_network(np.random.default_rng(0))

    def cast(tree, dtype):
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    @jax.jit
    def reference(params):
        low = cast(params, request.param)
        high = cast(low, jnp.float64)
        direction = cast(jax.tree.map(jnp.negative, jax.grad(value_fn)(high)), request.param)
        expected = measure(value_fn, high, cast(direction, jnp.float64), curvature="hvp")[:3]
        return low, direction, expected

    low, direction, expected = reference(params)
    return request.param, value_fn, low, direction, [float(x) for x in expected]


@exact_methods
def test_low_precision_parameters_give_float32_scalars(rounded, method):
    """At the same rounded point; 1e-5 is 100 roundings of float32, 5e-2 is 12 of bfloat16."""
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
    got = measure(quartic, jnp.ones(3), jnp.ones(3))
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


def quartic(params):
    return jnp.sum(params**4) + jnp.sum(params[:1] * params**2)


def test_directions_can_be_batched():
    params, directions = jnp.linspace(-1, 1, 4), jnp.asarray(np.eye(4) + 1)

    @jax.jit
    def curvatures(directions):
        along = lambda direction: measure(quartic, params, direction).curvature
        return jax.vmap(along)(directions), jnp.stack([along(u) for u in directions])

    batched, single = curvatures(directions)
    np.testing.assert_allclose(batched, single, rtol=1e-14)


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
    """Return an objective that applies `function` to the parameters and to a function of them."""
    return lambda w: jnp.sum(jnp.cos(function(w[::-1] * function(w))))


@custom
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_custom_vjp_is_measured_by_reverse_mode(function, plain, compiled):
    """The linear one has no residuals, so a jvp of a jvp fails only when it is compiled."""
    params, direction = jnp.linspace(0.1, 1, 3), jnp.linspace(-1, 1, 3)
    expected = measured(applied(plain), params, direction, "forward")
    measuring = functools.partial(measure, applied(function))
    got = (jax.jit(measuring) if compiled else measuring)(params, direction)
    assert [float(field) for field in got[:3]] == pytest.approx(expected, rel=1e-12)


def test_straight_through_parameters_are_measured_by_reverse_mode():
    """A custom_vjp of the parameters themselves, as in quantised training."""
    function, _ = CUSTOM["linear"]
    params, direction = jnp.linspace(0.1, 1, 3), jnp.linspace(-1, 1, 3)
    got = measured(lambda w: jnp.sum(function(w) ** 2), params, direction, "auto")
    expected = [4 * params @ params, 8 * params @ direction, 8 * direction @ direction]
    assert got == pytest.approx([float(x) for x in expected])


@custom
def test_custom_vjp_has_no_forward_over_forward(function, plain):
    params, direction = jnp.linspace(0.1, 1, 3), jnp.linspace(-1, 1, 3)
    forward = functools.partial(measure, applied(function), curvature="forward")
    for measuring in (forward, jax.jit(forward)):
        with pytest.raises((TypeError, NotImplementedError), match=r"custom_vjp|custom_lin"):
            measuring(params, direction)


def test_custom_vjp_of_the_data_leaves_forward_mode_alone():
    """Reverse mode cannot differentiate the while_loop, so forward mode must have been chosen."""
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
    """Reverse mode, and so the gradient, cannot differentiate a while_loop of unknown length."""

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
    """Return a real, indefinite function of a complex and a real leaf, not holomorphic."""
    z, x = params["z"], params["x"]
    coupling = jnp.sum(jnp.abs(z) ** 2) * jnp.sum(jnp.sin(x))
    return jnp.sum(jnp.real((1 + 2j) * z**3) + jnp.abs(z) ** 4) + coupling


def split(params):
    return {"re": params["z"].real, "im": params["z"].imag, "x": params["x"]}


def joined(parts):
    return {"z": parts["re"] + 1j * parts["im"], "x": parts["x"]}


@pytest.fixture(scope="module")
def complex_case(strict_jax, quick_compilation):
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


def test_complex_hvp_is_a_symmetric_operator(complex_case):
    params, direction, _, _, hessian = complex_case
    product = jax.jit(lambda p, v: hvp(complex_objective, p)(v))(params, direction)
    np.testing.assert_allclose(flat(split(product)), hessian @ flat(split(direction)), rtol=1e-12)
    measurement = cdat_core.measure(0.0, direction, lambda _: product, direction, space=TreeSpace())
    expected = measured(complex_objective, params, direction, "auto")[2]
    assert float(measurement.curvature) == pytest.approx(expected, rel=1e-12)


@all_methods
def test_zero_direction_gives_zeros(method):
    params = jnp.linspace(-1, 1, 4)
    value, slope, curvature = measured(quartic, params, jnp.zeros(4), method)
    assert (slope, curvature) == (0.0, 0.0)
    assert value == pytest.approx(float(quartic(params)))


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


def test_hvp_of_an_objective_that_is_not_scalar():
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
def test_an_unknown_method_is_named_with_those_that_exist(call):
    names = "'auto', 'forward', 'hvp', 'gauss_newton', 'finite_difference'"
    with pytest.raises(ValueError, match=rf"curvature must be one of \({names}\), got 'newton'$"):
        call("newton")
    for name in ("replay", "hessian"):
        with pytest.raises(ValueError, match=rf"{names}.* got '{name}', .*torch.* use \"hvp\""):
            call(name)
