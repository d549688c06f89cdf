"""Tuners that need the sharpness, against dense float64 Hessians of small networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cdat_core import tuners
from cdat_torch import CompositeLoss, StepInfo, TunedOptimizer
from tests.torch.models import NanCurvature, dense_hessian, flat, mlp, parameters

ALL = 26
"""Products that span the whole Krylov space of the network below: Lanczos is then exact."""


class Problem:
    """A network with 26 parameters, fitted to random targets."""

    def __init__(self) -> None:
        self.model = mlp(3, 5, 1)
        self.x = torch.randn(12, 3, dtype=torch.float64)
        self.y = torch.randn(12, 1, dtype=torch.float64)

    def loss(self, model: nn.Module) -> Tensor:
        return (model(self.x) - self.y).square().mean()

    def __call__(self) -> Tensor:
        return self.loss(self.model)

    def hessian(self) -> Tensor:
        return dense_hessian(self.model, self.loss)

    def gradient(self) -> Tensor:
        return flat(list(torch.autograd.grad(self(), parameters(self.model))))


def largest(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(matrix)[-1]


def assert_close(found: Tensor | None, exact: Tensor, rtol: float = 1e-9) -> None:
    assert found is not None
    torch.testing.assert_close(found, exact.to(found), rtol=rtol, atol=0)


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_the_rate_is_sigma_over_the_sharpness(sigma: float) -> None:
    problem = Problem()
    base = torch.optim.SGD(problem.model.parameters())
    optimizer = TunedOptimizer(base, tuners.sharpness_edge(sigma), sharpness_matvecs=ALL)
    for _ in range(5):
        exact, gradient = largest(problem.hessian()), problem.gradient()
        before = flat(parameters(problem.model)).detach().clone()
        optimizer.step(problem)
        assert_close(optimizer.last.sharpness, exact)
        assert_close(optimizer.last.learning_rate, sigma / exact)
        after = flat(parameters(problem.model)).detach()
        torch.testing.assert_close(after, before - sigma / exact * gradient, rtol=1e-9, atol=1e-12)
        assert optimizer.last.curvature is None
        assert optimizer.last.as_dict()["sharpness"] == float(optimizer.last.sharpness)


def saad_bound(hessian: Tensor, vector: Tensor, noise: float, num_matvecs: int) -> float:
    """A bound on the error of Lanczos in the largest eigenvalue (Saad; Golub and Van Loan, 10.1.5).

    It starts from a unit vector plus noise of the given length, in the worst direction.
    """
    values, vectors = torch.linalg.eigh(hessian)
    top, second, bottom = (float(values[i]) for i in (-1, -2, 0))
    along = abs(float(vectors[:, -1] @ vector))
    tangent = (math.sqrt(max(0.0, 1 - along**2)) + noise) / (along - noise)
    gap = (top - second) / (second - bottom)
    chebyshev = math.cosh((num_matvecs - 1) * math.acosh(1 + 2 * gap))
    return (top - bottom) * (tangent / chebyshev) ** 2


def test_the_error_is_that_of_lanczos_from_the_last_eigenvector() -> None:
    problem = Problem()
    base = torch.optim.SGD(problem.model.parameters())
    optimizer = TunedOptimizer(base, tuners.sharpness_edge(1.0), sharpness_matvecs=6)
    optimizer.step(problem)
    bounds, errors = [], []
    for _ in range(15):
        hessian = problem.hessian()
        state = optimizer.state_dict()["state"].values()
        vector = flat([s["sharpness_vector"] for s in state])
        bounds.append(saad_bound(hessian, vector, 0.1, 6) / float(largest(hessian)))
        optimizer.step(problem)
        errors.append(1 - float(optimizer.last.sharpness / largest(hessian)))
        assert -1e-12 < errors[-1] <= bounds[-1]
    assert max(bounds) < 0.05  # they say something
    assert max(errors) > 1e-12  # six products are not exact


def test_gradient_descent_stays_where_the_tuner_holds_it() -> None:
    """With the default number of products the rate times the true sharpness is sigma."""
    problem = Problem()
    base = torch.optim.SGD(problem.model.parameters())
    optimizer = TunedOptimizer(base, tuners.sharpness_edge(1.9))
    products, losses = [], []
    for _ in range(40):
        exact = largest(problem.hessian())
        losses.append(float(optimizer.step(problem)))
        products.append(float(optimizer.last.learning_rate * exact))
    assert max(abs(product - 1.9) for product in products) < 2e-3
    assert losses[-1] < 0.5 * losses[0]


def adam_by_hand(problem: Problem, options: dict[str, Any]) -> Iterator[Tensor]:
    """The P that each step divides by, including its own gradient."""
    second, beta = torch.zeros(ALL, dtype=torch.float64), options["betas"][1]
    greatest, step = second, 0
    while True:
        second = beta * second + (1 - beta) * problem.gradient() ** 2
        greatest, step = torch.maximum(greatest, second), step + 1
        v = greatest if options.get("amsgrad") else second
        yield (v / (1 - beta**step)).sqrt() + options["eps"]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_under_adam_it_is_that_of_the_preconditioned_hessian(kind: Any, amsgrad: bool) -> None:
    problem = Problem()
    options = {"betas": (0.5, 0.9), "eps": 1e-3, "amsgrad": amsgrad}
    base = kind(problem.model.parameters(), **options)
    optimizer = TunedOptimizer(base, tuners.sharpness_edge(1.0), sharpness_matvecs=ALL)
    by_hand = adam_by_hand(problem, options)
    for _ in range(4):
        p, hessian = next(by_hand), problem.hessian()
        exact = largest(hessian / torch.sqrt(p[:, None] * p))
        optimizer.step(problem)
        assert_close(optimizer.last.sharpness, exact)
        assert abs(exact / largest(hessian) - 1) > 0.5  # it matters


def test_other_bases_have_the_plain_hessian_unless_told() -> None:
    problem = Problem()
    twin = copy.deepcopy(problem)
    plain = TunedOptimizer(
        torch.optim.RMSprop(problem.model.parameters()),
        tuners.sharpness_edge(0.01),
        sharpness_matvecs=ALL,
    )
    exact = largest(problem.hessian())
    plain.step(problem)
    assert_close(plain.last.sharpness, exact)

    params = parameters(twin.model)
    base = torch.optim.RMSprop(params, alpha=0.9, eps=1e-2)

    def inverse_sqrt(v: Any) -> Any:
        second = [base.state[p]["square_avg"] for p in params]
        return [x * (s.sqrt() + 1e-2).rsqrt() for x, s in zip(v, second, strict=True)]

    told = TunedOptimizer(
        base, tuners.sharpness_edge(1.0), sharpness_matvecs=ALL, inverse_sqrt=inverse_sqrt
    )
    p = (0.1 * twin.gradient() ** 2).sqrt() + 1e-2
    exact = largest(twin.hessian() / torch.sqrt(p[:, None] * p))
    told.step(twin)
    assert_close(told.last.sharpness, exact)


@pytest.mark.parametrize("adam", [False, True])
def test_groups_weigh_the_sharpness_by_their_multipliers(adam: bool) -> None:
    problem = Problem()
    first, second = (list(problem.model[i].parameters()) for i in (0, 2))
    groups: list[dict[str, Any]] = [
        {"params": first[:1], "lr": 0.2},
        {"params": first[1:], "lr": 0.0},
        {"params": second},
    ]
    options = {"betas": (0.5, 0.9), "eps": 1e-3}
    base = torch.optim.Adam(groups, lr=0.1, **options) if adam else torch.optim.SGD(groups, lr=0.1)
    optimizer = TunedOptimizer(base, tuners.sharpness_edge(1.0), sharpness_matvecs=ALL)
    weights = torch.tensor([2.0] * 15 + [0.0] * 5 + [1.0] * 6).double()
    by_hand = adam_by_hand(problem, options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        p = next(by_hand) if adam else torch.ones(ALL).double()
        scale = (weights / p).sqrt()
        exact = largest(scale[:, None] * problem.hessian() * scale)
        optimizer.step(problem)
        assert_close(optimizer.last.sharpness, exact)  # a scheduler's factor acts after the tuner
        schedule.step()


def everything() -> Any:
    """A user's tuner that needs every measurement."""

    def rule(measurement: Any, state: Any) -> Any:
        greedy = -measurement.slope / measurement.curvature
        return torch.minimum(greedy, 1.0 / measurement.sharpness), state

    return tuners.from_rule(
        tuners.constant(0.0).init, rule, needs=("value", "slope", "curvature", "sharpness")
    )


def stepped(optimizer: TunedOptimizer, problem: Problem, form: str) -> StepInfo:
    if form == "closure":
        optimizer.step(problem)
    else:
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if form == "scaled" else None
        parts = 4 if form == "accumulation" else 1
        for x, y in zip(problem.x.chunk(parts), problem.y.chunk(parts), strict=True):
            loss = (problem.model(x) - y).square().mean() / parts
            optimizer.backward(loss, scaler=scaler)
        optimizer.step() if scaler is None else scaler.step(optimizer)
    assert optimizer.last is not None
    return optimizer.last


@pytest.mark.parametrize("form", ["closure", "backward", "accumulation", "scaled"])
def test_a_rule_may_need_all_measurements_in_every_form_of_a_step(form: str) -> None:
    problem = Problem()
    base = torch.optim.SGD(problem.model.parameters())
    optimizer = TunedOptimizer(base, everything(), sharpness_matvecs=ALL)
    for _ in range(3):
        hessian, gradient = problem.hessian(), problem.gradient()
        found = stepped(optimizer, problem, form)
        curvature, slope = gradient @ hessian @ gradient, -gradient @ gradient
        assert_close(found.sharpness, largest(hessian))
        assert_close(found.curvature, curvature)
        assert_close(found.slope, slope)
        rate = torch.minimum(-found.slope / found.curvature, 1 / largest(hessian))
        assert_close(found.learning_rate, rate)


def test_finite_differences() -> None:
    """The error is of the order of the step squared: 1e-10 times a fourth derivative."""
    problem = Problem()
    optimizer = TunedOptimizer(
        torch.optim.SGD(problem.model.parameters()),
        tuners.sharpness_edge(1.0),
        curvature="finite_difference",
        sharpness_matvecs=12,
    )
    exact = largest(problem.hessian())
    optimizer.step(problem)
    assert_close(optimizer.last.sharpness, exact, rtol=1e-6)
    with pytest.raises(ValueError, match="pass a closure to step"):
        optimizer.backward(problem())


class OnceOnly(torch.autograd.Function):
    """The square, without a second derivative."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def test_where_there_is_no_second_derivative_finite_differences_take_over_once() -> None:
    scale = torch.tensor([4.0, 1.0]).double()
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = TunedOptimizer(torch.optim.SGD([w]), tuners.sharpness_edge(0.5))
    closure = lambda: OnceOnly.apply(scale * w).sum()
    with pytest.warns(UserWarning, match="two further evaluations of the loss for each product"):
        optimizer.step(closure)
    optimizer.step(closure)  # without a warning: warnings are errors
    assert_close(optimizer.last.sharpness, torch.tensor(32.0), rtol=1e-9)


def test_what_cannot_be_measured_is_refused_when_wrapping() -> None:
    problem = Problem()
    base = torch.optim.SGD(problem.model.parameters())
    for options, error, message in (
        ({"curvature": "gauss_newton"}, ValueError, 'pass curvature="hvp" or "finite_diff'),
        ({"sharpness_matvecs": 0}, ValueError, "sharpness_matvecs must be an integer >= 1, got 0"),
        ({"inverse_sqrt": 2.0}, TypeError, "inverse_sqrt must be a callable v -> P.*, got 2.0"),
    ):
        with pytest.raises(error, match=message):
            TunedOptimizer(base, tuners.sharpness_edge(), **options)  # type: ignore[arg-type]
        assert "tuned_lr" not in base.param_groups[0]
    split = CompositeLoss(lambda: problem.model(problem.x), lambda z: z.square().mean())
    TunedOptimizer(base, tuners.cdat(), curvature="gauss_newton").step(split)


def test_between_measurements_the_rate_holds() -> None:
    problem = Problem()
    base = torch.optim.SGD(problem.model.parameters())
    optimizer = TunedOptimizer(base, tuners.sharpness_edge(1.0), every=3, sharpness_matvecs=ALL)
    rates, exact = [], []
    for step in range(7):
        exact.append(largest(problem.hessian()))
        optimizer.step(problem)
        assert (optimizer.last.sharpness is not None) == (step % 3 == 0)
        assert ("sharpness" in optimizer.last.as_dict()) == (step % 3 == 0)
        rates.append(optimizer.last.learning_rate)
    for step, rate in enumerate(rates):
        assert_close(rate, 1 / exact[step - step % 3])


def test_runs_are_equal_and_leave_the_random_state_alone() -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(0)
        problem = Problem()
        optimizer = TunedOptimizer(
            torch.optim.Adam(problem.model.parameters()), tuners.sharpness_edge(1.0)
        )
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        for _ in range(3):
            optimizer.step(problem)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(flat(parameters(problem.model)))
    assert torch.equal(*found)


def test_parameters_that_the_loss_does_not_use() -> None:
    problem = Problem()
    unused = torch.ones(4, dtype=torch.float64, requires_grad=True)
    frozen = torch.ones(2, dtype=torch.float64)
    base = torch.optim.Adam([unused, frozen, *problem.model.parameters()], eps=1e-3)
    optimizer = TunedOptimizer(base, tuners.sharpness_edge(1.0), sharpness_matvecs=ALL)
    by_hand = adam_by_hand(problem, {"betas": (0.9, 0.999), "eps": 1e-3})
    for _ in range(2):
        p = next(by_hand)
        exact = largest(problem.hessian() / torch.sqrt(p[:, None] * p))
        optimizer.step(problem)
        assert_close(optimizer.last.sharpness, exact)
    assert unused not in optimizer.state
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert unused not in optimizer.state  # an Adam begins where the state is empty
    optimizer.step(lambda: problem() + unused.square().sum())
    assert bool((unused < 1.0).all())


@pytest.mark.parametrize("change", ["add", "freeze"])
def test_a_change_of_parameters_starts_cold(change: str) -> None:
    """One product from the old vector would be far off; twenty from a new one are not."""
    curvatures = torch.tensor([3.0, 2.0, 1.0]).double()
    w, v = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    params = [w] if change == "add" else [w, v]
    optimizer = TunedOptimizer(
        torch.optim.SGD(params), tuners.sharpness_edge(0.5), sharpness_matvecs=1
    )
    of_w = lambda: (curvatures * w**2).sum() / 2
    both = lambda: of_w() + 5 * (curvatures * v**2).sum()
    if change == "add":
        optimizer.step(of_w)
        optimizer.add_param_group({"params": [v]})
        optimizer.step(both)
        assert_close(optimizer.last.sharpness, torch.tensor(30.0))
    else:
        optimizer.step(both)
        v.requires_grad_(False)
        optimizer.step(both)
        assert_close(optimizer.last.sharpness, torch.tensor(3.0))


def test_a_concave_loss_or_a_straight_line_holds_the_rate() -> None:
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    tuner = tuners.sharpness_edge(1.0, initial_learning_rate=0.1)
    optimizer = TunedOptimizer(torch.optim.SGD([w]), tuner)
    for closure, expected in ((lambda: -(w**2).sum(), -2.0), (lambda: w.sum(), 0.0)):
        optimizer.step(closure)
        assert float(optimizer.last.sharpness) == pytest.approx(expected)
        assert float(optimizer.last.learning_rate) == 0.1


def everything_kept(optimizer: TunedOptimizer) -> Any:
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["tuned_lr"], group["tuner"]["skipped"], group["tuner"]["state"]["skipped"]
        del group["tuner"]["step"]  # skipped steps count as steps of the run
    params = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return params, saved


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("good_steps", [0, 2])
def test_a_sharpness_that_is_not_finite_changes_nothing(base: Any, good_steps: int) -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    twin = w.detach().clone().requires_grad_()
    optimizer = TunedOptimizer(base([w]), tuners.sharpness_edge(0.5))
    other = TunedOptimizer(base([twin]), tuners.sharpness_edge(0.5))
    for _ in range(good_steps):
        optimizer.step(lambda: (w**4).sum())
        other.step(lambda: (twin**4).sum())
    before = everything_kept(optimizer)
    optimizer.step(lambda: NanCurvature.apply(w).sum())
    assert torch.isnan(optimizer.last.sharpness)
    assert int(optimizer.last.skipped) == 1
    assert float(optimizer.last.learning_rate) == 0.0
    torch.testing.assert_close(everything_kept(optimizer), before, rtol=0, atol=0)
    for _ in range(2):  # it goes on as if the bad step had not been
        optimizer.step(lambda: (w**4).sum())
        other.step(lambda: (twin**4).sum())
    assert torch.equal(w, twin)


def test_an_interrupt_between_two_products_changes_nothing() -> None:
    problem = Problem()
    optimizer = TunedOptimizer(
        torch.optim.Adam(problem.model.parameters()),
        tuners.sharpness_edge(0.5),
        curvature="finite_difference",
    )
    optimizer.step(problem)
    before, calls = everything_kept(optimizer), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return problem()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    torch.testing.assert_close(everything_kept(optimizer), before, rtol=0, atol=0)
