"""Steps under ``jax.shard_map``: the mean over devices inside the loss, or elsewhere."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.jax_ecosystem.problems import SOLVERS, batch, loss_fn, start, train_step

DATA = (P(), P(), P("data"), P("data"))


def mean(number):
    return jax.lax.pmean(number, "data")


def mean_loss(params, x, y):
    return mean(loss_fn(params, x, y))


def first_step(solver, step):
    params = start()
    return jax.jit(step)(params, solver.init(params), *batch())


def averaged_too_late(solver):
    """Return a step that averages loss and gradient, but passes the local loss to the tuner."""

    def loss_of_the_shard(params, x, y):
        return loss_fn(params, x, y)

    def step(params, state, x, y):
        value, grad = map(mean, jax.value_and_grad(loss_of_the_shard)(params, x, y))
        extra = {"value": value, "grad": grad, "value_fn": loss_of_the_shard, "x": x, "y": y}
        updates, state = solver.update(grad, state, params, **extra)
        return updates, state, value

    return step


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - {"gauss-newton"}))
def test_the_mean_inside_of_the_loss_gives_the_steps_of_the_whole_batch(mesh, name):
    solver = SOLVERS[name]()
    step = train_step(solver, mean_loss)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=DATA, out_specs=P())
    expected = first_step(solver, train_step(solver))
    for one, four in zip(
        *map(jax.tree.leaves, (expected, first_step(solver, mapped))), strict=True
    ):
        np.testing.assert_allclose(four, one, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("forward", ValueError, "out_specs"),
        ("every", TypeError, "cond branches must have equal output types"),
        ("backtracking", TypeError, "while_loop body function"),
        ("zoom", TypeError, "while_loop body function"),
    ],
)
def test_a_mean_after_the_loss_is_refused(mesh, name, error, message):
    """Curvature and trials would belong to the shard of each device."""
    solver = SOLVERS[name]()
    step = averaged_too_late(solver)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=DATA, out_specs=P())
    with pytest.raises(error, match=message):
        first_step(solver, mapped)


def test_a_mean_after_the_gradient_is_a_sum(mesh):
    """JAX has already summed the gradient of replicated parameters: "hvp" gets four losses."""
    solver = SOLVERS["hvp"]()
    step = averaged_too_late(solver)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=DATA, out_specs=P())
    expected = first_step(solver, train_step(solver))[1].tuner.info
    found = first_step(solver, mapped)[1].tuner.info
    np.testing.assert_allclose(found.slope, 4 * expected.slope, rtol=1e-6)
    np.testing.assert_allclose(found.curvature, 4 * expected.curvature, rtol=1e-5)


def test_without_the_check_of_shard_map_the_gradient_is_that_of_a_shard(mesh):
    """With ``check_vma=False`` the gradients of the devices are not averaged."""
    x, y = batch()
    step = lambda params, x, y: jax.grad(mean_loss)(params, x, y)
    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P()}
    checked, unchecked = (
        jax.jit(jax.shard_map(step, mesh=mesh, check_vma=check, **specs))(start(), x, y)["out"]
        for check in (True, False)
    )
    whole, first = (jax.grad(loss_fn)(start(), x[:n], y[:n])["out"] for n in (32, 8))
    np.testing.assert_allclose(checked, whole, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(unchecked, first, rtol=1e-10, atol=1e-12)
