"""The strong-Wolfe search in the optimizer: a gradient for each trial, and no trace of it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cdat_core import Measurement, linesearch
from cdat_torch import TunedOptimizer
from tests.torch.models import mlp, parameters


def network(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = mlp(3, 8, 1, dtype=dtype)
    x = torch.randn(32, 3, dtype=dtype)
    y = torch.sin(2 * x[:, :1]) * x[:, 1:2]
    return model, lambda: F.mse_loss(model(x), y)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_zoom_trains_a_tanh_network(base: type[torch.optim.Optimizer]) -> None:
    """The strong Wolfe conditions hold at every step, and the loss falls."""
    model, closure = network()
    optimizer = TunedOptimizer(base(model.parameters()), linesearch.zoom())
    params = parameters(model)
    start = closure().item()
    for _ in range(25):
        before = [p.detach().clone() for p in params]
        loss = optimizer.step(closure)
        info = optimizer.last
        if not info.learning_rate:  # an Adam direction need not descend
            assert info.slope >= 0
            continue
        after = closure()
        grads = torch.autograd.grad(after, params)
        moves = [p.detach() - b for p, b in zip(params, before, strict=True)]
        slope = sum(float((g * m).sum()) for g, m in zip(grads, moves, strict=True))
        slope0 = float(info.learning_rate * info.slope)
        # The move, a difference of parameters, is rounded to about 1e-10 of itself.
        assert abs(slope) <= 0.9 * abs(slope0) * (1 + 1e-8)
        assert after - loss <= 1e-4 * slope0 + 1e-15
    assert closure().item() < 0.5 * start


def test_zoom_equals_the_core_search_driven_by_hand() -> None:
    w = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([1.0, 30.0], dtype=torch.float64)
    search = linesearch.zoom(initial_step_size=3.0, curvature_condition=0.1)
    optimizer = TunedOptimizer(torch.optim.SGD([w]), search)

    def value(v: Tensor) -> Tensor:
        return (scale * (torch.cosh(v) - 1)).sum()

    def gradient(v: Tensor) -> Tensor:
        return scale * torch.sinh(v)

    rate, v = torch.zeros((), dtype=torch.float64), w.detach().clone()
    for _ in range(8):
        optimizer.step(lambda: value(w))
        g = gradient(v)
        state = search.init(Measurement(value(v), -(g @ g), None), rate, rate)
        while not state.done:
            there = v - state.step_size * g
            state = search.tell(state, value(there), -(gradient(there) @ g))
        rate, v = state.step_size, v - state.step_size * g
        assert not state.failed
        torch.testing.assert_close(w.detach(), v, rtol=1e-11, atol=0)


def test_trials_leave_statistics_random_state_and_gradients_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
    reference = copy.deepcopy(model)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(model(x), y)

    search = linesearch.zoom(initial_step_size=1e-3, curvature_condition=0.1)
    optimizer = TunedOptimizer(torch.optim.SGD(model.parameters()), search)
    torch.manual_seed(1)
    F.cross_entropy(reference(x), y).backward()
    expected_random_state = torch.get_rng_state()
    torch.manual_seed(1)
    before = optimizer.step(closure)
    assert calls > 2  # the first loss and more than one trial
    assert torch.equal(torch.get_rng_state(), expected_random_state)
    for (name, found), expected in zip(model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)
    assert int(model[1].num_batches_tracked) == 1
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)

    torch.manual_seed(1)  # the same masks: the conditions must hold for this very loss
    after = F.cross_entropy(model(x), y)
    info = optimizer.last
    assert info.learning_rate > 0
    assert after <= before + 1e-4 * info.learning_rate * info.slope + 1e-6
    grads = torch.autograd.grad(after, parameters(model))
    slope = -sum(float((g * p.grad).sum()) for g, p in zip(grads, model.parameters(), strict=True))
    # The masks and the batch are the same; what is left is float32 in the slopes, about 1e-6.
    assert abs(slope) <= 0.1 * abs(float(info.slope)) + 1e-5


def test_trials_of_backtracking_build_no_graph() -> None:
    """The first evaluation of a step does, and so does each trial of zoom."""
    for search, expected in [(linesearch.backtracking(), False), (linesearch.zoom(), True)]:
        w = torch.tensor([1.0], requires_grad=True)
        recorded: list[bool] = []

        def closure(w: Tensor = w, recorded: list[bool] = recorded) -> Tensor:
            recorded.append(torch.is_grad_enabled())
            return 0.5 * (w**2).sum()

        TunedOptimizer(torch.optim.SGD([w]), search).step(closure)
        assert recorded == [True, expected]


def test_frozen_unused_and_branching_parameters() -> None:
    """A parameter that a trial does not reach has no part in its slope."""
    w = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    unused = torch.tensor([5.0], requires_grad=True)
    frozen = torch.tensor([2.0])
    optimizer = TunedOptimizer(torch.optim.SGD([w, v, unused, frozen]), linesearch.zoom())

    def closure() -> Tensor:
        loss = 0.5 * (frozen * w**2).sum()
        return loss + 0.5 * (v**2).sum() if bool(v > 0.05) else loss

    before = closure().item()
    optimizer.step(closure)
    assert optimizer.last.learning_rate > 0
    assert closure().item() < before
    assert (unused.item(), frozen.item(), unused.grad) == (5.0, 2.0, None)


def test_error_in_a_trial_restores_the_parameters() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError("no more data")
        return (w**2).sum()

    optimizer = TunedOptimizer(torch.optim.SGD([w]), linesearch.zoom())
    with pytest.raises(OSError, match="no more data"):
        optimizer.step(closure)
    assert w.tolist() == [1.0, 2.0]


def test_finishes_in_float32_at_a_minimum() -> None:
    """Far beyond the point where the loss no longer changes."""
    w = torch.tensor([3.0, -2.0], requires_grad=True)
    scale = torch.tensor([1.0, 7.0])
    optimizer = TunedOptimizer(torch.optim.SGD([w]), linesearch.zoom())
    for _ in range(60):
        optimizer.step(lambda: 1 + 0.5 * (scale * (w - 0.1) ** 2).sum())
        assert torch.isfinite(optimizer.last.learning_rate)
    torch.testing.assert_close(w.detach(), torch.full((2,), 0.1), rtol=0, atol=1e-3)
