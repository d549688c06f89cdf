"""Zero and negative curvature, directions that ascend, zero gradients: through real optimizers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cdat_core import linesearch, tuners
from cdat_torch import CompositeLoss, TunedOptimizer

SCALE = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
START = torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64)
SLOPES = torch.tensor([0.4, -1.0, 2.0], dtype=torch.float64)
METHODS = ["hvp", "gauss_newton", "finite_difference"]
BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": lambda p, **options: torch.optim.SGD(p, momentum=0.9, **options),
    "adam": torch.optim.Adam,
    "adamw": lambda p, **options: torch.optim.AdamW(p, weight_decay=0.0, **options),
}
# Loss, gradient and diagonal of the Hessian.
LOSSES = {
    "convex": (lambda w: 0.5 * (SCALE * w**2).sum(), lambda w: SCALE * w, SCALE),
    "concave": (lambda w: -0.5 * (SCALE * w**2).sum(), lambda w: -SCALE * w, -SCALE),
    "linear": (lambda w: (SLOPES * w).sum(), lambda w: SLOPES, 0 * SCALE),
}


class Expected:
    """The same training written out: the bare optimizer, closed forms, and plain numbers."""

    def __init__(self, base: str, sigma: float, decay: float, rate: float = 0.0, **options) -> None:  # type: ignore[no-untyped-def]
        self.w = START.clone()
        self._stand_in = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        self._base = BASES[base]([self._stand_in], lr=1.0, **options)
        self._sigma, self._decay, self.rate = sigma, decay, rate
        self._numerator = self._denominator = 0.0

    def step(self, kind: str) -> None:
        _, gradient, hessian = LOSSES[kind]
        g, before = gradient(self.w), self._stand_in.detach().clone()
        self._stand_in.grad = g.clone()
        self._base.step()
        u = self._stand_in.detach() - before
        self.slope, self.curvature = float(g @ u), float(u @ (hessian * u))
        if self.curvature != 0:
            fresh = 1 - self._decay
            self._numerator = self._decay * self._numerator + fresh * max(-self.slope, 0.0)
            self._denominator = self._decay * self._denominator + fresh * abs(self.curvature)
            applied = self._sigma * self._numerator / self._denominator
            self.rate = applied or self.rate
        else:
            applied = self.rate
        self.applied = applied
        self.w = self.w + applied * u


def wrapped(base: str, rule, method: str = "auto", **options) -> tuple[Tensor, TunedOptimizer]:  # type: ignore[no-untyped-def]
    w = START.clone().requires_grad_()
    return w, TunedOptimizer(BASES[base]([w], **options), rule, curvature=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", ["linear", "concave"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_zero_and_negative_curvature(base: str, kind: str, decay: float, method: str) -> None:
    """Zero says nothing, and the rate holds; a negative one counts by its absolute value."""
    w, optimizer = wrapped(base, tuners.cdat(0.5, decay), method)
    expected = Expected(base, 0.5, decay)
    for loss in ("convex", "convex", kind, kind, "convex"):
        optimizer.step(CompositeLoss(lambda: w, LOSSES[loss][0]))
        expected.step(loss)
        info = optimizer.last
        # The central difference of a quadratic is exact but for rounding.
        tolerance = {"rtol": 1e-6, "atol": 1e-9}
        torch.testing.assert_close(w.detach(), expected.w, **tolerance)
        assert float(info.slope) == pytest.approx(expected.slope, rel=1e-6)
        assert float(info.curvature) == pytest.approx(expected.curvature, rel=1e-6, abs=1e-12)
        assert float(info.learning_rate) == pytest.approx(expected.applied, rel=1e-6)
        assert int(info.skipped) == 0


@pytest.mark.parametrize("start_rate", [None, 0.25])
@pytest.mark.parametrize("base", BASES)
def test_zero_curvature_from_the_first_step(base: str, start_rate: float | None) -> None:
    """There is no rate to hold but the one of the user's."""
    w, optimizer = wrapped(base, tuners.cdat(initial_learning_rate=start_rate))
    expected = Expected(base, 2.0, 0.9, rate=start_rate or 0.0)
    for _ in range(3):
        optimizer.step(lambda: LOSSES["linear"][0](w))
        expected.step("linear")
        torch.testing.assert_close(w.detach(), expected.w)
    assert torch.equal(w.detach(), START) == (start_rate is None)
    assert int(optimizer.last.skipped) == 0


ASCENDING = {
    "sgd": {"maximize": True},
    "momentum": {},
    "adam": {},
    "adamw": {"maximize": True},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", ASCENDING)
def test_a_direction_that_ascends_gets_the_rate_zero(base: str, method: str) -> None:
    """The base steps on, so that its momentum can turn round."""
    options = ASCENDING[base]
    w, optimizer = wrapped(base, tuners.cdat(0.1, 0.0), method, **options)
    expected = Expected(base, 0.1, 0.0, **options)
    losses = ["convex"] if options else ["convex", "convex", "convex", "concave"]
    for loss in losses:
        before = w.detach().clone()
        optimizer.step(CompositeLoss(lambda: w, LOSSES[loss][0]))
        expected.step(loss)
        torch.testing.assert_close(w.detach(), expected.w, rtol=1e-6, atol=1e-9)
    assert float(optimizer.last.slope) > 0
    assert float(optimizer.last.learning_rate) == 0.0
    assert int(optimizer.last.skipped) == 0
    assert torch.equal(w.detach(), before)
    if base == "adam":
        assert float(optimizer.state[w]["step"]) == len(losses)


@pytest.mark.parametrize("search", [linesearch.backtracking(), linesearch.zoom()], ids=["b", "z"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_a_line_search_does_not_ascend(base: str, search: linesearch.LineSearch) -> None:
    w, optimizer = wrapped(base, search, maximize=True)
    optimizer.step(lambda: LOSSES["convex"][0](w))
    assert torch.equal(w.detach(), START)
    assert float(optimizer.last.learning_rate) == 0.0


RULES = {
    **{method: (tuners.cdat(1.0, 0.0), method) for method in METHODS},
    "backtracking": (linesearch.backtracking(), "auto"),
    "zoom": (linesearch.zoom(), "auto"),
    "polyak": (tuners.polyak(), "auto"),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("base", BASES)
def test_a_zero_gradient_moves_nothing_and_is_no_fault(base: str, rule: str) -> None:
    w, optimizer = wrapped(base, *RULES[rule])
    loss = CompositeLoss(lambda: w, LOSSES["convex"][0])
    with torch.no_grad():
        w.zero_()
    for _ in range(2):
        optimizer.step(loss)
        assert torch.equal(w.detach(), torch.zeros_like(w))
        assert int(optimizer.last.skipped) == 0
        assert float(optimizer.last.slope) == 0.0
    with torch.no_grad():
        w.copy_(START)
    before = float(loss().detach())
    optimizer.step(loss)
    assert float(optimizer.last.learning_rate) > 0
    assert float(loss().detach()) < before
