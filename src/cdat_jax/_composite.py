"""A loss split into a model and a function of its outputs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, Signature
from typing import Any

import jax

from cdat_jax._spaces import PyTree

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


class CompositeLoss:
    """A loss that is a function of the model's outputs: ``loss_fn(model_fn(params))``.

    Use it like any other `value_fn`, in ``jax.value_and_grad`` and in the `update` of
    `scale_by_tuner`. ``curvature="gauss_newton"`` requires it.

    The arguments of a batch follow `params`. A keyword argument goes to the function that has a
    parameter of that name, or to both; if neither has, to each function with ``**kwargs``.
    Positional arguments fill the parameters without a default value: first those of `model_fn`,
    then those of `loss_fn` that `model_fn` does not have. If `model_fn` takes ``*args`` it gets all
    positional arguments.

    Parameters
    ----------
    model_fn : callable
        ``model_fn(params, ...) -> outputs``, a pytree of arrays, at least one of them floating or
        complex.
    loss_fn : callable
        ``loss_fn(outputs, ...) -> loss``, a scalar. It must depend on the parameters through
        `outputs` only. To include weight decay in the loss, let `model_fn` return the weights among
        its outputs. If `loss_fn` is convex, the Gauss-Newton curvature is nonnegative.

    Raises
    ------
    TypeError
        If an argument is not a callable of the kind described.

    Examples
    --------
    >>> import functools
    >>> import jax, jax.numpy as jnp
    >>> from cdat_jax import CompositeLoss, measure
    >>> loss = CompositeLoss(lambda w, x: x * w**2, lambda z, y: 0.5 * ((z - y) ** 2).sum())
    >>> w, u = jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0])
    >>> value, grad = jax.value_and_grad(loss)(w, 1.0, 5.0)
    >>> float(value)
    8.5
    >>> on_batch = functools.partial(loss, x=1.0, y=5.0)
    >>> float(measure(on_batch, w, u, curvature="gauss_newton").curvature)
    16.0
    >>> float(measure(on_batch, w, u).curvature)
    14.0
    """

    def __init__(self, model_fn: Callable[..., PyTree], loss_fn: Callable[..., Any]) -> None:
        params, model = _parameters("model_fn", model_fn)
        _, loss = _parameters("loss_fn", loss_fn)
        self.model_fn = model_fn
        self.loss_fn = loss_fn
        loss = [p for p in loss if p.kind is not Parameter.VAR_POSITIONAL]
        if any(p.name == params for p in loss):
            msg = (
                "loss_fn must depend on the parameters through the outputs only, but it takes "
                f"{params!r}, the parameters of model_fn; let model_fn return them as outputs"
            )
            raise TypeError(msg)
        self._model, self._loss = Signature(model), Signature(loss)
        self._extra = _merged(model, loss)
        first = Parameter(params, Parameter.POSITIONAL_ONLY)
        # Optax and JAX call inspect.signature.
        self.__signature__ = Signature([first, *self._extra.parameters.values()])

    def __repr__(self) -> str:
        return f"CompositeLoss({self.model_fn!r}, {self.loss_fn!r})"

    def __call__(self, params: PyTree, /, *args: Any, **kwargs: Any) -> jax.Array:
        """Return the loss at `params`.

        Parameters
        ----------
        params : pytree
            The parameters.
        *args, **kwargs
            The other arguments of `model_fn` and `loss_fn`.

        Returns
        -------
        jax.Array
            ``loss_fn(model_fn(params, ...), ...)``.
        """
        model, loss = self._parts(*args, **kwargs)
        value: jax.Array = loss(model(params))
        return value

    def _parts(
        self, *args: Any, **kwargs: Any
    ) -> tuple[Callable[[PyTree], PyTree], Callable[[PyTree], Any]]:
        """Return ``params -> outputs`` and ``outputs -> loss`` with the other arguments fixed."""
        given = self._extra.bind(*args, **kwargs).arguments
        return _fixed(self.model_fn, self._model, given), _fixed(self.loss_fn, self._loss, given)


def split(value_fn: Any) -> tuple[Callable[[PyTree], PyTree], Callable[[PyTree], Any]]:
    """Return the parts of a `CompositeLoss`, or of a ``functools.partial`` of one.

    Raises
    ------
    TypeError
        If `value_fn` is anything else.
    """
    composite: Any = value_fn
    keywords: dict[str, Any] = {}
    # Python merges nested partials, except if the inner one has attributes.
    while isinstance(composite, functools.partial) and not composite.args:
        composite, keywords = composite.func, {**composite.keywords, **keywords}
    if not isinstance(composite, CompositeLoss):
        msg = (
            'value_fn must be a CompositeLoss for curvature="gauss_newton", or a functools.partial '
            f"of one with keyword arguments only, got {value_fn!r}; write the loss as "
            "CompositeLoss(model_fn, loss_fn), and put jax.jit around the step, not the loss"
        )
        raise TypeError(msg)
    return composite._parts(**keywords)


def _parameters(name: str, function: Any) -> tuple[str, list[Parameter]]:
    """Return the name of the first parameter, and the other parameters."""
    if not callable(function):
        msg = f"{name} must be callable, got {function!r}; pass a function, not its result"
        raise TypeError(msg)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError as error:
        msg = f"{name} must have a signature, got {function!r}; wrap it in a function"
        raise TypeError(msg) from error
    if parameters and parameters[0].kind in _POSITIONAL:
        return parameters[0].name, parameters[1:]
    if parameters and parameters[0].kind is Parameter.VAR_POSITIONAL:
        return "params", parameters
    msg = f"{name} must take a positional argument first, got {function!r}"
    raise TypeError(msg)


def _merged(model: Iterable[Parameter], loss: Iterable[Parameter]) -> Signature:
    """Return the signature of the arguments after `params`."""
    star = [p for p in model if p.kind is Parameter.VAR_POSITIONAL]
    named = [p for p in (*model, *loss) if p.kind in (*_POSITIONAL, Parameter.KEYWORD_ONLY)]
    if star:
        positional = {p.name: p for p in model if p.kind in _POSITIONAL}
    else:
        positional = {
            p.name: p.replace(kind=Parameter.POSITIONAL_OR_KEYWORD)
            for p in named
            if p.kind in _POSITIONAL and p.default is Parameter.empty
        }
    keywords: dict[str, Parameter] = {}
    for p in named:
        # A keyword is required if one of the two functions requires it.
        if p.name not in positional and (p.name not in keywords or p.default is Parameter.empty):
            keywords[p.name] = p.replace(kind=Parameter.KEYWORD_ONLY)
    others = []
    if any(p.kind is Parameter.VAR_KEYWORD for p in (*model, *loss)):
        others = [Parameter("kwargs", Parameter.VAR_KEYWORD)]
    return Signature([*positional.values(), *star, *keywords.values(), *others])


def _fixed(
    function: Callable[..., Any], signature: Signature, given: Mapping[str, Any]
) -> Callable[[Any], Any]:
    """Return `function` of its first argument alone; the others are taken from `given`."""
    arguments = {}
    for name, parameter in signature.parameters.items():
        key = "kwargs" if parameter.kind is Parameter.VAR_KEYWORD else name
        if key in given:
            arguments[name] = given[key]
    bound = inspect.BoundArguments(signature, arguments)
    return lambda first: function(first, *bound.args, **bound.kwargs)
