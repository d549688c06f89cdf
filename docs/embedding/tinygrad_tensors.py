"""cdat_core in tinygrad: lists of tensors, scalars in NumPy."""

import numpy as np
from tinygrad import Tensor

from cdat_core import measure, tuners


class TensorListSpace:
    """tinygrad has no array API, so vdot returns NumPy scalars: one transfer each."""

    def vdot(self, x, y):
        products = [(a * b).sum() for a, b in zip(x, y, strict=True)]
        return np.asarray(sum(products[1:], products[0]).item(), dtype=np.float32)

    def scale(self, a, x):
        return [(float(a) * t).realize() for t in x]

    def add_scale(self, x, a, y):
        return [(s + float(a) * t).realize() for s, t in zip(x, y, strict=True)]


space = TensorListSpace()
x = Tensor(np.linspace(-2, 2, 20, dtype=np.float32)[:, None])
y = (2 * x).sin()


def random_parameters(seed):
    rng = np.random.default_rng(seed)
    shapes = (1, 8), (8,), (8, 1)
    return [Tensor(rng.normal(size=shape).astype(np.float32)) for shape in shapes]


def loss(params):
    weights, biases, readout = params
    return (((x @ weights + biases).tanh() @ readout - y) ** 2).mean()


def gradient(params):
    return loss(params).gradient(*params)


def hvp_at(params):
    g = gradient(params)
    return lambda v: sum((a * b).sum() for a, b in zip(g, v, strict=True)).gradient(*params)


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
