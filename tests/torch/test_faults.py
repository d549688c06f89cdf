"""Bad input and faults: clear errors, and nothing changes."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch

from cdat_core import linesearch, tuners
from cdat_torch import CDAT, TunedOptimizer
from cdat_torch.base import groups
from cdat_torch.base.base_step import BaseStep
from cdat_torch.base.direction import base_direction
from tests.torch.models import NanCurvature, mlp


def snapshot(optimizer: TunedOptimizer) -> Any:
    params = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    state = [copy.deepcopy(s) for s in optimizer.base.state.values()]
    averages = copy.deepcopy(optimizer._rule.state)
    return params, state, averages


def assert_same(before: Any, after: Any) -> None:
    torch.testing.assert_close(after[:2], before[:2], rtol=0, atol=0)
    if before[2] is not None:
        assert before[2]._replace(skipped=0) == after[2]._replace(skipped=0)


RULES = {
    "cdat": tuners.cdat(),
    "constant": tuners.constant(0.01),
    "backtracking": linesearch.backtracking(),
}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_that_is_not_finite_changes_nothing(rule: str, where: str, bad: float) -> None:
    model, x = mlp(3, 4, 1), torch.randn(8, 3, dtype=torch.float64)
    optimizer = TunedOptimizer(torch.optim.Adam(model.parameters()), RULES[rule])
    good = lambda: model(x).square().mean()

    def broken() -> torch.Tensor:
        loss = good()
        if where == "loss":
            return loss + bad
        return loss + (0.0 * model[0].bias[0]).abs() ** 0.5  # finite value, gradient inf * 0

    for _ in range(3):
        optimizer.step(good)
    before = snapshot(optimizer)
    optimizer.step(broken)
    assert_same(before, snapshot(optimizer))
    assert int(optimizer.last.skipped) == 1
    assert float(optimizer.last.learning_rate) == 0.0
    optimizer.step(good)
    assert int(optimizer.last.skipped) == 1
    assert float(optimizer.last.learning_rate) > 0.0


def test_a_curvature_that_is_not_finite_moves_no_parameter() -> None:
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = CDAT(torch.optim.SGD([w]))
    optimizer.step(lambda: (w**2).sum())
    before = snapshot(optimizer)
    optimizer.step(lambda: NanCurvature.apply(w).sum())
    assert torch.isnan(optimizer.last.curvature)
    assert_same(before, snapshot(optimizer))
    assert int(optimizer.last.skipped) == 1


def test_a_curvature_that_is_not_finite_leaves_the_state_of_the_base() -> None:
    """Bit for bit, and with the tensors that others may hold."""
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = CDAT(torch.optim.Adam([w]), sigma=1.0)
    optimizer.step(lambda: NanCurvature.apply(w).sum())  # the very first step: no state yet
    assert not optimizer.state
    optimizer.step(lambda: (w**4).sum())
    before, held = snapshot(optimizer), optimizer.state[w]["exp_avg"]
    for _ in range(2):
        optimizer.step(lambda: NanCurvature.apply(w).sum())
    assert_same(before, snapshot(optimizer))
    assert optimizer.state[w]["exp_avg"] is held
    assert int(optimizer.last.skipped) == 3


class Unread:
    """A truth value on an accelerator: whoever reads it would wait for the device."""

    device = torch.device("cuda")

    def __init__(self, value: bool) -> None:
        self.value = torch.tensor(value)

    def to(self, device: torch.device) -> torch.Tensor:
        return self.value.to(device)

    def __bool__(self) -> bool:
        raise AssertionError


@pytest.mark.parametrize("hooked", [False, True])
def test_on_an_accelerator_the_state_is_kept_or_not_without_reading_why(hooked: bool) -> None:
    model, x = mlp(3, 4, 1), torch.randn(8, 3, dtype=torch.float64)
    bases = []
    for _ in range(2):
        base = torch.optim.Adam(model.parameters())
        if hooked:
            base.register_step_post_hook(lambda *_: None)
        bases.append(base)
    base, bare = bases
    model(x).square().mean().backward()
    params = list(model.parameters())
    rate = torch.tensor(0.0)
    for group in base.param_groups:
        groups.adopt(group, 1.0, rate)
    with torch.no_grad():
        BaseStep(base, params).commit(rate, skip=torch.tensor(False))  # creates the state
    base_direction(bare, params)
    for skip in (False, True, False):
        with torch.no_grad():
            BaseStep(base, params).commit(rate, skip=Unread(skip))  # type: ignore[arg-type]
        if not skip:
            base_direction(bare, params)
        for p in params:
            torch.testing.assert_close(dict(base.state[p]), dict(bare.state[p]), rtol=0, atol=0)


def test_a_measurement_holds_no_copy_of_the_state_of_the_base() -> None:
    """Beside Adam's two averages: the parameters and a copy of them, gradient and direction."""
    w, held = torch.randn(2**18, requires_grad=True), []
    optimizer = CDAT(torch.optim.Adam([w]), curvature="finite_difference", max_learning_rate=1e-3)

    def closure() -> torch.Tensor:
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
        held.append(len({t.data_ptr() for t in [w, *tensors] if t.numel() == w.numel()}))
        return (w**4).sum()

    for _ in range(2):
        optimizer.zero_grad()  # else they are kept until the step is taken
        optimizer.step(closure)
    assert held == [1, 4, 4, 3, 6, 6]


@pytest.mark.parametrize("bad", ["loss", "curvature"])
def test_too_many_skips_in_a_row_raise(bad: str) -> None:
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = CDAT(torch.optim.SGD([w]), sigma=1.0, max_consecutive_skips=3)
    broken = {
        "loss": lambda: (w**4).sum() * torch.nan,
        "curvature": lambda: NanCurvature.apply(w).sum(),
    }[bad]
    good = lambda: (w**4).sum()
    for _ in range(2):
        optimizer.step(broken)
    optimizer.step(good)
    for _ in range(2):
        optimizer.step(broken)
    with pytest.raises(RuntimeError, match="3 steps in a row were skipped"):
        optimizer.step(broken)
    assert torch.isfinite(w).all()
    with pytest.raises(ValueError, match="max_consecutive_skips must be an integer >= 1, got 0"):
        CDAT(torch.optim.SGD([w.detach().requires_grad_()]), max_consecutive_skips=0)


def test_an_interrupt_during_the_measurement_leaves_parameters_and_base_state() -> None:
    model, x = mlp(3, 4, 1), torch.randn(8, 3, dtype=torch.float64)
    optimizer = CDAT(torch.optim.Adam(model.parameters()), curvature="finite_difference")
    optimizer.step(lambda: model(x).square().mean())
    before, calls = snapshot(optimizer), 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return model(x).square().mean()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert_same(before, snapshot(optimizer))


def test_a_skipped_measurement_is_repeated_and_a_skipped_step_keeps_the_rate() -> None:
    """Of 9 steps, 0 and 4 measure; 2, 4 and 5 are skipped, so 6 measures for 4."""
    w = torch.full((2,), 3.0, dtype=torch.float64, requires_grad=True)
    optimizer = CDAT(torch.optim.SGD([w]), sigma=0.5, every=4)
    measured, rates = [], []
    for step in range(9):
        factor = torch.nan if step in (2, 4, 5) else 1.0
        optimizer.step(lambda factor=factor: (w**4).sum() * factor)
        measured.append(optimizer.last.curvature is not None)
        rates.append(float(optimizer.last.learning_rate))
    assert [step for step in range(9) if measured[step]] == [0, 6, 8]
    assert [step for step in range(9) if rates[step] == 0] == [2, 4, 5]
    assert rates[0] == rates[1] == rates[3]
    assert int(optimizer.last.skipped) == 3


def test_an_infinite_direction_never_reaches_the_parameters() -> None:
    w = torch.tensor([1.0, 0.0], requires_grad=True)
    base = torch.optim.RMSprop([w], eps=0.0)  # 0 / 0 where the gradient is zero
    optimizer = TunedOptimizer(base, tuners.constant(0.1))
    optimizer.step(lambda: (w**2).sum())
    assert w.tolist() == [1.0, 0.0]
    assert int(optimizer.last.skipped) == 1


def backward_inside(w: torch.Tensor) -> torch.Tensor:
    loss = (w**2).sum()
    loss.backward()
    return loss


@pytest.mark.parametrize(
    ("closure", "error", "message"),
    [
        (None, TypeError, "step needs the loss: .*or call optimizer.backward"),
        (lambda w: None, TypeError, "closure must return the loss as a tensor, got None"),
        (lambda w: float((w**2).sum().detach()), TypeError, "closure must return the loss as a"),
        (lambda w: w**2, ValueError, r"closure must return a real scalar, got shape \(2,\)"),
        (lambda w: (w**2).sum().detach(), ValueError, "without a graph"),
        (backward_inside, TypeError, "remove loss.backward.. and end with `return loss`"),
    ],
)
def test_what_a_closure_must_return(closure, error, message) -> None:  # type: ignore[no-untyped-def]
    w = torch.ones(2, requires_grad=True)
    optimizer = CDAT(torch.optim.Adam([w]))
    with pytest.raises(error, match=message):
        optimizer.step(closure and (lambda: closure(w)))
    assert w.tolist() == [1.0, 1.0]
    assert not optimizer.state


def test_backward_in_the_closure_is_noticed_behind_every_form_of_zero_grad() -> None:
    w = torch.ones(2, requires_grad=True)
    optimizer = CDAT(torch.optim.Adam([w]))
    optimizer.step(lambda: (w**2).sum())
    for set_to_none in (True, False):
        with pytest.raises(TypeError, match="without calling backward"):
            optimizer.step(lambda: (optimizer.zero_grad(set_to_none), backward_inside(w))[1])  # noqa: B023
        optimizer.step(lambda: (optimizer.zero_grad(set_to_none), (w**2).sum())[1])  # noqa: B023


@pytest.mark.parametrize("rule", ["cdat", "backtracking"])
@pytest.mark.parametrize("at_call", [1, 2])
def test_a_closure_that_raises_leaves_everything_as_it_was(rule: str, at_call: int) -> None:
    model, x = mlp(3, 4, 1), torch.randn(8, 3, dtype=torch.float64)
    calls = 0
    optimizer = TunedOptimizer(
        torch.optim.SGD(model.parameters()), RULES[rule], curvature="finite_difference"
    )
    before = snapshot(optimizer)

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == at_call:
            raise KeyboardInterrupt
        return model(x).square().mean()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    torch.testing.assert_close(snapshot(optimizer)[0], before[0], rtol=0, atol=0)
    optimizer.step(closure)
    assert float(optimizer.last.learning_rate) > 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: CDAT(torch.optim.Adam(p), sigma=-1.0), ValueError, "sigma must be .* got -1.0"),
        (lambda p: CDAT(torch.optim.Adam(p), sigma=float("nan")), ValueError, "sigma .* got nan"),
        (lambda p: CDAT(torch.optim.Adam(p), decay=1.0), ValueError, "decay must be .* got 1.0"),
        (lambda p: CDAT(torch.optim.Adam(p), every=0), ValueError, "every must be .* got 0"),
        (lambda p: CDAT(torch.optim.Adam(p), curvature="x"), ValueError, "curvature .* got 'x'"),
        (lambda p: CDAT(p), TypeError, "base must be a torch.optim.Optimizer, got"),
        (lambda p: CDAT(torch.optim.LBFGS(p)), TypeError, "must not choose step lengths itself"),
        (lambda p: CDAT(CDAT(torch.optim.SGD(p))), TypeError, "is wrapped already"),
        (lambda p: TunedOptimizer(torch.optim.SGD(p), 0.1), TypeError, "tuner_or_search must be"),
    ],
)
def test_bad_arguments_are_named_and_leave_the_base_alone(make, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        make([torch.ones(2, requires_grad=True)])
    base = torch.optim.Adam([torch.ones(2, requires_grad=True)])
    with pytest.raises(ValueError, match="sigma"):
        CDAT(base, sigma=-1.0)
    assert base.param_groups[0]["lr"] == 1e-3
    assert "tuned_lr" not in base.param_groups[0]


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="params must be real floating tensors, got .*complex"):
        CDAT(torch.optim.Adam([torch.ones(2, dtype=torch.complex64, requires_grad=True)]))


def test_a_base_that_has_a_scheduler_is_refused() -> None:
    base = torch.optim.Adam([torch.ones(2, requires_grad=True)])
    torch.optim.lr_scheduler.StepLR(base, 10)
    with pytest.raises(ValueError, match="attach the scheduler to the wrapper"):
        CDAT(base)


def test_the_missing_extra_is_named() -> None:
    code = """
        import sys
        sys.modules["torch"] = None
        try:
            import cdat_torch
        except ImportError as error:
            assert 'pip install "cdat[torch]"' in str(error), error
        else:
            raise AssertionError("imported without torch")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


class Momentum(torch.optim.Optimizer):
    """An optimizer of unknown kind, whose whole state is kept until the step is decided."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["m"] = 0.9 * state.get("m", 0.0) + p.grad
                p.sub_(state["m"], alpha=group["lr"])


def test_an_error_before_the_measurement_restores_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of the groups are applied after the base has stepped."""
    model, x = mlp(3, 4, 1), torch.randn(8, 3, dtype=torch.float64)
    loss = lambda: model(x).square().mean()
    slow = [{"params": [*model[0].parameters()]}, {"params": [*model[2].parameters()], "lr": 0.5}]
    optimizer = CDAT(Momentum(slow), sigma=1.0)
    optimizer.step(loss)
    before = snapshot(optimizer)

    def failing(*args: Any) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(torch, "_foreach_mul_", failing)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step(loss)
    assert_same(before, snapshot(optimizer))
    optimizer.step(loss)


def test_a_base_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="base must have parameters, got SGD without any"):
        CDAT(torch.optim.SGD([{"params": []}]))
