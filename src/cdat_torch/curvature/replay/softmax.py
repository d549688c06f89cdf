"""Softmax, log-softmax and log-sum-exp. E and Var are over the probabilities p."""

from __future__ import annotations

from torch import Tensor

from cdat_torch.curvature.replay.arithmetic import dot
from cdat_torch.curvature.replay.registry import Active, Needs, Node, Pushforward, nonlinear


def _softmax_needs(node: Node, active: Active) -> Needs:
    """Need g_x; for a leaf, whose gradient the user may change, the adjoint that gives it."""
    return Needs(adjoint=True) if node.reads_leaf(0) else Needs(gradients=(0,))


@nonlinear("SoftmaxBackward0", needs=_softmax_needs)
def softmax(node: Node, dx: Tensor) -> Pushforward:
    """Y' = p (x' - E x'); second order <g_x, (x' - E x')^2>, g_x the gradient with respect to x."""
    dim, p = node.saved("dim"), node.saved("result")
    centred = dx - (p * dx).sum(dim, keepdim=True)
    if node.first_order:
        return Pushforward(p * centred)
    gradient = node.vjp(node.adjoint)[0] if node.adjoints else node.required_gradient(0)
    assert gradient is not None
    return Pushforward(p * centred, dot(gradient * centred, centred))


@nonlinear("SafeSoftmaxBackward0", needs=_softmax_needs)
def safe_softmax(node: Node, dx: Tensor) -> Pushforward:
    """Softmax, zero for a row that is masked entirely."""
    return softmax(node, dx)  # type: ignore[no-any-return]


def _sum_of_adjoint(node: Node, adjoint: Tensor) -> Tensor:
    return adjoint.sum(node.saved("dim"), keepdim=True)


@nonlinear("LogSoftmaxBackward0", reduce_adjoint=_sum_of_adjoint)
def log_softmax(node: Node, dx: Tensor) -> Pushforward:
    """Y' = x' - E x'; second order -sum(lambda) Var x', for which sum(lambda) is kept."""
    dim, p = node.saved("dim"), node.saved("result").exp()
    centred = dx - (p * dx).sum(dim, keepdim=True)
    variance = p.mul_(centred).mul_(centred).sum(dim, keepdim=True)
    return Pushforward(centred, -dot(node.adjoint, variance))


@nonlinear("LogsumexpBackward0")
def logsumexp(node: Node, dx: Tensor) -> Pushforward:
    """Y' = E x'; second order lambda Var x'."""
    dims, keep = node.saved("dim"), node.saved("keepdim")
    y, adjoint = node.saved("result"), node.adjoint
    if not keep:
        for dim in sorted(d % dx.dim() for d in dims):
            y, adjoint = y.unsqueeze(dim), adjoint.unsqueeze(dim)
    p = (node.saved("self") - y).exp()
    mean = (p * dx).sum(dims, keepdim=True)
    variance = (p * (dx - mean) ** 2).sum(dims, keepdim=True)
    return Pushforward(mean.view(node.shape()), dot(adjoint, variance))
