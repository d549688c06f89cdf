"""The spectrum in one call: against dense Hessians, and without side effects on the model."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cdat_core
from cdat_core import tuners
from cdat_torch import (
    CDAT,
    TunedOptimizer,
    sharpness,
    spectral_density,
    top_eigenvalues,
    trace,
)
from tests.torch.models import dense_hessian, flat, mlp, parameters

FRONT_DOORS: dict[str, Callable[..., Any]] = {
    "sharpness": lambda *a, **k: sharpness(*a, num_matvecs=6, **k),
    "top_eigenvalues": lambda *a, **k: top_eigenvalues(*a, k=2, num_matvecs=6, **k),
    "spectral_density": lambda *a, **k: spectral_density(*a, num_probes=2, num_matvecs=3, **k),
    "trace": lambda *a, **k: trace(*a, num_probes=6, **k),
    "hutch++": lambda *a, **k: trace(*a, num_probes=4, method="hutch++", **k),
}


class Problem:
    """A small network whose Hessian has eigenvalues of both signs."""

    def __init__(self) -> None:
        self.model = mlp(3, 5, 1)
        self.x = torch.randn(12, 3, dtype=torch.float64)
        self.y = torch.randn(12, 1, dtype=torch.float64)

    def of(self, model: nn.Module) -> Tensor:
        return (model(self.x) - self.y).square().mean()

    def __call__(self) -> Tensor:
        return self.of(self.model)

    def hessian(self) -> Tensor:
        return dense_hessian(self.model, self.of)


def numbers(result: Any) -> list[Tensor]:
    """All tensors of a result, flat."""
    if isinstance(result, Tensor):
        return [result]
    return [leaf for part in result for leaf in numbers(part)]


def test_sharpness_is_the_largest_eigenvalue_of_the_dense_hessian() -> None:
    problem = Problem()
    eigenvalues = torch.linalg.eigvalsh(problem.hessian())
    found = sharpness(problem, problem.model.parameters(), num_matvecs=26)
    assert found.shape == ()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, eigenvalues[-1], rtol=1e-10, atol=0)
    least = sharpness(problem, problem.model.parameters(), num_matvecs=26, which="smallest")
    torch.testing.assert_close(least, eigenvalues[0], rtol=1e-10, atol=0)
    assert least < 0 < found


def test_both_ends_with_their_eigenvectors() -> None:
    problem = Problem()
    hessian = problem.hessian()
    found = top_eigenvalues(problem, parameters(problem.model), k=2, num_matvecs=26, which="both")
    expected = torch.linalg.eigvalsh(hessian)[[-1, -2, 1, 0]]
    torch.testing.assert_close(found.values, expected, rtol=1e-9, atol=1e-12)
    for value, vector in zip(found.values, found.vectors, strict=True):
        v = flat(list(vector))
        torch.testing.assert_close(hessian @ v, value * v, rtol=0, atol=1e-9)
        assert abs(float(v.norm()) - 1.0) < 1e-10


def test_a_linear_regression_against_scipy() -> None:
    x = torch.randn(300, 80, dtype=torch.float64) * torch.linspace(0.1, 1.0, 80).double()
    weight = torch.randn(80, dtype=torch.float64, requires_grad=True)
    hessian = (x.T @ x / 300).numpy()  # closed form
    values = scipy.sparse.linalg.eigsh(hessian, k=3, which="LA", return_eigenvectors=False)
    loss_fn = lambda: (x @ weight).square().mean() / 2
    found = top_eigenvalues(loss_fn, [weight], k=3, num_matvecs=60)
    np.testing.assert_allclose(found.values.numpy(), np.sort(values)[::-1], rtol=1e-9)

    density = spectral_density(loss_fn, [weight], num_probes=8, num_matvecs=30)
    spread = float((density.weights * density.nodes**2).sum())
    exact = float((hessian**2).sum() / 80)
    assert abs(spread - exact) < 0.05 * exact
    for method in ("hutchinson", "hutch++"):
        estimate = trace(loss_fn, [weight], num_probes=40, method=method)
        error = abs(float(estimate.estimate) - np.trace(hessian))
        assert error < 4 * float(estimate.standard_error)
        assert float(estimate.standard_error) < 0.04 * np.trace(hessian)


def test_the_trace_is_unbiased_and_its_spread_that_of_random_signs() -> None:
    problem = Problem()
    hessian = problem.hessian()
    draws = torch.stack(
        [
            trace(problem, problem.model.parameters(), num_probes=4, seed=seed).estimate
            for seed in range(200)
        ]
    )
    variance = 2 * (hessian.square().sum() - hessian.diagonal().square().sum()) / 4
    assert abs(draws.mean() - hessian.trace()) < 4 * (variance / 200).sqrt()
    # Gaussian probes would add the squares of the diagonal to the variance.
    assert 0.7 < float(draws.var() / variance) < 1.4
    gaussian = 2 * hessian.square().sum() / 4
    assert gaussian / variance > 1.3


def test_hutchpp_is_exact_on_low_rank() -> None:
    direction = torch.randn(50, dtype=torch.float64)
    w = torch.randn(50, dtype=torch.float64, requires_grad=True)
    found = trace(lambda: (direction @ w) ** 2 / 2, [w], num_probes=4, method="hutch++")
    torch.testing.assert_close(found.estimate, direction.square().sum(), rtol=1e-12, atol=0)
    assert int(found.num_matvecs) == 6


@pytest.mark.parametrize("name", FRONT_DOORS)
def test_frozen_and_unused_parameters_are_constants(name: str) -> None:
    problem = Problem()
    frozen = problem.model[0].bias.requires_grad_(False)
    unused = torch.randn(4, dtype=torch.float64, requires_grad=True)
    params = [*problem.model.parameters(), unused]
    hessian = dense_hessian(problem.model, problem.of)
    kept = torch.ones(len(hessian), dtype=torch.bool)
    kept[problem.model[0].weight.numel() :][: frozen.numel()] = False
    hessian = torch.where(kept[:, None] & kept, hessian, 0.0)
    found = FRONT_DOORS[name](problem, params)
    if name == "trace":
        z = trace(problem, params, num_probes=400)
        assert abs(z.estimate - hessian.trace()) < 4 * z.standard_error
    exact = torch.linalg.eigvalsh(hessian)[-1]
    torch.testing.assert_close(sharpness(problem, params, num_matvecs=26), exact)
    assert all(bool(torch.isfinite(part).all()) for part in numbers(found))


def test_constants_are_mass_at_zero() -> None:
    used = torch.ones(10, dtype=torch.float64, requires_grad=True)
    unused = torch.ones(30, dtype=torch.float64, requires_grad=True)
    found = spectral_density(lambda: used.square().sum(), [used, unused], num_matvecs=2)
    torch.testing.assert_close(found.nodes[0], torch.tensor([0.0, 2.0]).double())
    torch.testing.assert_close(found.weights.sum(0), torch.tensor([0.75, 0.25]).double())


@pytest.mark.parametrize("name", FRONT_DOORS)
def test_the_seed_decides_and_the_global_random_state_does_not(name: str) -> None:
    problem = Problem()
    front_door = FRONT_DOORS[name]
    before = torch.get_rng_state()
    first = numbers(front_door(problem, problem.model.parameters(), seed=3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    again = numbers(front_door(problem, problem.model.parameters(), seed=3))
    other = numbers(front_door(problem, problem.model.parameters(), seed=4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("name", FRONT_DOORS)
def test_a_call_leaves_no_trace(name: str) -> None:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 1)
    ).double()
    x = torch.randn(16, 4, dtype=torch.float64)
    model(x)  # running statistics that are not the initial ones
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    evaluations = 0

    def loss_fn() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return model(x).square().mean()

    with torch.no_grad():
        FRONT_DOORS[name](loss_fn, model.parameters())
    assert evaluations == 1
    assert torch.equal(torch.get_rng_state(), rng)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_nothing_is_left_behind_by_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout()).double()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rng = torch.get_rng_state()

    def loss_fn() -> Tensor:
        model(torch.randn(5, 2, dtype=torch.float64))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sharpness(loss_fn, model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_batch_norm_and_attention_against_differences_of_gradients() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.norm = nn.Linear(4, 12), nn.BatchNorm1d(5)
            self.out = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
            return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))

    model, x = Block().double(), torch.randn(7, 5, 4, dtype=torch.float64)
    loss_fn = lambda: model(x).square().mean()
    params = parameters(model)
    found = top_eigenvalues(loss_fn, params, num_matvecs=30)
    vector, step = found.vectors[0], 1e-5
    sides = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for p, v in zip(params, vector, strict=True):
                p.add_(v, alpha=sign * step)
        sides.append(flat(list(torch.autograd.grad(loss_fn(), params))))
        with torch.no_grad():
            for p, v in zip(params, vector, strict=True):
                p.sub_(v, alpha=sign * step)
    product = (sides[0] - sides[1]) / (2 * step)
    torch.testing.assert_close(product, found.values[0] * flat(list(vector)), rtol=0, atol=1e-7)


def test_a_term_without_a_second_derivative_is_not_dropped() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * grad

    w = torch.ones(3, requires_grad=True)
    # Below a sum PyTorch itself would raise nothing and return half of the Hessian.
    with pytest.raises(NotImplementedError, match="once_differentiable"):
        sharpness(lambda: Square.apply(w).sum() + (w**2).sum(), [w])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    problem = Problem()
    exact = torch.linalg.eigvalsh(problem.hessian())[-1]
    low = mlp(3, 5, 1, dtype=dtype)
    low.load_state_dict(problem.model.state_dict())
    x, y = problem.x.to(dtype), problem.y.to(dtype)
    found = sharpness(lambda: (low(x) - y).square().mean(), low.parameters(), num_matvecs=12)
    assert found.dtype == torch.float64
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, exact, rtol=tolerance, atol=0)


def adam_reference(problem: Problem, *, amsgrad: bool, wrapped: bool) -> tuple[Any, Tensor]:
    """Three steps, with P from moments averaged by hand."""
    model, beta, eps = problem.model, 0.9, 1e-3
    adam = torch.optim.AdamW(model.parameters(), betas=(0.5, beta), eps=eps, amsgrad=amsgrad)
    optimizer = TunedOptimizer(adam, tuners.constant(0.5)) if wrapped else adam
    v = greatest = torch.zeros_like(flat(parameters(model)))
    for _ in range(3):
        g = flat(list(torch.autograd.grad(problem(), parameters(model))))
        v = beta * v + (1 - beta) * g**2
        greatest = torch.maximum(greatest, v)
        if wrapped:
            optimizer.step(problem)
        else:
            adam.zero_grad()
            problem().backward()
            adam.step()
    v_hat = (greatest if amsgrad else v) / (1 - beta**3)
    return optimizer, v_hat.detach().sqrt() + eps


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
def test_the_preconditioner_of_adam(amsgrad: bool, wrapped: bool) -> None:
    problem = Problem()
    optimizer, p = adam_reference(problem, amsgrad=amsgrad, wrapped=wrapped)
    dense = problem.hessian() / torch.sqrt(p[:, None] * p)
    found = sharpness(problem, parameters(problem.model), num_matvecs=26, inverse_sqrt=optimizer)
    torch.testing.assert_close(found, torch.linalg.eigvalsh(dense)[-1], rtol=1e-9, atol=0)
    assert abs(found / torch.linalg.eigvalsh(problem.hessian())[-1] - 1) > 0.5  # it matters


def test_a_callable_or_a_number_as_preconditioner() -> None:
    problem = Problem()
    params = parameters(problem.model)
    plain = sharpness(problem, params, num_matvecs=26)
    scaled = sharpness(problem, params, num_matvecs=26, inverse_sqrt=3.0)
    called = sharpness(
        problem, params, num_matvecs=26, inverse_sqrt=lambda v: [3.0 * part for part in v]
    )
    torch.testing.assert_close(scaled, 9 * plain, rtol=1e-10, atol=0)
    torch.testing.assert_close(called, 9 * plain, rtol=1e-10, atol=0)
    doubled = trace(problem, params, inverse_sqrt=2.0).estimate
    torch.testing.assert_close(doubled, 4 * trace(problem, params).estimate)


def test_what_adam_has_not_moved_drops_out() -> None:
    problem = Problem()
    first, second = problem.model[0], problem.model[2]
    adam = torch.optim.Adam(first.parameters())
    problem().backward()
    adam.step()
    part = sharpness(problem, first.parameters(), num_matvecs=20, inverse_sqrt=adam)
    whole = sharpness(problem, problem.model.parameters(), num_matvecs=20, inverse_sqrt=adam)
    torch.testing.assert_close(whole, part, rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="take a step with it first"):
        sharpness(problem, second.parameters(), inverse_sqrt=adam)
    fresh = CDAT(torch.optim.Adam(problem.model.parameters()))
    with pytest.raises(ValueError, match="take a step with it first"):
        sharpness(problem, problem.model.parameters(), inverse_sqrt=fresh)
    with pytest.raises(TypeError, match="Adam or AdamW optimizer, got SGD"):
        sharpness(problem, first.parameters(), inverse_sqrt=torch.optim.SGD(first.parameters()))


def test_a_start_vector_is_used() -> None:
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    hessian = torch.tensor([5.0, 3.0, 1.0]).double()
    loss_fn = lambda: (hessian * w**2).sum() / 2
    start = [torch.tensor([0.0, 1.0, 1.0]).double()]
    assert abs(float(sharpness(loss_fn, [w], start=start, num_matvecs=3)) - 3.0) < 1e-12


def test_a_warm_start_saves_products_and_still_sees_a_new_eigenvalue() -> None:
    curvatures = torch.cat([torch.linspace(0, 5, 400), torch.tensor([6.0, 1.0])]).double()
    w = torch.ones(402, dtype=torch.float64, requires_grad=True)
    loss_fn = lambda: (curvatures * w**2).sum() / 2
    earlier = top_eigenvalues(loss_fn, [w], num_matvecs=60)
    assert float(earlier.residual_norms[0]) < 1e-6

    curvatures[-2] = 6.1
    warm = top_eigenvalues(loss_fn, [w], start=earlier, num_matvecs=4)
    cold = top_eigenvalues(loss_fn, [w], num_matvecs=4)
    assert float(warm.residual_norms[0]) < 0.3 * float(cold.residual_norms[0])
    assert abs(float(warm.values[0]) - 6.1) < 0.1 < abs(float(cold.values[0]) - 6.1)

    curvatures[-1] = 20.0  # its eigenvector is orthogonal to the exact one of the first run
    exact = torch.zeros_like(curvatures)
    exact[-2] = 1.0
    earlier = earlier._replace(vectors=([exact],))
    assert abs(float(sharpness(loss_fn, [w], start=earlier, num_matvecs=10)) - 20.0) < 1e-3


@pytest.mark.parametrize("name", FRONT_DOORS)
def test_progress_counts_every_product(name: str) -> None:
    problem = Problem()
    calls: list[tuple[int, int]] = []
    result = FRONT_DOORS[name](
        problem, problem.model.parameters(), progress=lambda *numbers: calls.append(numbers)
    )
    assert calls == [(i, 6) for i in range(1, 7)]
    if hasattr(result, "num_matvecs"):
        assert int(result.num_matvecs) == 6


class FakeBar:
    """The part of tqdm that is used."""

    made: ClassVar[list[FakeBar]] = []

    def __init__(self, *, total: int, desc: str) -> None:
        self.total, self.count, self.closed = total, 0, False
        FakeBar.made.append(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def update(self, by: int) -> None:
        self.count += by


def test_a_bar_by_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("tqdm")
    module.tqdm = FakeBar  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tqdm", module)
    monkeypatch.setattr(FakeBar, "made", [])
    problem = Problem()
    sharpness(problem, problem.model.parameters(), num_matvecs=5, progress=True)
    (bar,) = FakeBar.made
    assert (bar.total, bar.count, bar.closed) == (5, 5, True)


def test_a_bar_by_rich(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    pytest.importorskip("rich")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    problem = Problem()
    sharpness(problem, problem.model.parameters(), num_matvecs=5, progress=True)
    out, err = capfd.readouterr()
    assert "100%" in err
    assert not out


def test_without_a_package_for_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tqdm", "rich", "rich.progress"):
        monkeypatch.setitem(sys.modules, module, None)
    problem = Problem()
    with pytest.raises(ImportError, match="pip install tqdm"):
        sharpness(problem, problem.model.parameters(), progress=True)
    assert sharpness(problem, problem.model.parameters()) > 0


def test_the_results_are_those_of_the_core() -> None:
    problem = Problem()
    params = parameters(problem.model)
    assert isinstance(top_eigenvalues(problem, params), cdat_core.TopEigenvalues)
    assert isinstance(spectral_density(problem, params), cdat_core.SpectralDensity)
    assert isinstance(trace(problem, params), cdat_core.TraceEstimate)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"which": "middle"}, ValueError, "which must be 'largest' or 'smallest', got 'middle'"),
        ({"which": "both"}, ValueError, "top_eigenvalues gives both"),
        ({"num_matvecs": 0}, ValueError, "num_matvecs must be an integer >= 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be an integer >= 0, got -1"),
        ({"seed": None}, TypeError, "seed must be an integer >= 0, got None"),
        ({"start": [torch.ones(2)]}, ValueError, "start must hold tensors with the shapes"),
        ({"inverse_sqrt": -1.0}, ValueError, "inverse_sqrt must be a finite number > 0, got -1.0"),
        ({"progress": 3}, TypeError, "progress must be a bool or a callable"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    problem = Problem()
    with pytest.raises(error, match=message):
        sharpness(problem, problem.model.parameters(), **change)


def test_bad_params() -> None:
    problem = Problem()
    (w, *_) = params = parameters(problem.model)
    for bad, error, message in [
        (w, TypeError, "params must be an iterable of tensors, got Parameter"),
        (problem.model, TypeError, "params must be an iterable of tensors, got Sequential"),
        (problem.model.named_parameters(), TypeError, "params must hold tensors, got tuple"),
        ([w, w], ValueError, "one of them twice"),
        ([], ValueError, "at least one tensor"),
        ([p.detach() for p in params], ValueError, "requires grad"),
    ]:
        with pytest.raises(error, match=message):
            sharpness(problem, bad)
    with pytest.raises(ValueError, match=r"method must be 'hutchinson' or 'hutch\+\+', got 'x'"):
        trace(problem, params, method="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_probes must be an integer >= 2, got 1"):
        trace(problem, params, num_probes=1, method="hutch++")
    with pytest.raises(ValueError, match="num_probes must be an integer >= 1, got 0"):
        spectral_density(problem, params, num_probes=0)
    with pytest.raises(TypeError, match="return the loss as a tensor"):
        sharpness(lambda: problem().item(), params)  # type: ignore[arg-type, return-value]
