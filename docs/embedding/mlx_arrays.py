"""cdat_core in MLX: a dictionary of arrays, scalars in NumPy."""

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from cdat_core import measure, tuners


class TreeSpace:
    """MLX has no array API, so vdot returns NumPy scalars: one evaluation each."""

    def vdot(self, x, y):
        products = tree_map(lambda a, b: mx.sum(a * b), x, y)
        return np.asarray(sum(products.values()).item(), dtype=np.float32)

    def scale(self, a, x):
        return tree_map(lambda t: float(a) * t, x)

    def add_scale(self, x, a, y):
        return tree_map(lambda s, t: s + float(a) * t, x, y)


space = TreeSpace()
x = mx.linspace(-2, 2, 40)[:, None]
y = mx.sin(2 * x)


def random_parameters(seed):
    rng = np.random.default_rng(seed)
    shapes = {"weights": (1, 16), "biases": (16,), "readout": (16, 1)}
    return {name: mx.array(rng.normal(size=shape), mx.float32) for name, shape in shapes.items()}


def loss(params):
    hidden = mx.tanh(x @ params["weights"] + params["biases"])
    return mx.mean((hidden @ params["readout"] - y) ** 2)


gradient = mx.grad(loss)


def hvp_at(params):
    along = lambda w, v: sum(mx.sum(g * v[name]) for name, g in gradient(w).items())
    return lambda v: mx.grad(along)(params, v)


def train(params, steps):
    tuner = tuners.cdat(sigma=1.5)
    state = tuner.init(np.float32(0.0))
    losses = []
    for _ in range(steps):
        value, g = np.float32(loss(params).item()), gradient(params)
        u = space.scale(-1.0, g)
        measurement = measure(value, g, hvp_at(params), u, space=space)
        rate, state = tuner.update(measurement, state)
        params = space.add_scale(params, rate, u)
        losses.append(float(value))
    return losses
