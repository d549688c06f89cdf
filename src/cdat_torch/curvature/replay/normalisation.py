"""Normalisation: c = x - mean, y = r c w + b with r = (mean c^2 + eps)^(-1/2).

Means are over the entries that are normalised together. With q = r' / r, which is
-r mean(x^ x'), where x^ = r c is the normalised input,

    x^'  = q x^ + r c',        x^'' = 2 q (x^' - q x^) + (r'' / r) x^,
    r'' / r = 3 q^2 - r^2 mean(c'^2).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cdat_torch.curvature.replay.arithmetic import HALF, dot
from cdat_torch.curvature.replay.registry import (
    Active,
    Needs,
    Node,
    Pushforward,
    Tangent,
    nonlinear,
)

_ATEN = torch.ops.aten


@nonlinear("NativeLayerNormBackward0")
def layer_norm(node: Node, dx: Tangent, dw: Tangent, db: Tangent) -> Pushforward:
    """The last dimensions are normalised together; they are the rows of a matrix here."""
    mean, r = (node.saved(name).reshape(-1, 1) for name in ("result1", "result2"))
    width, precision = math.prod(node.saved("normalized_shape")), mean.dtype
    weights = (node.saved("weight"), dw, db)  # statistics of half precision are single
    w, dw, db = (None if t is None else t.reshape(width).to(precision) for t in weights)
    x = node.saved("input").reshape(len(r), width).to(precision)
    xhat = (x - mean).mul_(r)
    dxhat = second = None
    if dx is not None:
        dx = dx.reshape(len(r), width).to(precision).contiguous()
        # the Jacobian of x^ is symmetric, so backward's kernel gives x^'
        dxhat = _ATEN.native_layer_norm_backward(
            dx, x, [width], mean, r, None, None, [True, False, False]
        )[0]
        if not node.first_order:
            adjoint = node.adjoint.reshape(len(r), width).to(precision)
            second = _along_rows(xhat, dxhat, dx, r.squeeze(1), adjoint, w, dw)
    y = None if db is None else db.expand(len(r), width)
    if dw is not None:
        y = xhat.mul_(dw) if y is None else torch.addcmul(y, xhat, dw)
    if dxhat is not None:
        dxhat = dxhat if w is None else dxhat.mul_(w)
        y = dxhat if y is None else y + dxhat
    y = torch.zeros_like(x) if y is None else y
    return Pushforward([y.view(node.shape()).to(node.metadata().dtype), None, None], second)


def _along_rows(
    xhat: Tensor,
    dxhat: Tensor,
    dx: Tensor,
    r: Tensor,
    adjoint: Tensor,
    w: Tangent,
    dw: Tangent,
) -> Tensor:
    """Return <adjoint, w x^'' + 2 w' x^'>, given x^, x^' and x'.

    As r c' = x^' - q x^, and <x^, c'> = <x^, x'>, no c' need be formed:
    x^'' = 2 q x^' + (q^2 - r^2 mean(c'^2)) x^.
    """
    number = xhat.shape[1]
    q = torch.linalg.vecdot(xhat, dx).mul_(r).div_(-number)
    dxhat_squares, xhat_squares = (
        torch.linalg.vector_norm(t, dim=1).square_() for t in (dxhat, xhat)
    )
    # number times r^2 mean(c'^2) - q^2
    rest = torch.addcmul(dxhat_squares, q.square(), number - xhat_squares)
    with_xhat, with_dxhat = adjoint * xhat, adjoint * dxhat
    second = 2 * dot(_weighted(with_dxhat, w), q) - dot(_weighted(with_xhat, w), rest) / number
    if dw is not None:
        second = second + 2 * (with_dxhat @ dw).sum(dtype=torch.float64)
    return second


def _weighted(t: Tensor, w: Tangent) -> Tensor:
    """Return the weighted sum of each row."""
    return t.sum(1) if w is None else t @ w


@nonlinear("NativeGroupNormBackward0")
def group_norm(node: Node, dx: Tangent, dw: Tangent, db: Tangent) -> Pushforward:
    """The channels of a group are normalised together."""
    x = node.saved("input")
    groups, size, channels = node.saved("group"), x.shape[0], x.shape[1]
    precision = node.saved("result1").dtype  # single for half precision

    def by_group(t: Tensor) -> Tensor:
        return t.reshape(size * groups, -1).to(precision)

    def by_channel(t: Tangent) -> Tangent:
        return None if t is None else t.view(1, channels, *[1] * (x.dim() - 2))

    mean, r = by_group(node.saved("result1")), by_group(node.saved("result2"))
    weight, adjoint = by_channel(node.saved("weight")), node.adjoint
    xhat = (by_group(x) - mean).mul_(r)
    second = dxhat = None
    if dx is not None:
        dc = by_group(dx) - by_group(dx).mean(-1, keepdim=True)
        q = -(xhat * dc).mean(-1, keepdim=True) * r
        dxhat = torch.addcmul(r * dc, q, xhat)
        weighted = by_group(adjoint if weight is None else adjoint * weight)
        second = _along_rows(xhat, dxhat, by_group(dx), r.squeeze(1), weighted, None, None)
        dxhat = dxhat.view_as(x)
    y, mixed = _affine(
        node, xhat.view_as(x), dxhat, weight, by_channel(dw), by_channel(db), adjoint
    )
    return Pushforward([y, None, None], _total(second, mixed))


def _affine(
    node: Node,
    xhat: Tensor,
    dxhat: Tangent,
    weight: Tangent,
    dw: Tangent,
    db: Tangent,
    adjoint: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Return the tangent of ``w x^ + b`` and its mixed second-order term."""
    y: Tangent = None
    mixed: Tangent = None
    if dxhat is not None:
        y = dxhat if weight is None else dxhat * weight
        if dw is not None:
            mixed = 2 * dot(adjoint, dxhat * dw)
    if dw is not None:
        y = xhat * dw if y is None else torch.addcmul(y, xhat, dw)
    if db is not None:
        y = db.expand(node.shape()) if y is None else y + db
    return (node.zeros() if y is None else y.to(node.metadata().dtype)), mixed


def _total(*terms: Tensor | None) -> Tensor | None:
    present = [term.double() for term in terms if term is not None]
    return torch.stack(present).sum() if present else None


def _batch_norm_needs(node: Node, active: Active) -> Needs:
    """Need the gradients of x and w: unless w is 0, all sums with the adjoint follow from them.

    The gradient of x usually is in memory anyway, as the adjoint of a convolution's output.
    """
    x, w = active[:2]
    if not x:
        return Needs()
    if not node.saved("training"):
        return Needs(adjoint=w)
    if not w:
        return Needs(adjoint=True)
    weight = node.saved("weight")
    tiny = torch.finfo(weight.dtype).tiny ** 0.5
    if node.reads_leaf(0) or node.metadata().dtype in HALF or bool(weight.abs().min() <= tiny):
        return Needs(adjoint=True, gradients=(1,))
    return Needs(gradients=(0, 1))


@nonlinear("NativeBatchNormBackward0", needs=_batch_norm_needs)
def batch_norm(node: Node, dx: Tangent, dw: Tangent, db: Tangent) -> Pushforward:
    """Each channel is normalised over the batch; in evaluation mode r and the mean are constants.

    Four calls of backward's kernel give all sums over the batch without temporary memory of its
    size.
    """
    x, weight = node.saved("input"), node.saved("weight")
    shape = (1, -1) + (1,) * (x.dim() - 2)
    if not node.saved("training"):
        r = (node.saved("running_var") + node.saved("eps")).rsqrt().view(shape)
        mean = node.saved("running_mean").view(shape)
        dxhat = None if dx is None else dx * r
        w, dw, db = (None if v is None else v.view(shape) for v in (weight, dw, db))
        affine, mixed = _affine(node, (x - mean) * r, dxhat, w, dw, db, node.adjoint)
        return Pushforward([affine, None, None], mixed)
    mean, r = node.saved("result1"), node.saved("result2")
    y: Tangent = None
    second: Tangent = None
    if dx is not None:
        y, second = _batch_moments(node, dx.contiguous(), x, weight, dw, mean, r)
    if dw is not None:
        scale = dw * r
        offset = -scale * mean if db is None else db - scale * mean
        offset, scale = offset.view(shape), scale.view(shape)
        y = torch.addcmul(offset, x, scale) if y is None else y.addcmul_(x, scale).add_(offset)
    elif db is not None:
        y = db.view(shape).expand_as(x) if y is None else y.add_(db.view(shape))
    return Pushforward([None if y is None else y.to(x.dtype), None, None], second)


def _batch_moments(
    node: Node, dx: Tensor, x: Tensor, weight: Tangent, dw: Tangent, mean: Tensor, r: Tensor
) -> tuple[Tensor, Tangent]:
    """Return w x^' and the second-order term of a batch normalisation in training."""
    number = x.numel() / x.shape[1]
    eps = node.saved("eps")
    dy, with_xhat, sums = _ATEN.native_batch_norm_backward(
        dx, x, weight, None, None, mean, r, True, eps, [True, True, True]
    )
    if node.first_order:
        return dy, None
    mean_dx = sums / number
    squares = _centred(dx, dx, mean_dx) / number
    if node.adjoints:
        adjoint, gradient = node.adjoint.contiguous(), node.gradient(1)
        with_adjoint = _centred(adjoint, dx, mean_dx)
        if gradient is None:
            gradient = r * _centred(adjoint, x, mean)
    else:
        # backward computed g_x = r w (adjoint - mean - x^ <adjoint, x^> / number)
        assert weight is not None
        gradient = node.required_gradient(1)
        with_adjoint = _centred(node.required_gradient(0).contiguous(), dx, mean_dx) / (r * weight)
        with_adjoint = with_adjoint + gradient * with_xhat / number
    q = -r * with_xhat / number
    ratio = 3 * q * q - r * r * squares
    # <adjoint, x^''> with x^'' = 2 q r c' + (r'' / r) x^; the gradient of w is <adjoint, x^>
    second = 2 * q * r * with_adjoint + ratio * gradient
    second = (second if weight is None else second * weight).sum(dtype=torch.float64)
    if dw is not None:
        second = second + 2 * (dw * (r * with_adjoint + q * gradient)).sum(dtype=torch.float64)
    return dy, second


def _centred(a: Tensor, b: Tensor, mean: Tensor) -> Tensor:
    """Return <a, b - mean> for each channel, by the kernel that computes such sums in backward."""
    one = torch.ones_like(mean)
    _, sums, _ = _ATEN.native_batch_norm_backward(
        a, b, None, None, None, mean, one, True, 0.0, [False, True, False]
    )
    return sums  # type: ignore[no-any-return]


def _composed_weight_norm(node: Node) -> tuple[Callable[..., Tensor], list[Tensor]]:
    def normalised(v: Tensor, g: Tensor) -> Tensor:
        return v * (g / torch.norm_except_dim(v, 2, node.saved("dim")))

    return normalised, [node.saved("v"), node.saved("g")]


@nonlinear("WeightNormInterfaceBackward0", reference=_composed_weight_norm)
def weight_norm(node: Node, dv: Tangent, dg: Tangent) -> Pushforward:
    """W = g v / |v|, the norm over all dimensions but one.

    With n = |v| and e = v / n: n' = <e, v'>, e' = (v' - e n') / n, n'' = (|v'|^2 - n'^2) / n and
    e'' = -(2 e' n' + e n'') / n. PyTorch's own second derivative treats n as a constant, wrongly.
    """
    v, g, n = node.saved("v"), node.saved("g"), node.saved("result1")
    kept = node.saved("dim") % v.dim()
    dims = tuple(d for d in range(v.dim()) if d != kept)
    n = n.to(v.dtype).view([v.shape[d] if d == kept else 1 for d in range(v.dim())])
    g = g.view_as(n)
    dg = None if dg is None else dg.view_as(n)
    e = v / n
    if dv is None:
        assert dg is not None
        return Pushforward([e * dg, None])
    dn = (e * dv).sum(dims, keepdim=True)
    de = (dv - e * dn) / n
    ddn = ((dv * dv).sum(dims, keepdim=True) - dn * dn) / n
    second = -g * (2 * de * dn + e * ddn) / n
    y = g * de
    if dg is not None:
        y = y + e * dg
        second = second + 2 * de * dg
    return Pushforward([y, None], dot(node.adjoint, second))
