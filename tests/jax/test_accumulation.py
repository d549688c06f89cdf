"""The mean over micro-batches: the results of the whole batch in the memory of one part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cdat_core import linesearch
from cdat_jax import CompositeLoss, accumulate, cdat, measure, scale_by_tuner
from tests.jax.problems import dense, flat, random_like, same, stepper, train

pytestmark = pytest.mark.usefixtures("quick_compilation", "debug_nans")

NUMBER, SIZE = 4, 8
METHODS = ("forward", "hvp", "finite_difference", "gauss_newton")


def network(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


def squared_error(outputs, y):
    return jnp.mean((outputs - y) ** 2)


LOSS = CompositeLoss(network, squared_error)


def problem(dtype="float64", size=SIZE, width=5):
    """Return parameters, the whole batch, and the batch as micro-batches."""
    params = {"hidden": jnp.zeros((3, width), dtype), "out": jnp.zeros((width, 2), dtype)}
    params = random_like(params, seed=0, scale=0.7)
    whole = {"x": jnp.zeros((NUMBER * size, 3), dtype), "y": jnp.zeros((NUMBER * size, 2), dtype)}
    whole = random_like(whole, seed=1)
    stacked = jax.tree.map(lambda leaf: leaf.reshape(NUMBER, size, -1), whole)
    return params, whole, stacked


def everything(loss, method):
    """Return a function of parameters and a batch: value, gradient and measurement along -grad."""

    def found(params, batch):
        objective = functools.partial(loss, **batch)
        value, grad = jax.value_and_grad(objective)(params)
        direction = jax.tree.map(jnp.negative, grad)
        return value, grad, measure(objective, params, direction, curvature=method)

    return found


def test_value_gradient_and_curvature_are_those_of_the_whole_batch():
    """Against the dense Hessian of the loss of the whole batch."""
    params, whole, stacked = problem()
    value, gradient, hessian = dense(functools.partial(LOSS, **whole), params)
    expected = [value, -gradient @ gradient, gradient @ hessian @ gradient]
    for method in ("forward", "hvp", "auto"):
        found, grad, model = jax.jit(everything(accumulate(LOSS), method))(params, stacked)
        np.testing.assert_allclose(flat(grad), gradient, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose([found, *model[1:3]], [value, *expected[1:]], rtol=1e-12)
        np.testing.assert_allclose(model.value, value, rtol=1e-12)


@pytest.mark.parametrize("method", METHODS[2:])
def test_other_methods_give_the_numbers_of_the_whole_batch(method):
    params, whole, stacked = problem()
    found, expected = (
        jax.jit(everything(loss, method))(params, batch)
        for loss, batch in ((accumulate(LOSS), stacked), (LOSS, whole))
    )
    # A difference quotient of gradients loses about half of the digits.
    tolerance = 1e-9 if method == "finite_difference" else 1e-12
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=1e-15)


@jax.custom_vjp
def squares(errors):
    return jnp.mean(errors**2)


squares.defvjp(
    lambda errors: (squares(errors), errors),
    lambda errors, ct: (2 * ct * errors / errors.size,),
)


@pytest.mark.parametrize("method", ["auto", "gauss_newton"])
def test_a_custom_vjp_is_found_inside_the_loop(method):
    """It has no forward-mode rule, so the measurement uses reverse mode, as outside of the loop."""
    params, whole, stacked = problem()
    custom = CompositeLoss(network, lambda outputs, y: squares(outputs - y))
    found, expected = (
        jax.jit(everything(loss, method))(params, batch)
        for loss, batch in ((accumulate(custom), stacked), (LOSS, whole))
    )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_the_memory_is_that_of_one_micro_batch(method):
    """Plus a few copies of the parameters: the sum of the gradients, and the tangents."""
    params, whole, stacked = problem("float32", size=512, width=64)

    def temporary(loss, batch):
        compiled = jax.jit(everything(loss, method)).lower(params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one = temporary(LOSS, jax.tree.map(lambda leaf: leaf[0], stacked))
    copies = 4 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert temporary(accumulate(LOSS), stacked) <= 1.5 * one + copies
    assert temporary(LOSS, whole) >= 3 * one


@pytest.mark.parametrize(
    "solver",
    [
        lambda: cdat(optax.adam(1.0), sigma=1.0),
        lambda: cdat(optax.sgd(1.0), sigma=1.0, every=2),
        lambda: cdat(optax.sgd(1.0), sigma=1.0, curvature="gauss_newton"),
        lambda: optax.chain(optax.sgd(1.0), scale_by_tuner(linesearch.backtracking())),
        lambda: optax.chain(optax.sgd(1.0), scale_by_tuner(linesearch.zoom())),
    ],
    ids=["cdat", "every", "gauss_newton", "backtracking", "zoom"],
)
def test_training_takes_the_steps_of_the_whole_batch(solver):
    """Also where a solver forwards arguments that the loss does not have."""
    params, whole, stacked = problem()
    found = train(solver(), accumulate(LOSS), params, 4, **stacked)
    expected = train(solver(), LOSS, params, 4, **whole)
    for left, right in zip(found, expected, strict=True):
        for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-13)


def test_extra_arguments_that_the_loss_does_not_name_are_left_out():
    params, _, stacked = problem()
    solver, loss = cdat(optax.sgd(1.0), sigma=1.0), accumulate(LOSS)
    value, grad = jax.value_and_grad(loss)(params, **stacked)
    _, state = solver.update(
        grad, solver.init(params), params,
        value=value, grad=grad, value_fn=loss, unrelated=3.0, **stacked,
    )  # fmt: skip
    assert float(state.tuner.learning_rate) > 0


def test_it_measures_once_for_each_step():
    """optax.MultiSteps would measure in each micro-step, on the last micro-batch alone."""
    params, _, stacked = problem()
    seen = []

    def loss(params, x, y, index):
        jax.debug.callback(lambda index: seen.append(int(index)), index)
        return LOSS(params, x, y)

    solver = optax.chain(optax.sgd(1.0), scale_by_tuner(linesearch.backtracking()))
    counted, plain = accumulate(loss), accumulate(LOSS)
    value, grad = jax.value_and_grad(plain)(params, **stacked)
    update = jax.jit(
        lambda state, index: solver.update(
            grad, state, params,
            value=value, grad=grad, value_fn=counted, index=index, **stacked,
        )
    )  # fmt: skip
    _, state = update(solver.init(params), jnp.arange(NUMBER))
    jax.effects_barrier()
    trials = int(state[1].tuner_state.trials)
    assert sorted(seen) == sorted(list(range(NUMBER)) * trials)


def test_auxiliary_outputs_come_back_stacked():
    params, whole, stacked = problem()

    def with_outputs(params, x, y):
        outputs = network(params, x)
        return squared_error(outputs, y), {"outputs": outputs, "samples": len(x)}

    loss = accumulate(with_outputs)
    (value, aux), grad = jax.value_and_grad(loss, has_aux=True)(params, **stacked)
    expected, gradient = jax.value_and_grad(LOSS)(params, **whole)
    np.testing.assert_allclose(value, expected, rtol=1e-13)
    np.testing.assert_allclose(flat(grad), flat(gradient), rtol=1e-11)
    outputs = network(params, whole["x"])
    np.testing.assert_allclose(aux["outputs"].reshape(outputs.shape), outputs, rtol=1e-13)
    assert aux["samples"].tolist() == [SIZE] * NUMBER
    model = measure(functools.partial(loss, **stacked), params, params)
    np.testing.assert_allclose(model.value, expected, rtol=1e-13)


def test_micro_batches_of_several_sizes_are_weighted_by_the_loss():
    """They are padded to one size, and each sample has the same weight."""
    params, whole, stacked = problem()
    sizes = np.array([8, 3, 5, 8])
    mask = (np.arange(SIZE)[None, :] < sizes[:, None]).astype(float)

    def loss(params, x, y, mask):
        errors = jnp.mean((network(params, x) - y) ** 2, axis=1)
        return NUMBER * jnp.sum(mask * errors) / sizes.sum()

    kept = {name: leaf[mask.ravel() > 0] for name, leaf in whole.items()}
    value, grad = jax.value_and_grad(accumulate(loss))(params, mask=mask, **stacked)
    expected, gradient = jax.value_and_grad(LOSS)(params, **kept)
    np.testing.assert_allclose(value, expected, rtol=1e-13)
    np.testing.assert_allclose(flat(grad), flat(gradient), rtol=1e-11)


def test_random_keys_are_stacked_and_what_is_shared_is_fixed_before():
    params, _, stacked = problem()
    keys = jax.random.split(jax.random.key(0), NUMBER)

    def noisy(params, x, y, key, scale):
        return LOSS(params, x + scale * jax.random.normal(key, x.shape), y)

    value = accumulate(functools.partial(noisy, scale=0.1))(params, key=keys, **stacked)
    parts = [noisy(params, stacked["x"][i], stacked["y"][i], keys[i], 0.1) for i in range(NUMBER)]
    assert float(value) == pytest.approx(np.mean(parts), rel=1e-13)


def test_gradients_of_bfloat16_are_added_in_float32():
    """bfloat16 has 8 bits, so a sum of 512 equal terms would stop growing."""
    params, number = jnp.asarray([1.0], jnp.bfloat16), 512
    loss = accumulate(lambda w, x: jnp.sum(w * x))
    x = jnp.full((number, 1), 0.75, jnp.bfloat16)
    grad = jax.grad(loss)(params, x)
    assert same(grad, jnp.asarray([0.75], jnp.bfloat16))
    inside = jax.grad(lambda w: jax.lax.scan(lambda t, x: (t, jnp.sum(w * x)), 0, x)[1].mean())
    assert abs(float(inside(params)[0]) - 0.75) > 0.01  # without the wider sum


def test_a_step_compiles_once_and_can_be_mapped():
    params, _, stacked = problem()
    solver = cdat(optax.sgd(1.0), sigma=1.0)
    step = stepper(solver, accumulate(LOSS))
    first = after = (params, solver.init(params))
    for _ in range(3):
        after = step(*after, **stacked)
    assert step._cache_size() == 1
    pairs = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), first)
    together = jax.vmap(lambda p, s: step(p, s, **stacked))(*pairs)
    alone = step(*first, **stacked)
    for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(x[1], y, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.ones(())}, r"stacked micro-batches.*got shape \(\) at .*y.*functools.partial"),
        ({"y": np.ones((3, SIZE, 2))}, r"as many in each, got shape \(3, 8, 2\) at .*y"),
    ],
    ids=["scalar", "other-number"],
)
def test_arguments_that_are_not_stacked_are_named(change, message):
    params, _, stacked = problem()
    with pytest.raises(ValueError, match=message):
        accumulate(LOSS)(params, **(stacked | change))


def test_other_misuse_is_named():
    with pytest.raises(TypeError, match=r"value_fn must be callable, got 1\.0"):
        accumulate(1.0)
    with pytest.raises(ValueError, match="must be called with stacked micro-batches, got params"):
        accumulate(lambda w: w)(jnp.ones(()))
    params, _, stacked = problem()
    plain = functools.partial(accumulate(lambda params, x, y: LOSS(params, x, y)), **stacked)
    with pytest.raises(TypeError, match="must be a CompositeLoss for curvature="):
        measure(plain, params, params, curvature="gauss_newton")
