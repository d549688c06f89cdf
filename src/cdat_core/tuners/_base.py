"""What every tuner shares: its shape, its state, and the skip of non-finite measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar
from typing import cast as typing_cast

from cdat_core import _validation
from cdat_core._arrays import cast, increment, namespace, require_floating
from cdat_core._types import Measurement, Scalar


class TunerState(Protocol):
    """The fields that every tuner state has; states are NamedTuples of scalars."""

    @property
    def rate(self) -> Scalar:
        """The last positive learning rate; before the first one, `initial_learning_rate` or 0."""
        ...

    @property
    def skipped(self) -> Scalar:
        """How many measurements were skipped because they were not finite, int32."""
        ...


StateT = TypeVar("StateT", bound=TunerState)


Rule: TypeAlias = Callable[[Measurement, StateT], tuple[Scalar, StateT]]
"""A function ``(measurement, state) -> (learning_rate, state)``."""

Observation: TypeAlias = Callable[[Scalar, StateT], tuple[Scalar, StateT]]
"""A function ``(value, state) -> (learning_rate, state)`` of the loss alone."""


class Tuner(NamedTuple, Generic[StateT]):
    """A learning-rate tuner, as pure functions on scalars.

    Attributes
    ----------
    init : callable
        ``init(like) -> state``. `like` is a real floating 0-d array that fixes namespace, dtype and
        device of the state (an array of any shape runs a batch of independent tuners).
    update : callable
        ``update(measurement, state) -> (learning_rate, state)``. Pure, and never branches on
        values: it runs unchanged under numpy, ``jax.jit``, ``jax.vmap`` and on torch devices
        without a synchronisation.
    needs : frozenset of str
        The fields of `Measurement` that `update` reads. The others may be None.
    measures : callable or None
        ``measures(step) -> bool``, the schedule of the measurements: whether the tuner wants one in
        this step, counted from 0. It works on Python integers and on arrays of integers. A driver
        may measure more often. None means in every step.
    observe : callable or None
        ``observe(value, state) -> (learning_rate, state)``, in place of `update` in a step without
        a measurement: it sees the loss only. None means that such a step holds the rate and leaves
        the state unchanged.

    See Also
    --------
    every : The same tuner, measured once in k steps.
    """

    init: Callable[[Scalar], StateT]
    update: Rule[StateT]
    needs: frozenset[str]
    measures: Callable[[Any], Any] | None = None
    observe: Observation[StateT] | None = None


def every(tuner: Tuner[StateT], k: Any) -> Tuner[StateT]:
    """Return the same tuner, measured in the steps 0, k, 2 k and so on.

    Parameters
    ----------
    tuner : Tuner
        A tuner; its own schedule of measurements, if any, is replaced.
    k : int
        Steps from one measurement to the next, at least 1. It may be a traced array.

    Returns
    -------
    Tuner

    Raises
    ------
    TypeError, ValueError
        If `k` is not an integer >= 1.

    Examples
    --------
    >>> from cdat_core import tuners
    >>> tuner = tuners.every(tuners.cdat(), 4)
    >>> [step for step in range(10) if tuner.measures(step)]
    [0, 4, 8]
    """
    k = _validation.whole("k", k)
    return tuner._replace(measures=lambda step: step % k == 0)


def observe_or_hold(
    tuner: Tuner[StateT], value: Scalar | None, state: StateT
) -> tuple[Scalar, StateT]:
    """Return rate and state of a step without a measurement.

    A tuner without `observe` holds its last positive rate. A loss that is not finite is a skip.

    Parameters
    ----------
    tuner : Tuner
        The tuner.
    value : Scalar or None
        The loss; None if it is not known, which a tuner with `observe` may refuse.
    state : NamedTuple
        Its state.

    Returns
    -------
    learning_rate, state
    """
    if tuner.observe is not None:
        return tuner.observe(value, state)
    if value is None:
        return state.rate, state
    xp = namespace(state.rate)
    finite = xp.isfinite(value)
    skipped = increment(state.skipped, ~finite)
    rate = xp.where(finite, state.rate, xp.zeros_like(state.rate))
    return rate, state._replace(skipped=skipped)  # type: ignore[attr-defined]


def from_rule(
    init: Callable[[Scalar], StateT],
    rule: Rule[StateT],
    *,
    needs: Iterable[str],
    measures: Callable[[Any], Any] | None = None,
    observe: Observation[StateT] | None = None,
) -> Tuner[StateT]:
    """Make a tuner from a rule, the bare formula, and add what all tuners have in common.

    The tuner checks that the needed fields are present, skips measurements that are not finite
    (rate 0, state unchanged except for the count), casts to the dtypes of the state, replaces
    negative rates by 0 and keeps ``rate`` up to date. The rule sees only finite scalars.

    Parameters
    ----------
    init : callable
        ``like -> state``, a NamedTuple of scalars with the fields ``rate`` and ``skipped``.
    rule : callable
        ``(measurement, state) -> (learning_rate, state)``. It need not update ``rate`` and
        ``skipped``.
    needs : iterable of str
        The fields of `Measurement` that the rule reads.
    measures, observe : callable, optional
        When the rule wants a measurement, and what it does with the loss of the other steps; see
        `Tuner`. `observe` is a bare formula like `rule`.

    Returns
    -------
    Tuner

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import Measurement, tuners
    >>> def newton(measurement, state):
    ...     return -measurement.slope / measurement.curvature, state
    >>> tuner = tuners.from_rule(tuners.constant(0.0).init, newton, needs=("slope", "curvature"))
    >>> state = tuner.init(np.asarray(0.0))
    >>> rate, state = tuner.update(Measurement(None, np.asarray(-1.0), np.asarray(4.0)), state)
    >>> float(rate)
    0.25
    """
    needed = frozenset(needs)
    unknown = needed - set(Measurement._fields)
    if unknown:
        msg = f"needs must name fields of Measurement {Measurement._fields}, got {sorted(unknown)}"
        raise ValueError(msg)

    def checked_init(like: Scalar) -> StateT:
        require_floating(like, "like")
        return init(like)

    def update(measurement: Measurement, state: StateT) -> tuple[Scalar, StateT]:
        _require_fields(measurement, needed)
        return _guarded(rule, measurement, state)

    def observe_value(value: Scalar, state: StateT) -> tuple[Scalar, StateT]:
        assert observe is not None
        _require_fields(Measurement(value, None, None), {"value"})

        def observe_only(clean: Measurement, old: StateT) -> tuple[Scalar, StateT]:
            return observe(clean.value, old)

        return _guarded(observe_only, Measurement(value, None, None), state)

    return Tuner(checked_init, update, needed, measures, None if observe is None else observe_value)


def _require_fields(measurement: Measurement, needed: Iterable[str]) -> None:
    """Raise a ValueError if one of the fields is None."""
    missing = sorted(name for name in needed if getattr(measurement, name) is None)
    if missing:
        msg = f"this tuner needs Measurement.{missing[0]}, got None; see Tuner.needs"
        raise ValueError(msg)


def _guarded(rule: Rule[StateT], measurement: Measurement, state: StateT) -> tuple[Scalar, StateT]:
    """Apply a rule to finite input; skip what is not finite, and keep dtypes and ``rate``."""
    xp = namespace(state.rate)
    # The cast comes first, because a large number may overflow in the dtype of the state.
    fields = [None if field is None else cast(field, state.rate) for field in measurement]
    usable = xp.isfinite(state.rate)
    for field in fields:
        if field is not None:
            usable = usable & xp.isfinite(field)
    clean = Measurement(
        *(
            None if field is None else xp.where(usable, field, xp.zeros_like(state.rate))
            for field in fields
        )
    )
    rate, proposed = rule(clean, state)
    usable = usable & xp.isfinite(rate)
    rate = xp.where(usable & (rate > 0), cast(rate, state.rate), xp.zeros_like(state.rate))
    old = typing_cast(Any, state)
    kept = [
        xp.where(usable, cast(new, before), before)
        for new, before in zip(typing_cast(Any, proposed), old, strict=True)
    ]
    new_state = type(old)(*kept)._replace(
        rate=xp.where(rate > 0, rate, state.rate),
        skipped=increment(state.skipped, ~usable),
    )
    return rate, new_state


class RateState(NamedTuple):
    """State of the tuners without averages; all fields are scalars.

    Attributes
    ----------
    rate : Scalar
        The last positive learning rate.
    step : Scalar
        Measurements used so far, int32.
    skipped : Scalar
        Measurements skipped because they were not finite, int32.
    """

    rate: Scalar
    step: Scalar
    skipped: Scalar
