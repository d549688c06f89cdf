"""How far a run is in the tuner's schedule of measurements."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

_LONGEST_INTERVAL = 10_000


class Progress(NamedTuple):
    """How far the schedule of measurements is.

    Attributes
    ----------
    step : int
        The number of the next step, from 0; skipped ones count.
    due : bool
        Whether the last measurement was skipped, so that the next step repeats it.
    """

    step: int = 0
    due: bool = False

    def after(self, *, repeat: bool = False) -> Progress:
        """Return the progress after one more step; `repeat` if it must be measured again."""
        return Progress(self.step + 1, repeat)

    @classmethod
    def before_measurement(cls, steps: int) -> Progress:
        """Return the progress of a checkpoint from before version 0.2.

        It holds the number of steps until the next measurement, which count as steps before the
        start.
        """
        return cls(-steps)

    def placed_in(self, schedule: Callable[[int], bool] | None) -> Progress:
        """Return the progress with a number of steps from 0 on, before the same measurement."""
        if self.step >= 0 or schedule is None:
            return self._replace(step=max(self.step, 0))
        until = -self.step
        for step in range(_LONGEST_INTERVAL):
            if schedule(step + until) and not any(schedule(step + j) for j in range(until)):
                return self._replace(step=step)
        return self._replace(step=0)
