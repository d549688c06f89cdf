"""Tuners on the quadratic model along the update: CDAT, quadratically greedy, on edge."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

from cdat_core import _validation
from cdat_core._arrays import cast, counter, namespace
from cdat_core._types import Measurement, Scalar
from cdat_core.tuners._base import Tuner, from_rule
from cdat_core.tuners._guards import GuardOptions, Guards, name_guards

_FIRST_FRACTION = 0.1
"""The first rate on a full batch, as a part of the rule's."""


class CDATState(NamedTuple):
    """State of `cdat`; all fields are scalars.

    Attributes
    ----------
    rate : Scalar
        The last positive learning rate.
    numerator : Scalar
        Moving average of ``max(-slope, 0)``, started at zero.
    denominator : Scalar
        Moving average of ``|curvature|``, started at zero.
    weight : Scalar
        The same moving average of the constant 1; dividing by it removes the bias of the zero
        start.
    skipped : Scalar
        Measurements skipped because they were not finite, int32.
    """

    rate: Scalar
    numerator: Scalar
    denominator: Scalar
    weight: Scalar
    skipped: Scalar


def cdat(
    sigma: Any = 2.0,
    decay: Any = 0.9,
    eps: Any = 0.0,
    *,
    initial_learning_rate: Any = None,
    max_growth: Any = None,
    max_learning_rate: Any = None,
) -> Tuner[CDATState]:
    """Curvature Dynamics Aware Tuning: ``eta = sigma * n / (d + eps)``.

    n and d are the moving averages of ``max(-slope, 0)`` and ``|curvature|``. With sigma = 1 the
    rate minimises the (averaged) quadratic model; with sigma = 2 it is on the edge, where the model
    returns to the current loss. The method is from [Roulet2024]_; the guards, the skip of
    non-finite measurements and the hold at zero curvature are additions of this library.

    With eps = 0, a curvature of exactly zero gives no rate: the averages do not change and the last
    rate is kept (0 before the first rate, unless `initial_learning_rate` is given). A tiny
    curvature gives a huge rate, unless `max_growth`, `max_learning_rate` or eps > 0 bounds it. If
    the averaged slope is not negative, the rate is 0.

    Parameters
    ----------
    sigma : float
        Scale of the rate, > 0. Above 2 the sharpness collapses in many problems.
    decay : float
        Memory of the moving averages, in [0, 1). With 0 only the current measurement counts.
    eps : float
        Added to the averaged curvature (without the bias of the start), >= 0, in its units. If it
        is positive, a zero curvature counts like any other, and the rate depends on the scale of
        the loss.
    initial_learning_rate : float, optional
        Upper bound of the first rate, and the rate held until a curvature is known.
    max_growth : float, optional
        Largest factor, >= 1, from the last positive rate to the next (if the curvature is measured
        every k steps, once in k steps). After one very small rate, growing back takes many steps.
    max_learning_rate : float, optional
        Largest rate.

    Returns
    -------
    Tuner
        It needs slope and curvature.

    Raises
    ------
    ValueError
        If a hyperparameter is out of its range.

    References
    ----------
    .. [Roulet2024] V. Roulet, A. Agarwala, J.-B. Grill, G. Swirszcz, M. Blondel, F. Pedregosa,
       "Stepping on the Edge: Curvature Aware Learning Rate Tuners", 2024, arXiv:2407.06183.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import Measurement, tuners
    >>> tuner = tuners.cdat(sigma=1.0, decay=0.0)
    >>> state = tuner.init(np.asarray(0.0))
    >>> rate, state = tuner.update(
    ...     Measurement(np.asarray(3.0), np.asarray(-2.0), np.asarray(4.0)), state
    ... )
    >>> float(rate)
    0.5
    """
    guards = Guards.checked(
        initial_learning_rate=initial_learning_rate,
        max_growth=max_growth,
        max_learning_rate=max_learning_rate,
    )
    return _averaged(sigma, decay, eps, guards)


def _averaged(sigma: Any, decay: Any, eps: Any, guards: Guards) -> Tuner[CDATState]:
    """Return the tuner behind all tuners of this module; the guards are already validated."""
    sigma = _validation.positive("sigma", sigma)
    decay = _validation.fraction("decay", decay)
    eps = _validation.nonnegative("eps", eps)

    def init(like: Scalar) -> CDATState:
        zero = namespace(like).zeros_like(like)
        return CDATState(guards.start(like), zero, zero, zero, counter(like))

    def rule(measurement: Measurement, state: CDATState) -> tuple[Scalar, CDATState]:
        xp = namespace(state.rate)
        beta, offset = cast(decay, state.rate), cast(eps, state.rate)
        zero = xp.zeros_like(state.rate)
        slope: Scalar = measurement.slope
        magnitude = xp.abs(measurement.curvature)
        descent = xp.where(slope < 0, -slope, zero)
        numerator = beta * state.numerator + (1 - beta) * descent
        denominator = beta * state.denominator + (1 - beta) * magnitude
        weight = beta * state.weight + (1 - beta)

        informative = magnitude + offset > 0
        divisor = denominator + offset * weight
        usable = informative & (divisor > 0)
        ratio = cast(sigma, state.rate) * (
            numerator / xp.where(usable, divisor, xp.ones_like(divisor))
        )
        usable = usable & xp.isfinite(ratio)
        held = xp.where(numerator > 0, state.rate, zero)
        proposal = xp.where(usable, xp.where(usable, ratio, zero), held)
        rate = guards.limit(proposal, state.rate, first=state.weight == 0)
        return rate, state._replace(
            numerator=xp.where(informative, numerator, state.numerator),
            denominator=xp.where(informative, denominator, state.denominator),
            weight=xp.where(informative, weight, state.weight),
        )

    return from_rule(init, rule, needs=("slope", "curvature"))


def full_batch(
    sigma: Any = 1.9,
    decay: Any = 0.0,
    eps: Any = 0.0,
    *,
    initial_learning_rate: Any = None,
    max_growth: Any = 1.25,
    max_learning_rate: Any = None,
) -> Tuner[CDATState]:
    """Use the CDAT rate on a full batch: near the edge, without averages, from a cautious start.

    It is `cdat` with sigma = 1.9 and decay = 0, which suit a loss without noise. At the start
    nothing is known about how the curvature changes along a step, and Adam's first update is the
    sign of the gradient; so the first rate is a tenth of the rule's, and each update may raise it
    by a quarter at most. Without these two, 1.9 diverged from all of 40 seeds of a small
    classifier with Adam and with momentum; with them from none. The guards are additions of this
    library.

    Parameters
    ----------
    sigma, decay, eps, max_growth, max_learning_rate
        As in `cdat`.
    initial_learning_rate : float, optional
        Upper bound of the first rate, instead of a tenth of the rule's.

    Returns
    -------
    Tuner
        It needs slope and curvature.

    Raises
    ------
    ValueError
        If a hyperparameter is out of its range.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import Measurement, tuners
    >>> tuner = tuners.full_batch()
    >>> state = tuner.init(np.asarray(0.0))
    >>> model = Measurement(None, np.asarray(-1.0), np.asarray(1.0))
    >>> for _ in range(3):
    ...     rate, state = tuner.update(model, state)
    ...     print(round(float(rate), 2))
    0.19
    0.24
    0.3
    """
    guards = Guards.checked(
        initial_learning_rate=initial_learning_rate,
        max_growth=max_growth,
        max_learning_rate=max_learning_rate,
    )
    return _averaged(sigma, decay, eps, guards._replace(first_fraction=_FIRST_FRACTION))


@name_guards
def quadratically_greedy(
    decay: Any = 0.0,
    eps: Any = 0.0,
    **guards: Unpack[GuardOptions],
) -> Tuner[CDATState]:
    """Minimise the quadratic model along the update: ``eta = -slope / |curvature|``.

    One of the two classical tuners that the paper (arXiv:2407.06183) studies. It is `cdat` with
    sigma = 1 and, by default, no averaging. Where the curvature is negative the model has no
    minimum; using its magnitude there, as in `cdat`, is a choice of this library.

    Parameters
    ----------
    decay, eps
        As in `cdat`.
    **guards
        `initial_learning_rate`, `max_growth` and `max_learning_rate`, as in `cdat`.

    Returns
    -------
    Tuner
        It needs slope and curvature.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import Measurement, tuners
    >>> tuner = tuners.quadratically_greedy()
    >>> rate, _ = tuner.update(
    ...     Measurement(None, np.asarray(-1.0), np.asarray(2.0)), tuner.init(np.asarray(0.0))
    ... )
    >>> float(rate)
    0.5
    """
    return cdat(1.0, decay, eps, **guards)


@name_guards
def on_edge(
    decay: Any = 0.0,
    eps: Any = 0.0,
    **guards: Unpack[GuardOptions],
) -> Tuner[CDATState]:
    """Step to where the quadratic model equals the current loss: ``eta = -2 slope / |curvature|``.

    Twice the greedy rate (arXiv:2407.06183): `cdat` with sigma = 2 and, by default, no averaging.

    Parameters
    ----------
    decay, eps
        As in `cdat`.
    **guards
        `initial_learning_rate`, `max_growth` and `max_learning_rate`, as in `cdat`.

    Returns
    -------
    Tuner
        It needs slope and curvature.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import Measurement, tuners
    >>> tuner = tuners.on_edge()
    >>> rate, _ = tuner.update(
    ...     Measurement(None, np.asarray(-1.0), np.asarray(2.0)), tuner.init(np.asarray(0.0))
    ... )
    >>> float(rate)
    1.0
    """
    return cdat(2.0, decay, eps, **guards)


def gen(
    decay: Any = 0.9,
    *,
    initial_learning_rate: Any = None,
    max_learning_rate: Any = None,
) -> Tuner[CDATState]:
    """Use the generalized Newton rate: greedy on averages, at most a factor two per update.

    The rate ``-slope / curvature`` of a generalized Newton step [Bu2025]_, from moving averages of
    both as in `cdat` with sigma = 1, and never less than half or more than twice the last one. It
    suits a curvature that is measured only every few steps. The published code averages the rate
    itself; averaging slope and curvature is a choice of this library.

    Parameters
    ----------
    decay, initial_learning_rate, max_learning_rate
        As in `cdat`.

    Returns
    -------
    Tuner
        It needs slope and curvature.

    References
    ----------
    .. [Bu2025] Z. Bu, S. Xu, "Gradient descent with generalized Newton's method", ICLR 2025,
       arXiv:2407.02772.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import Measurement, tuners
    >>> tuner = tuners.gen(decay=0.0)
    >>> state = tuner.init(np.asarray(0.0))
    >>> for curvature in (1.0, 8.0, 8.0):
    ...     model = Measurement(None, np.asarray(-1.0), np.asarray(curvature))
    ...     rate, state = tuner.update(model, state)
    ...     print(float(rate))
    1.0
    0.5
    0.25
    """
    guards = Guards.checked(
        initial_learning_rate=initial_learning_rate,
        max_growth=2.0,
        max_learning_rate=max_learning_rate,
    )
    return _averaged(1.0, decay, 0.0, guards._replace(max_shrink=2.0))
