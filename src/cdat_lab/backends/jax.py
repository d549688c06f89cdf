"""The JAX backend: the steps between two records form one compiled loop."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cdat_jax
from cdat_lab.backends import _jax_packages
from cdat_lab.backends._sharpness import MATVECS, SharpnessTracker
from cdat_lab.backends._trajectory import Problem, Trajectory
from cdat_lab.bases import Base
from cdat_lab.contenders import Rule
from cdat_lab.tasks._task import Criterion, Model

Params: TypeAlias = Any
COLUMNS = ("loss", "learning_rate", "slope", "curvature", "trials", "skipped")


def run(problem: Problem) -> Trajectory:
    """Train a task under JAX, on JAX's default device, in float64.

    Parameters
    ----------
    problem : Problem
        The run.

    Returns
    -------
    Trajectory
    """
    with jax.enable_x64(True):
        return _run(problem)


@functools.lru_cache(maxsize=64)
def _composite(model: Model, criterion: Criterion, noisy: bool) -> cdat_jax.CompositeLoss:
    """Return the loss of parameters and data; one object per task, so that it compiles once."""

    def plain(params: Params, inputs: jax.Array) -> Any:
        return model(jnp, params, inputs)

    def random(params: Params, inputs: jax.Array, noise: jax.Array | None = None) -> Any:
        return model(jnp, params, inputs, noise)

    return cdat_jax.CompositeLoss(
        random if noisy else plain, lambda outputs, targets: criterion(jnp, outputs, targets)
    )


class Program(NamedTuple):
    """The static part of a problem; problems with the same program share one compilation."""

    model: Model
    criterion: Criterion
    noisy: bool
    base: Base
    rule: Callable[..., Rule] | None
    names: tuple[str, ...]
    curvature: str
    optimizer: str | None
    average: bool
    steps: int
    length: int

    @classmethod
    def of(cls, problem: Problem) -> Program:
        """Return the static part of a problem."""
        return cls(
            problem.task.model,
            problem.task.criterion,
            problem.task.noise is not None,
            problem.base,
            problem.contender.rule,
            tuple(sorted(problem.hyperparameters)),
            problem.contender.curvature,
            problem.contender.optimizer,
            problem.contender.average,
            problem.steps,
            min(problem.record_every, problem.steps),
        )

    def loss(self) -> cdat_jax.CompositeLoss:
        """Return the loss of the parameters and of `inputs`, `targets` and perhaps `noise`."""
        return _composite(self.model, self.criterion, self.noisy)

    def solver(self, values: tuple[Any, ...]) -> optax.GradientTransformationExtraArgs:
        """Return the optimizer with its hyperparameters, which may be traced."""
        hyperparameters = dict(zip(self.names, values, strict=True))
        if self.optimizer is not None:
            found = _jax_packages.solver(self.optimizer, self.steps, hyperparameters)
            return optax.chain(found, cdat_jax.average_params()) if self.average else found
        assert self.rule is not None
        rule = self.rule(self.steps, **hyperparameters)
        base = transformation(self.base)
        return cdat_jax.tuned(base, rule, curvature=self.curvature, average=self.average)

    def evaluated(self, state: Any, params: Params) -> Params:
        """Return the parameters at which to evaluate the optimizer."""
        if self.average:
            return cdat_jax.averaged_params(state)
        return _jax_packages.evaluated(self.optimizer, state, params)


def transformation(base: Base) -> optax.GradientTransformation:
    """Return a base optimizer as a transformation of Optax at learning rate 1."""
    if not base.builtin:
        if base.optax is None:
            msg = f"base {base.name!r} has no `optax` constructor, so it cannot run under JAX"
            raise ValueError(msg)
        built: optax.GradientTransformation = base.optax()
        return built
    if base.second_moment is not None:
        settings = {"b1": base.momentum, "b2": base.second_moment, "eps": base.eps}
        if base.weight_decay:
            return optax.adamw(1.0, **settings, weight_decay=base.weight_decay)
        return optax.adam(1.0, **settings)
    if base.momentum:
        return optax.chain(optax.trace(base.momentum), optax.scale(-1.0))
    return optax.scale(-1.0)


def _run(problem: Problem) -> Trajectory:
    program = Program.of(problem)
    values = tuple(jnp.asarray(problem.hyperparameters[name]) for name in program.names)
    params = tuple(map(jnp.asarray, problem.task.params))
    data = {
        "inputs": jnp.asarray(problem.task.inputs),
        "targets": jnp.asarray(problem.task.targets),
    }
    held_out = None
    if problem.task.held_out is not None:
        inputs, targets = map(jnp.asarray, problem.task.held_out)
        held_out = {"inputs": inputs, "targets": targets}
    records = problem.record_steps()
    state = jax.jit(lambda params: program.solver(values).init(params))(params)
    carry = jax.tree.map(jnp.copy, (params, state))
    batches = _Batches(problem, program.length)
    advance, compile_seconds = _compiled_loop(program, (values, carry, data, *batches(0), 0))
    sharpness = _Sharpness(problem, data)
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    full_loss, validation, sharp, seconds = [], [], [], [0.0]

    def record(step: int) -> None:
        params, state = carry
        evaluated = program.evaluated(state, params)
        full_loss.append(_full_loss(program.loss(), evaluated, data))
        if held_out is not None:
            validation.append(_full_loss(program.loss(), evaluated, held_out))
        sharp.append(sharpness(*carry, taken=step))

    for start, end in itertools.pairwise(records):
        record(int(start))
        batch, number = batches(int(start)), int(end - start)
        _wait((full_loss, validation, batch))
        began = time.perf_counter()
        carry, measured = advance(values, carry, data, *batch, number)
        _wait(carry)
        seconds.append(seconds[-1] + time.perf_counter() - began)
        for name, column in zip(COLUMNS, measured, strict=True):
            columns[name].append(np.asarray(column)[:number])
    record(problem.steps)
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Trajectory(
        **{**joined, **{n: joined[n].astype(np.int64) for n in ("trials", "skipped")}},
        full_loss=np.array(full_loss, dtype=np.float64),
        sharpness=np.array(sharp, dtype=np.float64),
        seconds=np.array(seconds),
        compile_seconds=compile_seconds,
        validation_loss=np.array(validation, dtype=np.float64) if validation else None,
    )


def _wait(arrays: Any) -> None:
    jax.block_until_ready(arrays)  # type: ignore[no-untyped-call]


class _Batches:
    """The rows and the noise of the next steps."""

    def __init__(self, problem: Problem, length: int) -> None:
        self._problem, self._length = problem, length
        self._rows = problem.batches()

    def __call__(self, start: int) -> tuple[jax.Array | None, jax.Array | None]:
        """Return those of `length` steps; beyond the end of the run they are not used."""
        rows = self._rows
        if rows is not None:
            rows = rows[np.minimum(start + np.arange(self._length), len(rows) - 1)]
        noise = self._problem.noise(start, self._length)
        return (
            None if rows is None else jnp.asarray(rows),
            None if noise is None else jnp.asarray(noise),
        )


@functools.lru_cache(maxsize=64)
def _slot(program: Program, shapes: tuple[Any, ...]) -> list[Any]:
    """Return the list that caches the compiled loop of a program."""
    del program, shapes
    return []


def _compiled_loop(program: Program, arguments: tuple[Any, ...]) -> tuple[Any, float]:
    """Return the compiled loop and the seconds that compiling took, 0 if it was cached."""
    shapes = tuple((jnp.shape(a), str(jnp.result_type(a))) for a in jax.tree.leaves(arguments))
    kept = _slot(program, shapes)
    if kept:
        return kept[0], 0.0
    began = time.perf_counter()
    loop = jax.jit(functools.partial(_loop, program), donate_argnums=1)
    kept.append(loop.lower(*arguments).compile())
    return kept[0], time.perf_counter() - began


def _loop(
    program: Program,
    values: tuple[Any, ...],
    carry: Any,
    data: dict[str, jax.Array],
    rows: jax.Array | None,
    noise: jax.Array | None,
    number: jax.Array,
) -> tuple[Any, tuple[jax.Array, ...]]:
    """Take `number` steps; return the new carry and the measurements, one array per column."""
    train = cdat_jax.make_step(program.loss(), program.solver(values))
    wide = jnp.zeros(program.length)
    empty = (wide, wide, wide, wide, wide.astype(jnp.int32), wide.astype(jnp.int32))

    def step(index: Any, moving: Any) -> Any:
        (params, state), columns = moving
        batch = data if rows is None else {k: jnp.take(x, rows[index], 0) for k, x in data.items()}
        if noise is not None:
            batch = {**batch, "noise": noise[index]}
        params, state, value = train(params, state, **batch)
        measured = (value, *_shown(program, state))
        columns = tuple(c.at[index].set(m) for c, m in zip(columns, measured, strict=True))
        return (params, state), columns

    result: tuple[Any, tuple[jax.Array, ...]] = jax.lax.fori_loop(0, number, step, (carry, empty))
    return result


def _shown(program: Program, state: Any) -> tuple[Any, ...]:
    """Return rate, slope, curvature, trials and skipped steps of the last step."""
    if program.optimizer is not None:
        return _jax_packages.rate(program.optimizer, state), jnp.nan, jnp.nan, 0, 0
    tuner = state.tuner
    curvature = jnp.nan if tuner.info.curvature is None else tuner.info.curvature
    trials = getattr(tuner.tuner_state, "trials", 0)
    return tuner.learning_rate, tuner.info.slope, curvature, trials, tuner.info.skipped


@functools.partial(jax.jit, static_argnums=0)
def _full_loss(loss: cdat_jax.CompositeLoss, params: Params, data: dict[str, jax.Array]) -> Any:
    return loss(params, **data)


class _Sharpness:
    """The largest eigenvalue of the Hessian on all data, tracked from record to record."""

    def __init__(self, problem: Problem, data: dict[str, jax.Array]) -> None:
        task = problem.task
        self._wanted = problem.sharpness
        self._base = problem.base
        self._preconditioned = problem.base.preconditioned and problem.contender.optimizer is None
        self._loss = _composite(task.model, task.criterion, task.noise is not None)
        self._data = (data["inputs"], data["targets"])
        self._tracker = SharpnessTracker(tuple(map(jnp.asarray, problem.probe())))

    def __call__(self, params: Params, state: Any, *, taken: int) -> float:
        if not self._wanted or (self._preconditioned and taken == 0):
            return float("nan")
        inverse_sqrt = None
        if self._preconditioned:
            inverse_sqrt = cdat_jax.adam_inverse_sqrt(
                state.base, b2=self._base.second_moment, eps=self._base.eps
            )
        return self._tracker.measure(
            lambda start: cdat_jax.top_eigenvalues(
                self._loss,
                params,
                *self._data,
                num_matvecs=MATVECS,
                start=start,
                inverse_sqrt=inverse_sqrt,
            )
        )
