"""The JAX backend: a run is one compiled scan, with the hyperparameters as traced arguments."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cdat_jax
from cdat_core import PowerIterationState, power_iteration
from cdat_lab.backends._trajectory import FIRST_MATVECS, MATVECS, Problem, Trajectory
from cdat_lab.bases import Base

Params: TypeAlias = Any
Loss = Callable[[Params], Any]


def run(problem: Problem) -> Trajectory:
    """Train a task under JAX, on the CPU or wherever JAX runs, in float64.

    Parameters
    ----------
    problem : Problem
        What to run.

    Returns
    -------
    Trajectory
    """
    with jax.enable_x64(True):
        task = problem.task
        # Hashable parts are static: runs that share them share one compiled function.
        names = tuple(sorted(problem.hyperparameters))
        values = tuple(jnp.asarray(problem.hyperparameters[name]) for name in names)
        arguments = (
            values,
            tuple(map(jnp.asarray, task.params)),
            jnp.asarray(task.inputs),
            jnp.asarray(task.targets),
            tuple(map(jnp.asarray, problem.probe())),
        )
        shapes = tuple((a.shape, str(a.dtype)) for a in jax.tree.leaves(arguments))
        started = time.perf_counter()
        compiled = _compiled(
            task.loss,
            problem.base,
            problem.contender.rule,
            names,
            problem.steps,
            problem.sharpness_every,
            shapes,
        )
        if not compiled:
            program = jax.jit(_program(problem, names))
            compiled.append(program.lower(*arguments).compile())
        compile_seconds = time.perf_counter() - started
        started = time.perf_counter()
        final_loss, columns = compiled[0](*arguments)
        final_loss.block_until_ready()
        seconds = time.perf_counter() - started
    return Trajectory(
        loss=np.append(np.asarray(columns["loss"]), final_loss),
        learning_rate=np.asarray(columns["learning_rate"]),
        slope=np.asarray(columns["slope"]),
        curvature=np.asarray(columns["curvature"]),
        sharpness=np.asarray(columns["sharpness"]),
        skipped=np.asarray(columns["skipped"], dtype=np.int64),
        seconds_per_step=seconds / problem.steps,
        compile_seconds=compile_seconds,
    )


@functools.lru_cache(maxsize=64)
def _compiled(*key: Any) -> list[Any]:
    """Return the slot in which the compiled function of these static parts is kept."""
    del key
    return []


def _program(problem: Problem, names: tuple[str, ...]) -> Callable[..., Any]:
    """Return the whole run as a function of arrays."""
    base, every = problem.base, problem.sharpness_every
    task_loss, rule, steps = problem.task.loss, problem.contender.rule, problem.steps

    def program(
        values: tuple[jax.Array, ...],
        params: Params,
        inputs: jax.Array,
        targets: jax.Array,
        probe: Params,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        def loss(params: Params) -> Any:
            return task_loss(params, inputs, targets)

        tuner = rule(steps, **dict(zip(names, values, strict=True)))
        solver = optax.chain(_base_transform(base), cdat_jax.scale_by_tuner(tuner))

        def step(carry: Any, index: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
            params, state, power = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = solver.update(
                grads, state, params, value=value, grad=grads, value_fn=loss
            )
            due = index % every == 0
            power = jax.lax.cond(
                due,
                lambda: _sharpen(loss, params, base, state[0], power, index),
                lambda: power,
            )
            info = state[-1].info
            columns = {
                "loss": value,
                "learning_rate": state[-1].learning_rate,
                "slope": info.slope,
                "curvature": jnp.nan * value if info.curvature is None else info.curvature,
                "sharpness": jnp.where(due, power.eigenvalue, jnp.nan),
                "skipped": info.skipped,
            }
            return (optax.apply_updates(params, updates), state, power), columns

        norm = jnp.sqrt(cdat_jax.TreeSpace().vdot(probe, probe))
        power = PowerIterationState(
            jax.tree.map(lambda p: p / norm, probe), 0 * norm, 0 * norm, jnp.int32(0)
        )
        carry = (params, solver.init(params), power)
        (params, _, _), columns = jax.lax.scan(step, carry, jnp.arange(steps))
        return loss(params), columns

    return program


def _base_transform(base: Base) -> optax.GradientTransformation:
    if base.second_moment is not None:
        return optax.adam(1.0, b1=base.momentum, b2=base.second_moment, eps=base.eps)
    return optax.chain(optax.trace(base.momentum), optax.scale(-1.0))


def _inverse_sqrt(base: Base, state: Any, params: Params) -> Params:
    """Return the diagonal of P^-1/2, where the base steps along ``-P^-1 m``."""
    if base.second_moment is None:
        return jax.tree.map(jnp.ones_like, params)
    adam = state[0]
    correction = 1 - base.second_moment**adam.count
    return jax.tree.map(lambda nu: 1 / jnp.sqrt(jnp.sqrt(nu / correction) + base.eps), adam.nu)


def _sharpen(
    loss: Loss,
    params: Params,
    base: Base,
    base_state: Any,
    power: PowerIterationState[Params],
    index: jax.Array,
) -> PowerIterationState[Params]:
    """Continue the power iteration on P^-1/2 H P^-1/2 at the present weights."""
    product = cdat_jax.hvp(loss, params)
    diagonal = _inverse_sqrt(base, base_state, params)

    def operator(v: Params, /) -> Params:
        inner = product(jax.tree.map(jnp.multiply, diagonal, v))
        return jax.tree.map(jnp.multiply, diagonal, inner)

    def once(_: jax.Array, state: PowerIterationState[Params]) -> PowerIterationState[Params]:
        return power_iteration(operator, state, num_matvecs=1, space=cdat_jax.TreeSpace())

    matvecs = jnp.where(index == 0, FIRST_MATVECS, MATVECS)
    result: PowerIterationState[Params] = jax.lax.fori_loop(0, matvecs, once, power)
    return result
