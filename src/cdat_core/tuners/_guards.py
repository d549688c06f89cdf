"""Guards: limits on the learning rate that most tuners accept."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict, TypeVar

from cdat_core._arrays import cast, counter, filled, namespace
from cdat_core._types import Scalar
from cdat_core._validation import at_least_one, optional, positive
from cdat_core.tuners._base import RateState

Function = TypeVar("Function", bound=Callable[..., Any])


class GuardOptions(TypedDict, total=False):
    """The keyword arguments that limit the learning rate, for ``**guards`` in a signature.

    A missing key, or None, switches a guard off. A function that only passes the guards on takes
    ``**guards: Unpack[GuardOptions]``, which type checkers understand.

    Attributes
    ----------
    initial_learning_rate : float or None
        Upper bound of the first rate, > 0, and the rate held until a curvature is known.
    max_growth : float or None
        Largest factor, >= 1, from the last positive rate to the next one.
    max_learning_rate : float or None
        Largest rate, > 0.

    Examples
    --------
    >>> from typing import Unpack
    >>> from cdat_core import tuners
    >>> def careful(sigma: float, **guards: Unpack[tuners.GuardOptions]) -> tuners.Tuner:
    ...     return tuners.cdat(sigma, 0.99, **guards)
    >>> tuner = careful(1.9, max_growth=1.1)
    """

    initial_learning_rate: Any
    max_growth: Any
    max_learning_rate: Any


def name_guards(function: Function) -> Function:
    """Show the guards by name in the signature of a function that takes ``**guards``.

    ``help``, editors and ``optax.inject_hyperparams`` read the signature.

    Parameters
    ----------
    function : callable
        It takes ``**guards: Unpack[GuardOptions]``.

    Returns
    -------
    callable
        The same function.

    Examples
    --------
    >>> import inspect
    >>> from cdat_core.extend import name_guards
    >>> @name_guards
    ... def careful(sigma=1.9, **guards): ...
    >>> list(inspect.signature(careful).parameters)
    ['sigma', 'initial_learning_rate', 'max_growth', 'max_learning_rate']
    """
    signature = inspect.signature(function)
    kinds = inspect.Parameter
    named = [p for p in signature.parameters.values() if p.kind is not kinds.VAR_KEYWORD]
    guards = [
        kinds(name, kinds.KEYWORD_ONLY, default=None, annotation="Any")
        for name in GuardOptions.__annotations__
    ]
    shown = signature.replace(parameters=[*named, *guards])
    function.__signature__ = shown  # type: ignore[attr-defined]
    return function


class Guards(NamedTuple):
    """The guards of a tuner as one object; None switches one off.

    Attributes
    ----------
    initial_learning_rate, max_growth, max_learning_rate
        As in `GuardOptions`.
    max_shrink : float or None
        Largest factor, >= 1, by which the rate may fall from one update to the next.
    first_fraction : float or None
        The part of the first proposal that is used.

    Examples
    --------
    Newton's rate along the update, with guards:

    >>> from typing import Unpack
    >>> import numpy as np
    >>> from cdat_core import Measurement, tuners
    >>> from cdat_core.extend import Guards, increment
    >>> def newton(**guards: Unpack[tuners.GuardOptions]) -> tuners.Tuner:
    ...     limits = Guards.checked(**guards)
    ...     def rule(measurement, state):
    ...         rate = -measurement.slope / measurement.curvature
    ...         limited = limits.limit(rate, state.rate, first=state.step == 0)
    ...         return limited, state._replace(step=increment(state.step, limited > 0))
    ...     return tuners.from_rule(limits.start_state, rule, needs=("slope", "curvature"))
    >>> tuner = newton(initial_learning_rate=0.1, max_growth=2.0)
    >>> state = tuner.init(np.asarray(0.0))
    >>> for _ in range(4):
    ...     model = Measurement(None, np.asarray(-1.0), np.asarray(2.0))
    ...     rate, state = tuner.update(model, state)
    ...     print(float(rate))
    0.1
    0.2
    0.4
    0.5
    """

    initial_learning_rate: Any = None
    max_growth: Any = None
    max_learning_rate: Any = None
    max_shrink: Any = None
    first_fraction: Any = None

    @classmethod
    def checked(
        cls,
        *,
        initial_learning_rate: Any = None,
        max_growth: Any = None,
        max_learning_rate: Any = None,
    ) -> Guards:
        """Return validated guards; the arguments are the keys of `GuardOptions`.

        Raises
        ------
        ValueError
            If a guard is out of its range.
        TypeError
            If a guard is not a real number or an array of real numbers.
        """
        return cls(
            optional(positive, "initial_learning_rate", initial_learning_rate),
            optional(at_least_one, "max_growth", max_growth),
            optional(positive, "max_learning_rate", max_learning_rate),
        )

    def start(self, like: Scalar) -> Scalar:
        """Return the rate of a state before its first measurement: the initial rate, or 0."""
        initial = 0.0 if self.initial_learning_rate is None else self.initial_learning_rate
        return filled(like, initial)

    def start_state(self, like: Scalar) -> RateState:
        """Return the state of a tuner without averages before its first measurement."""
        return RateState(self.start(like), counter(like), counter(like))

    def limit(self, proposal: Scalar, previous: Scalar, *, first: Scalar) -> Scalar:
        """Return `proposal` within the limits.

        Parameters
        ----------
        proposal : Scalar
            The rate before the limits.
        previous : Scalar
            The last positive rate; before the first one, the result of `start`.
        first : Scalar
            Boolean; whether no measurement has been used yet.
        """
        xp = namespace(previous)
        if self.initial_learning_rate is not None:
            proposal = xp.where(first & (proposal > previous), previous, proposal)
        if self.first_fraction is not None:
            part = cast(self.first_fraction, previous) * proposal
            proposal = xp.where(first & (previous == 0), part, proposal)
        if self.max_growth is not None:
            ceiling = cast(self.max_growth, previous) * previous
            proposal = xp.where((previous > 0) & (proposal > ceiling), ceiling, proposal)
        if self.max_shrink is not None:
            floor = previous / cast(self.max_shrink, previous)
            proposal = xp.where((proposal > 0) & (proposal < floor), floor, proposal)
        if self.max_learning_rate is not None:
            ceiling = filled(previous, self.max_learning_rate)
            proposal = xp.where(proposal > ceiling, ceiling, proposal)
        return proposal
