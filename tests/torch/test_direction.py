"""The step of every base optimizer: exact, at rate 1, without touching the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from cdat_core import tuners
from cdat_torch import TunedOptimizer
from tests.torch.models import mlp, parameters

Factory = Callable[[Any, float], Optimizer]

OPTIMIZERS: dict[str, Factory] = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr),
    "SGD momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=0.1),
    "SGD nesterov": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True),
    "SGD maximize": lambda p, lr: torch.optim.SGD(p, lr, weight_decay=0.1, maximize=True),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr),
    "Adam fused": lambda p, lr: torch.optim.Adam(p, lr, weight_decay=0.1, fused=True),
    "Adam foreach": lambda p, lr: torch.optim.Adam(p, lr, weight_decay=0.1, foreach=True),
    "Adam amsgrad": lambda p, lr: torch.optim.Adam(p, lr, amsgrad=True, maximize=True),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.1),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr, centered=True, weight_decay=0.1),
    "Adagrad": lambda p, lr: torch.optim.Adagrad(p, lr, lr_decay=0.01, weight_decay=0.1),
    "Adamax": lambda p, lr: torch.optim.Adamax(p, lr, weight_decay=0.1),
    "NAdam": lambda p, lr: torch.optim.NAdam(p, lr, weight_decay=0.1),
    "NAdam decoupled": lambda p, lr: torch.optim.NAdam(
        p, lr, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "RAdam decoupled": lambda p, lr: torch.optim.RAdam(
        p, lr, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "Adadelta": lambda p, lr: torch.optim.Adadelta(p, lr, weight_decay=0.1),
    "Adafactor": lambda p, lr: torch.optim.Adafactor(p, lr, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_constant_rate_gives_the_trajectory_of_the_bare_optimizer(name: str) -> None:
    # Adafactor limits its rate to 1/sqrt(step), so it equals the bare one only at rate 1 or below
    # that limit in both: it is compared at rate 1, all others also away from it.
    lr = 1.0 if name == "Adafactor" else 0.02
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    bare_model, model = mlp(5, 8, 2), mlp(5, 8, 2)
    model.load_state_dict(bare_model.state_dict())
    bare = OPTIMIZERS[name](bare_model.parameters(), lr)
    tuned = TunedOptimizer(OPTIMIZERS[name](model.parameters(), 1e-3), tuners.constant(lr))
    for _ in range(12):
        bare.zero_grad()
        (bare_model(x) - y).square().mean().backward()
        bare.step()
        tuned.step(lambda: (model(x) - y).square().mean())
    for p, expected in zip(model.parameters(), bare_model.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-9, atol=1e-12)


def test_groups_keep_their_ratio_of_learning_rates() -> None:
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    bare_model, model = mlp(5, 8, 2), mlp(5, 8, 2)
    model.load_state_dict(bare_model.state_dict())

    def groups(net: torch.nn.Sequential, lr: float) -> list[dict[str, Any]]:
        return [
            {"params": net[0].parameters()},
            {"params": net[2].parameters(), "lr": lr / 4, "weight_decay": 0.1},
        ]

    bare = torch.optim.AdamW(groups(bare_model, 0.02), lr=0.02)
    tuned = TunedOptimizer(torch.optim.AdamW(groups(model, 0.4), lr=0.4), tuners.constant(0.02))
    assert [group["lr"] for group in tuned.param_groups] == [1.0, 0.25]
    for _ in range(8):
        bare.zero_grad()
        (bare_model(x) - y).square().mean().backward()
        bare.step()
        tuned.step(lambda: (model(x) - y).square().mean())
    for p, expected in zip(model.parameters(), bare_model.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-9, atol=1e-12)


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
