"""Which rule `cdat` and `scale_by_cdat` use: the self-tuning one, or the published one."""

from __future__ import annotations

from typing import Any

from cdat_core import tuners
from cdat_core.extend import validation
from cdat_core.tuners import Tuner
from cdat_jax._arguments import with_schedule


def is_self_tuning(*, full_batch: bool, **hyperparameters: Any) -> bool:
    """Whether these options choose the self-tuning rule; None means that one is not given."""
    if not isinstance(full_batch, bool):
        msg = f"full_batch must be True or False, got {full_batch!r}"
        raise TypeError(msg)
    return not full_batch and all(number is None for number in hyperparameters.values())


def chosen_tuner(
    *, total_steps: Any, momentum: Any, full_batch: bool, every: Any, **hyperparameters: Any
) -> Tuner[Any]:
    """Return the tuner that these options choose; None means that one is not given."""
    momentum = validation.fraction("momentum", momentum)
    tuner: Tuner[Any]
    if is_self_tuning(full_batch=full_batch, **hyperparameters):
        tuner = tuners.self_tuning(momentum)
    else:
        given = {name: number for name, number in hyperparameters.items() if number is not None}
        tuner = tuners.full_batch(**given) if full_batch else tuners.cdat(**given)
    tuner = with_schedule(tuner, every)  # inside, so that nothing is measured in the cooldown
    return tuner if total_steps is None else tuners.with_cooldown(tuner, total_steps)
