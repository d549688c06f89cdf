"""How far a run is in the tuner's schedule of measurements."""

from __future__ import annotations

from typing import NamedTuple


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
    def until_refresh(cls, steps: int) -> Progress:
        """Return the progress of a checkpoint from before version 0.2.

        It holds the number of steps until the next measurement, which count as steps before the
        start.
        """
        return cls(-steps)

    def counted_from(self, every: int) -> Progress:
        """Return the same place in a schedule that repeats after `every` steps, from 0 on."""
        return self if self.step >= 0 else self._replace(step=self.step % every)
