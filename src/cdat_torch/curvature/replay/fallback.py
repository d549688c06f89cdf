"""Any operation whose backward PyTorch can differentiate: a double backward of that node alone.

With v for the adjoints of the outputs, backward computes g(v) = J' v. It is linear in v, so its
derivative along v gives J x'; its derivative along the inputs, at v = lambda, gives the
second-order term <d<g(lambda), x'>, x'>. That is exact, and costs about three times the operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from cdat_torch.curvature.replay.arithmetic import dot
from cdat_torch.curvature.replay.registry import Edge, Node, Pushed, Tangent

CHECKED = frozenset(
    f"{name}Backward0"
    for name in (
        "Acos", "Acosh", "AdaptiveAvgPool3D", "AdaptiveMaxPool3D", "Addbmm", "Addcdiv", "Addcmul",
        "Addmv", "Addr", "AffineGridGenerator", "Aminmax", "Asin", "Asinh", "AsStrided", "Atan",
        "Atan2", "Atanh", "AvgPool3D", "BlockDiag", "Cat", "Ceil", "Celu", "ChannelShuffle",
        "CholeskyInverse", "CholeskySolve", "Clamp", "Col2Im", "Copysign", "Cosh", "Cummax",
        "Cummin", "Cumprod", "Cumsum", "Deg2Rad", "DiagEmbed", "Diagonal", "DiagonalScatter",
        "Digamma", "Dist", "Dot", "Erfc", "Erfinv", "Exp2", "Expm1", "Floor", "Fmax", "Fmin",
        "Frac", "FractionalMaxPool2D", "FractionalMaxPool3D", "Glu", "GridSampler2D", "Hardshrink",
        "Hypot", "Im2Col", "IndexAdd", "IndexCopy", "IndexFill", "IndexPut", "Kthvalue", "Lerp",
        "Lgamma", "LinalgCholeskyEx", "LinalgCross", "LinalgDet", "LinalgEigh",
        "LinalgHouseholderProduct", "LinalgInvEx", "LinalgMatrixExp", "LinalgPinv", "LinalgQr",
        "LinalgSlogdet", "LinalgSolveEx", "LinalgSolveTriangular", "LinalgSvd", "LinalgVectorNorm",
        "Log10", "Log2", "Logaddexp", "Logaddexp2", "Logcumsumexp", "Logit", "MaskedScatter",
        "MaskedSelect", "Maximum", "MaxPool3DWithIndices", "MaxUnpool2D", "MaxUnpool3D", "Minimum",
        "Mish", "Mv", "Nansum", "NanToNum", "PackPaddedSequence", "PixelShuffle", "PixelUnshuffle",
        "PreluKernel", "Prod", "Rad2Deg", "ReflectionPad1D", "ReflectionPad2D", "ReflectionPad3D",
        "Remainder", "ReplicationPad1D", "ReplicationPad2D", "ReplicationPad3D", "Roll", "Rot90",
        "Round", "RreluWithNoise", "Scatter", "ScatterAdd", "ScatterReduce", "SelectScatter",
        "Sign", "Sinc", "Sinh", "SliceScatter", "SoftMarginLoss", "Softshrink", "SparseAddmm",
        "SpecialEntr", "SpecialLogNdtr", "Std", "StdMean", "Take", "Tan", "Trace", "Trilinear",
        "Trunc", "Unfold", "UpsampleBicubic2D", "UpsampleBilinear2DAa", "UpsampleLinear1D",
        "UpsampleNearest1D", "UpsampleNearest3D", "UpsampleNearestExact2D", "UpsampleTrilinear3D",
        "Var", "VarMean", "Vdot", "Xlogy",
    )
) | {
    "ClampMaxBackward1", "ClampMinBackward1", "DivBackward2", "EluBackward1", "FmodBackward1",
    "LerpBackward1", "MaskedFillBackward1", "MaxBackward1", "MedianBackward1", "MinBackward1",
    "NormBackward1", "PowBackward1", "PowBackward2", "ProdBackward1", "ScatterBackward1",
    "torch::autograd::CopySlices",
}  # fmt: skip
"""Operations whose second derivative in PyTorch was compared with dense ones and is right."""


def push(node: Node, *tangents: Tangent) -> Pushed:
    """Carry the tangents through a node, and return the second-order term."""
    with torch.enable_grad():
        v = _adjoints(node)
        found = node.vjp(*v)
        edges: dict[Edge, Tensor] = {
            edge: t
            for edge, t in zip(node.autograd.next_functions, tangents, strict=False)
            if t is not None
        }
        with _apart([edge[0] for edge in edges]):
            inputs = [GradientEdge(*edge) for edge in edges]
            return _derived(found, tangents, v, inputs, list(edges.values()))


def push_through(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], node: Node, *tangents: Tangent
) -> Pushed:
    """Do the same for an operation that is given as a function of tensors."""
    with torch.enable_grad():
        x = [t.detach().requires_grad_() for t in inputs]
        (v,) = _adjoints(node)[:1]
        found = torch.autograd.grad(function(*x), x, v, create_graph=True)
        moved = [(a, t) for a, t in zip(x, tangents, strict=False) if t is not None]
        return _derived(found, tangents, [v], [a for a, _ in moved], [t for _, t in moved])


def _adjoints(node: Node) -> list[Tensor]:
    """Return the adjoints of all outputs as variables."""
    outputs = range(len(node.autograd._input_metadata))
    known = [node.adjoints[i] if i < len(node.adjoints) else None for i in outputs]
    return [
        (node.zeros(i) if adjoint is None else adjoint.detach()).requires_grad_()
        for i, adjoint in zip(outputs, known, strict=True)
    ]


def _derived(
    found: Sequence[Tensor | None],
    tangents: Sequence[Tangent],
    v: Sequence[Tensor],
    inputs: Sequence[Any],
    moved: Sequence[Tensor],
) -> Pushed:
    """Differentiate <g(v), x'>, where `found` is g(v), with respect to v and the inputs."""
    pairs = [
        (g, t.expand_as(g))
        for g, t in zip(found, tangents, strict=False)
        if g is not None and t is not None and g.requires_grad
    ]
    if not pairs:
        return Pushed([None] * len(v))
    derivatives = torch.autograd.grad(
        [g for g, _ in pairs],
        [*v, *inputs],
        [t for _, t in pairs],
        allow_unused=True,
        retain_graph=True,
    )
    second: Sequence[Tensor | None] = derivatives[len(v) :]
    pairs = [(h, t) for h, t in zip(second, moved, strict=True) if h is not None]
    terms = [dot(h, t).to(torch.float64) for h, t in pairs]
    return Pushed(list(derivatives[: len(v)]), torch.stack(terms).sum() if terms else None)


class _apart:  # noqa: N801
    """Keep derivatives that reach one input from flowing on into another input."""

    def __init__(self, nodes: list[Any]) -> None:
        several = len(set(nodes)) > 1
        inner = [n for n in dict.fromkeys(nodes) if "AccumulateGrad" not in n.name()]
        self._nodes = inner if several else []

    def __enter__(self) -> None:
        self._handles = [node.register_prehook(_zeros) for node in self._nodes]

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


def _zeros(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else torch.zeros_like(g) for g in gradients)
