"""The wrapper around a base optimizer, and the names and imports of the package."""

import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cdat_jax
from cdat_core import tuners
from cdat_core.extend import StepInfo
from cdat_jax import TunedState, cdat, scale_by_cdat
from tests.jax.problems import factors, same, stepper, train

pytestmark = pytest.mark.usefixtures("quick_compilation")

BASES = {
    "momentum": lambda: optax.sgd(1.0, momentum=0.9),
    "adam": lambda: optax.adam(1.0),
    "adamw": lambda: optax.adamw(1.0, weight_decay=0.01),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.rmsprop(1.0)),
}


@pytest.mark.parametrize(("base", "every"), [(base, 1) for base in BASES] + [("adam", 3)])
def test_wrapper_is_the_chain_of_base_and_tuner(base, every):
    base = BASES[base]
    loss, params, batch = factors()
    options = {"sigma": 1.0, "decay": 0.5, "max_growth": 2.0, "every": every}
    wrapped = train(cdat(base(), **options), loss, params, 7, batch=batch)
    chained = train(optax.chain(base(), scale_by_cdat(**options)), loss, params, 7, batch=batch)
    for step, ((left, state), (right, expected)) in enumerate(zip(wrapped, chained, strict=True)):
        assert isinstance(state, TunedState)
        assert int(state.step) == step + 1
        for x, y in zip(
            jax.tree.leaves((left, state.base, state.tuner)),
            jax.tree.leaves((right, *expected)),
            strict=True,
        ):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)


def updates_of(solver, params, state, loss, batch):
    """Return the updates of one step, without applying them."""

    @jax.jit
    def update(params, state):
        value, grad = jax.value_and_grad(loss)(params, batch)
        return solver.update(
            grad, state, params, value=value, grad=grad, value_fn=loss, batch=batch
        )

    return update(params, state)


@pytest.mark.parametrize("multiplier", [0.5, lambda step: 0.5 + 0 * step, jnp.asarray],
                         ids=["number", "schedule", "array"])  # fmt: skip
def test_multiplier_scales_the_step_and_not_the_tuning(multiplier):
    multiplier = jnp.asarray(0.5) if multiplier is jnp.asarray else multiplier
    loss, params, batch = factors()
    full, half = (
        cdat(optax.adam(1.0), sigma=2.0),
        cdat(optax.adam(1.0), sigma=2.0, learning_rate=multiplier),
    )
    updates, state = updates_of(full, params, full.init(params), loss, batch)
    halved, other = updates_of(half, params, half.init(params), loss, batch)
    assert same(other, state)
    assert same(halved, jax.tree.map(lambda u: 0.5 * u, updates))


def test_multiplier_keeps_the_dtype_of_the_updates():
    loss, params, batch = factors(jnp.bfloat16)
    solver = cdat(
        optax.sgd(1.0), sigma=2.0, learning_rate=lambda step: jnp.asarray(0.5, dtype=jnp.float64)
    )
    updates, _ = updates_of(solver, params, solver.init(params), loss, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}


def test_schedule_follows_the_steps_taken_and_skips_do_not_count():
    """With sigma = 1 an unscaled step ends at the minimum of a quadratic, so each factor shows."""
    factors_of_schedule = jnp.asarray([0.5, 0.25, 0.75, 0.125])
    solver = cdat(optax.sgd(1.0), sigma=1.0, learning_rate=lambda step: factors_of_schedule[step])
    step = stepper(solver, lambda w, scale: scale * jnp.sum(w**2))
    params, remaining = jnp.ones(3), []
    state = solver.init(params)
    for scale in (1.0, np.nan, 1.0, np.inf, 1.0):
        before = params
        params, state = step(params, state, scale=scale)
        remaining.append(float(params[0] / before[0]))
    assert remaining == pytest.approx([0.5, 1.0, 0.75, 1.0, 0.25])
    assert (int(state.step), int(state.tuner.info.skipped)) == (3, 2)


def test_base_may_hold_keys_of_random_numbers():
    loss, params, batch = factors()
    base = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(1.0))
    solver = cdat(base, sigma=1.0)
    (_, first), (_, second) = train(solver, loss, params, 2, batch=batch)
    keys = [jax.random.key_data(state.base[0].rng_key) for state in (first, second)]
    assert not np.array_equal(*keys)


def test_base_gets_the_extra_arguments():
    loss, params, batch = factors()
    given = []

    def update(updates, state, params=None, **extra):
        given.append(sorted(extra))
        return updates, state

    listening = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    train(cdat(listening, sigma=2.0), loss, params, 1, batch=batch)
    assert given
    assert all(names == ["batch", "grad", "value", "value_fn"] for names in given)


def in_a_fresh_interpreter(script):
    return subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )


@pytest.mark.parametrize("missing", ["jax", "optax"])
def test_missing_extra_is_named(missing):
    run = in_a_fresh_interpreter(f"import sys; sys.modules[{missing!r}] = None; import cdat_jax")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("ImportError: cdat_jax needs JAX and Optax")
    assert 'pip install "cdat[jax]"' in run.stderr


def test_import_loads_no_other_framework():
    run = in_a_fresh_interpreter(
        "import sys, cdat_jax; print(*({'jax', 'optax', 'torch'} & sys.modules.keys()))"
    )
    assert (set(run.stdout.split()), run.stderr) == ({"jax", "optax"}, "")


def test_all_is_sorted_and_resolves():
    assert cdat_jax.__all__ == sorted(set(cdat_jax.__all__))
    assert [name for name in cdat_jax.__all__ if not hasattr(cdat_jax, name)] == []


def test_removed_names_say_so():
    with pytest.raises(AttributeError, match="module 'cdat_jax' has no attribute 'CDATState'"):
        cdat_jax.CDATState  # noqa: B018
    with pytest.warns(DeprecationWarning, match=r"TunerInfo is deprecated; use cdat_jax\.StepInfo"):
        assert cdat_jax.TunerInfo is cdat_jax.StepInfo is StepInfo
    assert "TunerInfo" not in cdat_jax.__all__


def test_hyperparameters_are_keyword_only():
    with pytest.raises(TypeError, match="takes 0 positional arguments but 1 was given"):
        scale_by_cdat(1.9)
    with pytest.raises(TypeError, match="takes 1 positional argument but 2 were given"):
        cdat(optax.sgd(1.0), 1.9)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_grow'"):
        cdat(optax.sgd(1.0), max_grow=1.1)


@pytest.mark.parametrize("function", [cdat, scale_by_cdat])
def test_the_signature_names_the_guards(function):
    parameters = inspect.signature(function).parameters
    guards = tuners.GuardOptions.__annotations__
    assert [parameters[name].default for name in guards] == [None] * len(guards)
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
