"""What every tuner shares: its shape, its state, and the skip of non-finite measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar
from typing import cast as typing_cast

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


class Tuner(NamedTuple, Generic[StateT]):
    """A learning-rate tuner, as a pair of pure functions on scalars.

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
    """

    init: Callable[[Scalar], StateT]
    update: Callable[[Measurement, StateT], tuple[Scalar, StateT]]
    needs: frozenset[str]


def from_rule(
    init: Callable[[Scalar], StateT],
    rule: Callable[[Measurement, StateT], tuple[Scalar, StateT]],
    *,
    needs: Iterable[str],
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
        missing = sorted(name for name in needed if getattr(measurement, name) is None)
        if missing:
            msg = f"this tuner needs Measurement.{missing[0]}, got None; see Tuner.needs"
            raise ValueError(msg)
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

    return Tuner(checked_init, update, needed)


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
