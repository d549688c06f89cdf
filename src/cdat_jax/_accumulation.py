"""The mean loss over micro-batches, in the memory of one of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cdat_jax._spaces import PyTree


def accumulate(value_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the mean of `value_fn` over micro-batches stacked in its arguments.

    The result is an objective like any other. Value, gradient, curvature and the trials of a line
    search all come from it, so a tuner measures once per step and on the whole batch. It runs the
    micro-batches one after the other (``lax.scan``) and recomputes the activations of each in the
    backward pass (``jax.checkpoint``), so the gradient takes one more forward pass.

    Parameters
    ----------
    value_fn : callable
        ``value_fn(params, ...) -> loss`` or ``(loss, aux)`` on one micro-batch, where the loss is a
        mean over its samples; also a `CompositeLoss`. Random keys are stacked like data:
        ``jax.random.split(key, number)``. Arguments that all micro-batches share must be fixed
        beforehand with ``functools.partial``.

    Returns
    -------
    callable
        A function with the signature of `value_fn`. The first axis of every array in the arguments
        after `params` runs over the micro-batches. The loss is their mean, with equal weights;
        `aux` is stacked.

    Raises
    ------
    TypeError
        If `value_fn` is not callable.
    ValueError
        In a call, if the first axes of the arguments do not have the same length.

    Notes
    -----
    Gradients of float16 and bfloat16 parameters are summed in float32.

    Micro-batches of different sizes must be padded to one size and weighted by `value_fn`: the loss
    of a micro-batch is then ``number of micro-batches * sum over its samples / number of all
    samples``.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from cdat_jax import accumulate
    >>> loss = lambda w, x: ((w - x) ** 2).mean()
    >>> x = jnp.arange(6.0)
    >>> value, grad = jax.value_and_grad(accumulate(loss))(1.0, x.reshape(3, 2))
    >>> round(float(value), 4), round(float(loss(1.0, x)), 4), round(float(grad), 4)
    (5.1667, 5.1667, -3.0)
    """
    if not callable(value_fn):
        msg = f"value_fn must be callable, got {value_fn!r}"
        raise TypeError(msg)
    return Accumulated(value_fn)


class Accumulated:
    """The result of `accumulate`; a class, so that `measure` finds the micro-batches."""

    def __init__(self, value_fn: Callable[..., Any]) -> None:
        functools.update_wrapper(self, value_fn, updated=())  # the signature, for extra arguments
        self.value_fn = value_fn

    def __repr__(self) -> str:
        return f"accumulate({self.value_fn!r})"

    def __call__(self, params: PyTree, /, *args: Any, **kwargs: Any) -> Any:
        """Return the mean loss, or the mean loss and the stacked auxiliary outputs."""
        # The gradients are summed in the dtype of the parameters that the loop takes.
        wide = jax.tree.map(_widened, params)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def on_one(wide: PyTree, micro: Any) -> Any:
            narrow = jax.tree.map(lambda w, p: w.astype(jnp.asarray(p).dtype), wide, params)
            return self.value_fn(narrow, *micro[0], **micro[1])

        result = over_micro_batches(functools.partial(on_one, wide), (args, kwargs))
        if isinstance(result, tuple) and len(result) == 2:
            return jnp.mean(result[0], axis=0), result[1]
        return jax.tree.map(lambda values: jnp.mean(values, axis=0), result)


def over_micro_batches(function: Callable[[Any], Any], stacked: Any) -> Any:
    """Return the stacked results of `function` on each micro-batch, one after the other."""
    _check_stacked(stacked)
    _, results = jax.lax.scan(lambda _, micro: (None, function(micro)), None, stacked)
    return results


def micro_batches(value_fn: Any) -> tuple[Callable[..., Any], dict[str, Any]] | None:
    """Return the function of one micro-batch and the stacked arguments of an accumulated loss.

    None unless `value_fn` is a ``functools.partial`` of one with keyword arguments only.
    """
    keywords: dict[str, Any] = {}
    # Python merges nested partials, except if the inner one has attributes.
    while isinstance(value_fn, functools.partial) and not value_fn.args:
        value_fn, keywords = value_fn.func, {**value_fn.keywords, **keywords}
    return (value_fn.value_fn, keywords) if isinstance(value_fn, Accumulated) else None


def _widened(leaf: Any) -> jax.Array:
    array = jnp.asarray(leaf)
    if jnp.issubdtype(array.dtype, jnp.inexact):
        array = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    return array


def _check_stacked(arguments: Any) -> None:
    """Raise a ValueError unless the first axes of all arrays have the same length."""
    found = jax.tree_util.tree_leaves_with_path(arguments)
    if not found:
        msg = "an accumulated loss must be called with stacked micro-batches, got params alone"
        raise ValueError(msg)
    for path, leaf in found:
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != jnp.shape(found[0][1])[0]:
            shapes = ", ".join(str(jnp.shape(leaf)) for _, leaf in found)
            msg = (
                "the arguments of an accumulated loss must be stacked micro-batches, as many in "
                f"each, got shape {jnp.shape(leaf)} at {jax.tree_util.keystr(path)} among shapes "
                f"{shapes}; fix arguments that all micro-batches share with functools.partial "
                "before accumulate"
            )
            raise ValueError(msg)
