"""Slope and curvature of a PyTorch loss along a direction.

The exact way is double backward: the gradient is taken with ``create_graph=True`` on the graph the
loss has just built, and the product with the Hessian is one more reverse pass through it. Nested
forward-mode differentiation is never used: in PyTorch it silently drops terms in normalisation
layers (pytorch/pytorch issues 196699, 196700, 198017).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel

import cdat_core
from cdat_torch.reevaluation import RandomState, moved, random_state, without_trace
from cdat_torch.spaces import TensorListSpace

LossFn = Callable[[], Tensor]

METHODS = ("auto", "hessian", "finite_difference")


def check_method(curvature: str) -> None:
    """Raise a ValueError unless `curvature` names a way to compute it."""
    if curvature not in METHODS:
        msg = f"curvature must be one of {METHODS}, got {curvature!r}"
        raise ValueError(msg)


def measure(
    loss_fn: LossFn,
    params: Sequence[Tensor],
    direction: Sequence[Tensor],
    *,
    curvature: str = "auto",
) -> cdat_core.Measurement:
    """Return loss, slope and curvature along `direction` at the present parameters.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn() -> loss``, a scalar tensor with its graph, evaluated at the present `params`.
    params : sequence of Tensor
        The parameters w; those the loss does not depend on count as constants.
    direction : sequence of Tensor
        The update direction u, shaped like `params`.
    curvature : str
        "auto" is double backward, or finite differences of gradients (with a warning) where an
        operation has no second derivative; "hessian" and "finite_difference" demand one of the two.
        While the loss is evaluated for double backward, scaled dot-product attention uses its math
        kernel, the only one with a second derivative.

    Returns
    -------
    cdat_core.Measurement
        value f(w), slope <g, u>, curvature <u, H u>: 0-d float64 tensors on the device of the
        first parameter.

    Raises
    ------
    TypeError, ValueError
        If the loss is not a scalar tensor with a graph, or the arguments do not match.

    Examples
    --------
    >>> import torch
    >>> from cdat_torch import measure
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> measurement = measure(lambda: (w**3).sum(), [w], [torch.tensor([0.0, 1.0])])
    >>> [float(x) for x in measurement[:3]]
    [9.0, 12.0, 12.0]
    """
    check_method(curvature)
    params, direction = list(params), list(direction)
    _check_direction(params, direction)
    space = TensorListSpace()
    start = random_state(params)
    differentiated_twice = curvature != "finite_difference"
    loss = evaluate(loss_fn, "loss_fn", differentiated_twice=differentiated_twice)
    grads = gradients(loss, params, create_graph=differentiated_twice)
    present = [i for i, g in enumerate(grads) if g is not None]
    w, u = [params[i] for i in present], [direction[i] for i in present]
    g = [grad for grad in grads if grad is not None]
    slope = space.vdot([grad.detach() for grad in g], u)
    second, _ = directional_curvature(loss_fn, loss, g, w, u, method=curvature, start=start)
    return cdat_core.Measurement(loss.detach().to(slope), slope, second)


def hvp(
    loss_fn: LossFn, params: Sequence[Tensor]
) -> cdat_core.HessianVectorProduct[Sequence[Tensor]]:
    """Return the Hessian-vector product of the loss at the present parameters.

    The loss is evaluated once; each product is one reverse pass through the graph of its gradient,
    which lives as long as the returned callable.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn() -> loss``, a scalar tensor with its graph.
    params : sequence of Tensor
        The parameters.

    Returns
    -------
    cdat_core.HessianVectorProduct
        ``v -> H v`` on lists of tensors like `params`.

    Examples
    --------
    >>> import torch
    >>> from cdat_torch import hvp
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> product = hvp(lambda: (w**3).sum(), [w])
    >>> [float(x) for x in product([torch.ones(2)])[0]]
    [6.0, 12.0]
    """
    params = list(params)
    loss = evaluate(loss_fn, "loss_fn", differentiated_twice=True)
    grads = gradients(loss, params, create_graph=True)

    def product(v: Sequence[Tensor], /) -> Sequence[Tensor]:
        v = list(v)
        _check_direction(params, v)
        pairs = [(g, x) for g, x in zip(grads, v, strict=True) if g is not None and g.requires_grad]
        return _vector_jacobian(pairs, params, retain_graph=True)

    return product


def evaluate(loss_fn: LossFn, argument: str, *, differentiated_twice: bool) -> Tensor:
    """Call the user's loss with gradients on and check what comes back."""
    attention = sdpa_kernel(SDPBackend.MATH) if differentiated_twice else _nothing()
    with torch.enable_grad(), attention:
        loss = loss_fn()
    check_scalar(loss, argument)
    if not loss.requires_grad:
        msg = (
            f"{argument} must return a loss that depends on the parameters, got a tensor without a "
            "graph; do not detach it or compute it under torch.no_grad()"
        )
        raise ValueError(msg)
    return loss


def check_scalar(loss: Any, argument: str) -> None:
    """Raise unless `loss` is a real floating 0-d tensor."""
    if not isinstance(loss, Tensor):
        msg = (
            f"{argument} must return the loss as a tensor, got {loss!r}; end it with `return loss`"
            " (not loss.item(), and without calling backward)"
        )
        raise TypeError(msg)
    if loss.ndim != 0 or not loss.is_floating_point():
        msg = (
            f"{argument} must return a real scalar, got shape {tuple(loss.shape)} of {loss.dtype}; "
            "reduce it, for example with .mean()"
        )
        raise ValueError(msg)


def gradients(
    loss: Tensor, params: Sequence[Tensor], *, create_graph: bool
) -> tuple[Tensor | None, ...]:
    """Return the gradient of `loss`; None for parameters it does not depend on."""
    trainable = [p for p in params if p.requires_grad]
    if not trainable:
        msg = "params must hold at least one tensor that requires grad, got none"
        raise ValueError(msg)
    found = torch.autograd.grad(loss, trainable, create_graph=create_graph, allow_unused=True)
    if all(g is None for g in found):
        msg = "the loss does not depend on any of the params; is this the right model?"
        raise ValueError(msg)
    by_param = dict(zip(trainable, found, strict=True))
    return tuple(by_param.get(p) for p in params)


def directional_curvature(
    loss_fn: LossFn,
    loss: Tensor,
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    direction: Sequence[Tensor],
    *,
    method: str,
    start: RandomState,
) -> tuple[Tensor, str]:
    """Return <u, H u> and the method that gave it.

    Parameters
    ----------
    loss_fn : callable
        The loss; called again by finite differences only.
    loss : Tensor
        What it returned, with its graph.
    grads : sequence of Tensor
        The gradient, with its graph unless `method` is "finite_difference".
    params, direction : sequence of Tensor
        The parameters that have a gradient, and u.
    method : str
        One of `METHODS`.
    start : RandomState
        The random state from which `loss_fn` was evaluated.
    """
    space = TensorListSpace()
    if method != "finite_difference":
        pairs = [(g, u) for g, u in zip(grads, direction, strict=True) if g.requires_grad]
        try:
            _refuse_once_differentiable(loss)
            product = _vector_jacobian(pairs, params, retain_graph=False)
            return space.vdot(direction, product), "hessian"
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            if method == "hessian":
                raise
            warnings.warn(
                "the loss has an operation without a second derivative "
                f"({_first_line(error)}); the curvature comes from central finite differences of "
                "gradients instead: two further evaluations of the loss for each measurement",
                stacklevel=4,
            )

    def gradient_at(values: Sequence[Tensor]) -> list[Tensor]:
        with moved(params, values), without_trace(params, start):
            loss = evaluate(loss_fn, "loss_fn", differentiated_twice=False)
            found = gradients(loss, params, create_graph=False)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)]

    here = [p.detach().clone() for p in params]
    difference = cdat_core.finite_difference_hvp(gradient_at, here, step=_step(here), space=space)
    return space.vdot(direction, difference(list(direction))), "finite_difference"


def _vector_jacobian(
    pairs: Sequence[tuple[Tensor, Tensor]], params: Sequence[Tensor], *, retain_graph: bool
) -> list[Tensor]:
    """Return the derivative of ``sum <g_i, v_i>`` with respect to `params`."""
    if not pairs:  # the gradient is constant: a linear loss
        return [torch.zeros_like(p) for p in params]
    outputs, vectors = [g for g, _ in pairs], [v.to(g.dtype) for g, v in pairs]
    trainable = [p for p in params if p.requires_grad]
    found = torch.autograd.grad(
        outputs, trainable, grad_outputs=vectors, retain_graph=retain_graph, allow_unused=True
    )
    by_param = dict(zip(trainable, found, strict=True))
    products = [by_param.get(p) for p in params]
    return [torch.zeros_like(p) if h is None else h for h, p in zip(products, params, strict=True)]


def _refuse_once_differentiable(loss: Tensor) -> None:
    """Raise where double backward would silently drop a custom function's second derivative.

    PyTorch raises for a ``once_differentiable`` backward only if the gradient that flows into it
    has a graph itself; behind a linear loss it has none, and the term would just be missing.
    """
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
        if isinstance(node, BackwardCFunction):
            function = getattr(node, "_forward_cls", None)
            if hasattr(getattr(function, "backward", None), "__wrapped__"):
                msg = f"{function.__name__} is marked once_differentiable"
                raise NotImplementedError(msg)


def _check_direction(params: Sequence[Tensor], direction: Sequence[Tensor]) -> None:
    if len(params) != len(direction):
        msg = f"direction must hold {len(params)} tensors like params, got {len(direction)}"
        raise ValueError(msg)
    for p, u in zip(params, direction, strict=True):
        if p.shape != u.shape:
            msg = f"direction must have the shapes of params, got {u.shape} for {p.shape}"
            raise ValueError(msg)


def _step(params: Sequence[Tensor]) -> float:
    """Return the relative displacement that balances truncation and rounding of the gradients."""
    return float(max(torch.finfo(p.dtype).eps for p in params) ** (1 / 3))


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@contextmanager
def _nothing() -> Iterator[None]:
    yield
