"""The rule for operations without their own: a double backward of that node alone.

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

from cdat_torch import pytorch_internals
from cdat_torch.curvature.replay.arithmetic import dot
from cdat_torch.curvature.replay.registry import Edge, Node, Pushforward, Tangent

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
"""Operations whose second derivative in PyTorch agrees with a dense one, as the tests show."""


def apply(node: Node, *tangents: Tangent) -> Pushforward:
    """Return the tangents of the outputs and the second-order term."""
    with torch.enable_grad():
        v = _adjoints(node)
        g = node.vjp(*v)
        edges: dict[Edge, Tensor] = {
            edge: t
            for edge, t in zip(node.autograd.next_functions, tangents, strict=False)
            if t is not None
        }
        with _separated([edge[0] for edge in edges]):
            inputs = [GradientEdge(*edge) for edge in edges]
            return _differentiate(g, tangents, v, inputs, list(edges.values()))


def apply_to(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], node: Node, *tangents: Tangent
) -> Pushforward:
    """Return the same for an operation that is given as a function of its inputs."""
    with torch.enable_grad():
        x = [t.detach().requires_grad_() for t in inputs]
        (v,) = _adjoints(node)[:1]
        g = torch.autograd.grad(function(*x), x, v, create_graph=True)
        active = [(a, t) for a, t in zip(x, tangents, strict=False) if t is not None]
        return _differentiate(g, tangents, [v], [a for a, _ in active], [t for _, t in active])


def _adjoints(node: Node) -> list[Tensor]:
    """Return the adjoints of all outputs as variables."""
    outputs = range(len(pytorch_internals.output_metadata(node.autograd)))
    known = [node.adjoints[i] if i < len(node.adjoints) else None for i in outputs]
    return [
        (node.zeros(i) if adjoint is None else adjoint.detach()).requires_grad_()
        for i, adjoint in zip(outputs, known, strict=True)
    ]


def _differentiate(
    g: Sequence[Tensor | None],
    tangents: Sequence[Tangent],
    v: Sequence[Tensor],
    active_inputs: Sequence[Any],
    active_tangents: Sequence[Tensor],
) -> Pushforward:
    """Differentiate <g(v), x'> with respect to v and the inputs."""
    pairs = [
        (g_i, t.expand_as(g_i))
        for g_i, t in zip(g, tangents, strict=False)
        if g_i is not None and t is not None and g_i.requires_grad
    ]
    if not pairs:
        return Pushforward([None] * len(v))
    derivatives = torch.autograd.grad(
        [g_i for g_i, _ in pairs],
        [*v, *active_inputs],
        [t for _, t in pairs],
        allow_unused=True,
        retain_graph=True,
    )
    second: Sequence[Tensor | None] = derivatives[len(v) :]
    terms = [
        dot(h, t).to(torch.float64)
        for h, t in zip(second, active_tangents, strict=True)
        if h is not None
    ]
    return Pushforward(list(derivatives[: len(v)]), torch.stack(terms).sum() if terms else None)


class _separated:  # noqa: N801
    """Let no derivative that reaches one input flow on into another input."""

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
