"""Classical tuners: Polyak, hypergradient descent and the edge of stability."""

from __future__ import annotations

from typing import Any, Unpack

from cdat_core import _validation
from cdat_core._arrays import cast, increment, namespace
from cdat_core._types import Measurement, Scalar
from cdat_core.tuners._base import RateState, Tuner, from_rule
from cdat_core.tuners._guards import GuardOptions, Guards, name_guards


@name_guards
def polyak(
    f_min: Any = 0.0,
    **guards: Unpack[GuardOptions],
) -> Tuner[RateState]:
    """Step to where the linear model of the loss reaches `f_min`: ``eta = (f - f_min) / -slope``.

    For ``u = -g`` this is Polyak's rate ``(f - f_min) / |g|**2`` [Polyak1987]_; with
    `max_learning_rate` it is the bounded stochastic Polyak step of [Loizou2021]_. It needs no
    curvature, but a good `f_min`: if that is too low, the rate grows without bound near the
    minimum. If the update does not descend, or the loss is not above `f_min`, the rate is 0.

    Parameters
    ----------
    f_min : float
        The smallest value of the loss, finite, in its units.
    **guards
        `initial_learning_rate`, `max_growth` and `max_learning_rate`, as in `cdat`.

    Returns
    -------
    Tuner
        It needs value and slope.

    Raises
    ------
    ValueError
        If a hyperparameter is out of its range.

    References
    ----------
    .. [Polyak1987] B. T. Polyak, "Introduction to Optimization", Optimization Software, 1987.
    .. [Loizou2021] N. Loizou, S. Vaswani, I. Laradji, S. Lacoste-Julien, "Stochastic Polyak
       Step-size for SGD", AISTATS 2021, arXiv:2002.10542.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import Measurement, tuners
    >>> tuner = tuners.polyak()
    >>> model = Measurement(np.asarray(3.0), np.asarray(-2.0), None)
    >>> rate, _ = tuner.update(model, tuner.init(np.asarray(0.0)))
    >>> float(rate)
    1.5
    """
    f_min = _validation.finite("f_min", f_min)
    limits = Guards.checked(**guards)

    def rule(measurement: Measurement, state: RateState) -> tuple[Scalar, RateState]:
        xp = namespace(state.rate)
        zero, one = xp.zeros_like(state.rate), xp.ones_like(state.rate)
        slope: Scalar = measurement.slope
        gap = measurement.value - cast(f_min, state.rate)
        descends = slope < 0
        ratio = xp.where(gap > 0, gap, zero) / xp.where(descends, -slope, one)
        usable = descends & xp.isfinite(ratio)
        held = xp.where(descends, state.rate, zero)  # a ratio that overflows is ignored
        proposal = xp.where(usable, xp.where(usable, ratio, zero), held)
        rate = limits.limit(proposal, state.rate, first=state.step == 0)
        return rate, state._replace(step=increment(state.step, usable & (rate > 0)))

    return from_rule(limits.start_state, rule, needs=("value", "slope"))


@name_guards
def hypergradient(
    hyper_learning_rate: Any = 0.02,
    **guards: Unpack[GuardOptions],
) -> Tuner[RateState]:
    """Apply gradient descent to the rate itself: ``eta <- eta * (1 - hyper_learning_rate * h)``.

    Hypergradient descent [Baydin2018]_ moves the rate against the derivative of the loss with
    respect to the rate. Here the quadratic model gives this derivative at the rate in use: ``slope
    + eta * curvature``. On a quadratic loss it is the inner product of the next gradient with this
    update, which the original method computes one step later. Normalised, ``h = (slope + eta *
    curvature) / (|slope| + eta * |curvature|)`` lies in [-1, 1], so the rate stays positive and
    does not depend on the scale of the loss or the update. The model and the normalisation are
    choices of this library. The rate converges to the greedy rate ``-slope / curvature``, but
    slowly.

    Parameters
    ----------
    hyper_learning_rate : float
        Largest relative change of the rate in one update, in (0, 1).
    **guards
        `initial_learning_rate` is the first rate; by default it is the first greedy rate,
        ``-slope / |curvature|``. `max_growth` and `max_learning_rate` are as in `cdat`.

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
    .. [Baydin2018] A. G. Baydin, R. Cornish, D. Martinez Rubio, M. Schmidt, F. Wood, "Online
       Learning Rate Adaptation with Hypergradient Descent", ICLR 2018, arXiv:1703.04782.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import Measurement, tuners
    >>> tuner = tuners.hypergradient(0.1, initial_learning_rate=0.01)
    >>> model = Measurement(None, np.asarray(-1.0), np.asarray(2.0))
    >>> state = tuner.init(np.asarray(0.0))
    >>> for _ in range(200):
    ...     rate, state = tuner.update(model, state)
    >>> round(float(rate), 3)
    0.5
    """
    hyper_learning_rate = _validation.open_fraction("hyper_learning_rate", hyper_learning_rate)
    limits = Guards.checked(**guards)

    def rule(measurement: Measurement, state: RateState) -> tuple[Scalar, RateState]:
        xp = namespace(state.rate)
        zero, one = xp.zeros_like(state.rate), xp.ones_like(state.rate)
        slope: Scalar = measurement.slope
        curvature: Scalar = measurement.curvature
        magnitude = xp.abs(curvature)
        # Before the first rate there is nothing to change: it starts from the greedy one.
        known = magnitude > 0
        greedy = xp.where(slope < 0, -slope, zero) / xp.where(known, magnitude, one)
        greedy = xp.where(known & xp.isfinite(greedy), greedy, zero)
        bend = state.rate * curvature
        total = xp.abs(slope) + xp.abs(bend)
        usable = xp.isfinite(total) & (total > 0)
        relative = xp.where(usable, slope + bend, zero) / xp.where(usable, total, one)
        moved = state.rate * (1 - cast(hyper_learning_rate, state.rate) * relative)
        proposal = xp.where(state.rate > 0, xp.where(xp.isfinite(moved), moved, state.rate), greedy)
        rate = limits.limit(proposal, state.rate, first=state.step == 0)
        return rate, state._replace(step=increment(state.step, rate > 0))

    return from_rule(limits.start_state, rule, needs=("slope", "curvature"))


@name_guards
def sharpness_edge(
    sigma: Any = 2.0,
    **guards: Unpack[GuardOptions],
) -> Tuner[RateState]:
    """Keep the product of rate and sharpness: ``eta = sigma / sharpness``.

    With sigma = 2 a gradient step is on the edge of stability in the sharpest direction. If the
    sharpness is not positive, the last rate is kept (0 before the first, unless
    `initial_learning_rate` is given). The rate depends on the scale of the loss but not on the
    scale of the update, so it suits updates of the size of the gradient (or of the preconditioned
    gradient, with the sharpness under the same preconditioner). It is a baseline of this library.

    Parameters
    ----------
    sigma : float
        The product, > 0.
    **guards
        `initial_learning_rate`, `max_growth` and `max_learning_rate`, as in `cdat`.

    Returns
    -------
    Tuner
        It needs sharpness.

    Raises
    ------
    ValueError
        If a hyperparameter is out of its range.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import Measurement, tuners
    >>> tuner = tuners.sharpness_edge()
    >>> model = Measurement(None, None, None, sharpness=np.asarray(8.0))
    >>> rate, _ = tuner.update(model, tuner.init(np.asarray(0.0)))
    >>> float(rate)
    0.25
    """
    sigma = _validation.positive("sigma", sigma)
    limits = Guards.checked(**guards)

    def rule(measurement: Measurement, state: RateState) -> tuple[Scalar, RateState]:
        xp = namespace(state.rate)
        sharpness: Scalar = measurement.sharpness
        positive = sharpness > 0
        ratio = cast(sigma, state.rate) / xp.where(positive, sharpness, xp.ones_like(state.rate))
        usable = positive & xp.isfinite(ratio)
        proposal = xp.where(usable, ratio, state.rate)
        rate = limits.limit(proposal, state.rate, first=state.step == 0)
        return rate, state._replace(step=increment(state.step, usable))

    return from_rule(limits.start_state, rule, needs=("sharpness",))
