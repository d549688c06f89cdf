"""The equations of the joint model, and a tuner run against them."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from cdat_core import _validation
from cdat_core._arrays import cast, counter, filled, namespace, require_floating
from cdat_core._types import Measurement, Scalar
from cdat_core.linesearch import LineSearch
from cdat_core.tuners import Tuner

_SMALLEST_DISPLACEMENT = 1e-6


class ModelState(NamedTuple):
    """The state of the joint model.

    Attributes
    ----------
    displacement : Scalar
        The component x of the parameters along the sharpest direction.
    sharpness : Scalar
        The curvature lam along it, >= 0.
    step : Scalar
        Steps taken, int32.
    """

    displacement: Scalar
    sharpness: Scalar
    step: Scalar


class JointModel(NamedTuple):
    """The equations: what a tuner measures, and how a step changes the state.

    Both methods are pure and never branch on values, so a loop over them compiles, for example in
    ``jax.lax.scan``. All fields may be arrays; they broadcast against the state.

    Attributes
    ----------
    gradient_norm : float
        G0, norm of the gradient outside the sharpest direction at the start.
    bulk_curvature : float
        mu, curvature along that part of the gradient.
    progressive_sharpening : float
        a, growth of the sharpness per unit of time (learning rate times steps).
    self_stabilization : float
        b, its decrease per unit of time and of squared displacement.
    decay_time : float
        tau, steps after which gradient and sharpening have halved.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core.dynamics import JointModel, ModelState
    >>> state = ModelState(np.asarray(0.1), np.asarray(2.0), np.asarray(0, dtype=np.int32))
    >>> model = JointModel()
    >>> round(float(model.measure(state).slope), 6)
    -0.0425
    >>> round(float(model.advance(state, np.asarray(0.25)).displacement), 6)
    0.05
    """

    gradient_norm: Any = 0.05
    bulk_curvature: Any = 0.5
    progressive_sharpening: Any = 5e-3
    self_stabilization: Any = 1.0
    decay_time: Any = 500.0

    def measure(self, state: ModelState) -> Measurement:
        """Return the loss of both parts, slope, curvature and sharpness."""
        lam = state.sharpness
        gradient = cast(self.gradient_norm, lam) * self._progress(state)
        along, bulk = (lam * state.displacement) ** 2, gradient**2
        mu = cast(self.bulk_curvature, lam)
        return Measurement(
            value=(lam * state.displacement**2 + bulk / mu) / 2,
            slope=-(along + bulk),
            curvature=lam * along + mu * bulk,
            sharpness=lam,
        )

    def advance(self, state: ModelState, learning_rate: Scalar) -> ModelState:
        """Return the state after one step."""
        xp = namespace(state.sharpness)
        x, lam = state.displacement, state.sharpness
        moved = (1 - learning_rate * lam) * x
        positive = filled(moved, _SMALLEST_DISPLACEMENT)
        smallest = xp.where(moved < 0, -positive, positive)
        sharpening = cast(self.progressive_sharpening, lam) * self._progress(state)
        change = sharpening - cast(self.self_stabilization, lam) * x**2
        sharper = lam + learning_rate * change
        return ModelState(
            displacement=xp.where(xp.abs(moved) < _SMALLEST_DISPLACEMENT, smallest, moved),
            sharpness=xp.where(sharper > 0, sharper, xp.zeros_like(sharper)),
            step=state.step + 1,
        )

    def _progress(self, state: ModelState) -> Scalar:
        """Return s, the progress that training still makes: 1 at the start, falling like 1/t."""
        time = namespace(state.sharpness).astype(state.step, state.sharpness.dtype)
        return 1 / (1 + time / cast(self.decay_time, state.sharpness))


class Trajectory(NamedTuple):
    """A run of the model; the trailing axes are those of the initial conditions.

    Attributes
    ----------
    sharpness, displacement : array
        Before each step and after the last, shape (steps + 1, ...).
    value : array
        The loss there, shape (steps + 1, ...).
    learning_rate : array
        The rate of each step, shape (steps, ...).
    """

    sharpness: Any
    displacement: Any
    value: Any
    learning_rate: Any


def simulate(
    tuner: Tuner[Any] | LineSearch,
    *,
    steps: int,
    sharpness: Any = 1.0,
    displacement: Any = 1e-3,
    model: JointModel | None = None,
    like: Any = None,
) -> Trajectory:
    """Run a tuner or a line search in the joint model of rate and sharpness.

    Initial conditions and the constants of the model may be arrays: they broadcast, and all runs
    advance together. The loss of a line search is the quadratic model of each step.

    Parameters
    ----------
    tuner : Tuner or LineSearch
        The tuner or line search to run.
    steps : int
        Number of steps, at least 1.
    sharpness, displacement : float or array
        Initial conditions, ``sharpness >= 0``.
    model : JointModel, optional
        The constants; by default those of `JointModel`.
    like : array, optional
        Fixes namespace, dtype and device. By default an array among the arguments does, or else
        NumPy in float64.

    Returns
    -------
    Trajectory

    Raises
    ------
    ValueError, TypeError
        If `steps` is not an integer >= 1, an initial condition is a number out of its range, or
        `tuner` is neither a tuner nor a line search.

    Notes
    -----
    The loop over the steps runs in Python, and the loop of a line search reads values. Inside
    ``jax.jit``, put `JointModel` and the tuner into your own scan.

    Examples
    --------
    At a constant rate the sharpness grows to 2 / rate; CDAT on the edge keeps it low:

    >>> from cdat_core import dynamics, tuners
    >>> constant = dynamics.simulate(tuners.constant(0.5), steps=5000)
    >>> edge = dynamics.simulate(tuners.cdat(2.0, decay=0.0), steps=5000)
    >>> round(float(constant.sharpness[-1]), 2), round(float(edge.sharpness[-1]), 2)
    (4.0, 0.41)
    """
    if not isinstance(tuner, Tuner | LineSearch):
        msg = f"tuner must be a Tuner or a LineSearch, got {tuner!r}"
        raise TypeError(msg)
    steps = _validation.count("steps", steps)
    sharpness = _validation.nonnegative("sharpness", sharpness)
    displacement = _validation.finite("displacement", displacement)
    model = JointModel() if model is None else model
    numbers = (sharpness, displacement, *model)
    start = _common(like, numbers)
    xp = namespace(start)
    state = ModelState(
        start + cast(displacement, start), start + cast(sharpness, start), counter(start)
    )
    tuner_state = tuner.init(start) if isinstance(tuner, Tuner) else None
    rate, states, rates = start, [state], []
    for _ in range(steps):
        measurement = model.measure(state)
        if isinstance(tuner, Tuner):
            rate, tuner_state = tuner.update(measurement, tuner_state)
        else:
            rate = _search(tuner, measurement, rate)
        state = model.advance(state, rate)
        states.append(state)
        rates.append(rate)
    return Trajectory(
        sharpness=xp.stack([s.sharpness for s in states]),
        displacement=xp.stack([s.displacement for s in states]),
        value=xp.stack([model.measure(s).value for s in states]),
        learning_rate=xp.stack(rates),
    )


def _common(like: Any, numbers: tuple[Any, ...]) -> Any:
    """Return zeros in the common shape of all arrays, in the dtype of `like`."""
    arrays = [number for number in numbers if hasattr(number, "dtype")]
    if like is None and not arrays:
        # The default namespace, imported only here: importing the core loads no framework.
        embedded: Any = importlib.import_module("array_api_compat.numpy")
        return embedded.zeros((), dtype=embedded.float64)
    like = arrays[0] if like is None else like
    require_floating(like, "like")
    xp = namespace(like)
    start = xp.zeros_like(like)
    for array in arrays:
        start = start + filled(cast(array, like), 0.0)
    return start


def _search(search: LineSearch, measurement: Measurement, previous: Scalar) -> Scalar:
    """Search along the parabola of the measurement until every run is done."""
    xp = namespace(previous)
    value, slope, curvature, _ = measurement
    trial = search.init(measurement, previous, previous)
    while not bool(xp.all(trial.done)):
        eta = trial.step_size
        there = value + eta * (slope + eta / 2 * curvature)
        trial = search.tell(trial, there, slope + eta * curvature)
    return trial.step_size
