"""Checks of the arguments of an update, and which of them go to the objective."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cdat_core import tuners
from cdat_core.extend import validation
from cdat_core.tuners import Tuner
from cdat_jax._curvature import check_like
from cdat_jax._spaces import PyTree


def with_schedule(tuner_or_search: Any, every: Any) -> Any:
    """Return a tuner measured in each `every`-th step; None keeps its own schedule.

    `every` may be an array (a traced hyperparameter). A line search stays what it is.
    """
    if every is None:
        return tuner_or_search
    if not (isinstance(every, jax.Array) and jnp.issubdtype(every.dtype, jnp.integer)):
        every = validation.count("every", every)
    if not isinstance(tuner_or_search, Tuner):
        return tuner_or_search
    if not isinstance(every, jax.Array) and every == 1:
        return tuner_or_search._replace(measures=None)
    return tuners.every(tuner_or_search, every)


def check_arguments(params: PyTree, updates: PyTree, grad: PyTree, value: Any) -> None:
    """Raise a ValueError if the arguments of an update do not fit together."""
    if isinstance(value, tuple | list | dict):
        msg = (
            f"value must be a scalar, got a {type(value).__name__}; "
            "if the loss has auxiliary outputs, pass the loss alone"
        )
        raise ValueError(msg)
    if jnp.shape(value) != ():
        msg = f"value must be a scalar, got shape {jnp.shape(value)}"
        raise ValueError(msg)
    try:
        check_like(params, updates, name="updates")
        check_like(params, grad, name="grad")
    except ValueError as error:
        nodes = jax.tree.leaves(params, is_leaf=_is_masked)
        if not any(map(_is_masked, nodes)):
            raise
        msg = (
            "params must be all parameters of value_fn, got some of them; use optax.masked and "
            "optax.multi_transform on the base alone: "
            "optax.chain(optax.multi_transform(...), scale_by_tuner(...))"
        )
        raise ValueError(msg) from error


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def bind(value_fn: Callable[..., Any], extra_args: dict[str, Any]) -> Callable[[PyTree], Any]:
    """Fix the extra arguments that `value_fn` takes; ``optax.chain`` passes all to each member."""
    parameters = inspect.signature(value_fn).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        taken = extra_args
    else:
        names = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        taken = {name: value for name, value in extra_args.items() if name in names}
    return functools.partial(value_fn, **taken)
