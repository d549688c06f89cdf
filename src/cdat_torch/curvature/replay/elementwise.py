"""Functions of one number: y = f(x), y' = f'(x) x' and y'' = f''(x) x'^2.

The Jacobian is diagonal, so the node's own backward applied to x' gives y'. A rule gives f''.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cdat_torch.curvature.replay.arithmetic import dot
from cdat_torch.curvature.replay.registry import Node, Pushforward, Tangent, linear, nonlinear

_CHUNK = 2**16
"""Elements per chunk: f'' of one chunk is in memory at a time."""


def elementwise(*names: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Register ``factor(node) -> f''(x)`` for the autograd nodes of these names.

    It may return ``(constant, f''(x) / constant)`` instead.
    """

    def register(factor: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def apply(node: Node, dx: Tensor, *others: Tangent) -> Any:
            if any(other is not None for other in others):
                return NotImplemented
            dy = node.vjp(dx)[0]
            return Pushforward(dy, None if node.first_order else _second_order(node, dx, factor))

        nonlinear(*names)(apply)
        return factor

    return register


class _Chunk:
    """A node seen through a window: some elements of its flattened tensors."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._saved: dict[str, Any] = {}
        self.elements = slice(None)

    def saved(self, name: str) -> Any:
        """Return what the forward pass has saved of these elements."""
        if name not in self._saved:
            value = self._node.saved(name)
            self._saved[name] = value.reshape(-1) if isinstance(value, Tensor) else value
        value = self._saved[name]
        return value[self.elements] if isinstance(value, Tensor) else value


def _second_order(node: Node, dx: Tensor, factor: Callable[[Any], Any]) -> Tensor:
    """Return <adjoint, f'' x'^2>; on a CPU in chunks that about fit its cache."""
    adjoint = node.adjoint
    if dx.device.type != "cpu" or not (dx.is_contiguous() and adjoint.is_contiguous()):
        return _term(adjoint, dx, factor(node))
    adjoint, dx = adjoint.view(-1), dx.view(-1)
    chunk, terms = _Chunk(node), []
    for start in range(0, max(1, dx.numel()), _CHUNK):
        chunk.elements = slice(start, start + _CHUNK)
        terms.append(_term(adjoint[chunk.elements], dx[chunk.elements], factor(chunk)))
    return torch.stack(terms).sum(dtype=torch.float64)


def _term(adjoint: Tensor, dx: Tensor, factor: Any) -> Tensor:
    constant, second = factor if isinstance(factor, tuple) else (1.0, factor)
    term: Tensor = dot(torch.mul(adjoint, dx).mul_(second), dx) * constant
    return term


@linear(
    "ReluBackward0", "LeakyReluBackward0", "LeakyReluBackward1", "ThresholdBackward0",
    "ThresholdBackward1", "HardtanhBackward0", "HardsigmoidBackward0", "AbsBackward0",
    "ClampBackward1", "ClampMinBackward0", "ClampMaxBackward0", "NegBackward0", "MulBackward1",
    "DivBackward1",
)  # fmt: skip
def piecewise_linear(node: Node, dx: Tensor) -> Tangent:
    """F'' = 0 where it exists."""
    return node.vjp(dx)[0]


@linear("NativeDropoutBackward0")
def dropout(node: Node, dx: Tensor) -> Tangent:
    """A mask, scaled."""
    return node.vjp(dx)[0]


@elementwise("ExpBackward0")
def exp(node: Node) -> Tensor:
    """F'' = f."""
    return node.saved("result")  # type: ignore[no-any-return]


@elementwise("LogBackward0")
def log(node: Node) -> Tensor:
    """F'' = -1 / x^2."""
    return -(node.saved("self") ** -2)  # type: ignore[no-any-return]


@elementwise("Log1PBackward0")
def log1p(node: Node) -> Tensor:
    """F'' = -1 / (1 + x)^2."""
    return -((1 + node.saved("self")) ** -2)  # type: ignore[no-any-return]


@elementwise("PowBackward0")
def power(node: Node) -> Any:
    """F'' = p (p - 1) x^(p - 2), for a constant exponent."""
    p = node.saved("exponent")
    if p in (0, 1):
        return 0.0
    return 2.0 if p == 2 else p * (p - 1) * node.saved("self") ** (p - 2)


@elementwise("SqrtBackward0")
def sqrt(node: Node) -> Tensor:
    """F'' = -1 / (4 f^3)."""
    return -0.25 * node.saved("result") ** -3  # type: ignore[no-any-return]


@elementwise("RsqrtBackward0")
def rsqrt(node: Node) -> Tensor:
    """F'' = 3/4 f^5."""
    return 0.75 * node.saved("result") ** 5  # type: ignore[no-any-return]


@elementwise("ReciprocalBackward0")
def reciprocal(node: Node) -> Tensor:
    """F'' = 2 f^3."""
    return 2 * node.saved("result") ** 3  # type: ignore[no-any-return]


@elementwise("SinBackward0")
def sin(node: Node) -> Tensor:
    """F'' = -f."""
    return -node.saved("self").sin()  # type: ignore[no-any-return]


@elementwise("CosBackward0")
def cos(node: Node) -> Tensor:
    """F'' = -f."""
    return -node.saved("self").cos()  # type: ignore[no-any-return]


@elementwise("TanhBackward0")
def tanh(node: Node) -> Tensor:
    """F'' = -2 f (1 - f^2)."""
    y = node.saved("result")
    return 2 * y * (y * y - 1)  # type: ignore[no-any-return]


@elementwise("SigmoidBackward0")
def sigmoid(node: Node) -> Tensor:
    """F'' = f (1 - f) (1 - 2 f)."""
    y = node.saved("result")
    return y * (1 - y) * (1 - 2 * y)  # type: ignore[no-any-return]


@elementwise("LogSigmoidBackward0")
def log_sigmoid(node: Node) -> Tensor:
    """F'' = -s (1 - s), with s the sigmoid."""
    s = node.saved("self").sigmoid()
    return s * (s - 1)  # type: ignore[no-any-return]


@elementwise("SiluBackward0")
def silu(node: Node) -> Tensor:
    """F'' = s (1 - s) (2 + x (1 - 2 s)), with s the sigmoid."""
    x = node.saved("self")
    s = x.sigmoid()
    return s * (1 - s) * (2 + x * (1 - 2 * s))  # type: ignore[no-any-return]


@elementwise("SoftplusBackward0")
def softplus(node: Node) -> Tensor:
    """F'' = beta s (1 - s), with s the sigmoid of beta x, below the threshold."""
    scaled = node.saved("self") * node.saved("beta")
    s = scaled.sigmoid()
    return torch.where(scaled < node.saved("threshold"), node.saved("beta") * s * (1 - s), 0.0)


@elementwise("HardswishBackward0")
def hardswish(node: Node) -> Tensor:
    """F'' = 1/3 between -3 and 3."""
    x = node.saved("self")
    return (x.abs() < 3).to(x.dtype) / 3  # type: ignore[no-any-return]


@elementwise("EluBackward0")
def elu(node: Node) -> Tensor:
    """F'' = alpha scale c^2 exp(c x) for x < 0, with c the scale of the input."""
    x, c = node.saved("self"), node.saved("input_scale")
    factor = node.saved("alpha") * node.saved("scale") * c * c
    return torch.where(x >= 0, 0.0, factor * (c * x.clamp(max=0)).exp())


@elementwise("GeluBackward0")
def gelu(node: Node) -> Any:
    """F'' = (2 - x^2) phi(x), with phi the normal density; of the tanh form its own."""
    x: Tensor = node.saved("self")
    if node.saved("approximate") == "none":
        exponent = torch.addcmul(x.new_zeros(()), x, x, value=-0.5)
        density = exponent.exp()
        return 2 / math.sqrt(2 * math.pi), density.addcmul_(density, exponent)
    # f = x (1 + t) / 2 with t = tanh k and k = c (x + d x^3); t' = k' s and s = 1 - t^2
    c, d = math.sqrt(2 / math.pi), 0.044715
    t = (c * (x + d * x**3)).tanh()
    s, dk = 1 - t * t, c * (1 + 3 * d * x * x)
    return dk * s + x * (3 * c * d * x * s - t * dk * dk * s)


@elementwise("ErfBackward0")
def erf(node: Node) -> Tensor:
    """F'' = -4 x exp(-x^2) / sqrt(pi)."""
    x = node.saved("self")
    return -4 / math.sqrt(math.pi) * x * (-x * x).exp()  # type: ignore[no-any-return]
