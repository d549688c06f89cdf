"""Slope and curvature of a PyTorch loss along a direction.

Two methods give the exact curvature of the Hessian. One replays the autograd graph that the loss
has just built. The other is double backward: the gradient is taken with ``create_graph=True``, and
the product with the Hessian is one more reverse pass. Nested forward-mode differentiation is never
used: in PyTorch it silently drops terms in normalisation layers (pytorch/pytorch issues 196699,
196700, 198017). `cdat_torch.curvature.methods` holds all methods.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import cdat_core
from cdat_torch.curvature.autograd import LossFn, differentiate, evaluate, vector_jacobian
from cdat_torch.curvature.fallback import Methods, evaluate_with_fallback
from cdat_torch.curvature.methods import EvaluatedLoss
from cdat_torch.distributed import fsdp
from cdat_torch.kernels import further_differentiable, refuse_once_differentiable
from cdat_torch.side_effects import restore_on_error


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
        How to compute the curvature:

        - "auto": the first of "replay", "hvp" and "finite_difference" that works; it warns if it
          has to use finite differences;
        - "replay": <u, H u> by carrying u through the graph that the loss has built, exact and the
          cheapest; a RuntimeError names an operation that it does not know;
        - "hvp": <u, H u> by double backward, exact ("hessian" is the old, deprecated name);
        - "gauss_newton": <Ju, H_loss Ju>, where J is the derivative of the model's outputs and
          H_loss the Hessian of the loss of the outputs. `loss_fn` must be a
          `cdat_torch.CompositeLoss`; where that loss is convex the curvature is not negative;
        - "finite_difference": <u, H u> by a central difference of two gradients.

    Returns
    -------
    cdat_core.Measurement
        value f(w), slope <g, u>, curvature <u, H u>: 0-d float64 tensors on the device of the
        first parameter. For "gauss_newton" the curvature is that of the Gauss-Newton matrix.

    Raises
    ------
    TypeError, ValueError
        If the loss is not a scalar tensor with a graph, or the arguments do not match.
    RuntimeError
        If the method does not work for an operation of the loss and there is none to fall back on.

    Notes
    -----
    "replay" takes the graph as it is, fused attention included; but recurrent layers run without
    the kernels of oneDNN and cuDNN, and modules under ``torch.compile`` run uncompiled. "hvp" and
    "gauss_newton" use kernels that can be differentiated twice: scaled dot-product attention runs
    its math kernel, recurrent layers run their native one, and modules under ``torch.compile`` run
    uncompiled. With "hvp" this is the forward pass of the training step; with "gauss_newton" it is
    a separate pass, whose side effects are undone. A message of the logger "cdat_torch" at level
    INFO says once that the kernels change.

    A custom ``torch.autograd.Function`` must have a differentiable backward for "hvp", and a
    ``jvp`` or a differentiable backward for "gauss_newton". A backward marked
    ``once_differentiable`` is detected; a backward that computes with detached tensors is not.

    If parameters are sharded over processes (DTensors), `direction` must be sharded alike. All of
    these processes must call this, and all get the same numbers; under ``fully_shard`` these are
    means over the losses of the processes.

    For ``Embedding(padding_idx=...)`` the direction must be zero in the padding row. The direction
    of every ``torch.optim`` optimizer is, as long as the row itself is zero.

    Examples
    --------
    >>> import torch
    >>> from cdat_torch import measure
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> measurement = measure(lambda: (w**3).sum(), [w], [torch.tensor([0.0, 1.0])])
    >>> [float(x) for x in measurement[:3]]
    [9.0, 12.0, 12.0]
    """
    methods = Methods.named(curvature)
    params, direction = list(params), list(direction)
    _check_direction(params, direction)
    methods.current.check(loss_fn, "loss_fn")
    try:
        with restore_on_error(params) as effects:
            loss, (variables, grads, recording), methods = evaluate_with_fallback(
                loss_fn,
                lambda kernels: evaluate(loss_fn, "loss_fn", kernels=kernels),
                params,
                methods,
                effects,
            )
            direction = fsdp.redistribute_like(direction, variables)
            present = [i for i, g in enumerate(grads) if g is not None]
            w, u = [variables[i] for i in present], [direction[i] for i in present]
            g = [grad for grad in grads if grad is not None]
            evaluated = EvaluatedLoss(loss_fn, loss, g, w, u, effects.start, recording)
            (slope, second), _ = methods.first_that_works(
                lambda method: method.slope_and_curvature(evaluated)
            )
            scalars = [loss.detach().to(slope), slope, second]
            return cdat_core.Measurement(*fsdp.average(params, scalars))
    finally:
        fsdp.reshard(params)


def hvp(
    loss_fn: LossFn, params: Sequence[Tensor]
) -> cdat_core.HessianVectorProduct[Sequence[Tensor]]:
    """Return the Hessian-vector product of the loss at the present parameters.

    The loss is evaluated once; each product is one reverse pass through the graph of its gradient,
    which lives as long as the returned callable. Modules under ``fully_shard`` stay unsharded until
    a backward pass or their ``reshard()``.

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

    Raises
    ------
    NotImplementedError
        If a custom function of the loss is marked ``once_differentiable``.

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
    loss = evaluate(loss_fn, "loss_fn", kernels=further_differentiable)
    refuse_once_differentiable(loss)
    variables, grads, _ = differentiate(loss, params, create_graph=True)

    def product(v: Sequence[Tensor], /) -> Sequence[Tensor]:
        _check_direction(params, list(v))
        v = fsdp.redistribute_like(v, variables)
        pairs = [(g, x) for g, x in zip(grads, v, strict=True) if g is not None]
        outputs, vectors = [g for g, _ in pairs], [x for _, x in pairs]
        result = vector_jacobian(outputs, variables, vectors, retain_graph=True)
        return [h for h in fsdp.reduce_scatter(params, variables, result) if h is not None]

    return product


def _check_direction(params: Sequence[Tensor], direction: Sequence[Tensor]) -> None:
    if len(params) != len(direction):
        msg = f"direction must hold {len(params)} tensors like params, got {len(direction)}"
        raise ValueError(msg)
    for p, u in zip(params, direction, strict=True):
        if p.shape != u.shape:
            msg = f"direction must have the shapes of params, got {u.shape} for {p.shape}"
            raise ValueError(msg)
