"""A loss that is split into a model and a loss of its outputs."""

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

    It is a `value_fn` like any other, for ``jax.value_and_grad`` and for the `update` of
    `scale_by_tuner`, and what ``curvature="gauss_newton"`` needs.

    The arguments of a batch follow `params`. By keyword each one goes to the function that has a
    parameter of that name, or to both; names that neither has go to those with ``**kwargs``.
    By position they fill the parameters without a default value: those of `model_fn` first, then
    those that `loss_fn` alone has. If `model_fn` takes ``*args`` it gets all positional ones.

    Parameters
    ----------
    model_fn : callable
        ``model_fn(params, ...) -> outputs``, a pytree of arrays, at least one of them of floating
        point or complex.
    loss_fn : callable
        ``loss_fn(outputs, ...) -> loss``, a scalar. It depends on the parameters through `outputs`
        only; for weight decay as a part of the loss let `model_fn` return the weights beside its
        other outputs. Where it is convex the Gauss-Newton curvature is nonnegative.

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
                f"{params!r}, as model_fn calls them; let model_fn return them beside its outputs"
            )
            raise TypeError(msg)
        self._model, self._loss = Signature(model), Signature(loss)
        self._extra = _merged(model, loss)
        first = Parameter(params, Parameter.POSITIONAL_ONLY)
        # What inspect.signature tells Optax and JAX.
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
            Further arguments of `model_fn` and `loss_fn`.

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
        """Return ``params -> outputs`` and ``outputs -> loss`` with the further arguments fixed."""
        given = self._extra.bind(*args, **kwargs).arguments
        return _fixed(self.model_fn, self._model, given), _fixed(self.loss_fn, self._loss, given)


def split(value_fn: Any) -> tuple[Callable[[PyTree], PyTree], Callable[[PyTree], Any]]:
    """Return the parts of a `CompositeLoss`, also of a ``functools.partial`` that fixes a batch.

    Raises
    ------
    TypeError
        If `value_fn` is anything else.
    """
    composite: Any = value_fn
    keywords: dict[str, Any] = {}
    # Python makes one partial of nested ones, but not where the inner has attributes.
    while isinstance(composite, functools.partial) and not composite.args:
        composite, keywords = composite.func, {**composite.keywords, **keywords}
    if not isinstance(composite, CompositeLoss):
        msg = (
            'value_fn must be a CompositeLoss for curvature="gauss_newton", or a functools.partial '
            f"of one with keyword arguments only, got {value_fn!r}; write the loss as "
            "CompositeLoss(model_fn, loss_fn), and apply jax.jit around the step"
        )
        raise TypeError(msg)
    return composite._parts(**keywords)


def _parameters(name: str, function: Any) -> tuple[str, list[Parameter]]:
    """Return the name of the first parameter, and the others."""
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
    """Return the signature of the arguments that follow the parameters."""
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
        # Required by one of the two is required.
        if p.name not in positional and (p.name not in keywords or p.default is Parameter.empty):
            keywords[p.name] = p.replace(kind=Parameter.KEYWORD_ONLY)
    others = []
    if any(p.kind is Parameter.VAR_KEYWORD for p in (*model, *loss)):
        others = [Parameter("kwargs", Parameter.VAR_KEYWORD)]
    return Signature([*positional.values(), *star, *keywords.values(), *others])


def _fixed(
    function: Callable[..., Any], signature: Signature, given: Mapping[str, Any]
) -> Callable[[Any], Any]:
    """Return `function` as one of its first argument, with what it takes of `given`."""
    arguments = {}
    for name, parameter in signature.parameters.items():
        key = "kwargs" if parameter.kind is Parameter.VAR_KEYWORD else name
        if key in given:
            arguments[name] = given[key]
    bound = inspect.BoundArguments(signature, arguments)
    return lambda first: function(first, *bound.args, **bound.kwargs)
