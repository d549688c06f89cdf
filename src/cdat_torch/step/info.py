"""What a step tells about itself."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class StepInfo(NamedTuple):
    """What the last step measured and did; 0-d tensors on the device of the parameters.

    Attributes
    ----------
    value, slope : Tensor or None
        Loss and directional derivative <g, u>; slope is None if the step was skipped before it or
        held its rate.
    curvature : Tensor or None
        Directional curvature <u, H u>; None if this step did not measure it.
    sharpness : Tensor or None
        Largest eigenvalue of the (preconditioned) Hessian; None if this step did not measure it.
    learning_rate : Tensor
        The tuned rate in use, before the multipliers of the groups; 0 if the step was skipped.
    skipped : Tensor
        How many steps were skipped so far because something was not finite, int32.
    method : str or None
        How the curvature was computed; None if this step did not measure it.
    """

    value: Tensor | None
    slope: Tensor | None
    curvature: Tensor | None
    sharpness: Tensor | None
    learning_rate: Tensor
    skipped: Tensor
    method: str | None = None

    def as_dict(self) -> dict[str, float]:
        """Return what is known as Python numbers, for a logger; this waits for the device."""
        fields = self._asdict().items()
        return {name: float(field) for name, field in fields if isinstance(field, Tensor)}
