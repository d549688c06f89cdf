"""Objectives and training loops that several test modules share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree


def random_like(tree, seed, scale=1.0):
    """Return a pytree like `tree` with entries drawn from N(0, scale**2)."""
    generator = np.random.default_rng(seed)

    def draw(leaf):
        entries = generator.normal(size=leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            entries = entries + 1j * generator.normal(size=leaf.shape)
        return jnp.asarray(scale * entries, dtype=leaf.dtype)

    return jax.tree.map(draw, tree)


def dense(value_fn, params):
    """Return value, gradient (a vector) and Hessian (a matrix) of a real objective."""
    vector, unravel = ravel_pytree(params)

    @jax.jit
    def derivatives(vector):
        def on_vector(vector):
            return value_fn(unravel(vector))

        value, gradient = jax.value_and_grad(on_vector)(vector)
        return value, gradient, jax.hessian(on_vector)(vector)

    value, gradient, hessian = derivatives(vector)
    return float(value), np.asarray(gradient), np.asarray(hessian)


def flat(tree):
    """Return the leaves of a pytree as one numpy vector."""
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)])


def same(left, right):
    """Whether two pytrees are equal in structure, dtypes and every bit (NaN equals NaN)."""
    if jax.tree.structure(left) != jax.tree.structure(right):
        return False
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
               for x, y in pairs)  # fmt: skip


def factors(dtype=None):
    """Return a loss ``loss(params, batch)`` of two linear layers of width one, params and a batch.

    It has only elementwise operations, so a training step compiles quickly. It is not quadratic.
    """
    generator = np.random.default_rng(3)
    params = {"inner": (np.linspace(0.5, 1.5, 5), np.zeros(5)), "outer": np.linspace(-0.5, 0.7, 5)}
    inputs = generator.normal(size=5)
    batch = (inputs, 2 * inputs + 1)

    def loss(params, batch):
        inputs, targets = (x.astype(params["outer"].dtype) for x in batch)
        weights, bias = params["inner"]
        return jnp.mean(((inputs * weights + bias) * params["outer"] - targets) ** 2)

    return loss, jax.tree.map(lambda x: jnp.asarray(x, dtype=dtype), params), batch


def quadratic(size=6, seed=0):
    """Return a convex quadratic ``loss(params)``, a start, its Hessian and its minimiser."""
    generator = np.random.default_rng(seed)
    factor = generator.normal(size=(size, size))
    hessian = factor @ factor.T / size + 0.1 * np.eye(size)
    minimiser = generator.normal(size=size)

    def loss(params):
        offset = params - minimiser
        return 0.5 * offset @ (hessian @ offset)

    return loss, jnp.asarray(generator.normal(size=size)), hessian, minimiser


def stepper(solver, loss, **jit_options):
    """Return one compiled training step: ``step(params, state, **extra) -> (params, state)``."""

    def step(params, state, **extra):
        value, grad = jax.value_and_grad(loss)(params, **extra)
        updates, state = solver.update(
            grad, state, params, value=value, grad=grad, value_fn=loss, **extra
        )
        return optax.apply_updates(params, updates), state

    return jax.jit(step, **jit_options)


def train(solver, loss, params, steps, **extra):
    """Train and return the parameters and the states after every step."""
    step, state = stepper(solver, loss), solver.init(params)
    trajectory = []
    for _ in range(steps):
        params, state = step(params, state, **extra)
        trajectory.append((params, state))
    return trajectory
