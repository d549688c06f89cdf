"""cdat_core in HIPS autograd: NumPy arrays, the parameters in a tuple."""

import autograd
import autograd.numpy as np

from cdat_core import TupleSpace, measure, tuners

space = TupleSpace()  # the arrays are NumPy's, so the core's own space fits
x = np.linspace(-2, 2, 40)[:, None]
y = np.sin(2 * x)


def random_parameters(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(1, 16)), rng.normal(size=16), 0.25 * rng.normal(size=(16, 1))


def loss(params):
    weights, biases, readout = params
    return np.mean((np.tanh(x @ weights + biases) @ readout - y) ** 2)


gradient = autograd.grad(loss)


def hvp_at(params):
    return autograd.make_hvp(loss)(params)[0]


def train(params, steps):
    tuner = tuners.cdat(sigma=1.5)
    state = tuner.init(np.asarray(0.0))
    losses = []
    for _ in range(steps):
        value, g = loss(params), gradient(params)
        u = space.scale(-1.0, g)
        measurement = measure(value, g, hvp_at(params), u, space=space)
        rate, state = tuner.update(measurement, state)
        params = space.add_scale(params, rate, u)
        losses.append(float(value))
    return losses
