"""Tasks: the same problem under every framework, determined by the seed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import array_api_compat.numpy
import array_api_strict
import numpy as np
import pytest
import sklearn.datasets
from scipy.special import log_softmax

from cdat_core import TupleSpace, top_eigenvalues
from cdat_lab import tasks
from cdat_lab.backends import numpy as numpy_backend
from cdat_lab.bases import BASES
from cdat_lab.tasks import Task, _characters, _networks, _patches
from cdat_lab.tasks._teacher_student import teacher_student

NAMES = sorted(tasks.FULL_BATCH)
SEED = 3

Evaluation = tuple[float, list[np.ndarray]]


@functools.cache
def made(name: str, seed: int) -> Task:
    return tasks.TASKS[name](seed)


@pytest.fixture(params=NAMES)
def task(request: pytest.FixtureRequest) -> Task:
    return made(request.param, SEED)


def perturbed(task: Task, step: float, direction: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    return tuple(p + step * u for p, u in zip(task.params, direction, strict=True))


def random_direction(task: Task) -> tuple[np.ndarray, ...]:
    """A direction of unit length."""
    generator = np.random.default_rng(7)
    parts = [generator.standard_normal(p.shape) for p in task.params]
    length = math.sqrt(sum(np.sum(u * u) for u in parts))
    return tuple(u / length for u in parts)


def by_autograd(task: Task, params: tuple[np.ndarray, ...]) -> Evaluation:
    value, grads, _ = numpy_backend.Objective(task).derivatives(params, second=False)
    return float(value), list(grads)


def by_jax(task: Task, params: tuple[np.ndarray, ...]) -> Evaluation:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    import jax.numpy as jnp

    with jax.enable_x64(True):
        evaluate = jax.jit(jax.value_and_grad(functools.partial(task.loss, jnp)))
        value, grads = evaluate(params, task.inputs, task.targets)
        return float(value), [np.asarray(g) for g in grads]


def by_torch(task: Task, params: tuple[np.ndarray, ...]) -> Evaluation:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import array_api_compat.torch as xp

    leaves = [torch.tensor(p, requires_grad=True) for p in params]
    value = task.loss(xp, leaves, torch.tensor(task.inputs), torch.tensor(task.targets))
    return value.item(), [g.numpy() for g in torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("evaluate", [by_jax, by_torch])
def test_loss_and_gradient_are_the_same_under_every_framework(
    task: Task, evaluate: Callable[..., Evaluation]
) -> None:
    params = perturbed(task, 0.5, random_direction(task))
    value, grads = evaluate(task, params)
    expected_value, expected_grads = by_autograd(task, params)
    assert value == pytest.approx(expected_value, rel=1e-12)
    for found, expected in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_the_gradient_is_the_limit_of_differences(task: Task) -> None:
    direction, step = random_direction(task), 1e-4
    _, grads = by_autograd(task, task.params)
    slope = sum(np.sum(g * u) for g, u in zip(grads, direction, strict=True))
    values = [by_autograd(task, perturbed(task, k * step, direction))[0] for k in (-2, -1, 1, 2)]
    quotient = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)
    assert slope == pytest.approx(quotient, rel=1e-8, abs=1e-11)


@pytest.mark.parametrize("xp", [array_api_compat.numpy, array_api_strict], ids=["compat", "strict"])
def test_a_task_uses_only_the_array_api(task: Task, xp: Any) -> None:
    params = [xp.asarray(p) for p in task.params]
    value = task.loss(xp, params, xp.asarray(task.inputs), xp.asarray(task.targets))
    assert value.shape == ()
    assert value.dtype == xp.float64
    assert float(value) == pytest.approx(by_autograd(task, task.params)[0], rel=1e-12)


def test_rows_of_the_outputs_belong_to_rows_of_the_inputs(task: Task) -> None:
    """Means over the rows and mini-batches rely on this."""
    xp, some = array_api_compat.numpy, np.array([5, 0, 9])
    whole = task.model(xp, task.params, task.inputs)
    part = task.model(xp, task.params, task.inputs[some])
    np.testing.assert_allclose(part, whole[some], rtol=0, atol=1e-12)
    each = [
        float(task.criterion(xp, whole[i : i + 1], task.targets[i : i + 1]))
        for i in range(len(whole))
    ]
    assert np.mean(each) == pytest.approx(float(task.criterion(xp, whole, task.targets)))


@pytest.mark.parametrize("name", NAMES)
def test_a_task_depends_only_on_its_seed(name: str) -> None:
    first, again, other = (tasks.TASKS[name](seed) for seed in (SEED, SEED, SEED + 1))
    assert first.name == name
    for a, b, c in zip(arrays(first), arrays(again), arrays(other), strict=True):
        assert a.dtype == np.float64
        assert np.array_equal(a, b)
        assert a.shape == c.shape
    assert not np.array_equal(first.inputs, other.inputs)
    drawn = [i for i, p in enumerate(first.params) if len(np.unique(p)) > 1]
    assert drawn
    assert all(not np.array_equal(first.params[i], other.params[i]) for i in drawn)


def arrays(task: Task) -> list[np.ndarray]:
    return [task.inputs, task.targets, *task.params]


@pytest.mark.parametrize("name", NAMES)
def test_a_task_says_how_long_a_run_is(name: str) -> None:
    task = made(name, SEED)
    assert set(task.steps) == set(BASES)
    assert all(steps >= 100 for steps in task.steps.values())
    assert str(len(task.inputs)) in task.description


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a\\b", "Digits", "-x", ".x", "a b", "a" * 65])
def test_a_name_that_could_not_be_a_file_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name must start with a lower-case letter"):
        small_task(name=name)


def test_data_without_rows_or_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="4 and 3 rows"):
        small_task(targets=np.zeros((3, 1)))
    with pytest.raises(ValueError, match="0 and 0 rows"):
        small_task(inputs=np.zeros((0, 2)), targets=np.zeros((0, 1)))
    with pytest.raises(ValueError, match="params must hold at least one array"):
        small_task(params=())


def small_task(**changes: Any) -> Task:
    fields: dict[str, Any] = {
        "name": "small",
        "description": "",
        "inputs": np.zeros((4, 2)),
        "targets": np.zeros((4, 1)),
        "params": (np.zeros((2, 1)),),
        "model": _networks.linear_network,
        "criterion": _networks.squared_loss,
    }
    return Task(**(fields | changes))


def test_the_smoothed_cross_entropy_has_the_infimum_0() -> None:
    task = made("digits-cross-entropy", SEED)
    assert set(np.round(task.targets, 12).ravel()) == {0.01, 0.91}
    xp = array_api_compat.numpy
    assert abs(task.criterion(xp, np.log(task.targets), task.targets)) < 1e-15
    outputs = np.random.default_rng(0).standard_normal(task.targets.shape)
    for step in (-1e-2, 1e-2):
        assert task.criterion(xp, np.log(task.targets) + step * outputs, task.targets) > 1e-6


def test_the_cross_entropy_uses_the_softmax() -> None:
    generator = np.random.default_rng(0)
    outputs = 300 * generator.standard_normal((5, 3, 4))  # would overflow without its maximum
    targets = np.eye(4)[generator.integers(4, size=(5, 3))]
    expected = -np.mean(np.sum(targets * log_softmax(outputs, axis=-1), axis=-1))
    found = _networks.cross_entropy(array_api_compat.numpy, outputs, targets)
    assert found == pytest.approx(expected, rel=1e-13)


def test_the_data_of_the_teacher() -> None:
    tasks_of_seeds = [teacher_student(seed) for seed in range(8)]
    inputs = np.concatenate([task.inputs for task in tasks_of_seeds])
    assert np.mean(inputs**2) == pytest.approx(1.0, rel=0.05)
    deviations = inputs.std(axis=0)
    np.testing.assert_allclose(deviations / deviations[0], np.arange(1, 65) ** -0.75, rtol=0.08)
    for task in tasks_of_seeds:
        assert np.array_equal(task.targets.sum(axis=1), np.ones(512))
        assert len(np.unique(task.targets.argmax(axis=1))) > 5


def test_a_convolution_without_overlap_is_one() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    task = made("patches", SEED)
    first, bias, second, second_bias, last, last_bias = map(torch.tensor, task.params)
    hidden = torch.tensor(task.inputs).permute(0, 3, 1, 2)
    for weights, shift, side in ((first, bias, 4), (second, second_bias, 2)):
        kernel = weights.reshape(side, side, -1, weights.shape[1]).permute(3, 2, 0, 1)
        hidden = torch.nn.functional.conv2d(hidden, kernel, shift, stride=side)
        hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
    expected = hidden.permute(0, 2, 3, 1).reshape(len(task.inputs), -1) @ last + last_bias
    found = task.model(array_api_compat.numpy, task.params, task.inputs)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-12)


def test_a_patch_comes_from_the_quarter_that_is_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    quarters = np.kron(np.array([[0, 1], [2, 3]]), np.ones((20, 30)))
    images = [np.repeat(quarters[:, :, None] + 4 * k, 3, axis=2) for k in (0, 1)]
    photographs = sklearn.utils.Bunch(images=images)
    monkeypatch.setattr(sklearn.datasets, "load_sample_images", lambda: photographs)
    task = _patches.patches(SEED)
    labels = task.targets.argmax(axis=1)
    expected = np.broadcast_to(labels[:, None, None, None], task.inputs.shape)
    np.testing.assert_allclose(task.inputs, (expected - 3.5) / np.std(np.arange(8)), atol=1e-12)


def test_the_transformer_matches_a_reference() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    functional = torch.nn.functional
    task = made("characters", SEED)
    generator = np.random.default_rng(0)
    params = [p + 0.1 * generator.standard_normal(p.shape) for p in task.params]
    found = task.model(array_api_compat.numpy, params, task.inputs)

    embedding, places, *layer, gain, shift, readout = map(torch.tensor, params)
    gain_1, shift_1, attention, mixing, gain_2, shift_2, into, bias, out_of, bias_2 = layer
    hidden = embedding[torch.tensor(task.inputs.argmax(axis=-1))] + places
    shape = (*hidden.shape[:2], 2, -1)
    normalised = functional.layer_norm(hidden, hidden.shape[-1:], gain_1, shift_1)
    heads = [x.reshape(shape).transpose(1, 2) for x in (normalised @ attention).chunk(3, dim=-1)]
    gathered = functional.scaled_dot_product_attention(*heads, is_causal=True)
    hidden = hidden + gathered.transpose(1, 2).reshape(hidden.shape) @ mixing
    normalised = functional.layer_norm(hidden, hidden.shape[-1:], gain_2, shift_2)
    inner = functional.gelu(normalised @ into + bias, approximate="tanh")
    hidden = hidden + inner @ out_of + bias_2
    expected = (functional.layer_norm(hidden, hidden.shape[-1:], gain, shift) @ readout)[:, 4:]
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-12)


def test_the_characters_come_from_a_text() -> None:
    task = made("characters", SEED)
    inputs, targets = task.inputs.argmax(axis=-1), task.targets.argmax(axis=-1)
    assert np.array_equal(inputs[:, 5:], targets[:, :-1])
    text = "".join(_characters.ALPHABET[code] for code in inputs[0])
    assert text in _characters._text()
    assert len(_characters._text()) == 16384


def test_the_sharpness_of_the_teacher_task_grows_ten_fold() -> None:
    """Under gradient descent, at a rate below its edge of stability."""
    jax = pytest.importorskip("jax", reason="jax is not installed, and it trains 1500 steps")
    import jax.numpy as jnp

    task, rate = teacher_student(11), 0.08

    def trained(params: Any, inputs: Any, targets: Any) -> Any:
        gradient = jax.grad(lambda params: task.loss(jnp, params, inputs, targets))

        def step(_: Any, params: Any) -> Any:
            return jax.tree.map(lambda p, g: p - rate * g, params, gradient(params))

        return jax.lax.fori_loop(0, 1500, step, params)

    with jax.enable_x64(True):
        last = jax.jit(trained)(task.params, task.inputs, task.targets)
    before, after = sharpness(task, task.params), sharpness(task, tuple(map(np.asarray, last)))
    assert 10 * before < after < 2 / rate


def sharpness(task: Task, params: tuple[np.ndarray, ...]) -> float:
    generator = np.random.default_rng(0)
    probe = tuple(generator.standard_normal(p.shape) for p in params)
    hvp = numpy_backend.Objective(task).hvp(params)
    return float(top_eigenvalues(hvp, probe, num_matvecs=30, space=TupleSpace()).values[0])
