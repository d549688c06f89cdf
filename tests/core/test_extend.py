"""What authors of tuners and adapters import: enough to build what the package builds."""

import math
from typing import Any, NamedTuple

import pytest

from cdat_core import Measurement, linesearch, tuners
from cdat_core.extend import (
    Guards,
    cast,
    counter,
    filled,
    increment,
    namespace,
    require_floating,
    safe_reciprocal,
    validation,
)
from cdat_core.testing import check_tuner

GUARDS = {"initial_learning_rate": 0.1, "max_growth": 2.0, "max_learning_rate": 0.7}


def greedy(**guards):
    """Return `tuners.quadratically_greedy` for positive curvatures, written outside the core."""
    limits = Guards.checked(**guards)

    def rule(measurement, state):
        zero = namespace(state.rate).zeros_like(state.rate)
        descent = namespace(zero).where(measurement.slope < 0, -measurement.slope, zero)
        rate = descent * safe_reciprocal(abs(measurement.curvature))
        rate = limits.limit(rate, state.rate, first=state.step == 0)
        return rate, state._replace(step=increment(state.step, measurement.curvature > 0))

    return tuners.from_rule(limits.start_state, rule, needs=("slope", "curvature"))


def rates(tuner, scalar, history):
    state, found = tuner.init(scalar(0.0)), []
    for slope, curvature in history:
        rate, state = tuner.update(Measurement(None, scalar(slope), scalar(curvature)), state)
        found.append(float(rate))
    return found


@pytest.mark.parametrize("guards", [{}, *({name: GUARDS[name]} for name in GUARDS), GUARDS])
def test_a_tuner_with_guards_can_be_written_outside_the_core(scalar, guards):
    if not guards:  # they break the laws of scaling
        check_tuner(greedy(), scalar(0.0))
    history = [(-1.0, 2.0), (-1.0, 0.5), (-1.0, math.nan), (1.0, 4.0), (-3.0, 1.0), (-1.0, 64.0)]
    expected = rates(tuners.quadratically_greedy(**guards), scalar, history)
    assert rates(greedy(**guards), scalar, history) == expected
    assert len(set(expected)) > 2


class HalvingState(NamedTuple):
    step_size: Any
    done: Any
    failed: Any
    trials: Any
    value: Any


def halving():
    """Return a line search that halves the step until the loss is lower than at the start."""

    def init(measurement, like, previous_step_size=None):
        require_floating(like, "like")
        no = counter(like) > 0
        return HalvingState(filled(like, 1.0), no, no, counter(like), cast(measurement.value, like))

    def tell(state, value, slope=None):
        xp = namespace(state.step_size)
        lower = state.done | (cast(value, state.step_size) < state.value)
        return state._replace(
            step_size=xp.where(lower, state.step_size, state.step_size / 2),
            done=lower,
            trials=increment(state.trials, ~state.done),
        )

    return linesearch.LineSearch(init, tell, frozenset({"value"}))


def test_a_line_search_can_be_written_outside_the_core(xp, scalar):
    search = halving()
    state = search.init(Measurement(scalar(1.0), None, None), scalar(0.0))
    while not bool(state.done):
        state = search.tell(state, (1 - 8 * state.step_size) ** 2)
    assert (float(state.step_size), int(state.trials)) == (0.125, 4)
    with pytest.raises(TypeError, match="like must have a real floating dtype, got .*int32"):
        search.init(Measurement(scalar(1.0), None, None), xp.asarray(1, dtype=xp.int32))


def test_optional_checks_what_is_given():
    assert validation.optional(validation.positive, "bound", None) is None
    assert validation.optional(validation.positive, "bound", 2) == 2.0
    with pytest.raises(ValueError, match="bound must be a finite number > 0, got 0"):
        validation.optional(validation.positive, "bound", 0)
