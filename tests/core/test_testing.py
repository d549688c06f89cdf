"""The conformance kit accepts correct implementations and names the law that fails."""

import math

import numpy as np
import pytest

from cdat_core import ArraySpace, TupleSpace, finite_difference_hvp, tuners
from cdat_core.testing import check_hvp, check_oracle, check_space, check_tuner

rng = np.random.default_rng(0)
VECTORS = list(rng.normal(size=(4, 3, 2)))
PAIRS = [(rng.normal(size=3), rng.normal(size=(2, 2))) for _ in range(3)]
FACTOR = rng.normal(size=(6, 6))
HESSIAN = FACTOR + FACTOR.T


def product(v):
    return (HESSIAN @ v.reshape(-1)).reshape(v.shape)


def changed(**methods):
    """Return an array space with some methods replaced."""
    return type("Changed", (ArraySpace,), methods)()


def test_good_spaces_pass(xp, dtype):
    check_space(ArraySpace(), [xp.asarray(v, dtype=dtype) for v in VECTORS])
    pairs = [tuple(xp.asarray(part, dtype=dtype) for part in pair) for pair in PAIRS]
    check_space(TupleSpace(), pairs)


def in_place(self, x, a, y):
    x += a * y
    return x


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"vdot": lambda self, x, y: np.sum(x * y**2)}, "space: vdot"),
        (
            {"vdot": lambda self, x, y: np.sum(x * np.cumsum(y, axis=0))},
            r"vdot\(x, y\) = vdot\(y, x\)",
        ),
        ({"vdot": lambda self, x, y: -np.sum(x * y)}, "must be positive"),
        ({"vdot": lambda self, x, y: np.sum(x * y, axis=0)}, r"0-d array, got the shape \(2,\)"),
        ({"vdot": lambda self, x, y: float(np.sum(x * y))}, "0-d array of an array-API namespace"),
        ({"vdot": lambda self, x, y: np.int64(np.sum(x * y))}, "real floating dtype, got int64"),
        ({"scale": lambda self, a, x: abs(a) * x}, r"vdot\(-x, x\)"),
        ({"scale": lambda self, a, x: np.nan_to_num(a * x)}, "scale with the multiplier NaN"),
        (
            {"scale": lambda self, a, x: x * (a if type(a) is float else 1)},
            "with a as a 0-d array",
        ),
        ({"add_scale": lambda self, x, a, y: x + y}, "add_scale"),
        ({"add_scale": lambda self, x, a, y: np.nan_to_num(x + a * y)}, "add_scale with the multi"),
        ({"add_scale": in_place}, "fails|changed their arguments"),
    ],
)
def test_broken_spaces_are_told_what_is_broken(methods, message):
    with pytest.raises(AssertionError, match=message):
        check_space(changed(**methods), [np.copy(v) for v in VECTORS])


def test_good_products_pass(xp, dtype):
    vectors = [xp.asarray(v, dtype=dtype) for v in VECTORS]
    matrix = xp.asarray(HESSIAN, dtype=dtype)
    check_hvp(
        lambda v: xp.reshape(matrix @ xp.reshape(v, (-1,)), v.shape), vectors, space=ArraySpace()
    )


def drifting():
    calls = iter(range(100))
    return lambda v: product(v) * (1 + 1e-6 * next(calls))


def spoiling(v):
    result = product(v)
    v *= 1.5
    return result


@pytest.mark.parametrize(
    ("hvp", "message"),
    [
        (lambda v: (FACTOR @ v.reshape(-1)).reshape(v.shape), "<x, H y> = <y, H x> fails"),
        (lambda v: product(v) + 1, "H y|H 0"),
        (lambda v: product(v) * np.linalg.norm(v), "hvp:"),
        (drifting(), "hvp: "),
        (lambda v: product(v)[:1], "vector of the layout of v"),
        (lambda v: None, "vector of the layout of v"),
        (spoiling, "hvp: "),
    ],
    ids=["factor", "affine", "homogeneous", "drifting", "shape", "none", "in-place"],
)
def test_broken_products_are_told_what_is_broken(hvp, message):
    with pytest.raises(AssertionError, match=message):
        check_hvp(hvp, [np.copy(v) for v in VECTORS], space=ArraySpace())


def test_a_product_by_differences_passes_with_its_own_tolerance():
    hvp = finite_difference_hvp(lambda w: np.sinh(w), VECTORS[3], space=ArraySpace())
    check_hvp(hvp, VECTORS[:2], space=ArraySpace(), rtol=1e-7)
    with pytest.raises(AssertionError, match="hvp: "):
        check_hvp(hvp, VECTORS[:2], space=ArraySpace(), rtol=1e-14)


def value(w):
    return np.sum(np.cosh(w) + 0.1 * w**3)


def gradient(w):
    return np.sinh(w) + 0.3 * w**2


def hvp_at(w):
    return lambda v: (np.cosh(w) + 0.6 * w) * v


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_right_oracle_passes(dtype):
    w, u = VECTORS[0].astype(dtype), VECTORS[1].astype(dtype)
    check_oracle(value, gradient, hvp_at, w, u, space=ArraySpace())


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ((value, lambda w: 1.001 * gradient(w), hvp_at), "derivative of the loss"),
        ((value, gradient, lambda w: lambda v: 1.001 * hvp_at(w)(v)), "derivative of <g, u>"),
        ((value, gradient, lambda w: lambda v: np.cosh(w) * v), "derivative of <g, u>"),
        ((lambda w: np.nan, gradient, hvp_at), "derivative of the loss"),
    ],
    ids=["gradient", "hvp", "gauss-newton", "nan"],
)
def test_a_wrong_oracle_is_told_what_is_wrong(functions, message):
    with pytest.raises(AssertionError, match=f"oracle: .*{message}.* fails"):
        check_oracle(*functions, VECTORS[0], VECTORS[1], space=ArraySpace())


GOOD = {
    "cdat": (tuners.cdat(), {}),
    "greedy": (tuners.quadratically_greedy(), {}),
    "gen": (tuners.gen(), {}),
    "polyak": (tuners.polyak(), {}),
    "hypergradient": (tuners.hypergradient(), {}),
    "self-tuning": (tuners.self_tuning(), {}),
    "cooldown": (tuners.self_tuning(total_steps=6), {}),
    "sharpness-edge": (
        tuners.sharpness_edge(),
        {"loss_scale_invariant": False, "direction_scale_inverse": False},
    ),
    "constant": (tuners.constant(0.1), {"direction_scale_inverse": False}),
}


@pytest.mark.parametrize(("tuner", "laws"), GOOD.values(), ids=GOOD)
def test_the_tuners_of_the_core_pass(tuner, laws, scalar):
    check_tuner(tuner, scalar(0.0), **laws)


def built(update):
    """Return a tuner without the protection of from_rule."""
    return tuners.cdat()._replace(update=update)


def negative(measurement, state):
    rate, state = tuners.cdat().update(measurement, state)
    return -rate, state


def forgetful(measurement, state):
    rate, after = tuners.cdat().update(measurement, state)
    return rate, after._replace(skipped=state.skipped)


def wide(measurement, state):
    rate, after = tuners.cdat().update(measurement, state)
    return rate, after._replace(numerator=np.float32(after.numerator))


def averaging_bad_ones(measurement, state):
    rate, after = tuners.cdat().update(measurement, state)
    return rate, after._replace(numerator=after.numerator + np.isnan(measurement.slope))


def stepping_on_bad_ones(measurement, state):
    rate, after = tuners.cdat().update(measurement, state)
    return rate + (after.skipped > state.skipped), after


def observing(observe):
    """Return a self-tuning tuner that observes the loss in a wrong way."""
    return tuners.self_tuning()._replace(observe=observe)


def moving_on_bad_losses(value, state):
    rate, after = tuners.self_tuning().observe(value, state)
    return rate + state.rate * np.isnan(value), after


def remembering_bad_losses(value, state):
    rate, after = tuners.self_tuning().observe(value, state)
    return rate, after._replace(retreat=after.retreat + np.isnan(value))


@pytest.mark.parametrize(
    ("tuner", "message"),
    [
        (observing(moving_on_bad_losses), "observed loss of nan must give the rate 0"),
        (observing(remembering_bad_losses), "observed loss of nan must leave state.retreat"),
        (built(negative), "finite and not negative"),
        (built(forgetful), "add 1 to skipped, it added 0"),
        (built(wide), "keep its type, dtypes and shapes"),
        (built(averaging_bad_ones), "slope of nan must leave state.numerator"),
        (built(stepping_on_bad_ones), "give the rate 0"),
        (tuners.cdat(eps=1.0), "scaling the loss leaves the rate fails"),
        (tuners.constant(0.1), "scaling the direction"),
        (tuners.sharpness_edge(), "scaling the loss"),
    ],
)
def test_broken_tuners_are_told_what_is_broken(tuner, message):
    with pytest.raises(AssertionError, match=f"tuner: .*{message}"):
        check_tuner(tuner, np.asarray(0.0))


def test_too_few_vectors_are_refused():
    with pytest.raises(ValueError, match="at least 3 vectors, got 2"):
        check_space(ArraySpace(), VECTORS[:2])
    with pytest.raises(ValueError, match="at least 2 vectors, got 0"):
        check_hvp(product, [], space=ArraySpace())


def test_zero_vectors_and_directions_are_refused():
    with pytest.raises(AssertionError, match="must be positive and finite"):
        check_space(ArraySpace(), [np.zeros(2), np.ones(2), np.ones(2)])
    with pytest.raises(AssertionError, match="direction must not be zero"):
        check_oracle(value, gradient, hvp_at, VECTORS[0], 0 * VECTORS[1], space=ArraySpace())
    assert math.isfinite(value(VECTORS[0]))
