"""cdat_core on Dask arrays: lazy, chunked, scalars included."""

import dask
import dask.array as da
import numpy as np

from cdat_core import ArraySpace, measure, tuners

space = ArraySpace()  # Dask follows the array API: nothing to write
inputs = np.random.default_rng(0).normal(size=(400, 10))
x = da.from_array(inputs, chunks=(100, 10))  # 4 chunks: as many tasks, or machines
y = da.from_array((inputs[:, 0] > 0.1).astype(float), chunks=100)


def random_parameters(seed):
    return da.from_array(np.random.default_rng(seed).normal(size=10))


def loss(w):
    z = x @ w
    return da.mean(da.logaddexp(0, z) - y * z) + 0.005 * da.sum(w * w)


def probability(w):
    return 1 / (1 + da.exp(-(x @ w)))


def gradient(w):
    return x.T @ (probability(w) - y) / len(y) + 0.01 * w


def hvp_at(w):
    p = probability(w)
    return lambda v: x.T @ (p * (1 - p) * (x @ v)) / len(y) + 0.01 * v


def train(w, steps):
    tuner = tuners.cdat(sigma=1.5)
    state = tuner.init(da.zeros(()))
    losses = []
    for _ in range(steps):
        value, g = loss(w), gradient(w)
        u = space.scale(-1.0, g)
        measurement = measure(value, g, hvp_at(w), u, space=space)
        rate, state = tuner.update(measurement, state)
        # One graph for the whole step: gradient, curvature, rate and move run in parallel.
        w, state, value = dask.persist(space.add_scale(w, rate, u), state, value)
        losses.append(float(value))
    return losses
