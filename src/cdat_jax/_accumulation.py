"""The mean loss over micro-batches, with the memory of one of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cdat_jax._spaces import PyTree


def accumulate(value_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the mean of `value_fn` over micro-batches that are stacked in its arguments.

    The result is an objective like any other: value, gradient, curvature and the trials of a line
    search all come from it, so that a tuner measures once for each step and sees the whole batch.
    It runs one micro-batch after the other (``lax.scan``) and forgets the activations of each
    (``jax.checkpoint``), so the gradient takes one forward pass more.

    Parameters
    ----------
    value_fn : callable
        ``value_fn(params, ...) -> loss`` or ``(loss, aux)`` on one micro-batch, where the loss is a
        mean over its samples; also a `CompositeLoss`. Random keys are arguments too:
        ``jax.random.split(key, number)``. What the micro-batches have in common is fixed before
        with ``functools.partial``.

    Returns
    -------
    callable
        A function with the signature of `value_fn`. Every array among the arguments after `params`
        has the micro-batches along its first axis. The loss is their mean, each with the same
        weight; `aux` comes back stacked.

    Raises
    ------
    TypeError
        If `value_fn` is not callable.
    ValueError
        In a call, if an argument is not stacked, or not as often as the others.

    Notes
    -----
    Gradients of float16 and bfloat16 parameters are added up in float32.

    Micro-batches that do not have the same number of samples are padded to it, and weighted by
    `value_fn`: its loss is ``number of micro-batches * sum over its samples / number of all
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
    """What `accumulate` returns; a type of its own, so that `measure` finds the micro-batches."""

    def __init__(self, value_fn: Callable[..., Any]) -> None:
        functools.update_wrapper(self, value_fn, updated=())  # the signature, for extra arguments
        self.value_fn = value_fn

    def __repr__(self) -> str:
        return f"accumulate({self.value_fn!r})"

    def __call__(self, params: PyTree, /, *args: Any, **kwargs: Any) -> Any:
        """Return the mean loss, or the mean loss and the stacked auxiliary outputs."""
        # The gradients are added in the dtype of what the loop starts from.
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
    """Return the function of one micro-batch and the stacked arguments, if those are fixed."""
    if isinstance(value_fn, functools.partial) and not value_fn.args:
        function, keywords = value_fn.func, value_fn.keywords
        if isinstance(function, Accumulated):
            return function.value_fn, keywords
    return None


def _widened(leaf: Any) -> jax.Array:
    array = jnp.asarray(leaf)
    if jnp.issubdtype(array.dtype, jnp.inexact):
        array = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    return array


def _check_stacked(arguments: Any) -> None:
    """Raise a ValueError unless all arrays have a first axis of the same length."""
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
                f"{shapes}; fix what all micro-batches share with functools.partial before "
                "accumulate"
            )
            raise ValueError(msg)
