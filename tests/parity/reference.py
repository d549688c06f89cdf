"""The rules and gradient descent written again in plain Python and numpy float64.

Nothing here comes from the package under test: the formulas are those of arXiv:2407.06183, and the
guards are written from their documentation. The rules are plain callables
``rule(value, slope, curvature, loss_along) -> rate``.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

EPS = 2.0**-52


@dataclass(frozen=True)
class Quadratic:
    """The loss ``w.A w / 2 + b.w`` and the point where a run starts."""

    matrix: np.ndarray
    offset: np.ndarray
    start: np.ndarray

    def value(self, w):
        return 0.5 * (w @ self.matrix @ w) + self.offset @ w

    def grad(self, w):
        return self.matrix @ w + self.offset


LARGEST = 4.0
"""The largest magnitude of an eigenvalue of every random quadratic."""


def random_quadratic(kind, size, log10_condition, seed):
    """Return a quadratic with a random eigenbasis; `kind` says which signs its eigenvalues have."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((size, size)))
    eigenvalues = LARGEST * 10.0 ** (-log10_condition * np.linspace(0, 1, size))
    if kind == "indefinite":
        eigenvalues *= rng.choice([-1.0, 1.0], size)
    if kind == "singular":
        eigenvalues[(size + 1) // 2 :] = 0
    matrix = basis * eigenvalues @ basis.T
    matrix = (matrix + matrix.T) / 2
    offset, start = rng.standard_normal((2, size))
    if kind == "singular":
        offset = matrix @ offset  # in the range, so that the loss is bounded below
    return Quadratic(matrix, offset, start)


class CDAT:
    """``sigma * n / d`` with its guards."""

    def __init__(self, sigma, decay, initial=None, growth=math.inf, ceiling=math.inf):
        self.sigma, self.decay = sigma, decay
        self.initial, self.growth, self.ceiling = initial, growth, ceiling
        self.n = self.d = 0.0
        self.measured = False
        self.previous = initial or 0.0

    def __call__(self, value, slope, curvature, loss_along):
        if curvature == 0:
            descends = self.decay * self.n + (1 - self.decay) * max(-slope, 0.0) > 0
            rate = self.previous if descends else 0.0
        else:
            self.n = self.decay * self.n + (1 - self.decay) * max(-slope, 0.0)
            self.d = self.decay * self.d + (1 - self.decay) * abs(curvature)
            rate = self.sigma * self.n / self.d
        if not self.measured and self.initial is not None:
            rate = min(rate, self.initial)
        elif self.measured and self.previous > 0:
            rate = min(rate, self.growth * self.previous)
        self.measured = self.measured or curvature != 0
        rate = min(rate, self.ceiling)
        self.previous = rate if rate > 0 else self.previous
        return rate


class Schedule:
    """A function of the step number."""

    def __init__(self, schedule):
        self.schedule, self.step = schedule, -1

    def __call__(self, value, slope, curvature, loss_along):
        self.step += 1
        return self.schedule(self.step)


class Backtracking:
    """Armijo; `closest` is the smallest margin of a decision, in units of the rounding of the loss.

    Where it is not far above one, the data do not determine the decision.
    """

    def __init__(self, initial=1.0, shrink=0.8, grow=1.5, fraction=1e-4, rtol=2 * EPS):
        self.initial, self.shrink, self.grow = initial, shrink, grow
        self.fraction, self.rtol = fraction, rtol
        self.previous = 0.0
        self.closest = math.inf

    def __call__(self, value, slope, curvature, loss_along):
        if not slope < 0:
            self.previous = 0.0
            return 0.0
        rate = self.grow * self.previous if self.previous > 0 else self.initial
        best, best_value = 0.0, value
        for _ in range(50):
            trial, rounding = loss_along(rate)
            bound = value + self.fraction * rate * slope + self.rtol * abs(value)
            self.closest = min(self.closest, abs(trial - bound) / rounding)
            if trial <= bound:
                best = rate
                break
            if trial < best_value:
                best, best_value = rate, trial
            rate = self.shrink * rate
        self.previous = best
        return best


class Run(NamedTuple):
    """A run of gradient descent: the points, the rates that led on from them, the margins."""

    points: np.ndarray
    rates: np.ndarray
    margins: np.ndarray


def descend(problem, rule, steps, noise=None):
    """Run gradient descent, to where it exceeds 1e100 or its gradient is nothing but rounding.

    With a random generator as `noise`, every result is disturbed as rounding could have: by one
    unit of rounding relative to the sizes of the terms that were added up.
    """
    a, b = np.abs(problem.matrix), np.abs(problem.offset)

    def disturbed(exact, terms):
        if noise is None:
            return exact
        return exact + EPS * terms * noise.standard_normal(np.shape(exact))

    def terms(w):
        return 0.5 * (np.abs(w) @ a @ np.abs(w)) + b @ np.abs(w)

    def loss_along(rate):
        there = w - rate * g
        return disturbed(problem.value(there), terms(there)), EPS * (terms(there) + terms(w))

    w = disturbed(problem.start, np.abs(problem.start))
    points, rates, margins = [w], [], []
    for _ in range(steps):
        parts = a @ np.abs(w) + b
        g = disturbed(problem.grad(w), parts)
        if np.max(np.abs(g)) <= 1e4 * EPS * np.max(parts):
            break
        slope = disturbed(-(g @ g), g @ g)
        curvature = disturbed(g @ problem.matrix @ g, np.abs(g) @ a @ np.abs(g))
        value = disturbed(problem.value(w), terms(w))
        rate = rule(float(value), float(slope), float(curvature), loss_along)
        w = disturbed(w - rate * g, np.abs(w) + rate * np.abs(g))
        if not np.max(np.abs(w)) < 1e100:
            break
        points.append(w)
        rates.append(rate)
        margins.append(getattr(rule, "closest", math.inf))
    return Run(np.array(points), np.array(rates), np.array(margins))
