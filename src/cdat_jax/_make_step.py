"""A whole training step, in which a measurement shares the forward pass of the gradient."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from cdat_jax._loops import cond
from cdat_jax._rate import ScaleByTunerState
from cdat_jax._spaces import PyTree

Step = Callable[..., tuple[PyTree, Any, Any]]
"""``step(params, state, *args, **kwargs) -> (params, state, loss)``."""


def make_step(
    loss_fn: Callable[..., Any],
    solver: optax.GradientTransformation | optax.MultiSteps,
    *,
    has_aux: bool = False,
) -> Step:
    """Return a training step: loss, gradient, measurement and update in one function.

    The result is that of `jax.value_and_grad`, ``solver.update`` and `optax.apply_updates`, but
    steps that measure cost less if not all of them do. In a loop written by hand, the gradient is
    computed before the condition on which the measurement depends, and XLA does not share results
    across that border: the measurement repeats the forward pass. Here both branches of the
    condition contain everything, the gradient included.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn(params, *args, **kwargs) -> loss``, or ``(loss, aux)`` with `has_aux`; also a
        `CompositeLoss`, or `accumulate` of a loss.
    solver : optax.GradientTransformation
        `cdat`, `tuned`, or any chain of Optax. Solvers that do not measure, and line searches, take
        a plain step.
    has_aux : bool
        Whether `loss_fn` returns auxiliary outputs too, as in `jax.value_and_grad`.

    Returns
    -------
    callable
        ``step(params, state, *args, **kwargs) -> (params, state, loss)``, and with `has_aux`
        ``(params, state, (loss, aux))``. The loss is that before the update. The function is pure
        and not compiled: put it into `jax.jit`, with ``donate_argnums=(0, 1)`` if you like, or into
        ``lax.scan``. Under ``jax.vmap`` both branches are computed.

    Raises
    ------
    TypeError
        If `loss_fn` is not callable, or `solver` is not a transformation.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, optax
    >>> from cdat_jax import cdat, make_step
    >>> loss_fn = lambda w, x: ((w - x) ** 2).mean()
    >>> solver = cdat(optax.adam(1.0), total_steps=100)
    >>> step = jax.jit(make_step(loss_fn, solver))
    >>> params = jnp.zeros(())
    >>> state = solver.init(params)
    >>> for _ in range(100):
    ...     params, state, loss = step(params, state, jnp.asarray([2.0, 4.0]))
    >>> round(float(loss), 2)
    1.0
    """
    if not callable(loss_fn):
        msg = f"loss_fn must be callable, got {loss_fn!r}; pass the function, not its result"
        raise TypeError(msg)
    if isinstance(solver, optax.MultiSteps):
        # Its own conversion drops the extra arguments.
        solver = optax.GradientTransformationExtraArgs(solver.init, solver.update)
    if not isinstance(solver, optax.GradientTransformation):
        msg = f"solver must be an optax.GradientTransformation, got {solver!r}"
        raise TypeError(msg)
    solver = optax.with_extra_args_support(solver)

    def step(params: PyTree, state: Any, *args: Any, **kwargs: Any) -> tuple[PyTree, Any, Any]:
        objective = _with_arguments(loss_fn, args, kwargs)

        def update(result: Any, grad: PyTree, **known: Any) -> tuple[PyTree, Any]:
            value = result[0] if has_aux else result
            found: tuple[PyTree, Any] = solver.update(
                grad, state, params, value=value, grad=grad, value_fn=objective, **known
            )
            return found

        evaluate = jax.value_and_grad(objective, has_aux=has_aux)

        def tune(due: bool) -> tuple[Any, PyTree, ScaleByTunerState]:
            result, grad = evaluate(params)
            _, new_state = update(result, grad, tuner_step=due)
            return result, grad, _tuners(new_state)[0]

        tuners = _tuners(state)
        if len(tuners) == 1:
            # Only the tuner leaves the condition: XLA would copy the parameters and the state of
            # the base on their way through it.
            measures: Any = tuners[0].due
            result, grad, found = cond(
                measures, functools.partial(tune, True), functools.partial(tune, False)
            )
            updates, new_state = update(result, grad, tuner_step=found)
        else:  # each of several tuners has its own condition
            result, grad = evaluate(params)
            updates, new_state = update(result, grad)
        return optax.apply_updates(params, updates), new_state, result

    return step


def _tuners(state: Any) -> list[ScaleByTunerState]:
    """Return the states of the tuners in the state of a solver that do not always measure."""

    def is_tuner(node: Any) -> bool:
        return isinstance(node, ScaleByTunerState)

    nodes = jax.tree.leaves(state, is_leaf=is_tuner)
    return [node for node in nodes if is_tuner(node) and node.due is not None]


def _with_arguments(
    loss_fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[PyTree], Any]:
    """Return ``params -> loss``; by name if possible, for the parts of a `CompositeLoss`."""
    try:
        parameters = list(inspect.signature(loss_fn).parameters.values())[1 : len(args) + 1]
    except (TypeError, ValueError):  # it has no signature
        parameters = []
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(names) < len(args):
        return lambda params: loss_fn(params, *args, **kwargs)
    return functools.partial(loss_fn, **dict(zip(names, args, strict=True)), **kwargs)
