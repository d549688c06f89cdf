"""CDAT with nothing to choose: the self-tuning rule, its cooldown and its averaged weights."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cdat_core import Measurement, tuners
from cdat_torch import CDAT, TunedOptimizer, measure

Base = Callable[[Any], torch.optim.Optimizer]

BASES: dict[str, tuple[Base, float]] = {
    "sgd": (torch.optim.SGD, 0.0),
    "momentum": (lambda p: torch.optim.SGD(p, momentum=0.9), 0.9),
    "rmsprop": (torch.optim.RMSprop, 0.0),
    "adam": (torch.optim.Adam, 0.9),
    "adamw": (lambda p: torch.optim.AdamW(p, betas=(0.8, 0.99)), 0.8),
}


class Regression:
    """A noisy regression on mini-batches, which depend on the seed and the step alone."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.dtype, self.seed = dtype, seed
        self.x = torch.randn(256, 6, generator=generator, dtype=torch.float64).to(dtype)
        self.y = torch.sin(self.x.sum(dim=1, keepdim=True))
        self.y = self.y + 0.1 * torch.randn(256, 1, generator=generator).to(dtype)
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)
        self.params = list(self.model.parameters())

    def loss(self, step: int | None = None) -> Tensor:
        x, y = self.x, self.y
        if step is not None:
            generator = torch.Generator().manual_seed(1000 * self.seed + step)
            rows = torch.randint(256, (32,), generator=generator)
            x, y = x[rows], y[rows]
        return (self.model(x) - y).square().mean()

    def train(self, optimizer: TunedOptimizer, steps: range) -> list[float]:
        rates = []
        for step in steps:
            optimizer.step(lambda step=step: self.loss(step))  # type: ignore[misc]
            rates.append(float(optimizer.last.learning_rate))  # type: ignore[union-attr]
        return rates


@pytest.mark.parametrize("total", [None, 100])
@pytest.mark.parametrize("base", BASES)
def test_rates_are_those_of_the_core_fed_by_hand(base: str, total: int | None) -> None:
    """NumPy scalars, measured along the step of a plain copy of the base at rate 1."""
    make, momentum = BASES[base]
    ours, theirs = Regression(), Regression()
    optimizer, plain = CDAT(make(ours.params), total_steps=total), make(theirs.params)
    tuner = tuners.self_tuning(momentum, total)
    state, measured = tuner.init(np.asarray(0.0)), []
    for step in range(120):
        loss = theirs.loss(step)
        plain.zero_grad()
        loss.backward()
        before = [p.detach().clone() for p in theirs.params]
        for group in plain.param_groups:
            group["lr"] = 1.0
        plain.step()
        u = [p.detach() - b for p, b in zip(theirs.params, before, strict=True)]
        with torch.no_grad():
            for p, b in zip(theirs.params, before, strict=True):
                p.copy_(b)
        value = np.asarray(loss.item())
        if tuner.measures(step):
            model = measure(lambda step=step: theirs.loss(step), theirs.params, u, curvature="hvp")  # type: ignore[misc]
            numbers = (np.asarray(model.slope.item()), np.asarray(model.curvature.item()))
            rate, state = tuner.update(Measurement(value, *numbers), state)
        else:
            rate, state = tuner.observe(value, state)  # type: ignore[misc]
        with torch.no_grad():
            for p, part in zip(theirs.params, u, strict=True):
                p.add_(part, alpha=float(rate))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the end of total_steps, tested below
            found = ours.train(optimizer, range(step, step + 1))[0]
        assert found == pytest.approx(float(rate), rel=1e-9)
        measured.append(optimizer.last.curvature is not None)  # type: ignore[union-attr]
    assert measured == [bool(tuner.measures(step)) for step in range(120)]
    for p, q in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("full", [False, True])
def test_newcomer_trains_with_no_number_chosen(base: str, seed: int, full: bool) -> None:
    """Mini-batches, and a full batch with full_batch=True: the loss falls and never explodes."""
    problem = Regression(seed, torch.float32)
    optimizer = CDAT(BASES[base][0](problem.params), full_batch=full)
    first, losses = problem.loss().item(), []
    for step in range(200):
        loss = optimizer.step(lambda step=step: problem.loss(None if full else step))  # type: ignore[misc]
        losses.append(float(loss))
    assert max(losses) < 3 * first
    assert problem.loss().item() < 0.5 * first
    assert int(optimizer.last.skipped) == 0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, tuners.self_tuning(0.9)),
        ({"total_steps": 50}, tuners.self_tuning(0.9, 50)),
        ({"sigma": 1.5}, tuners.cdat(1.5, 0.9)),
        ({"decay": 0.5}, tuners.cdat(2.0, 0.5)),
        ({"eps": 0.1}, tuners.cdat(2.0, 0.9, 0.1)),
        ({"max_growth": 1.1}, tuners.cdat(2.0, 0.9, max_growth=1.1)),
        ({"sigma": 1.5, "total_steps": 50}, tuners.with_cooldown(tuners.cdat(1.5, 0.9), 50)),
        ({"every": 3}, tuners.every(tuners.self_tuning(0.9), 3)),
        (
            {"every": 3, "total_steps": 30},
            tuners.with_cooldown(tuners.every(tuners.self_tuning(0.9), 3), 30),
        ),
        ({"full_batch": True}, tuners.full_batch()),
        ({"full_batch": True, "sigma": 1.0}, tuners.full_batch(1.0)),
    ],
)
def test_which_rule_the_options_choose(options: dict[str, Any], expected: Any) -> None:
    problem, other = Regression(), Regression()
    optimizer = CDAT(torch.optim.Adam(problem.params), **options)
    reference = TunedOptimizer(torch.optim.Adam(other.params), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the end of total_steps, tested below
        assert problem.train(optimizer, range(40)) == other.train(reference, range(40))


def test_momentum_is_the_largest_of_the_groups() -> None:
    """Adam's beta1 or the momentum; the rate then aims lower."""

    def base(problem: Regression, momentum: float) -> torch.optim.SGD:
        first = {"params": problem.params[:2], "momentum": 0.0}
        second = {"params": problem.params[2:], "momentum": momentum}
        return torch.optim.SGD([first, second], lr=0.1)

    rates = []
    for momentum in (0.0, 0.5):
        problem, other = Regression(), Regression()
        optimizer = CDAT(base(problem, momentum))
        expected = TunedOptimizer(base(other, momentum), tuners.self_tuning(momentum))
        rates.append(problem.train(optimizer, range(30)))
        assert rates[-1] == other.train(expected, range(30))
    assert rates[0] != rates[1]


@pytest.mark.parametrize("total", [0, -1])
def test_total_steps_must_be_positive(total: int) -> None:
    with pytest.raises(ValueError, match="total_steps must be an integer >= 1, got"):
        CDAT(torch.optim.Adam(Regression().params), total_steps=total)


def test_total_steps_must_be_an_integer() -> None:
    with pytest.raises(TypeError, match=r"total_steps must be an integer >= 1, got 10\.0"):
        CDAT(torch.optim.Adam(Regression().params), total_steps=10.0)  # type: ignore[arg-type]


def test_after_total_steps_the_rate_is_zero_and_that_is_said_once() -> None:
    problem = Regression()
    optimizer = CDAT(torch.optim.Adam(problem.params), total_steps=20)
    problem.train(optimizer, range(20))
    before = [p.detach().clone() for p in problem.params]
    with pytest.warns(UserWarning, match="the 20 steps of total_steps are taken") as caught:
        rates = problem.train(optimizer, range(20, 25))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert rates == [0.0] * 5
    assert all(torch.equal(p, b) for p, b in zip(problem.params, before, strict=True))


@pytest.mark.parametrize("total", [None, 60])
@pytest.mark.parametrize("base", ["momentum", "adam"])
@pytest.mark.parametrize("at", [3, 24, 50])
def test_resumed_run_continues_bit_for_bit(base: str, total: int | None, at: int) -> None:
    """While all steps are measured, between measurements, and in the cooldown."""
    make, _ = BASES[base]
    whole, part = Regression(), Regression()
    optimizer = CDAT(make(whole.params), total_steps=total)
    expected = whole.train(optimizer, range(58))
    first = CDAT(make(part.params), total_steps=total)
    rates = part.train(first, range(at))
    saved = copy.deepcopy({"model": part.model.state_dict(), "optimizer": first.state_dict()})
    resumed = Regression()
    second = CDAT(make(resumed.params), total_steps=total)
    resumed.model.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    assert rates + resumed.train(second, range(at, 58)) == expected
    assert all(torch.equal(p, q) for p, q in zip(resumed.params, whole.params, strict=True))
    if total is None:
        with optimizer.averaged(), second.averaged():
            pairs = zip(resumed.params, whole.params, strict=True)
            assert all(torch.equal(p, q) for p, q in pairs)


def test_state_loads_with_weights_only(tmp_path: Any) -> None:
    problem = Regression()
    optimizer = CDAT(torch.optim.Adam(problem.params), total_steps=30)
    problem.train(optimizer, range(5))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    other = CDAT(torch.optim.Adam(Regression().params), total_steps=30)
    other.load_state_dict(loaded)
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_run_may_go_on_with_another_length() -> None:
    """The cooldown moves: in it, the rate is back at its full height."""
    problem = Regression()
    short = CDAT(torch.optim.Adam(problem.params), total_steps=40)
    rates = problem.train(short, range(39))
    assert rates[-1] < 0.3 * max(rates)
    longer = CDAT(torch.optim.Adam(problem.params), total_steps=200)
    longer.load_state_dict(short.state_dict())
    assert problem.train(longer, range(39, 40))[0] > 3 * rates[-1]


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ({"sigma": 2.0}, {}),
        ({}, {"sigma": 2.0}),
        ({"total_steps": 9}, {}),
        ({}, {"total_steps": 9}),
    ],
)
def test_state_of_another_rule_is_refused_and_nothing_changes(
    saved: dict[str, Any], loaded: dict[str, Any]
) -> None:
    problem = Regression()
    first = CDAT(torch.optim.Adam(problem.params), **saved)
    problem.train(first, range(3))
    second = CDAT(torch.optim.Adam(Regression().params), **loaded)
    before = copy.deepcopy(second.state_dict())
    with pytest.raises(ValueError, match="total_steps in one of the two only.*sigma=2.0"):
        second.load_state_dict(first.state_dict())
    after = second.state_dict()
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_losses_skip_the_step_and_the_schedule_goes_on(bad: float) -> None:
    """Losses 2, 20 and 24 are bad: measured, between measurements, measured. 25 repeats 24."""
    problem = Regression()
    optimizer = CDAT(torch.optim.Adam(problem.params), total_steps=60)
    rates, measured = [], []
    for step in range(60):
        before = [p.detach().clone() for p in problem.params]
        factor = bad if step in (2, 20, 24) else 1.0
        optimizer.step(lambda step=step, factor=factor: problem.loss(step) * factor)  # type: ignore[misc]
        rates.append(float(optimizer.last.learning_rate))  # type: ignore[union-attr]
        measured.append(optimizer.last.curvature is not None)  # type: ignore[union-attr]
        same = all(torch.equal(p, b) for p, b in zip(problem.params, before, strict=True))
        assert same == (step in (2, 20, 24))
    assert [step for step in range(60) if rates[step] == 0] == [2, 20, 24]
    expected = [*(s for s in range(17) if s != 2), 25, 32, 40]
    assert [step for step in range(60) if measured[step]] == expected
    assert rates[59] == pytest.approx(rates[42] / 18, rel=0.5)


def test_step_without_a_loss_is_refused_with_the_way_out() -> None:
    problem = Regression()
    optimizer = CDAT(torch.optim.Adam(problem.params))
    problem.loss().backward()
    with pytest.raises(
        TypeError, match=r"step needs the loss: pass a closure.*optimizer\.backward"
    ):
        optimizer.step()


def test_scheduler_multiplies_the_rate() -> None:
    """It drives the multiplier; the rule does not see it."""
    problem, other = Regression(), Regression()
    optimizer = CDAT(torch.optim.Adam(problem.params))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    plain = CDAT(torch.optim.Adam(other.params))
    rates = problem.train(optimizer, range(1)), other.train(plain, range(1))
    assert rates[0] == rates[1]
    start = Regression().params
    for p, q, w in zip(problem.params, other.params, start, strict=True):
        torch.testing.assert_close(p - w, 0.5 * (q - w))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_accumulated_micro_batches_equal_the_whole_batch() -> None:
    problem, other = Regression(), Regression()
    ours = CDAT(torch.optim.Adam(problem.params), total_steps=40)
    theirs = CDAT(torch.optim.Adam(other.params), total_steps=40)
    for step in range(40):
        ours.zero_grad()
        for rows in (slice(0, 100), slice(100, 256)):
            part = (problem.model(problem.x[rows]) - problem.y[rows]).square().sum() / 256
            ours.backward(part)
        ours.step()
        theirs.step(lambda: other.loss())
        found = float(ours.last.learning_rate)  # type: ignore[union-attr]
        assert found == pytest.approx(float(theirs.last.learning_rate), rel=1e-8), step  # type: ignore[union-attr]


def test_max_consecutive_skips_counts_every_kind_of_step() -> None:
    problem = Regression()
    optimizer = CDAT(torch.optim.Adam(problem.params), max_consecutive_skips=3)
    problem.train(optimizer, range(18))
    for _ in range(2):
        optimizer.step(lambda: problem.loss() * torch.nan)
    with pytest.raises(RuntimeError, match="3 steps in a row were skipped"):
        optimizer.step(lambda: problem.loss() * torch.nan)


# Averaged weights.


@pytest.mark.parametrize("base", ["sgd", "adam"])
@pytest.mark.parametrize("options", [{}, {"sigma": 1.0, "average": True}])
def test_average_is_that_of_the_weights_after_each_step(base: str, options: Any) -> None:
    """Computed by hand; a skipped step does not count."""
    problem = Regression()
    optimizer = CDAT(BASES[base][0](problem.params), **options)
    average, taken = [torch.zeros_like(p) for p in problem.params], 0
    for step in range(40):
        bad = step in (1, 30)
        optimizer.step(
            lambda step=step, bad=bad: problem.loss(step) * (torch.nan if bad else 1.0)  # type: ignore[misc]
        )
        if not bad:
            weight = 9 / (taken + 9)
            average = [
                a + weight * (p.detach() - a) for a, p in zip(average, problem.params, strict=True)
            ]
            taken += 1
    last = [p.detach().clone() for p in problem.params]
    with optimizer.averaged():
        for p, a in zip(problem.params, average, strict=True):
            torch.testing.assert_close(p.detach(), a, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(p, q) for p, q in zip(problem.params, last, strict=True))


def test_average_of_bfloat16_weights_moves() -> None:
    """It is kept in float32: in bfloat16 a weight of 1 % of a small change rounds to nothing."""
    w = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    optimizer = TunedOptimizer(torch.optim.SGD([w]), tuners.constant(0.01), average=True)
    values = []
    for _ in range(100):
        optimizer.step(lambda: w.sum())
        values.append(w[0].item())
    expected = 0.0
    for taken, value in enumerate(values):
        expected += 9 / (taken + 9) * (value - expected)
    saved = optimizer.state_dict()["state"][0]["averaged_weights"]
    assert saved.dtype == torch.float32
    assert float(saved[0]) == pytest.approx(expected, rel=1e-4)


def test_parameters_come_back_after_an_error_and_training_inside_is_refused() -> None:
    problem = Regression()
    optimizer = CDAT(torch.optim.Adam(problem.params))
    problem.train(optimizer, range(5))
    last = [p.detach().clone() for p in problem.params]
    with pytest.raises(ZeroDivisionError), optimizer.averaged():
        raise ZeroDivisionError
    with optimizer.averaged(), pytest.raises(RuntimeError, match="inside averaged"):
        problem.train(optimizer, range(1))
    with (
        optimizer.averaged(),
        pytest.raises(RuntimeError, match="inside another averaged"),
        optimizer.averaged(),
    ):
        pass
    assert all(torch.equal(p, q) for p, q in zip(problem.params, last, strict=True))
    problem.train(optimizer, range(5, 6))


def test_buffers_come_back_if_the_model_is_given() -> None:
    """Their statistics can be recomputed for the averaged weights, as PyTorch does it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    x = torch.randn(32, 3)
    optimizer = CDAT(torch.optim.Adam(model.parameters()))
    for _ in range(5):
        optimizer.step(lambda: model(x).square().mean())
    before = copy.deepcopy(model.state_dict())
    with optimizer.averaged(model):
        torch.optim.swa_utils.update_bn([x], model)
        inside = copy.deepcopy(model.state_dict())
    after = model.state_dict()
    assert not torch.equal(inside["1.running_mean"], before["1.running_mean"])
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_no_average_is_kept_where_it_is_not_needed() -> None:
    for options in ({"total_steps": 10}, {"sigma": 1.0}, {"average": False}):
        problem = Regression()
        optimizer = CDAT(torch.optim.Adam(problem.params), **options)  # type: ignore[arg-type]
        problem.train(optimizer, range(2))
        with pytest.raises(RuntimeError, match="average=True"), optimizer.averaged():
            pass
        assert "averaged_weights" not in optimizer.state_dict()["state"][0]


def test_average_before_the_first_step_is_the_weights() -> None:
    problem = Regression()
    optimizer = CDAT(torch.optim.Adam(problem.params))
    before = [p.detach().clone() for p in problem.params]
    other = CDAT(torch.optim.Adam(Regression().params))
    other.load_state_dict(optimizer.state_dict())
    with optimizer.averaged():
        assert all(torch.equal(p, q) for p, q in zip(problem.params, before, strict=True))


def test_averaged_model_of_pytorch_stays_usable() -> None:
    problem = Regression()
    optimizer = CDAT(torch.optim.Adam(problem.params), total_steps=20)
    averaged = torch.optim.swa_utils.AveragedModel(problem.model)
    for step in range(20):
        problem.train(optimizer, range(step, step + 1))
        averaged.update_parameters(problem.model)
    assert int(averaged.n_averaged) == 20
