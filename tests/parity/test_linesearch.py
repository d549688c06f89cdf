"""Line searches decide alike in every framework, and compare with those of Optax."""

import functools
import math

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax import lax

from cdat_core import Measurement, linesearch
from cdat_jax import scale_by_tuner
from cdat_torch import TunedOptimizer

SEARCHES = {
    "backtracking": linesearch.backtracking(initial_step_size=4.0),
    "zoom": linesearch.zoom(initial_step_size=4.0),
    "exact zoom": linesearch.zoom(curvature_condition=0.01, increase_factor=2.0),
}
NAMESPACES = {
    "strict": functools.partial(array_api_strict.asarray, dtype=array_api_strict.float64),
    "jax": jnp.float64,
    "torch": functools.partial(torch.tensor, dtype=torch.float64),
}
COUNT = 60


def random_functions(count=COUNT):
    """Return parameters of a parabola with its minimum somewhere in 1e-2..1e2 and four bumps.

    Only rational operations, so that the frameworks differ by rounding alone. All descend at 0.
    """
    generator = np.random.default_rng(11)
    found = []
    while len(found) < count:
        scale = 10.0 ** generator.uniform(-2, 2)
        bumps = np.stack(
            [generator.uniform(-0.6, 0.6, 4), generator.uniform(1, 4, 4), generator.normal(size=4)]
        )
        if slope_at(0.0, (scale, bumps)) * scale < -0.1:
            found.append((scale, bumps))
    return found


def bumps_at(s, bumps):
    for k in range(4):
        distance = bumps[1, k] * s - bumps[2, k]
        yield bumps[0, k], bumps[1, k], distance, 1 + distance * distance


def value_at(t, function):
    s = t / function[0]
    bumps = sum(height / spread for height, _, _, spread in bumps_at(s, function[1]))
    return 0.5 * (s - 1) * (s - 1) + bumps + 3


def slope_at(t, function):
    s = t / function[0]
    bumps = sum(
        -2 * height * rate * distance / (spread * spread)
        for height, rate, distance, spread in bumps_at(s, function[1])
    )
    return (s - 1 + bumps) / function[0]


def driven(search, scalar, function, previous):
    """Drive a search by a Python loop; return its trials and the fields of its last state."""
    start = Measurement(scalar(value_at(0.0, function)), scalar(slope_at(0.0, function)), None)
    state = search.init(start, scalar(0.0), scalar(previous))
    trials = []
    while not bool(state.done):
        trials.append(float(state.step_size))
        told = [value_at(trials[-1], function)]
        if "slope" in search.trial_needs:
            told.append(slope_at(trials[-1], function))
        state = search.tell(state, *map(scalar, told))
    return trials, [float(field) for field in jax.tree.leaves(state)]


@functools.cache
def on_numpy(name):
    return [driven(SEARCHES[name], np.asarray, f, 0.5) for f in random_functions()]


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", SEARCHES)
def test_python_loop_decides_alike_in_every_namespace(name, namespace):
    """Told the same numbers, they ask for the same trials: bit for bit, but for torch.

    The square root of torch is off by one unit in the last place in one of a hundred numbers.
    """
    functions = random_functions()[: COUNT if namespace == "torch" else 12]
    expected = on_numpy(name)[: len(functions)]
    found = [driven(SEARCHES[name], NAMESPACES[namespace], f, 0.5) for f in functions]
    if namespace == "torch" and "slope" in SEARCHES[name].trial_needs:
        for both in zip(found, expected, strict=True):
            trials, others = (trials for trials, _ in both)
            np.testing.assert_allclose(trials, others, rtol=1e-12)
    else:
        assert found == expected


@pytest.mark.parametrize("name", SEARCHES)
def test_while_loop_under_jit_and_vmap_decides_like_the_python_loop(name):
    """The compiled loss is rounded differently, by a few units in the last place.

    Interpolation divides differences of it; 1e-12 leaves room for a loss of four digits.
    """
    search = SEARCHES[name]

    def run(function):
        def tell(state):
            told = (value_at(state.step_size, function), slope_at(state.step_size, function))
            return search.tell(state, *told[: len(search.trial_needs)])

        start = Measurement(value_at(0.0, function), slope_at(0.0, function), None)
        state = search.init(start, jnp.zeros(()), jnp.asarray(0.5))
        return lax.while_loop(lambda state: ~state.done, tell, state)

    scales, bumps = (jnp.asarray(np.stack(part)) for part in zip(*random_functions(), strict=True))
    states = jax.jit(jax.vmap(run))((scales, bumps))
    expected = [fields for _, fields in on_numpy(name)]
    steps, trials = states.step_size, states.trials
    assert trials.tolist() == [fields[-1] for fields in expected]
    assert states.failed.tolist() == [bool(fields[2]) for fields in expected]
    np.testing.assert_allclose(steps, [fields[0] for fields in expected], rtol=1e-12)
    assert len(set(trials.tolist())) > 3


@pytest.mark.parametrize("name", ["backtracking", "zoom"])
def test_both_adapters_take_the_steps_of_the_python_loop(name):
    """Ten steps of gradient descent on a loss of two variables."""
    search = SEARCHES[name]
    first, second = random_functions(2)

    def loss(w):
        return value_at(w[0], (1.0, first[1])) + 4 * value_at(w[1], (1.0, second[1]))

    start = [-1.0, 2.5]

    solver = optax.chain(optax.sgd(1.0), scale_by_tuner(search))

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), state

    params = jnp.asarray(start)
    state = solver.init(params)
    w = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = TunedOptimizer(torch.optim.SGD([w]), search)
    rates = []
    for _ in range(10):
        params, state = step(params, state)
        optimizer.step(lambda: loss(w))
        rates.append(float(state[1].learning_rate))
        # Rounding is enlarged by interpolation and carried on from step to step.
        np.testing.assert_allclose(float(optimizer.last.learning_rate), rates[-1], rtol=1e-9)
        np.testing.assert_allclose(w.detach().numpy(), params, rtol=1e-9)
    assert len(set(rates)) > 1


def compare(transformation, names):
    """Run a transformation along many functions; return steps, failures and calls of the loss."""
    calls = 0

    def count():
        nonlocal calls
        calls += 1

    def loss(eta, function):
        jax.debug.callback(count)
        return value_at(eta, function)

    @jax.jit
    def search(function):
        state = transformation.init(jnp.zeros(()))
        value, grad = value_at(0.0, function), slope_at(0.0, function)
        updates, state = transformation.update(
            jnp.ones(()),
            state,
            jnp.zeros(()),
            value=value,
            grad=grad,
            value_fn=functools.partial(loss, function=function),
        )
        return updates, state

    rows = []
    for function in random_functions(100):
        calls = 0
        step, state = search(function)
        jax.effects_barrier()
        rows.append((float(step), names(state), calls))
    return rows


def meets(function, step, decrease, curvature):
    """Whether the strong Wolfe (or, for curvature None, Armijo) conditions hold, in float64."""
    value, slope = value_at(0.0, function), slope_at(0.0, function)
    low = value_at(step, function) <= value + decrease * step * slope + 1e-14 * abs(value)
    flat = curvature is None or abs(slope_at(step, function)) <= curvature * abs(slope) * (1 + 1e-9)
    return 0 < step < math.inf and low and flat


@pytest.mark.parametrize("curvature", [0.9, 0.1])
def test_zoom_against_optax(curvature):
    """From the same first guess, both meet the same conditions; ours with fewer evaluations."""
    ours = compare(
        scale_by_tuner(linesearch.zoom(curvature_condition=curvature)),
        lambda state: bool(state.tuner_state.failed),
    )
    theirs = compare(
        optax.scale_by_zoom_linesearch(30, curv_rtol=curvature, initial_guess_strategy="one"),
        lambda state: False,
    )
    functions = random_functions(100)
    assert all(
        not failed and meets(f, step, 1e-4, curvature)
        for f, (step, failed, _) in zip(functions, ours, strict=True)
    )
    met = [
        meets(f, step, 1e-4, curvature) for f, (step, _, _) in zip(functions, theirs, strict=True)
    ]
    assert np.mean(met) > 0.9  # or it would be no comparison
    assert np.median([row[2] for row in ours]) <= np.median([row[2] for row in theirs])
    assert np.mean([row[2] for row in ours]) <= np.mean([row[2] for row in theirs])


def test_backtracking_against_optax():
    """From the same first guess and with the same factor they are the same search."""
    ours = compare(
        scale_by_tuner(linesearch.backtracking(max_trials=50)),
        lambda state: bool(state.tuner_state.failed),
    )
    theirs = compare(optax.scale_by_backtracking_linesearch(50), lambda state: False)
    functions = random_functions(100)
    for function, (step, failed, calls), (their_step, _, their_calls) in zip(
        functions, ours, theirs, strict=True
    ):
        assert not failed
        assert meets(function, step, 1e-4, None)
        assert step == pytest.approx(their_step, rel=1e-12)
        assert calls <= their_calls
