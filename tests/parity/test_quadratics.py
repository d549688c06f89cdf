"""The four backends on random quadratics, against formulas written again in numpy."""

import functools

import numpy as np
import pytest
from backends import BACKENDS, DTYPES
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    CDAT,
    EPS,
    LARGEST,
    Backtracking,
    Schedule,
    descend,
    random_quadratic,
)

from cdat_core import ArraySpace, linesearch, measure, tuners
from tests.examples import examples

SPACE = ArraySpace()

kinds = st.sampled_from(["definite", "indefinite", "singular"])
conditions = st.integers(0, 8)  # in decades
seeds = st.integers(0, 2**32 - 1)
EXAMPLES = 12


# One measurement


def measure_quadratic(matrix, offset, w, u):
    """Measure ``w.A w / 2 + b.w`` at w along u."""
    product = matrix @ w
    value = 0.5 * SPACE.vdot(w, product) + SPACE.vdot(offset, w)
    return measure(value, product + offset, lambda v: matrix @ v, u, space=SPACE)


MEASURE = {name: backend.wrap(measure_quadratic) for name, backend in BACKENDS.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BACKENDS)
@examples(50)
@given(
    kind=kinds,
    size=st.integers(1, 50),
    condition=conditions,
    seed=seeds,
    along=st.sampled_from(["random", "descent", "ascent", "zero"]),
)
def test_measurement_equals_the_closed_form(name, dtype, kind, size, condition, seed, along):
    """Within the rounding that any order of summation may leave.

    A sum of n products is off by at most ``n eps`` times the sum of their magnitudes. Nesting two
    of them, and adding the offset, makes ``2 n + 2`` on the magnitudes of all terms; the reference
    is rounded too (its products in extended precision, where there is one), hence ``4 n + 4``.
    """
    backend = BACKENDS[name]
    problem = random_quadratic(kind, size, condition, seed)
    matrix, offset, w = (
        np.asarray(x, dtype=dtype) for x in (problem.matrix, problem.offset, problem.start)
    )
    gradient = matrix @ w + offset
    u = {
        "random": np.random.default_rng(seed + 1).standard_normal(size),
        "descent": -gradient,
        "ascent": gradient,
        "zero": np.zeros(size),
    }[along].astype(dtype)
    found = MEASURE[name](*(backend.asarray(x, dtype) for x in (matrix, offset, w, u)))

    def model(*arrays):
        a, b, w, u = (x.astype(np.longdouble) for x in arrays)
        return 0.5 * (w @ a @ w) + b @ w, (a @ w + b) @ u, u @ a @ u

    expected = model(matrix, offset, w, u)
    bounds = model(*map(np.abs, (matrix, offset, w, u)))
    rounding = (4 * size + 4) * np.finfo(dtype).eps
    for field, exact, bound in zip(found[:3], expected, bounds, strict=True):
        assert abs(float(field) - float(exact)) <= rounding * float(bound)
        assert str(field.dtype).endswith(dtype)
        assert field.shape == ()
    if along == "zero":
        assert (float(found.slope), float(found.curvature)) == (0.0, 0.0)


# Trajectories


@functools.cache
def rooms(name):
    """Return the vector operations of a run in one backend, compiled where it compiles."""
    wrap = BACKENDS[name].wrap

    def measure_down(matrix, offset, w):
        g = matrix @ w + offset
        return measure_quadratic(matrix, offset, w, -g), -g

    def value_along(matrix, offset, w, rate, u):
        there = SPACE.add_scale(w, rate, u)
        return 0.5 * SPACE.vdot(there, matrix @ there) + SPACE.vdot(offset, there)

    return wrap(measure_down), wrap(value_along), wrap(SPACE.add_scale)


def run_in(name, tuner_or_search, problem, steps):
    """Run gradient descent in float64 with the package under test."""
    backend = BACKENDS[name]
    measure_down, value_along, move = rooms(name)
    matrix, offset, w = (
        backend.asarray(x, "float64") for x in (problem.matrix, problem.offset, problem.start)
    )
    like = backend.asarray(0.0, "float64")
    if isinstance(tuner_or_search, linesearch.LineSearch):
        tell = backend.wrap(tuner_or_search.tell)
        rate = like
    else:
        update = backend.wrap(tuner_or_search.update)
        state = tuner_or_search.init(like)
    points, rates = [np.asarray(w)], []
    for _ in range(steps):
        measurement, u = measure_down(matrix, offset, w)
        if isinstance(tuner_or_search, linesearch.LineSearch):
            search = tuner_or_search.init(measurement, like, rate)
            while not search.done:
                search = tell(search, value_along(matrix, offset, w, search.step_size, u))
            rate = search.step_size
        else:
            rate, state = update(measurement, state)
        w = move(w, rate, u)
        points.append(np.asarray(w))
        rates.append(float(rate))
    return np.array(points), np.array(rates)


def cdat(*arguments):
    """Pair the tuner with its reference."""
    sigma, decay, *guards = arguments
    names = ("initial_learning_rate", "max_growth", "max_learning_rate")
    return tuners.cdat(sigma, decay, **dict(zip(names, guards, strict=False))), lambda: CDAT(
        *arguments
    )


def decaying(step):
    return 1 / LARGEST / (1 + 0.1 * step)


CONTENDERS = {  # name: tuner or search, its reference, steps
    "cdat(0.5, 0)": (*cdat(0.5, 0.0), 100),
    "cdat(1, 0)": (*cdat(1.0, 0.0), 100),
    "cdat(1.5, 0)": (*cdat(1.5, 0.0), 100),
    "cdat(0.5, 0.9)": (*cdat(0.5, 0.9), 100),
    "cdat(1, 0.9)": (*cdat(1.0, 0.9), 100),
    "cdat(1.5, 0.9)": (*cdat(1.5, 0.9), 100),
    "cdat(2, 0.9)": (*cdat(2.0, 0.9), 10),
    "guarded": (*cdat(1.5, 0.9, 1e-2, 1.1, 0.3), 100),
    "greedy": (tuners.quadratically_greedy(), lambda: CDAT(1.0, 0.0), 100),
    "on_edge": (tuners.on_edge(), lambda: CDAT(2.0, 0.0), 10),
    "constant": (tuners.constant(1 / LARGEST), lambda: Schedule(lambda step: 1 / LARGEST), 100),
    "scheduled": (tuners.scheduled(decaying), lambda: Schedule(decaying), 100),
    "backtracking": (linesearch.backtracking(), Backtracking, 100),
}


def drifted(noisy, reference):
    """Return how far disturbed runs have got from the reference, by the largest component."""
    apart = [np.abs(x - reference).reshape(len(x), -1).max(axis=1) for x in noisy]
    return np.maximum.accumulate(np.max(apart, axis=0))


@pytest.mark.parametrize("contender", CONTENDERS)
def test_trajectory_equals_the_reference(contender):
    """As far as float64 determines it, and no further.

    A rule without memory can amplify rounding until nothing is left in common (relaxed greedy
    descent is chaotic), so no fixed tolerance is right. The reference is therefore run three times
    more with noise of one unit of rounding in every operation. A backend, whose rounding differs
    from the reference by as much, may be off by ten times their drift. Once the drift exceeds 1e-4
    of the size of the points (of the rate), or a decision of the line search was within 100 units
    of rounding of a tie, the run is no longer determined and the comparison ends; so it does at a
    minimum, where only rounding is left of the gradient. For the test to mean something, half of
    the steps up to there must be compared; with most rules it is all of them.
    """
    tuner_or_search, make_reference, steps = CONTENDERS[contender]
    compared = []

    @examples(20)
    @given(
        # A line search finds no bottom in an indefinite quadratic, and grows beyond all numbers.
        kind=kinds.filter(lambda kind: (contender, kind) != ("backtracking", "indefinite")),
        size=st.sampled_from([1, 2, 3, 5, 10, 20, 50]),
        condition=conditions,
        seed=seeds,
    )
    def compare(kind, size, condition, seed):
        problem = random_quadratic(kind, size, condition, seed)
        reference = descend(problem, make_reference(), steps)
        noisy = [
            descend(problem, make_reference(), steps, np.random.default_rng(k)) for k in range(3)
        ]
        length = min(len(run.rates) for run in (reference, *noisy))
        points, rates = reference.points[: length + 1], reference.rates[:length]
        scale = np.maximum.accumulate(np.abs(points).max(axis=1))
        pull = np.where(rates > 0, rates, 1.0)
        drift = drifted([run.points[: length + 1] for run in noisy], points) / scale
        drift_of_rate = drifted([run.rates[:length] / pull for run in noisy], rates / pull)
        decided = np.append(True, reference.margins[:length] > 100)
        sure = decided & (drift < 1e-4)
        sure_of_rate = decided[1:] & (drift_of_rate < 1e-4)
        compared.append((np.sum(sure[1:]) + np.sum(sure_of_rate)) / (2 * length))
        for name in BACKENDS:
            their_points, their_rates = run_in(name, tuner_or_search, problem, length)
            error = np.abs(their_points - points).max(axis=1) / scale
            error_of_rate = np.abs(their_rates - rates) / pull
            assert np.all((error <= 10 * drift + 4 * EPS)[sure]), name
            assert np.all((error_of_rate <= 10 * drift_of_rate + 4 * EPS)[sure_of_rate]), name

    compare()
    assert np.mean(compared) >= 0.5, compared
