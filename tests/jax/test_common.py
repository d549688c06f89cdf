"""Properties of every public transformation, like the common tests of Optax.

A NaN in the result of a compiled program is an error here (``jax_debug_nans``).
"""

import functools
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cdat_core import linesearch, tuners
from cdat_jax import cdat, scale_by_cdat, scale_by_tuner
from tests.jax.problems import factors, quadratic, same, stepper, train

pytestmark = [pytest.mark.usefixtures("quick_compilation", "debug_nans"), pytest.mark.laws]

TUNERS = {
    "cdat": lambda: tuners.cdat(1.0, initial_learning_rate=0.01, max_growth=1.5),
    "full_batch": lambda: tuners.full_batch(max_learning_rate=0.05),
    "gen": lambda: tuners.gen(),
    "hypergradient": lambda: tuners.hypergradient(
        0.05, initial_learning_rate=0.02, max_learning_rate=0.03
    ),
    "on_edge": lambda: tuners.on_edge(max_learning_rate=0.05),
    "polyak": lambda: tuners.polyak(max_learning_rate=0.1),
    "quadratically_greedy": lambda: tuners.quadratically_greedy(max_learning_rate=0.1),
    "sharpness_edge": lambda: tuners.sharpness_edge(max_learning_rate=0.05),
    "constant": lambda: tuners.constant(0.02),
    "scheduled": lambda: tuners.scheduled(lambda step: 0.02 / (1 + step / 100)),
}
SEARCHES = {"backtracking": linesearch.backtracking, "zoom": linesearch.zoom}


def chained(rule, **options):
    """Return a function that builds plain gradient descent with the rule."""
    return lambda: optax.chain(optax.sgd(1.0), scale_by_tuner(rule(), **options))


TRANSFORMS = {
    **{name: chained(rule) for name, rule in (TUNERS | SEARCHES).items()},
    **{
        f"{name}-every-3": chained(rule, every=3)
        for name, rule in TUNERS.items()
        if "curvature" in rule().needs
    },
    "scale_by_cdat": lambda: optax.chain(optax.adam(1.0), scale_by_cdat(sigma=1.0)),
    "wrapper": lambda: cdat(optax.adam(1.0), sigma=1.0),
    "wrapper-every-3": lambda: cdat(
        optax.sgd(1.0), sigma=1.0, every=3, learning_rate=lambda step: 1 / (1 + step / 100)
    ),
}
CASES = [
    (name.removesuffix("-every-3"), 3 if name.endswith("-every-3") else 1) for name in TRANSFORMS
]
every_transform = pytest.mark.parametrize(("rule", "every"), CASES)


@pytest.fixture
def name(rule, every):
    """The key of a transformation."""
    return rule if every == 1 else f"{rule}-every-{every}"


def test_every_rule_and_every_line_search_is_here():
    def public(module, kind):
        functions = {name: getattr(module, name) for name in module.__all__ if name.islower()}
        return {
            name
            for name, function in functions.items()
            if kind in str(inspect.signature(function).return_annotation)
        }

    not_rules, in_test_self_tuning = {"every", "from_rule", "with_cooldown"}, {"self_tuning"}
    assert public(tuners, "Tuner[") - not_rules - in_test_self_tuning == TUNERS.keys()
    assert public(linesearch, "LineSearch") == SEARCHES.keys()


class Run:
    """A transformation with its compiled step, made once for all tests."""

    def __init__(self, name):
        loss, params, batch = factors()
        self.loss, (self.params, self.batch) = loss, jax.device_put((params, batch))
        self.solver = TRANSFORMS[name]()
        self.traces = []

        def counted(params, batch):
            self.traces.append(None)
            return loss(params, batch)

        self.counted = counted
        self.step = stepper(self.solver, counted)

    def start(self):
        return self.params, self.solver.init(self.params)

    def looped(self, steps, start=None):
        params, state = start or self.start()
        for _ in range(steps):
            params, state = self.step(params, state, batch=self.batch)
        return params, state


run = functools.cache(Run)


def tuning(state):
    """Return the `ScaleByTunerState` in a state."""
    return getattr(state, "tuner", None) or state[-1]


def eager_step(solver, loss, params, state):
    value, grad = jax.value_and_grad(loss)(params)
    updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
    return optax.apply_updates(params, updates), state


@every_transform
def test_the_loss_falls_and_one_program_serves_all_steps(name):
    case = run(name)
    first = case.looped(1)
    traces = len(case.traces)
    params, state = case.looped(60, first)
    assert case.loss(params, case.batch) < 0.6 * case.loss(case.params, case.batch)
    assert 0 < float(tuning(state).learning_rate) < np.inf
    assert int(tuning(state).info.skipped) == 0
    assert len(case.traces) == traces
    assert case.step._cache_size() == 1


def rosenbrock(params):
    x, y = params["x"], params["y"]
    return (1 - x) ** 2 + 10 * (y - x**2) ** 2


def parabola(params):
    return jnp.sum((params - jnp.asarray([1.0, -2.0])) ** 2 * jnp.asarray([1.0, 4.0]))


@every_transform
@pytest.mark.parametrize("problem", ["parabola", "rosenbrock"])
def test_the_loss_falls_on_the_problems_of_optax(name, problem):
    """To a hundredth in 300 steps from the starts of Optax; one problem has scalar parameters."""
    loss, params = {
        "parabola": (parabola, jnp.asarray([-1.0, 10.0])),
        "rosenbrock": (rosenbrock, {"x": jnp.asarray(0.0), "y": jnp.asarray(0.8)}),
    }[problem]
    solver = TRANSFORMS[name]()
    step = stepper(solver, loss)

    @jax.jit
    def trained(params):
        body = lambda carry, _: (step(*carry), None)
        return jax.lax.scan(body, (params, solver.init(params)), length=300)[0]

    after, _ = trained(params)
    assert loss(after) < 0.01 * loss(params)


@every_transform
def test_compiled_and_eager_steps_agree(name):
    case = run(name)
    loss = lambda params: case.loss(params, case.batch)
    eager = compiled = case.start()
    for _ in range(2):
        eager = eager_step(case.solver, loss, *eager)
        compiled = case.step(*compiled, batch=case.batch)
    for x, y in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.bitwise
@every_transform
def test_scan_equals_the_loop_bit_for_bit(name):
    case = run(name)

    @jax.jit
    def scanned(params, state, batch):
        body = lambda carry, _: (case.step(*carry, batch=batch), None)
        return jax.lax.scan(body, (params, state), length=8)[0]

    assert same(scanned(*case.start(), case.batch), case.looped(8))


@every_transform
def test_mapped_runs_are_separate_runs(name):
    """Mapped over parameters and state, so conditions become selections."""
    case = run(name)
    starts = [jax.tree.map(lambda p, s=scale: s * p, case.params) for scale in (1.0, 0.5)]

    @jax.jit
    @jax.vmap
    def mapped(params):
        carry = params, case.solver.init(params)
        for _ in range(2):
            carry = case.step(*carry, batch=case.batch)
        return carry

    together = mapped(jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts))
    for index, start in enumerate(starts):
        alone = case.looped(2, (start, case.solver.init(start)))
        for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(x[index], y, rtol=1e-9, atol=1e-12)


@pytest.mark.bitwise
@every_transform
def test_params_and_state_can_be_donated(name):
    """Also the state that an update outside of jit returns; the caller's arrays are not deleted."""
    case = run(name)
    donating = stepper(case.solver, case.loss, donate_argnums=(0, 1))
    donated, state = jax.tree.map(jnp.copy, case.start())
    for _ in range(2):
        donated, state = donating(donated, state, batch=case.batch)
    assert same((donated, state), case.looped(2))

    params, value = jnp.ones(2), jnp.asarray(2.0)
    _, state = case.solver.update(
        params, case.solver.init(params), params,
        value=value, grad=2 * params, value_fn=lambda w: jnp.sum(w**2),
    )  # fmt: skip
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((tuning(state), value))]
    assert len(set(buffers)) == len(buffers)


@every_transform
def test_a_state_that_was_flattened_and_pickled_goes_on_as_before(name):
    case = run(name)
    params, state = case.looped(2)
    leaves, structure = jax.tree.flatten(state)
    restored = pickle.loads(pickle.dumps(jax.tree.unflatten(structure, leaves)))
    assert same(restored, state)
    assert same(case.looped(3, (params, restored)), case.looped(3, (params, state)))


def updated(solver, params):
    """Return the state before one update, and updates and state after it, as shapes and dtypes."""

    def value_fn(params):
        return sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in jax.tree.leaves(params))

    def update(state):
        value, grad = jax.value_and_grad(value_fn)(params)
        return solver.update(grad, state, params, value=value, grad=grad, value_fn=value_fn)

    state = jax.eval_shape(solver.init, params)
    return state, *jax.eval_shape(update, state)


def dtypes(tree):
    return jax.tree.map(lambda leaf: leaf.dtype, tree)


def check_dtypes(name, dtype, wide):
    params = {"a": jnp.ones((2, 3), dtype=dtype), "b": (jnp.ones(4, dtype=dtype),)}
    before, updates, after = updated(TRANSFORMS[name](), params)
    assert after == before
    assert dtypes(updates) == dtypes(params)
    assert tuning(before).learning_rate.dtype == jnp.dtype(wide)


@every_transform
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
        ("complex64", "float32"),
        ("complex128", "float64"),
    ],
)
def test_structure_shapes_and_dtypes_of_the_state_are_fixed(name, dtype, wide):
    check_dtypes(name, dtype, wide)


@every_transform
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
def test_dtypes_are_fixed_without_float64(name, dtype, single_precision):
    """JAX then warns about every request for 64 bits."""
    check_dtypes(name, dtype, "float32")


@every_transform
def test_parameters_of_several_dtypes_keep_their_own(name):
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones((), jnp.float32), "c": jnp.ones(1)}
    before, updates, after = updated(TRANSFORMS[name](), params)
    assert after == before
    assert dtypes(updates) == dtypes(params)
    assert tuning(before).learning_rate.dtype == jnp.float64


@every_transform
@pytest.mark.parametrize("params", [{}, {"a": None}, ()], ids=str)
def test_no_parameters_give_no_updates(name, params):
    solver = TRANSFORMS[name]()
    updates, state = solver.update(
        params, solver.init(params), params,
        value=jnp.float32(1.0), grad=params, value_fn=lambda _: jnp.float32(1.0),
    )  # fmt: skip
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert int(tuning(state).info.skipped) == 0


@every_transform
def test_zero_gradient_moves_nothing_and_is_not_skipped(name):
    loss, _, _, minimiser = quadratic()
    for params, state in train(TRANSFORMS[name](), loss, jnp.asarray(minimiser), 2):
        np.testing.assert_array_equal(params, minimiser)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
        assert int(tuning(state).info.skipped) == 0


@every_transform
def test_no_tracer_leaks_and_no_hidden_transfers(name):
    """An implicit transfer between host and device is an error here."""
    case = run(name)
    params, state = case.start()
    with jax.checking_leaks():
        step = stepper(case.solver, case.loss)
        step.lower(params, state, batch=case.batch)
    with jax.transfer_guard("disallow"):
        moved, state = step(params, state, batch=case.batch)
        moved, state = step(moved, state, batch=case.batch)
    assert not same(moved, params)


def test_the_checks_of_jax_are_on():
    with pytest.raises(FloatingPointError, match="nan"):
        jax.jit(jnp.log)(-1.0)
    step = jax.jit(lambda x: 2 * x)
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed host-to-dev"):
        step(np.ones(2))
