"""Complete optimizers of Optax: each replaces base and rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
import optax.contrib

from cdat_lab.contenders import ADAMW_DECAY, ADAMW_WARMUP, cosine_factor


def solver(
    name: str, steps: int, hyperparameters: Mapping[str, Any]
) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer; its hyperparameters may be traced.

    Parameters
    ----------
    name : str
        `Contender.optimizer`.
    steps : int
        Length of the run.
    hyperparameters : mapping of str to number or array
        Those of the contender.

    Returns
    -------
    optax.GradientTransformationExtraArgs
    """

    def cosine(step: Any) -> Any:
        return cosine_factor(step, steps, ADAMW_WARMUP)

    def without_warmup(step: Any) -> Any:
        return cosine_factor(step, steps, 0.0)

    made: Any
    if name == "adamw-cosine":
        peak = hyperparameters["peak"]
        made = optax.adamw(lambda step: peak * cosine(step), weight_decay=ADAMW_DECAY)
    elif name == "dog":
        made = optax.contrib.dog()
    elif name == "mechanic":
        made = optax.contrib.mechanize(optax.adamw(cosine, weight_decay=ADAMW_DECAY))
    elif name == "prodigy":
        made = optax.contrib.prodigy(1.0)
    elif name == "prodigy-cosine":
        made = optax.contrib.prodigy(without_warmup)
    else:
        made = optax.contrib.schedule_free_adamw(hyperparameters["learning_rate"])
    return optax.with_extra_args_support(made)


def rate(name: str, state: Any) -> Any:
    """Return the rate that an optimizer has estimated; NaN if it estimates none."""
    return state.estim_lr if name.startswith("prodigy") else jnp.nan


def evaluated(name: str | None, state: Any, params: Any) -> Any:
    """Return the parameters at which to evaluate an optimizer."""
    if name == "schedule-free":
        return optax.contrib.schedule_free_eval_params(state, params)
    return params
