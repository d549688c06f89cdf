"""CDAT around any ``torch.optim`` optimizer."""

from __future__ import annotations

from typing import Any, Unpack

from torch.optim import Optimizer

from cdat_core import tuners
from cdat_core.extend import name_guards
from cdat_core.tuners import GuardOptions
from cdat_torch.optimizer import TunedOptimizer


class CDAT(TunedOptimizer):
    """Any ``torch.optim`` optimizer at the CDAT learning rate (arXiv:2407.06183).

    `TunedOptimizer` with `cdat_core.tuners.cdat`.

    Parameters
    ----------
    base : torch.optim.Optimizer
        The optimizer that gives the direction.
    sigma, decay, eps
        See `cdat_core.tuners.cdat`.
    curvature, every, max_consecutive_skips, process_group
        See `TunedOptimizer`.
    initial_learning_rate, max_growth, max_learning_rate
        Guards on the rate; see `cdat_core.tuners.cdat`.

    Examples
    --------
    >>> import torch
    >>> from cdat_torch import CDAT
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = CDAT(torch.optim.Adam(model.parameters()), sigma=1.9)
    >>> loss = optimizer.step(lambda: (model(torch.ones(4, 3)) - 1.0).square().mean())
    """

    @name_guards
    def __init__(
        self,
        base: Optimizer,
        *,
        sigma: Any = 2.0,
        decay: Any = 0.9,
        eps: Any = 0.0,
        curvature: str = "auto",
        every: int = 1,
        max_consecutive_skips: int | None = None,
        process_group: Any = None,
        **guards: Unpack[GuardOptions],
    ) -> None:
        super().__init__(
            base,
            tuners.cdat(sigma, decay, eps, **guards),
            curvature=curvature,
            every=every,
            max_consecutive_skips=max_consecutive_skips,
            process_group=process_group,
        )
