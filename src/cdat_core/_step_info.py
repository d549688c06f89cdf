"""What a training step reports, the same in every adapter."""

from __future__ import annotations

from typing import NamedTuple

from cdat_core._types import Scalar


class StepInfo(NamedTuple):
    """The report of one training step; numbers are 0-d arrays of the framework.

    Attributes
    ----------
    value : Scalar or None
        The loss before the step, in units of the loss.
    slope : Scalar or None
        The directional derivative <g, u>.
    curvature : Scalar or None
        The directional curvature <u, H u>; None if it was not measured.
    sharpness : Scalar or None
        The largest eigenvalue of the (preconditioned) Hessian; None if it was not measured.
    learning_rate : Scalar
        The tuned rate of the step; 0 if the step was skipped.
    skipped : Scalar
        Steps skipped so far because a loss, gradient or measurement was not finite, int32.
    method : str or None
        How the curvature was computed; None if it was not measured, or if the framework fixes the
        method before the step runs (JAX does so when it traces the step).
    """

    value: Scalar | None
    slope: Scalar | None
    curvature: Scalar | None
    sharpness: Scalar | None
    learning_rate: Scalar
    skipped: Scalar
    method: str | None = None

    def as_dict(self) -> dict[str, float]:
        """Return the numbers that are not None as Python floats, for a logger.

        This waits for the device.
        """
        numbers = self._asdict()
        del numbers["method"]
        return {name: float(number) for name, number in numbers.items() if number is not None}
