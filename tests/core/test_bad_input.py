"""Wrong hyperparameters and arguments are refused by name and value."""

import math
import re
from functools import partial

import numpy as np
import pytest

from cdat_core import ArraySpace, Measurement, finite_difference_hvp, linesearch, tuners

NOT_FINITE = (math.nan, math.inf, -math.inf)
POSITIVE = (0.0, -1.0, -1, *NOT_FINITE)
NONNEGATIVE = (-1e-3, *NOT_FINITE)
AT_LEAST_ONE = (0.999, 0, -2.0, *NOT_FINITE)
FRACTION = (1.0, 1, -0.1, 1.5, *NOT_FINITE)
OPEN_FRACTION = (0.0, *FRACTION)

GUARDS = {
    "initial_learning_rate": POSITIVE,
    "max_growth": AT_LEAST_ONE,
    "max_learning_rate": POSITIVE,
}
RANGES = [
    (tuners.cdat, {"sigma": POSITIVE, "decay": FRACTION, "eps": NONNEGATIVE, **GUARDS}),
    (tuners.quadratically_greedy, {"decay": FRACTION, "eps": NONNEGATIVE, **GUARDS}),
    (tuners.on_edge, {"decay": FRACTION, "eps": NONNEGATIVE, **GUARDS}),
    (tuners.gen, {"decay": FRACTION, "initial_learning_rate": POSITIVE}),
    (tuners.polyak, {"f_min": NOT_FINITE, **GUARDS}),
    (tuners.hypergradient, {"hyper_learning_rate": OPEN_FRACTION, **GUARDS}),
    (tuners.sharpness_edge, {"sigma": POSITIVE, **GUARDS}),
    (tuners.constant, {"learning_rate": NONNEGATIVE}),
    (
        linesearch.backtracking,
        {
            "initial_step_size": POSITIVE,
            "decrease_factor": OPEN_FRACTION,
            "increase_factor": AT_LEAST_ONE,
            "sufficient_decrease": OPEN_FRACTION,
            "value_rtol": NONNEGATIVE,
            "max_step_size": POSITIVE,
        },
    ),
    (
        partial(finite_difference_hvp, lambda w: w, np.ones(2), space=ArraySpace()),
        {"step": POSITIVE},
    ),
]
NUMBERS = [(make, name) for make, ranges in RANGES for name in ranges]
WRONG_VALUES = [
    (make, name, value)
    for make, ranges in RANGES
    for name, values in ranges.items()
    for value in values
]


def label(value):
    return value if isinstance(value, str) else getattr(value, "__name__", None)


@pytest.mark.parametrize(("make", "name", "value"), WRONG_VALUES, ids=label)
def test_number_out_of_range_is_refused(make, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {re.escape(repr(value))}$"):
        make(**{name: value})


@pytest.mark.parametrize("value", ["0.5", True, 0.5j, [0.5]], ids=repr)
@pytest.mark.parametrize(("make", "name"), NUMBERS, ids=label)
def test_what_is_no_number_is_refused(make, name, value):
    with pytest.raises(TypeError, match=rf"^{name} must be .*, got {re.escape(repr(value))}$"):
        make(**{name: value})


@pytest.mark.parametrize("value", [np.float32(-1), np.float64("nan"), np.int64(-1)], ids=repr)
def test_numpy_scalars_are_checked_as_numbers(value):
    with pytest.raises(ValueError, match=r"^sigma must be a finite number > 0, got"):
        tuners.cdat(value)


@pytest.mark.parametrize("value", [np.bool_(True), np.complex128(1j), np.str_("2")], ids=repr)
def test_arrays_of_other_kinds_are_refused(value):
    with pytest.raises(TypeError, match=r"^sigma must be a real number or a 0-d array, got"):
        tuners.cdat(value)


def test_an_integer_beyond_the_floats_is_refused():
    with pytest.raises(ValueError, match=r"^sigma must be a finite number > 0, got 1000"):
        tuners.cdat(10**400)


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-3, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_number_of_trials_is_a_positive_integer(value, error):
    with pytest.raises(error, match=rf"^max_trials must be an integer >= 1, got {value!r}$"):
        linesearch.backtracking(max_trials=value)


def test_arrays_of_hyperparameters_pass_through(xp, scalar):
    """Their values are unknown when traced; here they behave like the numbers."""
    numbers = {
        "sigma": 1.5,
        "decay": 0.5,
        "eps": 0.25,
        "initial_learning_rate": 0.75,
        "max_growth": 1.25,
        "max_learning_rate": 2.0,
    }
    as_numbers = tuners.cdat(**numbers)
    as_arrays = tuners.cdat(
        **{name: xp.asarray(value, dtype=xp.float64) for name, value in numbers.items()}
    )
    states = as_numbers.init(scalar(0.0)), as_arrays.init(scalar(0.0))
    for slope in (-1.0, -4.0, -9.0):
        measurement = Measurement(None, scalar(slope), scalar(1.0))
        left, right = (
            tuner.update(measurement, state)
            for tuner, state in zip((as_numbers, as_arrays), states, strict=True)
        )
        assert float(left[0]) == float(right[0]) > 0
        assert right[0].dtype == scalar(0.0).dtype
        states = left[1], right[1]


def test_array_out_of_range_is_not_looked_at(xp):
    assert tuners.cdat(xp.asarray(-1.0)).needs == {"slope", "curvature"}
    assert tuners.constant(xp.asarray(-1.0)).needs == frozenset()


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_state_needs_a_real_floating_dtype(xp, dtype):
    like = xp.zeros((), dtype=getattr(xp, dtype))
    measurement = Measurement(xp.asarray(1.0), xp.asarray(-1.0), xp.asarray(1.0))
    message = r"^like must have a real floating dtype, got .*" + dtype
    for tuner in (tuners.cdat(), tuners.constant(0.1)):
        with pytest.raises(TypeError, match=message):
            tuner.init(like)
    with pytest.raises(TypeError, match=message):
        linesearch.backtracking().init(measurement, like)


@pytest.mark.parametrize("tuner", [tuners.cdat(), tuners.quadratically_greedy(), tuners.on_edge()])
@pytest.mark.parametrize("field", ["slope", "curvature"])
def test_missing_field_is_named(tuner, field, scalar):
    assert field in tuner.needs
    measurement = Measurement(None, scalar(-1.0), scalar(1.0))._replace(**{field: None})
    with pytest.raises(ValueError, match=rf"needs Measurement\.{field}, got None"):
        tuner.update(measurement, tuner.init(scalar(0.0)))


@pytest.mark.parametrize("field", ["value", "slope"])
def test_line_search_names_its_missing_field(field, scalar):
    search = linesearch.backtracking()
    assert field in search.needs
    measurement = Measurement(scalar(1.0), scalar(-1.0), None)._replace(**{field: None})
    with pytest.raises(ValueError, match=rf"needs .*{field}.*, got .*{field}=None"):
        search.init(measurement, scalar(0.0))


def test_rule_that_needs_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match=r"needs must name fields of Measurement .*'hessian'"):
        tuners.from_rule(lambda like: like, lambda m, s: (m, s), needs=("hessian",))
