"""The transformations inside and around the combinators of Optax."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cdat_core import linesearch, tuners
from cdat_jax import ScaleByTunerState, cdat, scale_by_cdat, scale_by_tuner
from tests.jax.problems import factors, quadratic, same, stepper, train

pytestmark = pytest.mark.usefixtures("quick_compilation")

GROUPS = {"inner": "a", "outer": "b"}
COMPOSITIONS = {
    "nested": lambda: optax.chain(
        optax.chain(optax.identity(), optax.sgd(1.0)), scale_by_cdat(sigma=2.0)
    ),
    "named_chain": lambda: optax.named_chain(
        ("base", optax.sgd(1.0)), ("tune", scale_by_cdat(sigma=2.0))
    ),
    "multi_transform": lambda: optax.chain(
        optax.multi_transform({"a": optax.sgd(1.0), "b": optax.sgd(1.0)}, GROUPS),
        scale_by_cdat(sigma=2.0),
    ),
    "masked": lambda: optax.chain(
        optax.masked(optax.add_decayed_weights(0.0), {"inner": True, "outer": False}),
        optax.sgd(1.0),
        scale_by_cdat(sigma=2.0),
    ),
    "scaled-after": lambda: optax.chain(optax.sgd(1.0), scale_by_cdat(sigma=2.0), optax.scale(1.0)),
    "inject_hyperparams": lambda: optax.chain(
        optax.sgd(1.0), optax.inject_hyperparams(scale_by_cdat)(sigma=2.0)
    ),
    "inject_hyperparams-cdat": lambda: optax.inject_hyperparams(cdat)(optax.sgd(1.0), sigma=2.0),
    "apply_if_finite": lambda: optax.apply_if_finite(cdat(optax.sgd(1.0), sigma=2.0), 5),
    "MultiSteps": lambda: optax.MultiSteps(cdat(optax.sgd(1.0), sigma=2.0), 1),
    "cdat": lambda: cdat(optax.sgd(1.0), sigma=2.0),
}


@functools.cache
def plain_chain():
    loss, params, batch = factors()
    return train(
        optax.chain(optax.sgd(1.0), scale_by_cdat(sigma=2.0)), loss, params, 3, batch=batch
    )


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions_of_optax_give_the_same_steps(name):
    loss, params, batch = factors()
    # MultiSteps sums gradients in float32 by default.
    tolerance = 1e-6 if name == "MultiSteps" else 1e-12
    trajectory = train(COMPOSITIONS[name](), loss, params, 3, batch=batch)
    for (left, _), (right, _) in zip(trajectory, plain_chain(), strict=True):
        for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


SECONDS = {
    "cdat": lambda: scale_by_cdat(sigma=1.0),
    "every": lambda: scale_by_cdat(sigma=1.0, every=2),
    "constant": lambda: scale_by_tuner(tuners.constant(0.01)),
    "backtracking": lambda: scale_by_tuner(linesearch.backtracking()),
    "zoom": lambda: scale_by_tuner(linesearch.zoom()),
}


@pytest.mark.parametrize("second", list(SECONDS.values()), ids=list(SECONDS))
def test_frozen_parameters_stay_and_the_others_train_as_if_alone(second):
    """The recipe for frozen parameters: multi_transform in the base."""
    loss, params, batch = factors()
    groups = {"a": optax.set_to_zero(), "b": optax.adam(1.0)}
    tuned = optax.chain(optax.multi_transform(groups, GROUPS), second())

    def rest(outer, batch):
        return loss({"inner": params["inner"], "outer": outer}, batch)

    *_, (after, state) = train(tuned, loss, params, 4, batch=batch)
    alone = optax.chain(optax.adam(1.0), second())
    *_, (outer, expected) = train(alone, rest, params["outer"], 4, batch=batch)
    assert same(after["inner"], params["inner"])
    np.testing.assert_allclose(after["outer"], outer, rtol=1e-9)
    np.testing.assert_allclose(state[1].learning_rate, expected[1].learning_rate, rtol=1e-9)


@pytest.mark.parametrize("second", list(SECONDS.values()), ids=list(SECONDS))
@pytest.mark.parametrize(
    "hide",
    [
        lambda inner: optax.masked(inner, {"inner": False, "outer": True}),
        lambda inner: optax.multi_transform({"a": optax.set_to_zero(), "b": inner}, GROUPS),
    ],
    ids=["masked", "multi_transform"],
)
def test_a_rule_that_gets_some_of_the_parameters_says_what_to_do(second, hide):
    loss, params, batch = factors()
    with pytest.raises(ValueError, match=r"params must be all parameters.*chain\(optax.multi_tra"):
        train(hide(optax.chain(optax.sgd(1.0), second())), loss, params, 1, batch=batch)


def test_injected_hyperparameters_can_change_between_steps():
    """All of them, also `every`, without recompiling; on a quadratic each rate is known."""
    loss, params, _, _ = quadratic()
    solver = optax.chain(
        optax.sgd(1.0), optax.inject_hyperparams(scale_by_cdat)(sigma=1.0, decay=0.0, every=1)
    )
    plain = optax.chain(optax.sgd(1.0), scale_by_cdat(sigma=1.0, decay=0.0))
    step, state = stepper(solver, loss), solver.init(params)
    reference = stepper(plain, loss)
    measured = []
    for sigma, every in [(1.0, 1), (0.5, 2), (0.5, 2), (1.5, 1), (1.0, 1)]:
        state[1].hyperparams["sigma"] = jnp.asarray(sigma)
        state[1].hyperparams["every"] = jnp.asarray(every)
        _, fresh = reference(params, plain.init(params))
        before, (params, state) = state, step(params, state)
        rate = float(optax.tree.get(state, "learning_rate"))
        if before[1].inner_state.due:
            assert rate == pytest.approx(sigma * float(fresh[1].learning_rate), rel=1e-12)
        else:
            assert rate == float(optax.tree.get(before, "learning_rate"))
        measured.append(bool(before[1].inner_state.due))
    assert measured == [True, True, True, False, True]  # each decided by the `every` before it
    assert step._cache_size() == 1


def test_sigma_follows_a_schedule():
    loss, params, _, _ = quadratic()
    schedule = optax.linear_schedule(1.0, 0.5, 2)
    solver = optax.chain(
        optax.sgd(1.0), optax.inject_hyperparams(scale_by_cdat)(sigma=schedule, decay=0.0)
    )
    plain = optax.chain(optax.sgd(1.0), scale_by_cdat(sigma=1.0, decay=0.0))
    before = params
    for sigma, (after, state) in zip([1.0, 0.75, 0.5], train(solver, loss, params, 3), strict=True):
        ((_, unscaled),) = train(plain, loss, before, 1)
        rate = float(optax.tree.get(state, "learning_rate"))
        assert rate == pytest.approx(sigma * float(unscaled[1].learning_rate), rel=1e-12)
        before = after


def test_injected_hyperparameters_of_bfloat16_parameters_need_a_dtype():
    """By default Optax rounds them to the dtype of the parameters."""
    _, params, _ = factors(jnp.bfloat16)
    inject = functools.partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32)
    for factory, arguments in ((scale_by_cdat, ()), (cdat, (optax.sgd(1.0),))):
        rounded = optax.inject_hyperparams(factory)(*arguments, sigma=1.9).init(params)
        kept = inject(factory)(*arguments, sigma=1.9).init(params)
        assert float(rounded.hyperparams["sigma"]) == 1.8984375
        assert float(kept.hyperparams["sigma"]) == pytest.approx(1.9, rel=1e-7)

    def value_fn(p):
        return sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in jax.tree.leaves(p))

    solver = inject(cdat)(optax.sgd(1.0), sigma=1.9)
    ((after, state),) = train(solver, value_fn, params, 1)
    assert float(optax.tree.get(state.inner_state, "learning_rate")) == pytest.approx(
        0.95, rel=0.01
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("bfloat16")}


def test_guards_can_be_injected_too():
    loss, params, batch = factors()
    guards = {"initial_learning_rate": 1e-3, "max_growth": 1.2, "max_learning_rate": 2e-3}
    injected = optax.inject_hyperparams(cdat)(optax.sgd(1.0), sigma=1.0, **guards)
    assert guards.keys() <= injected.init(params).hyperparams.keys()
    found = train(injected, loss, params, 6, batch=batch)
    expected = train(cdat(optax.sgd(1.0), sigma=1.0, **guards), loss, params, 6, batch=batch)
    rates = [float(state.tuner.learning_rate) for _, state in expected]
    assert [float(state.inner_state.tuner.learning_rate) for _, state in found] == pytest.approx(
        rates, rel=1e-12
    )
    assert rates[:2] == pytest.approx([1e-3, 1.2e-3], rel=1e-12)
    assert rates[-1] == pytest.approx(2e-3, rel=1e-12)


def test_the_learning_rate_can_be_read_and_set_by_name():
    """It is stored once, in the info; the state has it as a property."""
    loss, params, batch = factors()
    for solver in (
        cdat(optax.sgd(1.0), sigma=2.0),
        optax.chain(optax.sgd(1.0), scale_by_cdat(sigma=2.0)),
    ):
        ((_, state),) = train(solver, loss, params, 1, batch=batch)
        (tuner,) = (s for s in (*state, state) if isinstance(s, ScaleByTunerState))
        rate = optax.tree.get(state, "learning_rate")
        assert rate is tuner.learning_rate is tuner.info.learning_rate
        changed = optax.tree.set(state, learning_rate=jnp.asarray(0.5))
        assert float(optax.tree.get(changed, "learning_rate")) == 0.5
        assert jax.tree.structure(changed) == jax.tree.structure(state)


def test_the_learning_rate_is_found_in_a_state_with_others_of_that_name():
    loss, params, batch = factors()

    def ours(path, _):
        return any(getattr(key, "tuple_name", "") == "ScaleByTunerState" for key in path)

    solver = optax.inject_hyperparams(cdat)(optax.sgd(1.0), sigma=1.0)
    ((_, state),) = train(solver, loss, params, 1, batch=batch)
    with pytest.raises(KeyError, match="multiple values"):
        optax.tree.get(state, "learning_rate")
    found = optax.tree.get(state, "learning_rate", filtering=ours)
    assert float(found) == float(state.inner_state.tuner.learning_rate) > 0
    assert float(state.hyperparams["learning_rate"]) == 1.0


def test_a_gradient_that_is_not_finite_is_left_to_apply_if_finite():
    """It checks the gradient only; cdat needs no such guard."""
    solver = optax.apply_if_finite(cdat(optax.adam(1.0), sigma=1.0), 5)
    step, params = stepper(solver, lambda w, scale: scale * jnp.sum(w**2)), jnp.ones(3)
    params, state = step(params, solver.init(params), scale=1.0)
    after, bad = step(params, state, scale=np.nan)
    assert same((after, bad.inner_state), (params, state.inner_state))
    assert int(bad.total_notfinite) == 1


def test_multi_steps_measures_in_every_micro_step():
    """The reason to use `accumulate` instead."""
    loss, params, batch = factors()
    seen = []

    def value_fn(params, batch, index):
        jax.debug.callback(lambda index: seen.append(int(index)), index)
        return loss(params, batch)

    # Newer releases of Optax accumulate in single precision unless told otherwise.
    choosable = "accumulator_dtype" in inspect.signature(optax.MultiSteps).parameters
    options = {"accumulator_dtype": jnp.float64} if choosable else {}
    solver = optax.MultiSteps(cdat(optax.sgd(1.0), sigma=1.0), 3, **options)

    @jax.jit
    def step(params, state, index):
        value, grad = jax.value_and_grad(loss)(params, batch)
        updates, state = solver.update(
            grad, state, params, value=value, grad=grad, value_fn=value_fn,
            batch=batch, index=index,
        )  # fmt: skip
        return optax.apply_updates(params, updates), state

    state = solver.init(params)
    for index in range(6):
        before, (params, state) = params, step(params, state, index)
        assert same(before, params) == (index % 3 != 2)
    jax.effects_barrier()
    assert set(seen) == set(range(6))
    assert int(state.inner_opt_state.step) == 2


def test_copies_of_the_parameters_are_found_in_the_state():
    """Optax uses optax.tree.map_params to shard states."""
    solver = cdat(optax.adam(1.0), sigma=2.0)
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    state = solver.init(params)
    mapped = optax.tree.map_params(
        solver, lambda _: "parameter", state, transform_non_params=lambda _: "scalar"
    )
    adam = mapped.base[0]
    assert adam.mu == adam.nu == {"a": "parameter", "b": "parameter"}
    assert set(jax.tree.leaves((adam.count, mapped.tuner, mapped.step))) == {"scalar"}
