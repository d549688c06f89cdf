"""Training on four devices: the results of one device, and the communication they need."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cdat_jax import CompositeLoss, cdat, make_step, sharpness, top_eigenvalues
from tests.jax.problems import dense, same
from tests.jax_ecosystem.hlo import collectives, operations, outside_of_branches
from tests.jax_ecosystem.problems import (
    LAYOUTS,
    SOLVERS,
    batch,
    begin,
    fully_sharded,
    loss_fn,
    network,
    placed,
    replicated,
    run,
    start,
    train_step,
)

layouts = pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=list(LAYOUTS))
solvers = pytest.mark.parametrize("name", SOLVERS)


@functools.cache
def program(name, mesh, layout):
    """Return the HLO text of a training step."""
    solver = {"adam": optax.with_extra_args_support(optax.adam(1e-2))}.get(name) or SOLVERS[name]()
    params, state, data = begin(solver, mesh, layout)
    return jax.jit(train_step(solver)).lower(params, state, *data).compile().as_text()


def sizes(name, leaves):
    """Return the count of one collective for each of the leaves."""
    return Counter((name, tuple(sorted(leaf.shape))) for leaf in leaves)


def beyond_the_base(name, mesh, layout):
    """Return the collectives of a step that Adam with a fixed rate does not need."""
    extra = collectives(program(name, mesh, layout))
    extra.subtract(collectives(program("adam", mesh, layout)))
    return +extra


@functools.cache
def on_one_device(name):
    solver, params = SOLVERS[name](), start()
    return run(jax.jit(train_step(solver)), params, solver.init(params), batch(), 6)


@layouts
@solvers
def test_the_steps_are_those_of_one_device(mesh, name, layout):
    solver = SOLVERS[name]()
    expected = on_one_device(name)
    params, state, data = begin(solver, mesh, layout)
    step = jax.jit(train_step(solver))
    found = run(step, params, state, data, 6)
    assert expected[2] < 0.9 * loss_fn(start(), *batch())
    for one, four in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
        np.testing.assert_allclose(four, one, rtol=1e-12, atol=1e-13)
    assert step._cache_size() == 1
    for before, after in zip(*map(jax.tree.leaves, ((params, state), found[:2])), strict=True):
        assert after.sharding.is_equivalent_to(before.sharding, after.ndim)


@layouts
def test_whole_self_tuned_steps_are_those_of_one_device(mesh, layout):
    solver = cdat(optax.adam(1.0), every=2)
    step, expected = jax.jit(make_step(loss_fn, solver)), (start(), solver.init(start()))
    params, state, data = begin(solver, mesh, layout)
    found = params, state
    for _ in range(5):
        *expected, _ = step(*expected, *batch())
        *found, _ = step(*found, *data)
    for one, four in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
        np.testing.assert_allclose(four, one, rtol=1e-12, atol=1e-13)
    for before, after in zip(*map(jax.tree.leaves, ((params, state), tuple(found))), strict=True):
        assert after.sharding.is_equivalent_to(before.sharding, after.ndim)


SCALAR = ("all-reduce", ())


@pytest.mark.parametrize("name", ["forward", "gauss-newton"])
def test_data_parallel_measurements_add_one_scalar(mesh, name):
    """In a second operation, because it depends on the reduced gradient."""
    assert beyond_the_base(name, mesh, replicated) == {SCALAR: 1}
    assert operations(program("adam", mesh, replicated), "all-reduce") == 1
    assert operations(program(name, mesh, replicated), "all-reduce") == 2


@pytest.mark.parametrize(("name", "numbers"), [("backtracking", 1), ("zoom", 2)])
def test_data_parallel_trials_add_scalars_only(mesh, name, numbers):
    assert beyond_the_base(name, mesh, replicated) == {SCALAR: numbers}


@pytest.mark.parametrize(
    ("name", "passes"), [("forward", 2), ("gauss-newton", 2), ("backtracking", 2), ("zoom", 3)]
)
def test_fully_sharded_parameters_are_gathered_once_for_each_pass(mesh, name, passes):
    """First for the gradient; then for the direction, the trial point, or (zoom) both."""
    leaves = jax.tree.leaves(start())
    gathered = sizes("all-gather", [leaf for leaf in leaves if leaf.ndim > 1])
    base = collectives(program("adam", mesh, fully_sharded))
    assert base == gathered + sizes("all-reduce", leaves) + Counter([SCALAR])
    extra = beyond_the_base(name, mesh, fully_sharded)
    assert extra.pop(SCALAR) <= 2 + len(leaves)  # one of the slope for each leaf
    assert extra == {kind: (passes - 1) * count for kind, count in gathered.items()}


@layouts
def test_hvp_reduces_up_to_two_more_gradients(mesh, layout):
    """It differentiates each product of the backward pass; XLA may reduce the terms separately."""
    extra = beyond_the_base("hvp", mesh, layout)
    for kind, count in sizes("all-reduce", jax.tree.leaves(start())).items():
        assert count <= extra.pop(kind) <= 2 * count
    extra.pop(SCALAR, None)
    matrices = [leaf for leaf in jax.tree.leaves(start()) if leaf.ndim > 1]
    assert extra == (sizes("all-gather", matrices) if layout is fully_sharded else {})


@layouts
def test_steps_without_a_measurement_communicate_nothing_for_it(mesh, layout):
    """Except one scalar for each sharded leaf, to check that <g, u> is finite."""
    always = collectives(outside_of_branches(program("every", mesh, layout)))
    always.subtract(collectives(program("adam", mesh, layout)))
    assert +always == {}
    sharded = len([leaf for leaf in jax.tree.leaves(start()) if layout(leaf) != P()])
    assert beyond_the_base("every", mesh, layout)[SCALAR] > 2 * sharded


def test_a_mesh_with_explicit_axes():
    """The sharding is then part of every type, and the loss gathers the parameters itself."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))

    def gathering(params, x):
        return network(jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, P()), params), x)

    def loss_of(logits, y):
        hit = y[:, None] == jnp.arange(4)
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - jnp.sum(logits * hit, axis=1))

    solver, expected = SOLVERS["gauss-newton"](), on_one_device("gauss-newton")
    with jax.set_mesh(mesh):
        params, state, data = begin(solver, mesh, fully_sharded)
        assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(solver.init(params)))
        step = jax.jit(train_step(solver, CompositeLoss(gathering, loss_of)))
        found = run(step, params, state, data, 6)
    for one, four in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
        np.testing.assert_allclose(four, one, rtol=1e-12, atol=1e-13)


@layouts
def test_scan_and_donation_on_four_devices(mesh, layout):
    """Equal to the loop over steps bit for bit, with the buffers of parameters and state reused."""
    solver = SOLVERS["every"]()
    params, state, data = begin(solver, mesh, layout)
    step = train_step(solver)
    looped = run(jax.jit(step), params, state, data, 7)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def scanned(params, state, x, y):
        body = lambda carry, _: (step(*carry, x, y)[:2], None)
        return jax.lax.scan(body, (params, state), length=7)[0]

    found = scanned(params, state, *data)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((params, state)))
    assert same(found, looped[:2])
    for leaf in jax.tree.leaves(found[0]):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, layout(leaf)), leaf.ndim)


def test_seeds_and_sigmas_are_mapped_over_the_devices(mesh):
    """Four runs at once, one on each device, without communication, equal single runs."""
    x, y = batch()
    sigmas = jnp.array([0.5, 1.0, 1.5, 2.0])

    def trained(key, sigma):
        solver = cdat(optax.adam(1.0), sigma=sigma, initial_learning_rate=1e-2, max_growth=1.5)
        keys = iter(jax.random.split(key, 3))
        params = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape) / 4, start())
        step = lambda carry, _: (train_step(solver)(*carry, x, y)[:2], None)
        (params, state), _ = jax.lax.scan(step, (params, solver.init(params)), length=5)
        return params, state.tuner.learning_rate

    keys = jax.random.split(jax.random.key(0), 4)
    arguments = placed((jax.random.key_data(keys), sigmas), mesh, lambda leaf: P("data"))
    mapped = jax.jit(jax.vmap(lambda data, sigma: trained(jax.random.wrap_key_data(data), sigma)))
    assert not collectives(mapped.lower(*arguments).compile().as_text())
    found = mapped(*arguments)
    single = [jax.jit(trained)(*pair) for pair in zip(keys, sigmas, strict=True)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *single)
    for one, four in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
        np.testing.assert_allclose(four, one, rtol=1e-11, atol=1e-13)


def test_sharpness_of_sharded_parameters(mesh):
    x, y = batch()
    params = placed(start(), mesh, fully_sharded)
    data = placed((x, y), mesh, lambda leaf: P("data"))
    _, _, hessian = dense(lambda p: loss_fn(p, x, y), start())
    eigenvalues, vectors = np.linalg.eigh(hessian)
    found = top_eigenvalues(loss_fn, params, *data, num_matvecs=20)
    assert float(found.values[0]) == pytest.approx(eigenvalues[-1], rel=1e-7)
    for vector, leaf in zip(*map(jax.tree.leaves, (found.vectors[0], params)), strict=True):
        assert vector.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    flat, _ = ravel_pytree(jax.device_get(found.vectors[0]))
    assert abs(flat @ vectors[:, -1]) == pytest.approx(1.0, rel=1e-6)
    again = sharpness(loss_fn, params, *data, num_matvecs=4, start=found)
    assert float(again) == pytest.approx(eigenvalues[-1], rel=1e-3)
