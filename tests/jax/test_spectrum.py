"""The functions of the spectrum against dense Hessians in float64."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree

from cdat_core import TopEigenvalues
from cdat_jax import (
    adam_inverse_sqrt,
    cdat,
    sharpness,
    spectral_density,
    top_eigenvalues,
    trace,
)
from tests.jax.problems import dense, flat, random_like, same, train

pytestmark = pytest.mark.usefixtures("quick_compilation")

FUNCTIONS = {
    "sharpness": lambda *a, **k: sharpness(*a, num_matvecs=4, **k),
    "top_eigenvalues": lambda *a, **k: top_eigenvalues(*a, k=2, num_matvecs=4, **k),
    "spectral_density": lambda *a, **k: spectral_density(*a, num_probes=2, num_matvecs=3, **k),
    "trace": lambda *a, **k: trace(*a, num_probes=3, **k),
    "hutch++": lambda *a, **k: trace(*a, num_probes=4, method="hutch++", **k),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def network_loss(params, x, y):
    hidden = jnp.tanh(x @ params["inner"][0] + params["inner"][1][None])
    return jnp.mean((hidden @ params["outer"] - y) ** 2)


@jax.jit
def dense_hessian(params, x, y):
    """The dense Hessian of `network_loss`."""
    vector, unravel = ravel_pytree(params)
    return jax.hessian(lambda vector: network_loss(unravel(vector), x, y))(vector)


gradient_of_network = jax.jit(jax.grad(network_loss))


@pytest.fixture(scope="module")
def problem():
    """Parameters, data and the dense Hessian of a small network; eigenvalues of both signs."""
    generator = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(generator.normal(size=shape))
    params = {"inner": (draw(3, 5), draw(5)), "outer": draw(5)}
    data = (draw(12, 3), draw(12))
    return params, data, np.asarray(dense_hessian(params, *data))


def regression():
    """A linear regression with a decaying spectrum: loss, data, Hessian in closed form."""
    x = np.random.default_rng(1).normal(size=(300, 80)) * np.linspace(0.1, 1.0, 80)
    loss = lambda w, x: jnp.mean((x @ w) ** 2) / 2
    return loss, jnp.asarray(x), x.T @ x / 300


def counted(value_fn):
    """Return the function, and a list that grows by one whenever the function is traced."""
    traces = []

    def wrapped(*args, **kwargs):
        traces.append(None)
        return value_fn(*args, **kwargs)

    return wrapped, traces


def test_sharpness_is_the_largest_eigenvalue_of_the_dense_hessian(problem):
    params, data, hessian = problem
    eigenvalues = np.linalg.eigvalsh(hessian)
    found = sharpness(network_loss, params, *data, num_matvecs=25)
    assert found.shape == ()
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, eigenvalues[-1], rtol=1e-10)
    least = sharpness(network_loss, params, *data, num_matvecs=25, which="smallest")
    np.testing.assert_allclose(least, eigenvalues[0], rtol=1e-10)
    assert least < 0 < found


def test_both_ends_with_their_eigenvectors(problem):
    params, data, hessian = problem
    found = top_eigenvalues(network_loss, params, *data, k=2, num_matvecs=25, which="both")
    expected = np.linalg.eigvalsh(hessian)[[-1, -2, 1, 0]]
    np.testing.assert_allclose(found.values, expected, rtol=1e-9)
    for value, vector in zip(found.values, found.vectors, strict=True):
        assert jax.tree.structure(vector) == jax.tree.structure(params)
        v = flat(vector)
        np.testing.assert_allclose(hessian @ v, value * v, rtol=0, atol=1e-9)
        np.testing.assert_allclose(np.linalg.norm(v), 1.0, rtol=1e-10)


def test_a_linear_regression_against_scipy():
    loss, x, hessian = regression()
    w = jnp.zeros(80)
    values = scipy.sparse.linalg.eigsh(hessian, k=3, which="LA", return_eigenvectors=False)
    found = top_eigenvalues(loss, w, x, k=3, num_matvecs=60)
    np.testing.assert_allclose(found.values, np.sort(values)[::-1], rtol=1e-9)

    density = spectral_density(loss, w, x, num_probes=8, num_matvecs=30)
    second_moment = float((density.weights * density.nodes**2).sum())
    np.testing.assert_allclose(second_moment, (hessian**2).sum() / 80, rtol=0.05)
    for method in ("hutchinson", "hutch++"):
        estimate = trace(loss, w, x, num_probes=40, method=method)
        error = abs(float(estimate.estimate) - np.trace(hessian))
        assert error < 4 * float(estimate.standard_error)
        assert float(estimate.standard_error) < 0.04 * np.trace(hessian)


def test_probes_are_independent_random_signs(problem):
    params, data, hessian = problem
    draw = lambda key: trace(network_loss, params, *data, num_probes=4, key=key).estimate
    draws = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(3), 200)))
    variance = 2 * ((hessian**2).sum() - (np.diag(hessian) ** 2).sum()) / 4
    assert abs(np.mean(draws) - np.trace(hessian)) < 4 * (variance / 200) ** 0.5
    # Gaussian probes would add the squares of the diagonal to the variance.
    assert 0.7 < np.var(draws, ddof=1) / variance < 1.4
    assert (hessian**2).sum() / 2 / variance > 1.3


def test_hutchpp_is_exact_on_low_rank():
    direction = jnp.asarray(np.random.default_rng(2).normal(size=50))
    loss = lambda w, d: (d @ w) ** 2 / 2
    found = trace(loss, jnp.ones(50), direction, num_probes=4, method="hutch++")
    np.testing.assert_allclose(found.estimate, (direction**2).sum(), rtol=1e-12)
    assert int(found.num_matvecs) == 6


def test_complex_parameters_are_real_vectors_of_twice_the_length():
    matrix = random_like(jnp.zeros((6, 3), dtype=complex), seed=4)
    loss = lambda w, a: jnp.sum(jnp.abs(a @ w) ** 2) + jnp.sum((w**2).real)
    w = random_like(jnp.zeros(3, dtype=complex), seed=5)
    real = lambda pair: loss(jax.lax.complex(pair[0], pair[1]), matrix)
    hessian = dense(real, (w.real, w.imag))[2]
    eigenvalues = np.linalg.eigvalsh(hessian)
    found = top_eigenvalues(loss, w, matrix, k=2, num_matvecs=6, which="both")
    np.testing.assert_allclose(found.values, eigenvalues[[-1, -2, 1, 0]], rtol=1e-9)
    estimate = trace(loss, w, matrix, num_probes=200)
    assert abs(float(estimate.estimate) - hessian.trace()) < 4 * float(estimate.standard_error)


@pytest.mark.parametrize("function", [sharpness, trace])
def test_single_precision_and_half_precision(single_precision, function):
    loss = lambda w, c: (c * w**2).sum() / 2
    curvatures = jnp.array([0.5, 1.0, 2.0, 8.0])
    expected = 8.0 if function is sharpness else 11.5
    for dtype, rtol in ((jnp.float32, 1e-6), (jnp.bfloat16, 0.02)):
        options = {"num_matvecs": 4} if function is sharpness else {"num_probes": 1}
        found = function(loss, jnp.ones(4, dtype=dtype), curvatures.astype(dtype), **options)
        number = found if function is sharpness else found.estimate
        assert number.dtype == jnp.float32
        np.testing.assert_allclose(number, expected, rtol=rtol)


def adam_like(base, params, data, steps=5):
    """Return parameters, state and all gradients after a few steps."""
    state, gradients = base.init(params), []
    for _ in range(steps):
        gradient = gradient_of_network(params, *data)
        gradients.append(flat(gradient))
        updates, state = base.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state, gradients


@pytest.mark.parametrize("b2", [0.999, 0.9])
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "chain"])
def test_adam_as_preconditioner_against_the_dense_matrix(problem, b2, wrapped):
    params, data, _ = problem
    base = optax.adam(1e-2, b2=b2, eps=1e-3)
    if wrapped:
        base = optax.chain(optax.clip_by_global_norm(1e6), base)
    params, state, gradients = adam_like(base, params, data)
    v = np.zeros_like(gradients[0])
    for g in gradients:
        v = b2 * v + (1 - b2) * g**2
    scale = 1 / np.sqrt(np.sqrt(v / (1 - b2**5)) + 1e-3)
    hessian = np.asarray(dense_hessian(params, *data))
    expected = np.linalg.eigvalsh(scale[:, None] * hessian * scale)
    inverse_sqrt = adam_inverse_sqrt(state, b2=b2, eps=1e-3)
    options = {"k": 1, "num_matvecs": 25, "which": "both", "inverse_sqrt": inverse_sqrt}
    found = top_eigenvalues(network_loss, params, *data, **options)
    np.testing.assert_allclose(found.values, expected[[-1, 0]], rtol=1e-8)


def test_the_state_of_cdat_and_callables_and_numbers_as_preconditioners(problem):
    params, data, _ = problem
    loss = functools.partial(network_loss, x=data[0], y=data[1])
    params, state = train(cdat(optax.adam(1.0), sigma=1.0), loss, params, 2)[-1]
    hessian = np.asarray(dense_hessian(params, *data))
    adam = state.base[0]
    scale = 1 / np.sqrt(np.sqrt(flat(adam.nu) / (1 - 0.999**2)) + 1e-8)
    largest = functools.partial(sharpness, network_loss, params, *data, num_matvecs=25)
    expected = np.linalg.eigvalsh(scale[:, None] * hessian * scale)[-1]
    np.testing.assert_allclose(largest(inverse_sqrt=adam_inverse_sqrt(state)), expected, rtol=1e-8)
    plain = np.linalg.eigvalsh(hessian)[-1]
    np.testing.assert_allclose(largest(inverse_sqrt=0.5), plain / 4, rtol=1e-10)
    by_hand = lambda v: jax.tree.map(lambda leaf: 0.5 * leaf, v)
    np.testing.assert_allclose(largest(inverse_sqrt=by_hand), plain / 4, rtol=1e-10)


@every_function
def test_the_key_fixes_the_random_vectors(problem, function):
    params, data, _ = problem
    first = function(network_loss, params, *data)
    assert same(first, function(network_loss, params, *data))
    assert same(first, function(network_loss, params, *data, key=jax.random.key(0)))
    assert not same(first, function(network_loss, params, *data, key=jax.random.key(1)))


def test_a_warm_start_saves_products():
    loss, x, _ = regression()
    w = jnp.zeros(80)
    # Nearby data change the eigenvector only a little, like nearby parameters.
    moved = x + 0.01 * random_like(x, seed=6)
    exact = np.linalg.eigvalsh(np.asarray(moved.T @ moved / 300))[-1]
    before = top_eigenvalues(loss, w, x, num_matvecs=40)
    error = lambda start: abs(float(sharpness(loss, w, moved, num_matvecs=5, start=start)) - exact)
    assert error(before) < 1e-3 * exact
    assert error(None) > 1e-2 * exact
    assert error(before.vectors[0]) < 1e-3 * exact


def test_a_warm_start_sees_an_eigenvalue_that_is_new_at_the_top():
    loss = lambda w, c: (c * w**2).sum() / 2
    w, curvatures = jnp.zeros(6), jnp.array([5.0, 1.0, 0.5, 0.2, 0.1, 0.0])
    before = top_eigenvalues(loss, w, curvatures, num_matvecs=6)
    found = top_eigenvalues(loss, w, curvatures[::-1], num_matvecs=6, start=before)
    later = top_eigenvalues(loss, w, curvatures.at[5].set(9.0), num_matvecs=6, start=before)
    np.testing.assert_allclose([found.values[0], later.values[0]], [5.0, 9.0], rtol=1e-9)


@every_function
def test_nothing_is_compiled_again_for_arguments_of_the_same_shapes(problem, function):
    params, data, _ = problem
    value_fn, traces = counted(network_loss)
    function(value_fn, params, data[0], y=data[1])
    once = len(traces)
    assert once >= 1
    moved, x, y = jax.tree.map(lambda leaf: leaf + 0.1, params), 2 * data[0], data[1] + 1
    with compilations() as compiled:
        second = function(value_fn, moved, x, y=y)
    assert not compiled
    assert len(traces) == once
    # Neither the parameters nor the data were compiled as constants.
    assert same(second, function(lambda *a, **k: network_loss(*a, **k), moved, x, y=y))


@contextlib.contextmanager
def compilations():
    """Yield a list that grows by one whenever XLA compiles something in the block."""
    compiled, listening = [], True

    def listen(event, duration, **kwargs):
        if listening and event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    # Not every supported JAX can unregister a listener, so it stays and ignores what comes later.
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        listening = False


@every_function
def test_inside_jit_it_is_the_same_number(problem, function):
    params, data, _ = problem
    compiled = jax.jit(lambda params, data: function(network_loss, params, *data))(params, data)
    outside = function(network_loss, params, *data)
    for x, y in zip(jax.tree.leaves(compiled), jax.tree.leaves(outside), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("function", "number"),
    [
        (sharpness, "num_matvecs"),
        (spectral_density, "num_matvecs"),
        (spectral_density, "num_probes"),
        (trace, "num_probes"),
    ],
)
def test_the_hessian_is_compiled_once_however_many_products(problem, function, number):
    params, data, _ = problem

    def products(count):
        inside = jax.jit(lambda p, d: function(network_loss, p, *d, **{number: count}))
        return inside.lower(params, data).as_text().count("dot_general")

    assert products(3) == products(20) > 0


def test_inside_jit_with_an_adam_and_a_warm_start(problem):
    params, data, _ = problem
    _, state, _ = adam_like(optax.adam(1e-2), params, data, steps=2)
    start = top_eigenvalues(network_loss, params, *data, num_matvecs=3)

    @jax.jit
    def compiled(params, data, state, start):
        inverse_sqrt = adam_inverse_sqrt(state)
        return sharpness(
            network_loss, params, *data, num_matvecs=2, start=start, inverse_sqrt=inverse_sqrt
        )

    eager = sharpness(
        network_loss,
        params,
        *data,
        num_matvecs=2,
        start=start,
        inverse_sqrt=adam_inverse_sqrt(state),
    )
    np.testing.assert_allclose(compiled(params, data, state, start), eager, rtol=1e-12)


def test_a_loss_that_is_not_finite_shows():
    found = sharpness(lambda w: jnp.sum(jnp.log(w)), -jnp.ones(3), num_matvecs=2)
    assert jnp.isfinite(found)  # the second derivative of log is
    found = sharpness(lambda w: jnp.sum(jnp.sqrt(w)), -jnp.ones(3), num_matvecs=2)
    assert jnp.isnan(found)


@every_function
def test_parameters_that_are_not_floating_are_refused(function):
    loss = lambda p: jnp.sum(p["w"] ** 2)
    with pytest.raises(TypeError, match=r"int64 at params\['step'\]; pass it to value_fn"):
        function(loss, {"w": jnp.ones(3), "step": jnp.zeros((), dtype=int)})
    with pytest.raises(ValueError, match="at least one array"):
        function(loss, {})
    with pytest.raises(ValueError, match=r"value_fn must return a scalar, got shape \(3,\)"):
        function(lambda w: w**2, jnp.ones(3))
    with pytest.raises(TypeError, match="key must be a JAX random key, got 7"):
        function(lambda w: jnp.sum(w**2), jnp.ones(3), key=7)
    with pytest.raises(ValueError, match=r"inverse_sqrt\(v\) must have the shapes of params"):
        function(lambda w: jnp.sum(w**2), jnp.ones(3), inverse_sqrt=lambda v: v[:2])


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (sharpness, {"which": "both"}, "which must be 'largest' or 'smallest', got 'both'"),
        (top_eigenvalues, {"which": "all"}, "which must be .* got 'all'"),
        (top_eigenvalues, {"k": 3, "num_matvecs": 2}, "num_matvecs must be at least k"),
        (sharpness, {"num_matvecs": 0}, "num_matvecs must be an integer >= 1, got 0"),
        (spectral_density, {"num_probes": 0}, "num_probes must be an integer >= 1, got 0"),
        (trace, {"num_probes": 1, "method": "hutch++"}, "num_probes must be an integer >= 2"),
        (trace, {"method": "xtrace"}, "method must be 'hutchinson' or 'hutch.*, got 'xtrace'"),
        (sharpness, {"start": jnp.ones(2)}, r"start must have the shapes of params, got \(2,\)"),
        (sharpness, {"start": [jnp.ones(3)]}, "start must have the structure of params"),
        (
            sharpness,
            {"start": TopEigenvalues(jnp.ones(1), (jnp.ones(2),), jnp.ones(1), 1)},
            "start must have the shapes of params",
        ),
        (sharpness, {"inverse_sqrt": -1.0}, "inverse_sqrt must be a finite number > 0"),
    ],
)
def test_bad_arguments_are_named(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(lambda w: jnp.sum(w**2), jnp.ones(3), **options)


def test_a_value_fn_that_cannot_be_cached_is_refused():
    class Model:
        __hash__ = None

        def __call__(self, w):
            return jnp.sum(w**2)

    with pytest.raises(TypeError, match="value_fn must be hashable, got Model"):
        sharpness(Model(), jnp.ones(3))


def test_states_that_are_no_adam_are_refused():
    w = jnp.ones(3)
    adam = optax.adam(1e-3)
    with pytest.raises(ValueError, match=r"exactly one optax.ScaleByAdamState, got 0 in tuple"):
        adam_inverse_sqrt(optax.sgd(0.1).init(w))
    with pytest.raises(ValueError, match="got 2 in list"):
        adam_inverse_sqrt([adam.init(w), adam.init(w)])
    with pytest.raises(ValueError, match="after at least one step, got one with count 0"):
        adam_inverse_sqrt(adam.init(w))
    _, state = adam.update(w, adam.init(w))
    for options in ({"b2": 1.0}, {"eps": -1.0}, {"eps_root": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(options))):
            adam_inverse_sqrt(state, **options)
    loss = lambda w: jnp.sum(w**2)
    with pytest.raises(TypeError, match="pass adam_inverse_sqrt"):
        sharpness(loss, w, inverse_sqrt=state)
    with pytest.raises(ValueError, match="the second moments of the Adam state must have the sh"):
        sharpness(loss, jnp.ones(4), inverse_sqrt=adam_inverse_sqrt(state))
