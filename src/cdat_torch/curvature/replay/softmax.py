"""Softmax and its logarithms. E and Var are over the probabilities p."""

from __future__ import annotations

from torch import Tensor

from cdat_torch.curvature.replay.arithmetic import dot
from cdat_torch.curvature.replay.registry import Active, Needs, Node, Pushed, rule


def _softmax_needs(node: Node, active: Active) -> Needs:
    """Need the gradient of x; of a leaf what it is computed from, for it may be changed."""
    return Needs(adjoint=True) if node.reads_leaf(0) else Needs(gradients=(0,))


@rule("SoftmaxBackward0", needs=_softmax_needs)
def softmax(node: Node, dx: Tensor) -> Pushed:
    """Y = p: y' = p (x' - E x'); second order <g_x, (x' - E x')^2>, as p'' only shows J."""
    dim, p = node.saved("dim"), node.saved("result")
    centred = dx - (p * dx).sum(dim, keepdim=True)
    if node.first_order:
        return Pushed(p * centred)
    gradient = node.vjp(node.adjoint)[0] if node.adjoints else node.unchanged(0)
    assert gradient is not None
    return Pushed(p * centred, dot(gradient * centred, centred))


@rule("SafeSoftmaxBackward0", needs=_softmax_needs)
def safe_softmax(node: Node, dx: Tensor) -> Pushed:
    """Softmax with zeros for a row that is masked as a whole."""
    return softmax(node, dx)  # type: ignore[no-any-return]


@rule("LogSoftmaxBackward0", part=lambda node, lam: lam.sum(node.saved("dim"), keepdim=True))
def log_softmax(node: Node, dx: Tensor) -> Pushed:
    """Y' = x' - E x'; second order -sum(lambda) Var x', the sum being all that is kept."""
    dim, p = node.saved("dim"), node.saved("result").exp()
    centred = dx - (p * dx).sum(dim, keepdim=True)
    variance = p.mul_(centred).mul_(centred).sum(dim, keepdim=True)
    return Pushed(centred, -dot(node.adjoint, variance))


@rule("LogsumexpBackward0")
def logsumexp(node: Node, dx: Tensor) -> Pushed:
    """Y' = E x'; second order lambda Var x'."""
    dims, keep = node.saved("dim"), node.saved("keepdim")
    y, adjoint = node.saved("result"), node.adjoint
    if not keep:
        for dim in sorted(d % dx.dim() for d in dims):
            y, adjoint = y.unsqueeze(dim), adjoint.unsqueeze(dim)
    p = (node.saved("self") - y).exp()
    mean = (p * dx).sum(dims, keepdim=True)
    variance = (p * (dx - mean) ** 2).sum(dims, keepdim=True)
    return Pushed(mean.view(node.shape()), dot(adjoint, variance))
