"""Forward over forward repeats no operation, and merges only equal operations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cdat_jax import measure
from tests.jax.problems import dense, flat, random_like

WIDTH, DEPTH = 8, 3


def block(hidden, layer):
    """A residual layer after a layer norm, as in a transformer."""
    matrix, gain = layer
    centred = hidden - jnp.mean(hidden, axis=1, keepdims=True)
    spread = jax.lax.rsqrt(jnp.mean(centred**2, axis=1, keepdims=True) + 1e-5)
    return hidden + jnp.tanh((centred * spread * gain[None]) @ matrix)


def layers(*lead):
    generator = np.random.default_rng(0)
    matrix = jnp.asarray(generator.normal(size=(*lead, WIDTH, WIDTH)) / WIDTH**0.5)
    return matrix, jnp.asarray(generator.normal(size=(*lead, WIDTH)))


INPUTS = np.random.default_rng(1).normal(size=(5, WIDTH))


def unrolled(params, block):
    return jnp.sum(functools.reduce(block, params["layers"], INPUTS + params["shift"][None]) ** 2)


def scanned(params, block):
    step = lambda hidden, layer: (block(hidden, layer), None)
    start = INPUTS + params["shift"][None]
    return jnp.sum(jax.lax.scan(step, start, params["stacked"])[0] ** 2)


def products(value_fn, params):
    """Count the matrix products of a compiled measurement, with one pass through each loop body."""
    compiled = jax.jit(functools.partial(measure, value_fn)).lower(params, params).compile()
    return compiled.as_text().count(" dot(")


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "remat"])
def test_every_product_is_done_once(wrap):
    """z = x W takes five products, x W, x'W, x W', x''W and x'W'; both jvps have x'W and x W'."""
    shift = jnp.linspace(-1, 1, WIDTH)
    params = {"layers": [layers() for _ in range(DEPTH)], "shift": shift}
    assert products(lambda p: unrolled(p, wrap(block)), params) == 5 * DEPTH
    params = {"stacked": layers(DEPTH), "shift": shift}
    assert products(lambda p: scanned(p, wrap(block)), params) == 5


def nested(w):
    inner = lambda x: jax.lax.scan(lambda y, _: (jnp.sin(y) * w[0], y), x, None, length=2)
    outer = lambda x, _: (inner(x)[0], inner(x)[1])
    last, history = jax.lax.scan(outer, w, None, length=2)
    return jnp.sum(last**2) + jnp.sum(history**3)


def parting(w):
    """Carries that start equal and become different after one, two and no steps."""

    def step(carry, _):
        a, b, c, d = carry
        return (jnp.sin(a) + (b - c), b * w, c * w + (a - b), d * w), (a * b, b, d)

    last, history = jax.lax.scan(step, (w, w, w, w), None, length=4)
    return sum(jnp.sum(x**2) for x in (*last, *history))


def over_equal_arrays(w):
    """Two equal arrays to scan over, in reverse, and two equal outputs."""

    def step(carry, x):
        total = carry + x[0] * jnp.cos(x[1])
        return total, (total, total, x[0])

    last, history = jax.lax.scan(step, 0.0, (w, w), reverse=True)
    return last**2 + sum(jnp.sum(h**3) for h in history)


def no_steps(w):
    last, history = jax.lax.scan(lambda x, y: (x * y, x), w, w[:0])
    return jnp.sum(last**3) + jnp.sum(history)


def switch(w):
    return jnp.sum(jax.lax.cond(w[0] > 0, jnp.sin, lambda x: x**3, jnp.cos(w) * w))


@pytest.mark.parametrize("value_fn", [nested, parting, over_equal_arrays, no_steps, switch])
def test_control_flow_matches_the_dense_hessian(value_fn):
    w = jnp.linspace(0.4, 1.2, 3)
    direction = random_like(w, seed=1)
    value, gradient, hessian = dense(value_fn, w)
    u = flat(direction)
    found = jax.jit(functools.partial(measure, value_fn, curvature="forward"))(w, direction)
    expected = [value, gradient @ u, u @ hessian @ u]
    assert [float(x) for x in found[:3]] == pytest.approx(expected, rel=1e-12)


def test_zeros_of_two_signs_are_not_merged():
    def value_fn(w):
        return w**2 * (jnp.atan2(0.0, w) - jnp.atan2(-0.0, w))  # 2 pi w**2 where w < 0

    found = measure(value_fn, jnp.array(-3.0), jnp.array(1.0))
    expected = [18 * np.pi, -12 * np.pi, 4 * np.pi]
    assert [float(x) for x in found[:3]] == pytest.approx(expected, rel=1e-14)


def test_repeated_callbacks_are_not_merged():
    seen = []

    def value_fn(w):
        for _ in range(2):
            jax.debug.callback(seen.append, jnp.sum(w))
        return jnp.sum(w**2)

    jax.block_until_ready(jax.jit(functools.partial(measure, value_fn))(jnp.ones(2), jnp.ones(2)))
    jax.effects_barrier()
    assert [float(x) for x in seen] == [2.0, 2.0]
