"""Losses that are one operation: rho of each element, reduced to a mean or a sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cdat_torch.curvature.replay.arithmetic import dot
from cdat_torch.curvature.replay.registry import Node, Pushforward, Tangent, linear, nonlinear

_NONE, _MEAN = 0, 1
_ATEN = torch.ops.aten


@linear("NllLossBackward0", "NllLoss2DBackward0")
def nll_loss(node: Node, dx: Tensor) -> Tangent:
    """Minus the weighted elements at the targets."""
    forward = _ATEN.nll_loss2d_forward if "2D" in node.name else _ATEN.nll_loss_forward
    names = ("target", "weight", "reduction", "ignore_index")
    return forward(dx, *map(node.saved, names))[0]  # type: ignore[no-any-return]


def loss_of_difference(*names: str) -> Callable[[Callable[[Node, Tensor], Any]], Any]:
    """Register ``factor(node, x - target) -> rho''`` of a loss rho(x - target)."""

    def register(factor: Callable[[Node, Tensor], Any]) -> Any:
        def apply(node: Node, dx: Tangent, dt: Tangent = None) -> Pushforward:
            tangent = (0.0 if dx is None else dx) - (0.0 if dt is None else dt)
            assert isinstance(tangent, Tensor)
            difference = node.saved("self") - node.saved("target")
            return _reduced(node, tangent, factor(node, difference), _slope_of_difference(node))

        nonlinear(*names)(apply)
        return factor

    return register


def loss_of_prediction(*names: str) -> Callable[[Callable[[Node], Tensor]], Any]:
    """Register ``factor(node) -> rho''`` of a loss rho(x) with a constant target."""

    def register(factor: Callable[[Node], Tensor]) -> Any:
        def apply(node: Node, dx: Tensor, *others: Tangent) -> Any:
            if any(other is not None for other in others):
                return NotImplemented
            return _reduced(node, dx, factor(node), node.vjp(torch.ones_like(node.zeros()))[0])

        nonlinear(*names)(apply)
        return factor

    return register


def _slope_of_difference(node: Node) -> Tangent:
    """Return rho'; backward gives it for the prediction or minus it for the target."""
    of_prediction, of_target = node.vjp(torch.ones_like(node.zeros()))
    return -of_target if of_prediction is None and of_target is not None else of_prediction


def _reduced(node: Node, dx: Tensor, factor: Any, slope: Tangent) -> Pushforward:
    """Return the reduced rho' x' and rho'' x'^2; `slope` is rho', `factor` is rho''."""
    reduction = node.saved("reduction")
    assert slope is not None
    if reduction == _NONE:
        return Pushforward(slope * dx, dot(node.adjoint * factor * dx, dx))
    weight = node.adjoint / (dx.numel() if reduction == _MEAN else 1)
    tangent = dot(slope, dx.expand_as(slope)).to(slope.dtype).view(node.shape())
    return Pushforward(tangent, weight.reshape(()) * dot(factor * dx, dx))


@loss_of_difference("MseLossBackward0")
def mse_loss(node: Node, difference: Tensor) -> float:
    """Rho'' = 2."""
    return 2.0


@loss_of_difference("SmoothL1LossBackward0")
def smooth_l1_loss(node: Node, difference: Tensor) -> Tensor:
    """Rho'' = 1 / beta below beta."""
    beta = node.saved("beta")
    inside = (difference.abs() < beta).to(difference.dtype)
    return torch.div(inside, beta) if beta else torch.zeros_like(inside)


@loss_of_difference("HuberLossBackward0")
def huber_loss(node: Node, difference: Tensor) -> Tensor:
    """Rho'' = 1 below delta."""
    delta: float = node.saved("delta")
    return (difference.abs() < delta).to(difference.dtype)


@loss_of_prediction("BinaryCrossEntropyWithLogitsBackward0")
def bce_with_logits(node: Node) -> Tensor:
    """Rho'' = s (1 - s) (1 + (w - 1) t), with s the sigmoid and w the weight of positives."""
    s = node.saved("self").sigmoid()
    curvature = s * (1 - s)
    positives, weight = node.saved("pos_weight"), node.saved("weight")
    if positives is not None:
        curvature = curvature * (1 + (positives - 1) * node.saved("target"))
    return curvature if weight is None else curvature * weight  # type: ignore[no-any-return]


@loss_of_prediction("BinaryCrossEntropyBackward0")
def bce(node: Node) -> Tensor:
    """Rho'' = t / p^2 + (1 - t) / (1 - p)^2."""
    p, target, weight = node.saved("self"), node.saved("target"), node.saved("weight")
    curvature = target / p**2 + (1 - target) / (1 - p) ** 2
    return curvature if weight is None else curvature * weight  # type: ignore[no-any-return]
