"""The wrapped optimizer in a training loop."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cdat_core import Measurement, linesearch, tuners
from cdat_torch import CDAT, TunedOptimizer
from tests.torch.models import mlp, parameters


def test_one_greedy_step_minimises_a_quadratic_along_the_direction() -> None:
    hessian = torch.diag(torch.tensor([1.0, 10.0], dtype=torch.float64))
    w = torch.tensor([3.0, -1.0], dtype=torch.float64, requires_grad=True)
    optimizer = CDAT(torch.optim.SGD([w]), sigma=1.0, decay=0.0)
    start = w.detach().clone()
    optimizer.step(lambda: 0.5 * w @ hessian @ w)
    g = hessian @ start
    torch.testing.assert_close(w.detach(), start - (g @ g) / (g @ hessian @ g) * g)


def test_the_closure_runs_once_and_the_loss_comes_back_detached() -> None:
    model, calls = mlp(3, 4, 1), []
    x = torch.randn(8, 3, dtype=torch.float64)
    optimizer = CDAT(torch.optim.Adam(model.parameters()))

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return model(x).square().mean()

    expected = model(x).square().mean()
    loss = optimizer.step(closure)
    assert calls == [True]
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())


@pytest.mark.parametrize("method", ["auto", "finite_difference"])
def test_statistics_move_once_and_random_state_as_of_one_forward(method: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
    reference = copy.deepcopy(model)
    optimizer = CDAT(torch.optim.Adam(model.parameters()), curvature=method)
    torch.manual_seed(1)
    reference(x)
    expected_random_state = torch.get_rng_state()
    torch.manual_seed(1)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert torch.equal(torch.get_rng_state(), expected_random_state)
    for (name, found), expected in zip(model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


def test_a_line_search_repeats_dropout_and_leaves_statistics_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
    reference = copy.deepcopy(model)
    search = linesearch.backtracking(initial_step_size=64.0, decrease_factor=0.5)
    optimizer = TunedOptimizer(torch.optim.SGD(model.parameters()), search)
    torch.manual_seed(1)
    reference(x)
    expected_random_state = torch.get_rng_state()
    torch.manual_seed(1)
    before = optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert torch.equal(torch.get_rng_state(), expected_random_state)
    for (name, found), expected in zip(model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)
    torch.manual_seed(1)  # the same masks: the Armijo condition must hold for this very loss
    after = F.cross_entropy(model(x), y)
    info = optimizer.last
    assert info.learning_rate > 0
    assert after <= before + 1e-4 * info.learning_rate * info.slope + 1e-6


def test_the_search_in_the_optimizer_takes_the_steps_of_a_plain_loop() -> None:
    w = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
    v = w.detach().clone()
    search = linesearch.backtracking(initial_step_size=3.0, decrease_factor=0.7)
    optimizer = TunedOptimizer(torch.optim.SGD([w]), search)
    scale = torch.tensor([1.0, 30.0], dtype=torch.float64)
    rate = torch.zeros((), dtype=torch.float64)
    for _ in range(10):
        optimizer.step(lambda: 0.5 * (scale * w**2).sum())
        g = scale * v
        measurement = Measurement(0.5 * (scale * v**2).sum(), -(g @ g), None)
        state = search.init(measurement, rate, rate)
        while not state.done:
            state = search.tell(state, 0.5 * (scale * (v - state.step_size * g) ** 2).sum())
        rate, v = state.step_size, v - state.step_size * g
        torch.testing.assert_close(w.detach(), v, rtol=1e-12, atol=0)


def test_every_measures_each_k_steps_and_holds_the_rate() -> None:
    model, x = mlp(3, 8, 1), torch.randn(16, 3, dtype=torch.float64)
    optimizer = CDAT(torch.optim.SGD(model.parameters()), every=3)
    rates, measured = [], []
    for _ in range(9):
        optimizer.step(lambda: (model(x) - 1.0).square().mean())
        rates.append(float(optimizer.last.learning_rate))
        measured.append(optimizer.last.curvature is not None)
    assert measured == [True, False, False] * 3
    assert all(rates[i] == rates[i - i % 3] for i in range(9))
    assert len(set(rates)) == 3


def test_schedulers_drive_the_multiplier_and_not_the_tuned_rate() -> None:
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = TunedOptimizer(torch.optim.SGD([w], lr=0.3), tuners.constant(0.1))
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], milestones=[3])
    multipliers = []
    for _ in range(6):
        before, factor = w.detach().clone(), optimizer.param_groups[0]["lr"]
        multipliers.append(factor)
        optimizer.step(lambda: 0.5 * (w**2).sum())
        torch.testing.assert_close(w.detach(), before * (1 - 0.1 * factor))
        assert float(optimizer.param_groups[0]["tuned_lr"]) == pytest.approx(0.1)
        schedule.step()
    assert multipliers == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.8535533905932737, 0.5])


def test_a_group_added_later_takes_part() -> None:
    v, w = (torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = TunedOptimizer(torch.optim.SGD([v]), tuners.constant(0.5))
    optimizer.add_param_group({"params": [w], "lr": 0.5})
    optimizer.step(lambda: 0.5 * (v**2 + w**2).sum())
    assert (v.item(), w.item()) == (0.5, 0.75)


def test_frozen_and_unused_parameters_stay() -> None:
    model, x = mlp(3, 4, 1), torch.randn(5, 3, dtype=torch.float64)
    model[0].weight.requires_grad_(False)
    unused = torch.ones(3, requires_grad=True)
    frozen = model[0].weight.clone()
    optimizer = CDAT(torch.optim.AdamW([*model.parameters(), unused], weight_decay=0.1))
    for _ in range(3):
        optimizer.step(lambda: model(x).square().mean())
    assert torch.equal(model[0].weight, frozen)
    assert torch.equal(unused, torch.ones(3))  # torch.optim skips parameters without gradient
    assert unused.grad is None


def test_tied_weights_and_training_to_a_low_loss() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    model[2].weight = model[0].weight
    x = torch.randn(32, 6, dtype=torch.float64)
    y = torch.tanh(x.roll(1, dims=1))
    optimizer = CDAT(torch.optim.SGD(model.parameters(), momentum=0.9), sigma=1.0, decay=0.9)
    losses = [float(optimizer.step(lambda: (model(x) - y).square().mean())) for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_trains_with_wide_scalars(dtype: torch.dtype) -> None:
    model = mlp(6, 16, 1, dtype=dtype)
    x = torch.randn(64, 6, dtype=dtype)
    optimizer = CDAT(torch.optim.Adam(model.parameters()), initial_learning_rate=1e-3)
    losses = [
        float(optimizer.step(lambda: (model(x).float() - x[:, :1].float()).square().mean()))
        for _ in range(40)
    ]
    assert losses[-1] < 0.5 * losses[0]
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert optimizer.last.learning_rate.dtype == torch.float64


def test_nothing_of_the_graph_outlives_the_step() -> None:
    model, graphs = mlp(3, 8, 1), []

    def closure() -> torch.Tensor:
        hidden = model[0](torch.ones(4, 3, dtype=torch.float64))
        graphs.append(weakref.ref(hidden))
        return model[2](model[1](hidden)).square().mean()

    optimizer = CDAT(torch.optim.Adam(model.parameters()))
    gc.disable()
    try:
        for _ in range(3):
            optimizer.step(closure)
        assert [ref() for ref in graphs] == [None] * 3
    finally:
        gc.enable()


def test_the_default_call_of_the_readme_wraps_adam() -> None:
    model = mlp(3, 4, 2)
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(0, 2, (8,))
    optimizer = CDAT(torch.optim.Adam(model.parameters()), sigma=1.9)
    assert isinstance(optimizer, torch.optim.Optimizer)
    loss = optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert torch.isfinite(loss)
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters(model))
    assert "tuned_lr" in repr(optimizer)
