"""A classifier on four devices, and helpers that several test modules share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cdat_core import linesearch, tuners
from cdat_jax import CompositeLoss, cdat, scale_by_tuner


def network(params, x):
    weights, bias = params["hidden"]
    return jnp.tanh(x @ weights + bias) @ params["out"]


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


loss_fn = CompositeLoss(network, cross_entropy)


def start():
    """Return the parameters of a hidden layer and a linear one, on one device."""
    generator = np.random.default_rng(0)
    weights, bias = generator.normal(size=(8, 16)) / 3, np.zeros(16)
    out = generator.normal(size=(16, 4)) / 4
    return jax.tree.map(jnp.asarray, {"hidden": (weights, bias), "out": out})


def batch():
    generator = np.random.default_rng(1)
    x = generator.normal(size=(32, 8))
    return jnp.asarray(x), jnp.asarray(np.argmax(x[:, :4] + 0.5 * x[:, 4:], axis=1))


def replicated(leaf):
    return P()


def fully_sharded(leaf):
    """Shard matrices by rows; vectors are too small to be worth it."""
    return P("data") if leaf.ndim > 1 else P()


LAYOUTS = {"replicated": replicated, "fully sharded": fully_sharded}


def placed(tree, mesh, layout):
    """Return `tree` on the devices of `mesh`."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, layout(leaf))), tree)


def begin(solver, mesh, layout):
    """Return parameters, optimizer state and batch on the devices of `mesh`."""
    params = placed(start(), mesh, layout)
    state = placed(solver.init(params), mesh, layout)
    return params, state, placed(batch(), mesh, lambda leaf: P("data"))


def train_step(solver, loss=loss_fn):
    """Return an uncompiled step ``(params, state, x, y) -> (params, state, loss)``."""

    def step(params, state, x, y):
        value, grad = jax.value_and_grad(loss)(params, x, y)
        extra = {"value": value, "grad": grad, "value_fn": loss, "x": x, "y": y}
        updates, state = solver.update(grad, state, params, **extra)
        return optax.apply_updates(params, updates), state, value

    return step


def run(step, params, state, data, steps):
    for _ in range(steps):
        params, state, value = step(params, state, *data)
    return params, state, value


def _cdat(**options):
    options = {"sigma": 1.5, "initial_learning_rate": 1e-2, "max_growth": 1.5} | options
    return lambda: cdat(optax.adam(1.0), **options)


def _tuned(rule):
    return lambda: optax.chain(optax.adam(1.0), scale_by_tuner(rule))


SOLVERS = {
    "forward": _cdat(curvature="forward"),
    "hvp": _cdat(curvature="hvp"),
    "gauss-newton": _cdat(curvature="gauss_newton"),
    "every": _cdat(every=3),
    "backtracking": _tuned(linesearch.backtracking()),
    "zoom": _tuned(linesearch.zoom()),
}


STATEFUL = {
    "cdat": _cdat(),
    "cdat, every third step": _cdat(every=3),
    "cdat, Gauss-Newton": _cdat(curvature="gauss_newton"),
    "self-tuned": lambda: cdat(optax.adam(1.0)),
    "greedy": _tuned(tuners.quadratically_greedy(max_growth=1.2, initial_learning_rate=1e-2)),
    "on edge": _tuned(tuners.on_edge(max_growth=1.2, initial_learning_rate=1e-2)),
    "gen": _tuned(tuners.gen(initial_learning_rate=1e-2)),
    "polyak": _tuned(tuners.polyak(max_learning_rate=0.1)),
    "hypergradient": _tuned(tuners.hypergradient(initial_learning_rate=1e-2)),
    "constant": _tuned(tuners.constant(0.01)),
    "scheduled": _tuned(tuners.scheduled(lambda step: 0.01 / (1.0 + step))),
    "backtracking": _tuned(linesearch.backtracking()),
    "zoom": _tuned(linesearch.zoom()),
}
