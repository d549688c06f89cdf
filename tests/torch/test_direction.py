"""Stepping the base on stand-ins: its parameters, groups and state are unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cdat_core import tuners
from cdat_torch import CDAT, TunedOptimizer
from tests.torch.models import mlp, parameters


class WritesIntoGradients(torch.optim.SGD):
    """Adds its decay to the gradient in place, as many optimizers do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.add_(p, alpha=0.5)
        super().step(closure)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, momentum=0.9, nesterov=True, foreach=True),
        WritesIntoGradients,
    ],
    ids=["nesterov", "custom"],
)
def test_the_slope_is_that_of_the_loss_where_the_base_overwrites_gradients(make: Any) -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    optimizer = CDAT(make([w]), initial_learning_rate=1e-3, max_learning_rate=1e-3)
    for _ in range(3):
        before = w.detach().clone()
        optimizer.step(lambda: (w**4).sum())
        u = (w.detach() - before) / float(optimizer.last.learning_rate)
        assert torch.equal(w.grad, 4 * before**3)
        torch.testing.assert_close(optimizer.last.slope, 4 * before**3 @ u)
        torch.testing.assert_close(optimizer.last.curvature, 12 * before**2 @ u**2)


def test_the_base_keeps_its_state_under_its_own_parameters() -> None:
    model = mlp(3, 4, 1)
    base = torch.optim.Adam(model.parameters())
    optimizer = TunedOptimizer(base, tuners.cdat())
    optimizer.step(lambda: model(torch.ones(2, 3).double()).square().mean())
    assert set(base.state) == set(model.parameters())
    assert base.param_groups[0]["params"] == parameters(model)
    assert optimizer.state is base.state
    assert optimizer.param_groups is base.param_groups


def test_a_base_that_steps_on_references_of_its_own_is_refused() -> None:
    class Stubborn(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params)
            self.mine = [p for group in self.param_groups for p in group["params"]]

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.mine:
                p.add_(1.0)

    w = torch.ones(2, requires_grad=True)
    optimizer = TunedOptimizer(Stubborn([w]), tuners.constant(0.1))
    with pytest.raises(TypeError, match="keeps its own references"):
        optimizer.step(lambda: (w**2).sum())


def test_an_error_in_the_base_leaves_groups_and_state_in_place() -> None:
    class Failing(torch.optim.Adam):
        broken = False

        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            if self.broken:
                raise KeyboardInterrupt
            return super().step(closure)

    w = torch.ones(2, requires_grad=True)
    base = Failing([w])
    optimizer = TunedOptimizer(base, tuners.cdat())
    optimizer.step(lambda: (w**4).sum())
    before = w.detach().clone()
    base.broken = True
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(lambda: (w**4).sum())
    assert base.param_groups[0]["params"][0] is w
    assert list(base.state) == [w]
    assert base.param_groups[0]["lr"] == 1.0
    assert torch.equal(w, before)
