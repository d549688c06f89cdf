"""CDAT around any ``torch.optim`` optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack, overload

from torch import Tensor
from torch.optim import Optimizer

from cdat_core import tuners
from cdat_core.extend import name_guards, validation
from cdat_core.tuners import GuardOptions
from cdat_torch.base import groups
from cdat_torch.messages import warn
from cdat_torch.optimizer import TunedOptimizer
from cdat_torch.step.host import on_host


class CDAT(TunedOptimizer):
    """Any ``torch.optim`` optimizer at a learning rate that follows the curvature.

    By default there is nothing to choose: `cdat_core.tuners.self_tuning`, for training on
    mini-batches. With `full_batch`, or with any of the hyperparameters from `sigma` on, it is the
    published CDAT rule (arXiv:2407.06183), `cdat_core.tuners.cdat`.

    Parameters
    ----------
    base : torch.optim.Optimizer
        The optimizer that gives the direction. The self-tuning rule reads its momentum.
    total_steps : int, optional
        The number of steps of the run. The rate then falls to 0 over the last 30 % of them; later
        steps have the rate 0, with one warning. Without it, evaluate with `averaged`. A checkpoint
        may go on with another number.
    full_batch : bool
        Whether each step sees all the data. Then the rule is `cdat_core.tuners.full_batch`, the
        published one with sigma = 1.9, no average and a cautious start, measured in each step.
    average : bool, optional
        Keep an average of the weights for `averaged`. By default it is kept by the self-tuning rule
        without `total_steps`.
    sigma, decay, eps
        See `cdat_core.tuners.cdat`; by default 2, 0.9 and 0.
    curvature, every, max_consecutive_skips, process_group
        See `TunedOptimizer`. In the cooldown nothing is measured.
    initial_learning_rate, max_growth, max_learning_rate
        Guards on the rate of the published rule; see `cdat_core.tuners.cdat`.

    Examples
    --------
    >>> import torch
    >>> from cdat_torch import CDAT
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = CDAT(torch.optim.Adam(model.parameters()), total_steps=1000)
    >>> loss = optimizer.step(lambda: (model(torch.ones(4, 3)) - 1.0).square().mean())
    """

    @name_guards
    def __init__(
        self,
        base: Optimizer,
        *,
        total_steps: int | None = None,
        full_batch: bool = False,
        average: bool | None = None,
        sigma: Any = None,
        decay: Any = None,
        eps: Any = None,
        curvature: str = "auto",
        every: int | None = None,
        max_consecutive_skips: int | None = None,
        process_group: Any = None,
        **guards: Unpack[GuardOptions],
    ) -> None:
        groups.check_base(base)
        if total_steps is not None:
            total_steps = validation.count("total_steps", total_steps)
        numbers = {"sigma": sigma, "decay": decay, "eps": eps, **guards}
        given = {name: number for name, number in numbers.items() if number is not None}
        tuner: tuners.Tuner[Any]
        self_tuning = not (full_batch or given)
        if full_batch:
            tuner = tuners.full_batch(**given)
        elif given:
            tuner = tuners.cdat(**given)
        else:
            tuner = tuners.self_tuning(groups.momentum(base.param_groups))
        if every is not None:
            tuner = tuners.every(tuner, validation.count("every", every))
        if total_steps is not None:
            tuner = tuners.with_cooldown(tuner, total_steps)
        first = next(p for group in base.param_groups for p in group["params"])
        super().__init__(
            base,
            on_host(tuner) if first.device.type == "cpu" else tuner,
            curvature=curvature,
            average=average if average is not None else self_tuning and total_steps is None,
            max_consecutive_skips=max_consecutive_skips,
            process_group=process_group,
        )
        self._total_steps = total_steps

    @overload  # type: ignore[override]
    def step(self, closure: Callable[[], Any]) -> Tensor: ...
    @overload
    def step(self, closure: None = None) -> Tensor | None: ...
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:
        """Take one step; see `TunedOptimizer.step`."""
        if self._rule.progress.step == self._total_steps:
            warn(
                f"the {self._total_steps} steps of total_steps are taken: the learning rate is 0 "
                "from now on; create the optimizer with the length of the whole run"
            )
        return super().step(closure)
