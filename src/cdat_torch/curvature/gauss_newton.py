"""The Gauss-Newton curvature of a loss that is split into a model and a loss of its outputs.

With outputs z(w) and J = dz/dw, the Hessian of loss(z(w)) is J' H_loss J plus a term with second
derivatives of the model. The Gauss-Newton matrix is the first part: <Ju, H_loss Ju> needs one
forward-mode derivative of the model along u, and second derivatives of the loss only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from cdat_torch.curvature.autograd import check_scalar, vector_jacobian
from cdat_torch.interrupts import deliver_interrupts
from cdat_torch.kernels import (
    further_differentiable,
    refuse_once_differentiable,
    say_once,
)
from cdat_torch.pytorch_internals import pytree, sets_grad_mode, without_forward_gradients
from cdat_torch.side_effects import RandomState, without_side_effects
from cdat_torch.spaces import TensorListSpace

_make_dual: Callable[[Tensor, Tensor], Tensor] = forward_ad.make_dual
_unpack: Callable[[Tensor], tuple[Tensor, Tensor | None]] = forward_ad.unpack_dual


class CompositeLoss:
    """A loss that is a function of the model's outputs: ``loss_fn(model_fn())``.

    Called without arguments it returns the loss, so it can be the closure of a step or the
    `loss_fn` of `cdat_torch.measure`. ``curvature="gauss_newton"`` requires it.

    Parameters
    ----------
    model_fn : callable
        ``model_fn() -> outputs``, evaluated at the present parameters: a tensor, or tuples, lists
        and dicts of tensors.
    loss_fn : callable
        ``loss_fn(outputs) -> loss``, a scalar tensor. It must depend on the parameters through
        `outputs` only; for weight decay as a part of the loss, let `model_fn` return the weights
        besides its other outputs. If it is convex, the Gauss-Newton curvature is nonnegative.

    Raises
    ------
    TypeError
        If an argument is not callable.

    Examples
    --------
    >>> import torch
    >>> from cdat_torch import CompositeLoss, measure
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> loss = CompositeLoss(lambda: w**2, lambda z: 0.5 * (z - 5.0).square().sum())
    >>> u = [torch.tensor([0.0, 1.0])]
    >>> float(measure(loss, [w], u, curvature="gauss_newton").curvature)
    16.0
    >>> float(measure(loss, [w], u, curvature="hvp").curvature)
    14.0
    """

    def __init__(self, model_fn: Callable[[], Any], loss_fn: Callable[[Any], Tensor]) -> None:
        for name, value in (("model_fn", model_fn), ("loss_fn", loss_fn)):
            if not callable(value):
                msg = f"{name} must be callable, got {value!r}; pass a function, not its result"
                raise TypeError(msg)
        self.model_fn = model_fn
        self.loss_fn = loss_fn
        self._outputs: list[Any] | None = None

    def __call__(self) -> Tensor:
        """Return the loss at the present parameters.

        Returns
        -------
        Tensor
            ``loss_fn(model_fn())``.
        """
        outputs = self.model_fn()
        if self._outputs is not None:
            # Views distinguish what the loss reads of a tensor from what the model reads of it.
            outputs = pytree.tree_map(lambda z: z.view_as(z) if _depends(z) else z, outputs)
            self._outputs.append(outputs)
        return self.loss_fn(outputs)

    @contextmanager
    def recording_outputs(self) -> Iterator[list[Any]]:
        """Give a list that collects the outputs of the calls in the block."""
        before, self._outputs = self._outputs, []
        try:
            yield self._outputs
        finally:
            self._outputs = before


def tensors_of(outputs: Any) -> list[Tensor]:
    """Return the tensors among outputs that depend on something."""
    return [z for z in pytree.tree_leaves(outputs) if _depends(z)]


def gauss_newton_curvature(
    composite: CompositeLoss,
    params: Sequence[Tensor],
    direction: Sequence[Tensor],
    start: RandomState,
) -> Tensor:
    """Return <Ju, H_loss Ju>; parameters, ``.grad``, buffers and random state are as before.

    Parameters
    ----------
    composite : CompositeLoss
        The loss.
    params, direction : sequence of Tensor
        The parameters and u.
    start : RandomState
        The random state from which the loss was evaluated.
    """
    try:
        with without_side_effects(params, start), further_differentiable():
            with _tangents(params, direction):
                # Interrupts stay deferred: one raised in here might leave the function mode on.
                outputs, tangents = _primals_and_tangents(composite.model_fn())
            return _second_derivative(composite, outputs, tangents, params)
    except (torch.OutOfMemoryError, _NotCompositeError):
        raise
    except RuntimeError as error:
        reason = first_line(error)
    try:
        with without_side_effects(params, start), further_differentiable(), torch.enable_grad():
            with deliver_interrupts():
                outputs = composite.model_fn()
            outputs, tangents = _by_double_backward(outputs, params, direction)
            curvature = _second_derivative(composite, outputs, tangents, params)
    except RuntimeError as error:
        error.add_note(
            'curvature="gauss_newton" needs a model with forward-mode or second derivatives, and a '
            'loss_fn with second derivatives; "finite_difference" needs first derivatives only'
        )
        raise
    say_once(
        logging.WARNING,
        f"an operation of the model has no forward-mode derivative ({reason}); the Gauss-Newton "
        "curvature takes two reverse passes instead",
    )
    return curvature


class _NotCompositeError(ValueError):
    """The loss does not split as promised."""


def _second_derivative(
    composite: CompositeLoss,
    outputs: Any,
    tangents: Sequence[Tensor | None],
    params: Sequence[Tensor],
) -> Tensor:
    """Return <t, H_loss t>; `tangents` holds t for each leaf of `outputs`, or None for zero."""
    leaves, structure = pytree.tree_flatten(outputs)
    leaves = [
        z.detach().requires_grad_(m is not None) if _is_tensor(z) else z
        for z, m in zip(leaves, tangents, strict=True)
    ]
    z = [leaf for leaf, m in zip(leaves, tangents, strict=True) if m is not None]
    tangent = [m for m in tangents if m is not None]
    if not z:
        msg = (
            "model_fn must return outputs that depend on the parameters, as a tensor or tuples, "
            f"lists and dicts of tensors, got {_kind(outputs)} without a tensor that does"
        )
        raise _NotCompositeError(msg)
    with torch.enable_grad():
        with deliver_interrupts():
            loss = composite.loss_fn(pytree.tree_unflatten(leaves, structure))
        check_scalar(loss, "loss_fn")
        if not loss.requires_grad:
            return TensorListSpace().vdot(tangent, [torch.zeros_like(m) for m in tangent])
        refuse_once_differentiable(loss)
        trainable = [p for p in params if p.requires_grad]
        with deliver_interrupts():
            found: tuple[Tensor | None, ...] = torch.autograd.grad(
                loss, [*z, *trainable], create_graph=True, allow_unused=True
            )
        if any(g is not None for g in found[len(z) :]):
            msg = (
                "loss_fn must depend on the parameters through the outputs only, but it uses some "
                "directly; let model_fn return them as a part of its outputs"
            )
            raise _NotCompositeError(msg)
        pairs = [(g, m) for g, m in zip(found[: len(z)], tangent, strict=True) if g is not None]
        product = vector_jacobian([g for g, _ in pairs], z, [m for _, m in pairs])
    return TensorListSpace().vdot(tangent, product)


def _primals_and_tangents(outputs: Any) -> tuple[Any, list[Tensor | None]]:
    leaves, structure = pytree.tree_flatten(outputs)
    pairs = [_unpack(z) if _is_tensor(z) else (z, None) for z in leaves]
    tangents = [None if t is None else t.detach() for _, t in pairs]
    return pytree.tree_unflatten([z for z, _ in pairs], structure), tangents


def _by_double_backward(
    outputs: Any, params: Sequence[Tensor], direction: Sequence[Tensor]
) -> tuple[Any, list[Tensor | None]]:
    """Return the outputs and Ju, as the derivative of <J'v, u> with respect to v."""
    leaves = pytree.tree_leaves(outputs)
    z = [leaf for leaf in leaves if _is_tensor(leaf) and leaf.requires_grad]
    if not z:
        return outputs, [None] * len(leaves)
    for leaf in z:
        refuse_once_differentiable(leaf)
    v = [torch.zeros_like(leaf, requires_grad=True) for leaf in z]
    trainable = [p for p in params if p.requires_grad]
    with deliver_interrupts():
        transposed: tuple[Tensor | None, ...] = torch.autograd.grad(
            z, trainable, v, create_graph=True, allow_unused=True
        )
    u = [u for p, u in zip(params, direction, strict=True) if p.requires_grad]
    pairs = [(t, u) for t, u in zip(transposed, u, strict=True) if t is not None]
    products = vector_jacobian([t for t, _ in pairs], v, [u for _, u in pairs])
    found = dict(zip(map(id, z), products, strict=True))
    return outputs, [found.get(id(leaf)) for leaf in leaves]


@contextmanager
def _tangents(params: Sequence[Tensor], direction: Sequence[Tensor]) -> Iterator[None]:
    """Give `params` the tangents `direction` for forward-mode differentiation inside the block.

    This happens in place, so that any user's module sees the tangents; values and storage stay the
    same. Inside the block no graph is recorded.
    """
    trainable = [p for p in params if p.requires_grad and p.is_leaf]
    try:
        with forward_ad.dual_level():
            with torch.no_grad():
                for p, u in zip(params, direction, strict=True):
                    p.copy_(_make_dual(p.detach(), u.to(p)))
            for p in trainable:
                p.requires_grad_(False)
            with torch.enable_grad(), _ForwardFollowsGradMode():
                yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


class _ForwardFollowsGradMode(TorchFunctionMode):
    """Treat code under ``no_grad`` as constant in forward mode too, as reverse mode does."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        if torch.is_grad_enabled() or sets_grad_mode(func):
            return func(*args, **(kwargs or {}))
        with without_forward_gradients():
            return func(*args, **(kwargs or {}))


def _depends(value: Any) -> bool:
    return _is_tensor(value) and value.requires_grad


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _kind(value: Any) -> str:
    return type(value).__name__


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
