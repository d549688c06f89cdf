"""The NumPy backend against closed forms, dense matrices and plain loops."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import array_api_compat.numpy
import numpy as np
import pytest

from cdat_core import linesearch, tuners
from cdat_lab.backends import Problem, Trajectory
from cdat_lab.backends.numpy import Objective, run
from cdat_lab.bases import ADAM, BASES, GD, MOMENTUM, RMSPROP, Base
from cdat_lab.contenders import CONTENDERS, Contender
from cdat_lab.tasks import Task
from cdat_lab.tasks._networks import mlp_params, squared_loss, tanh_mlp
from tests.lab.linear import INPUTS, OUTPUTS, ROWS, linear_task


def tanh_task() -> Task:
    params = mlp_params((INPUTS, 4, OUTPUTS), np.random.default_rng(6))
    return linear_task(params=params, model=tanh_mlp)


def contender(rule: Any, **changes: Any) -> Contender:
    return Contender("mine", "mine", lambda steps: rule, **changes)


def problem(task: Task, rule: Any, base: Base = GD, **changes: Any) -> Problem:
    fields: dict[str, Any] = {
        "task": task,
        "base": base,
        "contender": rule if isinstance(rule, Contender) else contender(rule),
        "hyperparameters": {},
        "steps": 12,
        "record_every": 4,
        "sharpness": False,
        "batch_size": None,
        "seed": 0,
    }
    return Problem(**(fields | changes))


def regression(
    task: Task, rows: Any = slice(None)
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Loss and gradient of linear regression in independent formulas."""
    X, Y = task.inputs[rows], task.targets[rows]
    return (
        lambda W: 0.5 * np.mean(np.sum((X @ W - Y) ** 2, axis=1)),
        lambda W: X.T @ (X @ W - Y) / len(X),
    )


def hessian(task: Task, rows: Any = slice(None)) -> np.ndarray:
    X = task.inputs[rows]
    return X.T @ X / len(X)


# Rates in closed form


@pytest.mark.parametrize(("name", "sigma"), [("greedy", 1.0), ("on-edge", 2.0)])
def test_the_rates_of_gradient_descent_on_a_quadratic(name: str, sigma: float) -> None:
    task = linear_task()
    loss, gradient = regression(task)
    H, (W,) = hessian(task), task.params
    result = run(problem(task, CONTENDERS[name]))
    for step in range(12):
        g = gradient(W)
        curvature = np.sum(g * (H @ g))
        rate = sigma * np.sum(g * g) / curvature
        assert result.loss[step] == pytest.approx(loss(W), rel=1e-9)
        assert result.slope[step] == pytest.approx(-np.sum(g * g), rel=1e-9)
        assert result.curvature[step] == pytest.approx(curvature, rel=1e-9)
        assert result.learning_rate[step] == pytest.approx(rate, rel=1e-9)
        W = W - rate * g
    assert result.full_loss[-1] == pytest.approx(loss(W), rel=1e-9)
    assert not result.trials.any()
    assert not result.skipped.any()


@pytest.mark.parametrize("base", [GD, MOMENTUM, RMSPROP, ADAM], ids=lambda base: base.name)
def test_the_base_optimizers_match_torch(base: Base) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    task, rate = tanh_task(), 0.05
    result = run(problem(task, tuners.constant(rate), base, steps=30, record_every=1))
    leaves = [torch.tensor(p, requires_grad=True) for p in task.params]
    optimizer = (
        torch.optim.Adam(leaves, lr=rate, betas=(base.momentum, base.second_moment), eps=base.eps)
        if base.second_moment is not None
        else torch.optim.SGD(leaves, lr=rate, momentum=base.momentum)
    )
    inputs, targets = torch.tensor(task.inputs), torch.tensor(task.targets)
    losses = []
    for _ in range(31):
        optimizer.zero_grad()
        loss = task.loss(torch, leaves, inputs, targets)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    np.testing.assert_allclose(result.loss, losses[:-1], rtol=1e-10)
    np.testing.assert_allclose(result.full_loss, losses, rtol=1e-10)
    assert np.all(result.learning_rate == rate)
    assert np.all(np.isnan(result.curvature))  # a constant rate does not use it


def test_the_rate_of_a_sharpness_rule() -> None:
    task = linear_task()
    largest = np.linalg.eigvalsh(hessian(task))[-1]
    result = run(problem(task, tuners.sharpness_edge(sigma=1.5)))
    np.testing.assert_allclose(result.learning_rate, 1.5 / largest, rtol=1e-8)


def test_a_backtracking_search_takes_the_first_trial_that_lowers_the_loss_enough() -> None:
    task = linear_task()
    loss, gradient = regression(task)
    search = linesearch.backtracking(initial_step_size=4.0, decrease_factor=0.5)
    (W,), previous = task.params, None
    result = run(problem(task, search))
    for step in range(12):
        g, trials = gradient(W), 1
        rate = 4.0 if previous is None else 1.5 * previous
        while loss(W - rate * g) > loss(W) - 1e-4 * rate * np.sum(g * g):
            rate, trials = rate / 2, trials + 1
        assert result.learning_rate[step] == pytest.approx(rate)
        assert result.trials[step] == trials
        W, previous = W - rate * g, rate
    assert result.trials.max() > 1
    assert np.all(np.isnan(result.curvature))


def test_a_strong_wolfe_search_makes_the_slope_small_everywhere() -> None:
    task = linear_task()
    loss, gradient = regression(task)
    (W,) = task.params
    result = run(problem(task, CONTENDERS["zoom"]))
    for rate in result.learning_rate:
        g, moved = gradient(W), W - rate * gradient(W)
        assert loss(moved) <= loss(W) - 1e-4 * rate * np.sum(g * g)
        assert abs(np.sum(g * gradient(moved))) <= 0.9 * np.sum(g * g)
        W = moved
    assert result.trials.min() >= 1


# Curvature and sharpness against dense matrices


def dense_hessian(task: Task, params: tuple[np.ndarray, ...]) -> np.ndarray:
    """The Hessian by fourth-order differences of the loss in both directions."""
    flat, step = np.concatenate([p.ravel() for p in params]), 1e-2
    weights = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}

    def value(w: np.ndarray) -> float:
        parts = np.split(w, np.cumsum([p.size for p in params])[:-1])
        arrays = [part.reshape(p.shape) for part, p in zip(parts, params, strict=True)]
        return float(task.loss(array_api_compat.numpy, arrays, task.inputs, task.targets))

    E = step * np.eye(flat.size)
    return np.array(
        [
            [
                sum(
                    weights[i] * weights[j] * value(flat + i * a + j * b)
                    for i in weights
                    for j in weights
                )
                / step**2
                for b in E
            ]
            for a in E
        ]
    )


@pytest.mark.parametrize("task", [linear_task(depth=2), tanh_task()], ids=["deep", "tanh"])
def test_the_curvature_matches_the_dense_hessian(task: Task) -> None:
    H = dense_hessian(task, task.params)
    _, grads, _ = Objective(task).derivatives(task.params, second=False)
    g = np.concatenate([part.ravel() for part in grads])
    result = run(problem(task, CONTENDERS["greedy"], steps=1, sharpness=True, record_every=1))
    assert result.curvature[0] == pytest.approx(g @ H @ g, rel=1e-6)
    assert result.learning_rate[0] == pytest.approx(g @ g / (g @ H @ g), rel=1e-6)
    assert result.sharpness[0] == pytest.approx(np.linalg.eigvalsh(H)[-1], rel=1e-6)


def test_the_gauss_newton_curvature_matches_the_linearised_model() -> None:
    task = tanh_task()
    rule = contender(tuners.quadratically_greedy(), curvature="gauss_newton")
    result = run(problem(task, rule, steps=1))
    _, grads, _ = Objective(task).derivatives(task.params, second=False)

    def outputs(step: float) -> np.ndarray:
        moved = [p - step * g for p, g in zip(task.params, grads, strict=True)]
        return tanh_mlp(array_api_compat.numpy, moved, task.inputs)

    h = 1e-3
    change = (outputs(-2 * h) - 8 * outputs(-h) + 8 * outputs(h) - outputs(2 * h)) / (12 * h)
    expected = np.mean(np.sum(change**2, axis=1))  # the squared loss has the Hessian 1/n
    assert result.curvature[0] == pytest.approx(expected, rel=1e-8)
    whole = run(problem(task, tuners.quadratically_greedy(), steps=1))
    assert abs(whole.curvature[0] - expected) > 1e-2 * expected


def test_the_gauss_newton_curvature_of_a_cross_entropy() -> None:
    """For a model that is linear in its weights it equals the curvature."""
    from cdat_lab.tasks._networks import cross_entropy

    task = linear_task(targets=np.eye(OUTPUTS)[np.arange(ROWS) % OUTPUTS], criterion=cross_entropy)
    runs = [
        run(problem(task, contender(tuners.quadratically_greedy(), curvature=curvature)))
        for curvature in ("auto", "gauss_newton")
    ]
    np.testing.assert_allclose(runs[0].curvature, runs[1].curvature, rtol=1e-9)


def test_the_sharpness_of_a_quadratic_stays() -> None:
    task = linear_task()
    result = run(problem(task, CONTENDERS["greedy"], sharpness=True, steps=10, record_every=4))
    largest = np.linalg.eigvalsh(hessian(task))[-1]
    np.testing.assert_allclose(result.sharpness, np.full(4, largest), rtol=1e-9)


def test_the_sharpness_under_a_preconditioner() -> None:
    task, rate, steps = linear_task(), 0.01, 4
    _, gradient = regression(task)
    result = run(
        problem(task, tuners.constant(rate), RMSPROP, steps=steps, record_every=1, sharpness=True)
    )
    H = np.kron(hessian(task), np.eye(OUTPUTS))
    (W,) = task.params
    second = np.zeros_like(W)
    expected = [math.nan]
    for count in range(1, steps + 1):
        g = gradient(W)
        second = 0.99 * second + 0.01 * g * g
        P = np.sqrt(second / (1 - 0.99**count)) + 1e-8
        W = W - rate * g / P
        root = np.diag(1 / np.sqrt(P.ravel()))
        expected.append(np.linalg.eigvalsh(root @ H @ root)[-1])
    # The first measurement is exact here; later ones track it with a few products.
    np.testing.assert_allclose(result.sharpness, expected, rtol=1e-6)


# Records and batches


def test_records_are_made_at_their_steps() -> None:
    task = linear_task()
    result = run(problem(task, tuners.constant(0.1), steps=10, record_every=4))
    loss, gradient = regression(task)
    (W,), losses = task.params, []
    for _ in range(11):
        losses.append(loss(W))
        W = W - 0.1 * gradient(W)
    np.testing.assert_allclose(result.full_loss, [losses[i] for i in (0, 4, 8, 10)], rtol=1e-12)
    np.testing.assert_allclose(result.loss, losses[:10], rtol=1e-12)
    assert np.all(np.isnan(result.sharpness))
    assert result.seconds[0] == 0
    assert np.all(np.diff(result.seconds) > 0)
    assert result.compile_seconds == 0
    assert result.validation_loss is None
    for field in dataclasses.fields(Trajectory)[:-2]:
        column = getattr(result, field.name)
        assert column.shape == (
            (4,) if field.name in {"full_loss", "sharpness", "seconds"} else (10,)
        )
        assert column.dtype == (np.int64 if field.name in {"trials", "skipped"} else np.float64)


def test_each_step_of_a_mini_batch_run_is_on_its_rows() -> None:
    task = linear_task()
    setting = problem(task, CONTENDERS["greedy"], batch_size=5, steps=7, sharpness=True)
    batches = setting.batches()
    assert batches is not None
    result = run(setting)
    (W,) = task.params
    for step, rows in enumerate(batches):
        loss, gradient = regression(task, rows)
        g, H = gradient(W), hessian(task, rows)
        assert result.loss[step] == pytest.approx(loss(W), rel=1e-9)
        rate = np.sum(g * g) / np.sum(g * (H @ g))
        assert result.learning_rate[step] == pytest.approx(rate, rel=1e-9)
        W = W - rate * g
    assert result.full_loss[-1] == pytest.approx(regression(task)[0](W), rel=1e-9)
    largest = np.linalg.eigvalsh(hessian(task))[-1]  # of all the rows
    np.testing.assert_allclose(result.sharpness, np.full(3, largest), rtol=1e-9)


def test_the_task_is_left_as_it_was() -> None:
    task = linear_task()
    before = [a.copy() for a in (task.inputs, task.targets, *task.params)]
    run(problem(task, tuners.cdat(), ADAM, sharpness=True))
    for a, b in zip((task.inputs, task.targets, *task.params), before, strict=True):
        assert np.array_equal(a, b)


# Values that are not finite


@pytest.mark.parametrize("base", BASES.values(), ids=lambda base: base.name)
def test_a_step_on_a_bad_batch_leaves_everything_as_it_was(base: Base) -> None:
    """The run continues as if the batches with a bad row had never occurred."""
    task = linear_task()
    inputs = task.inputs.copy()
    inputs[3] = math.nan
    bad = linear_task(inputs=inputs)
    rule = tuners.cdat(sigma=1.0, decay=0.5)
    setting = problem(bad, rule, base, batch_size=4, steps=9)
    batches = setting.batches()
    assert batches is not None
    skip = np.any(batches == 3, axis=1)
    assert 0 < skip.sum() < 9
    result = run(setting)

    class Chosen(Problem):
        def batches(self) -> Any:
            assert batches is not None
            return batches[~skip]

    fields = {field.name: getattr(setting, field.name) for field in dataclasses.fields(setting)}
    expected = run(Chosen(**(fields | {"task": task, "steps": int((~skip).sum())})))
    assert np.array_equal(result.skipped, np.cumsum(skip))
    assert np.all(result.learning_rate[skip] == 0)
    assert np.all(np.isnan(result.loss[skip]))
    for name in ("loss", "learning_rate", "slope", "curvature"):
        assert np.array_equal(getattr(result, name)[~skip], getattr(expected, name)), name


def task_without_low_losses() -> Task:
    """A loss that is NaN where it would be below 0.9 of its first value."""
    loss, _ = regression(linear_task())
    threshold = 0.9 * loss(linear_task().params[0])

    def criterion(xp: Any, outputs: Any, targets: Any) -> Any:
        value = squared_loss(xp, outputs, targets)
        return value * xp.where(value < threshold, math.nan, 1.0)

    return linear_task(criterion=criterion)


@pytest.mark.parametrize("curvature", ["auto", "gauss_newton"])
@pytest.mark.parametrize("base", BASES.values(), ids=lambda base: base.name)
def test_a_loss_that_becomes_nan_skips_the_rest(curvature: str, base: Base) -> None:
    rule = contender(tuners.quadratically_greedy(), curvature=curvature)
    result = run(problem(task_without_low_losses(), rule, base, sharpness=True, record_every=1))
    first = int(np.argmax(np.isnan(result.loss)))
    assert first > 0
    assert np.array_equal(result.skipped, np.maximum(0, np.arange(12) - first + 1))
    assert np.all(result.learning_rate[first:] == 0)
    assert np.array_equal(np.isnan(result.full_loss), np.arange(13) >= first)
    assert np.all(np.isnan(result.sharpness[first:]))


@pytest.mark.parametrize("search", ["armijo", "zoom"])
@pytest.mark.parametrize("base", BASES.values(), ids=lambda base: base.name)
def test_a_search_keeps_away_from_where_the_loss_is_nan(search: str, base: Base) -> None:
    result = run(problem(task_without_low_losses(), CONTENDERS[search], base))
    assert np.all(np.isfinite(result.full_loss))
    assert result.full_loss[-1] < result.full_loss[0]
    assert result.skipped[-1] == 0


@pytest.mark.parametrize("base", BASES.values(), ids=lambda base: base.name)
def test_a_huge_rate_does_not_raise(base: Base) -> None:
    result = run(problem(linear_task(depth=3), tuners.constant(1e80), base, sharpness=True))
    assert result.skipped[-1] > 0
    assert len(result.loss) == 12


# Not supported


def test_what_is_built_for_other_frameworks_is_refused_by_name() -> None:
    for name in ("prodigy", "schedule-free"):
        with pytest.raises(ValueError, match=f"'{name}' is an optimizer from another package"):
            run(problem(linear_task(), CONTENDERS[name]))
    foreign = Base(name="lion", label="Lion", optax=lambda: None)
    with pytest.raises(ValueError, match="'lion' is built for other frameworks"):
        run(problem(linear_task(), CONTENDERS["greedy"], foreign))
    unknown = contender(tuners.quadratically_greedy(), curvature="forward")
    with pytest.raises(ValueError, match="curvature must be 'auto' or 'gauss_newton'.*'forward'"):
        run(problem(linear_task(), unknown))
