"""The next trial of a line search, from the loss and slope at two or three points.

The minimisers of polynomials are returned as fractions of the way from the first point to the
second, together with whether they exist; if not, the fraction is 1/2. All operations are
elementwise and without branches; points may hold infinities without causing warnings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from cdat_core._arrays import namespace
from cdat_core._types import Scalar

# The constants of Moré and Thuente's safeguards.
REMAINDER = 0.66  # part of the way to the far end that a trial between low and high may go
SHORTEST_STRIDE, LONGEST_STRIDE = 1.1, 4.0  # of the last stride, while there is no upper end
SHRINK = 0.25  # ours: what remains of a stride that led to a loss which is not finite


class Point(NamedTuple):
    """A step, and the loss and its derivative along the update there.

    Attributes
    ----------
    step : Scalar
        The step along the update.
    value, slope : Scalar
        The loss and its derivative; both infinite if either is not finite.
    """

    step: Scalar
    value: Scalar
    slope: Scalar


class Bracket(NamedTuple):
    """The interval that `zoom` searches.

    Attributes
    ----------
    low : Point
        The end of lower loss, from which the loss descends into the interval; step 0 at first.
    high : Point
        The other end, on either side of `low`; meaningless until `closed`.
    closed : Scalar
        Boolean: whether an acceptable step is known to lie between the two ends.
    """

    low: Point
    high: Point
    closed: Scalar


StateT = TypeVar("StateT", bound=tuple[Any, ...])


def map_scalars(function: Callable[..., Scalar], *states: StateT) -> StateT:
    """Apply `function` to each scalar of NamedTuples of the same type, nested ones included."""

    def apply(*fields: Any) -> Any:
        if isinstance(fields[0], tuple):
            return map_scalars(function, *fields)
        return function(*fields)

    return type(states[0])(*map(apply, *states))


def _divided(numerator: Scalar, denominator: Scalar, exists: Scalar) -> tuple[Scalar, Scalar]:
    """Return the quotient, or 1/2 where it does not exist, and whether it exists."""
    xp = namespace(numerator)
    exists = exists & (denominator != 0)
    ratio = numerator / xp.where(exists, denominator, xp.ones_like(denominator))
    return xp.where(exists, ratio, xp.full_like(ratio, 0.5)), exists


def _scaled(a: Point, b: Point) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """Return both slopes and the rise from a to b, on the unit interval, and if they are usable.

    The three numbers are divided by the largest: only ratios matter, and squares must not overflow.
    """
    xp = namespace(a.step)
    finite = xp.isfinite(b.value) & xp.isfinite(b.slope)
    finite = finite & xp.isfinite(a.value) & xp.isfinite(a.slope)
    zero, one = xp.zeros_like(a.step), xp.ones_like(a.step)
    length = b.step - a.step
    start = xp.where(finite, a.slope, zero) * length
    end = xp.where(finite, b.slope, zero) * length
    rise = xp.where(finite, b.value, zero) - xp.where(finite, a.value, zero)
    size = xp.maximum(xp.maximum(xp.abs(start), xp.abs(end)), xp.abs(rise))
    usable = xp.isfinite(size) & (size > 0)
    size = xp.where(usable, size, one)
    parts = (xp.where(usable, part, zero) / size for part in (start, end, rise))
    return (*parts, usable)


def cubic_fraction(a: Point, b: Point) -> tuple[Scalar, Scalar]:
    """Locate the minimiser of the cubic through the values and slopes of two points."""
    start, end, rise, usable = _scaled(a, b)
    xp = namespace(start)
    # The derivative of the cubic at the fraction s is start + 2 half s + lead s^2.
    half = 3 * rise - 2 * start - end
    lead = 3 * (start + end - 2 * rise)
    discriminant = half * half - lead * start
    usable = usable & (discriminant > 0)
    root = xp.sqrt(xp.where(usable, discriminant, xp.zeros_like(discriminant)))
    forward = half > 0  # of two forms of the same root, the one that does not cancel
    return _divided(
        xp.where(forward, -start, root - half), xp.where(forward, root + half, lead), usable
    )


def quadratic_fraction(a: Point, b: Point) -> tuple[Scalar, Scalar]:
    """Locate the minimiser of the parabola through two values and the slope at the first point."""
    start, _, rise, usable = _scaled(a, b)
    bend = 2 * (rise - start)
    return _divided(-start, bend, usable & (bend > 0))


def secant_fraction(a: Point, b: Point) -> tuple[Scalar, Scalar]:
    """Locate the zero of the line through two slopes."""
    start, end, _, usable = _scaled(a, b)
    return _divided(start, start - end, usable)


def refine(
    bracket: Bracket, trial: Point, *, tilt: Scalar, rounding: Scalar, largest: Scalar
) -> tuple[Bracket, Scalar]:
    """Return the bracket updated with a trial, and the step of the next trial.

    Parameters
    ----------
    bracket : Bracket
        Its `low` is finite.
    trial : Point
        A new point: between `low` and `high` if the bracket is closed, else beyond `low`.
    tilt : Scalar
        The slope of a line to subtract from the loss before anything is compared.
    rounding : Scalar
        Differences of the loss up to this size are noise; the slopes then decide.
    largest : Scalar
        Upper bound of the next trial.
    """
    xp = namespace(trial.step)
    closed, points = bracket.closed, (bracket.low, bracket.high, trial)
    low, high, trial = (
        Point(step, value - tilt * step, slope - tilt) for step, value, slope in points
    )
    stride = trial.step - low.step
    cubic, has_cubic = cubic_fraction(low, trial)
    quadratic, has_quadratic = quadratic_fraction(low, trial)
    secant, has_secant = secant_fraction(low, trial)
    level = xp.abs(trial.value - low.value) <= rounding
    cubic = xp.where(level, secant, cubic)
    has_cubic = xp.where(level, has_secant, has_cubic)

    # The loss is higher than at `low`: the minimum lies before the trial. The minimiser of the
    # cubic is taken if it is closer to `low`, else the midpoint between it and that of the
    # parabola.
    higher = ~(trial.value - low.value <= rounding)
    careful = xp.where(has_cubic & (cubic < quadratic), cubic, (cubic + quadratic) / 2)
    short = xp.full_like(careful, SHRINK)
    shorter = low.step + xp.where(has_quadratic, careful, short) * stride

    # It is lower and the slope has changed sign: the minimum lies before the trial, and the guess
    # that is farther from the trial is taken.
    turned = ~higher & (trial.slope * stride > 0)
    before = low.step + xp.where(has_cubic & (cubic < secant), cubic, secant) * stride

    # It is lower and still descends, less steeply: the minimum lies beyond the trial.
    easing = ~higher & ~turned & (xp.abs(trial.slope) <= xp.abs(low.slope))
    limit = xp.minimum(trial.step + LONGEST_STRIDE * stride, largest)
    far = xp.where(closed, high.step, limit)
    by_cubic = xp.where(has_cubic & (cubic > 1), low.step + cubic * stride, far)
    by_secant = xp.where(has_secant & (secant > 1), low.step + secant * stride, far)
    cubic_is_nearer = xp.abs(by_cubic - trial.step) < xp.abs(by_secant - trial.step)
    beyond = xp.where(cubic_is_nearer == closed, by_cubic, by_secant)
    bound = trial.step + REMAINDER * (high.step - trial.step)
    passes = xp.abs(beyond - trial.step) > xp.abs(bound - trial.step)
    beyond = xp.where(closed & passes, bound, beyond)

    # It is lower and descends even more steeply: only the far end limits where the minimum is.
    fraction, _ = cubic_fraction(trial, high)
    onward = xp.where(closed, trial.step + fraction * (high.step - trial.step), limit)

    step = xp.where(turned, before, xp.where(easing, beyond, onward))
    step = xp.where(higher, shorter, step)
    shortest = xp.minimum(trial.step + SHORTEST_STRIDE * stride, limit)
    opened = ~(closed | higher | turned)
    step = xp.where(opened, xp.minimum(xp.maximum(step, shortest), limit), step)

    low, high, trial = points
    refined = Bracket(
        low=_chosen(higher, low, trial),
        high=_chosen(higher, trial, _chosen(turned, low, high)),
        closed=~opened,
    )
    return refined, step


def _chosen(condition: Scalar, a: Point, b: Point) -> Point:
    xp = namespace(a.step)
    return map_scalars(lambda x, y: xp.where(condition, x, y), a, b)
