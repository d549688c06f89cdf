"""Tasks for mini-batches: the same under every framework, with held-out data and noise."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import array_api_compat.numpy
import numpy as np
import pytest

from cdat_lab import backends, self_tuning, tasks
from cdat_lab.backends import Problem
from cdat_lab.backends import numpy as numpy_backend
from cdat_lab.bases import BASES
from cdat_lab.contenders import Contender, constant
from cdat_lab.tasks import Task

ROWS = 6


@functools.cache
def made(name: str) -> Task:
    return tasks.TASKS[name](3)


@pytest.fixture(params=sorted(tasks.MINI_BATCH))
def task(request: pytest.FixtureRequest) -> Task:
    return made(request.param)


def batch(task: Task) -> tuple[Any, ...]:
    """A few rows with the noise of a step, or None."""
    noise = problem(task, batch_size=ROWS).noise(4, 1)
    rows = np.arange(ROWS)
    return task.inputs[rows], task.targets[rows], None if noise is None else noise[0]


def problem(task: Task, **changes: Any) -> Problem:
    contender = Contender("own", "own", constant, average=True)
    fields = {
        "task": task,
        "base": BASES["adamw"],
        "contender": contender,
        "hyperparameters": {"learning_rate": 2.0**-7},
        "steps": 8,
        "record_every": 3,
        "sharpness": False,
        "batch_size": 16,
        "seed": 5,
    }
    return Problem(**(fields | changes))


def direction(task: Task) -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(1)
    return tuple(generator.standard_normal(p.shape) for p in task.params)


def test_loss_and_gradient_are_the_same_under_every_framework(task: Task) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    jax = pytest.importorskip("jax", reason="jax is not installed")
    import array_api_compat.torch as torch_namespace
    import jax.numpy as jnp

    inputs, targets, noise = batch(task)
    objective = numpy_backend.Objective(task, np.arange(ROWS), noise)
    value, grads, _ = objective.derivatives(task.params, second=False)

    leaves = [torch.tensor(p, requires_grad=True) for p in task.params]
    given = [None if x is None else torch.tensor(x) for x in (inputs, targets, noise)]
    found = task.loss(torch_namespace, leaves, *given)
    assert found.item() == pytest.approx(value, rel=1e-12)
    for ours, theirs in zip(grads, torch.autograd.grad(found, leaves), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-12)

    u = direction(task)
    with jax.enable_x64(True):
        # Forward mode and little optimization compile fast.
        slope = jax.jit(
            lambda *data: jax.jvp(lambda p: task.loss(jnp, p, *data), (task.params,), (u,))
        )
        options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        compiled = slope.lower(inputs, targets, noise).compile(compiler_options=options)
        primal, tangent = compiled(inputs, targets, noise)
    assert float(primal) == pytest.approx(value, rel=1e-12)
    assert float(tangent) == pytest.approx(
        sum(np.sum(g * v) for g, v in zip(grads, u, strict=True)), rel=1e-9
    )


def test_a_task_is_small_and_has_held_out_data(task: Task) -> None:
    assert sum(p.size for p in task.params) <= 100_000
    assert next(iter(task.steps.values())) in range(400, 1501)
    assert str(len(task.inputs)) in task.description
    assert task.held_out is not None
    inputs, targets = task.held_out
    assert inputs.shape[1:] == task.inputs.shape[1:]
    assert targets.shape[1:] == task.targets.shape[1:]
    again, other = (tasks.TASKS[task.name](seed) for seed in (3, 4))
    for ours, same in zip(arrays(task), arrays(again), strict=True):
        assert ours.dtype == np.float64
        assert np.array_equal(ours, same)
    assert not np.array_equal(task.inputs, other.inputs)
    assert not np.array_equal(inputs, other.held_out[0])
    drawn = [i for i, p in enumerate(task.params) if len(np.unique(p)) > 1]
    assert all(not np.array_equal(task.params[i], other.params[i]) for i in drawn)


def arrays(task: Task) -> list[np.ndarray]:
    return [task.inputs, task.targets, *(task.held_out or ()), *task.params]


def test_rows_of_the_outputs_belong_to_rows_of_the_inputs(task: Task) -> None:
    xp, some = array_api_compat.numpy, np.array([5, 0])
    inputs, targets, noise = batch(task)
    for drawn in (None, noise):
        whole = task.outputs(xp, task.params, inputs, drawn)
        part = task.outputs(xp, task.params, inputs[some], None if drawn is None else drawn[some])
        np.testing.assert_allclose(part, whole[some], rtol=0, atol=1e-10)
    each = [float(task.criterion(xp, whole[i : i + 1], targets[i : i + 1])) for i in range(ROWS)]
    assert np.mean(each) == pytest.approx(float(task.criterion(xp, whole, targets)))


def test_noise_is_drawn_from_the_seed_and_the_step() -> None:
    task = made("digit-vae")
    found = problem(task).noise(2, 3)
    assert found is not None
    assert found.shape == (3, 16, 6)
    np.testing.assert_array_equal(problem(task, steps=99).noise(3, 1), found[1:2])
    assert not np.array_equal(found[0], found[1])
    assert not np.array_equal(problem(task, seed=6).noise(2, 1), found[:1])
    assert problem(made("counts")).noise(0, 1) is None
    values = problem(task, batch_size=1000).noise(0, 1)
    assert values is not None
    assert abs(float(values.mean())) < 0.05
    assert float(values.std()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_noise_decay_average_and_validation_agree_with_numpy(backend: str) -> None:
    if backends.BACKENDS[backend].missing():
        pytest.skip(f"{backend} is not installed")
    ours = problem(made("digit-vae"))
    expected, found = numpy_backend.run(ours), backends.load(backend)(ours)
    for name in ("loss", "full_loss", "validation_loss"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-9)
    last = numpy_backend.run(dataclasses.replace(ours, contender=Contender("own", "own", constant)))
    np.testing.assert_array_equal(last.loss, expected.loss)
    assert last.full_loss[-1] != expected.full_loss[-1]  # not at the average
    undecayed = numpy_backend.run(dataclasses.replace(ours, base=BASES["adam"]))
    assert undecayed.loss[0] == expected.loss[0]
    assert undecayed.loss[-1] != expected.loss[-1]


def test_the_average_has_the_weights_of_the_core() -> None:
    task = made("counts")
    ours = problem(
        task, base=BASES["gd"], steps=3, record_every=3, hyperparameters={"learning_rate": 0.1}
    )
    rows = ours.batches()
    assert rows is not None
    params = average = task.params
    for step in range(3):
        _, grads, _ = numpy_backend.Objective(task, rows[step]).derivatives(params, second=False)
        params = tuple(p - 0.1 * g for p, g in zip(params, grads, strict=True))
        average = tuple(a + 9 / (step + 9) * (p - a) for a, p in zip(average, params, strict=True))
    found = numpy_backend.run(ours)
    assert found.full_loss[-1] == pytest.approx(float(numpy_backend.Objective(task).value(average)))


def test_each_task_is_on_one_side_and_each_side_has_every_base() -> None:
    assert sorted(s.task for s in self_tuning.SETTINGS) == sorted(tasks.MINI_BATCH)
    assert self_tuning.side("counts") == "judgement"
    assert self_tuning.side("digits") is None
    for side in ("development", "judgement"):
        there = [s for s in self_tuning.SETTINGS if s.side == side]
        assert {s.base for s in there} == set(BASES)
        assert {s.base for s in there if s.quick} == set(BASES)
        assert min(s.batch_size for s in there) == 16
        assert max(s.batch_size for s in there) >= 128
    for setting in self_tuning.SETTINGS:
        task = made(setting.task)
        task.check_batch_size(setting.batch_size)
        assert set(task.steps) == {setting.base}
